"""Checkpoint files that the systems' authors publish, loaded into timm encoders.

    weights = read_weights(Path("mae_pretrain_vit_base.pth"))  # tensors only: nothing in the file is executed
    args = weights.args_for(plain_model)                       # class token, registers, LayerScale as in the file
    lines = load_weights(model, weights)                       # resampled where the model differs, or ValueError

`systems` has one small table for each system: how a file of it is recognised, which of its encoders is taken, how its
names become timm's, and what is left out on purpose. Names are facts, found in the official repositories; the code is
ours. An encoder loads completely or not at all.
"""

from __future__ import annotations

from .files import SUFFIXES
from .fit import load_weights
from .weights import Weights, read_weights

__all__ = ["SUFFIXES", "Weights", "load_weights", "read_weights"]
