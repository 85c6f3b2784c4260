"""Projection heads: linear layers between an encoder's token and the space in which a loss compares.

`Mlp` covers the projectors and predictors of the contrastive family, `DinoHead` those of the self-distillation family.
Both run in the autocast around them and need no caller to cast. Shapes: R rows, D width, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .batchnorm import SyncBatchNorm1d
from .precision import for_weight, full_precision, no_autocast
from .prototypes import Prototypes

LastNorm = Literal["none", "plain", "scale", "affine"]
"""BatchNorm after the last layer: none; without parameters; with a scale; with scale and shift"""


class Mlp(nn.Sequential):
    """Linear layers of widths `dims`, each hidden one followed by BatchNorm over the global batch and an activation.

    The defaults are MoCo v3's: no biases, and a last BatchNorm without parameters. BatchNorm sees the rows of one
    call, so views that are to be normalised apart are passed apart.

    Args:
        dims: widths, input and output included.
        norm: BatchNorm after the hidden layers.
        last_norm: BatchNorm after the last layer.
        bias: biases of the hidden layers.
        last_bias: bias of the last layer.
        activation: after each hidden layer.
        eps: of every BatchNorm.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        norm: bool = True,
        last_norm: LastNorm = "plain",
        bias: bool = False,
        last_bias: bool = False,
        activation: type[nn.Module] = nn.ReLU,
        eps: float = 1e-5,
    ) -> None:
        layers: list[nn.Module] = []
        for i, o in zip(dims[:-2], dims[1:-1], strict=True):
            layers += [nn.Linear(i, o, bias=bias), *([SyncBatchNorm1d(o, eps=eps)] if norm else []), activation()]
        layers.append(nn.Linear(dims[-2], dims[-1], bias=last_bias))
        if last_norm != "none":
            layers.append(SyncBatchNorm1d(dims[-1], affine=last_norm != "plain", shift=last_norm == "affine", eps=eps))
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(for_weight(x, layer.weight) if isinstance(layer, nn.Linear) else x)
        return x


class DinoHead(nn.Module):
    """Three linear layers with GELU, unit length, then prototypes (arXiv 2104.14294, appendix C).

    Args:
        dim: D, the encoder's width.
        prototypes: K.
        hidden: width of the two hidden layers.
        bottleneck: width of the embedding that is compared with the prototypes.
        norm_last_layer: keep the prototypes at length 1; false: learn their lengths.
        batchnorm: BatchNorm after the hidden layers (DINO on ResNet-50).
    """

    def __init__(
        self,
        dim: int,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm_last_layer: bool = True,
        batchnorm: bool = False,
    ) -> None:
        super().__init__()
        dims = (dim, hidden, hidden, bottleneck)
        self.mlp = Mlp(dims, norm=batchnorm, last_norm="none", bias=True, last_bias=True, activation=nn.GELU)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = Prototypes(bottleneck, prototypes, free_scale=not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """[R, D] -> float32 logits [R, K]."""
        return self.prototypes(self.embed(x))

    def embed(self, x: Tensor) -> Tensor:
        """[R, D] -> float32 unit rows [R, bottleneck].

        The prototypes have no bias, so the mean logit of many rows is the logit of their mean embedding: a centre over
        all patch tokens costs one row through K prototypes instead of all.
        """
        x = self.mlp(x)
        with no_autocast(x):  # float32: 1e-12 is 0 in fp16, and a zero row would become NaN
            return F.normalize(full_precision(x), dim=-1, eps=1e-12)
