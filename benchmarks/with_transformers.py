"""The same steps from transformers' pretraining models. It has those of masked image modelling only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForMaskedImageModeling, ViTMAEConfig, ViTMAEForPreTraining

from .work import HIDDEN, Work, autocast


class Transformers:
    """A model that returns its loss, and torch's default AdamW."""

    def __init__(self, work: Work, build: Callable[[Work], tuple[nn.Module, dict[str, Tensor]]]) -> None:
        torch.manual_seed(0)
        self.work = work
        model, self.inputs = build(work)
        self.modules = model.train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def forward_backward(self) -> Tensor:
        with autocast(self.work.precision):
            loss = self.modules(pixel_values=self.work.views["plain"], **self.inputs).loss
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def _common(work: Work) -> dict[str, Any]:
    size = work.size
    return {
        "hidden_size": size.dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.dim,
        "image_size": size.side,
        "patch_size": size.patch,
    }


def mae(work: Work) -> tuple[nn.Module, dict[str, Tensor]]:
    assert work.mask is not None
    size = work.size
    config = ViTMAEConfig(
        **_common(work),
        decoder_hidden_size=size.decoder_dim,
        decoder_num_hidden_layers=size.decoder_depth,
        decoder_num_attention_heads=size.decoder_heads,
        decoder_intermediate_size=4 * size.decoder_dim,
        mask_ratio=HIDDEN["mae"],
        norm_pix_loss=True,
    )
    return ViTMAEForPreTraining(config), {"noise": work.mask.float()}  # the patches of lowest noise are kept


def simmim(work: Work) -> tuple[nn.Module, dict[str, Tensor]]:
    assert work.mask is not None
    config = ViTConfig(**_common(work), encoder_stride=work.size.patch)
    return ViTForMaskedImageModeling(config), {"bool_masked_pos": work.mask}
