"""Our step, built from a recipe and in the order of `hybrid_ssl.train.Run.step`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hybrid_ssl.assemble import Layout, build_groups, build_pretrainer
from hybrid_ssl.config import Recipe, build_recipe
from hybrid_ssl.optim import build_optimizer, clip_gradients, drop_held, set_step
from hybrid_ssl.plan import Batch, Progress

from .work import HIDDEN, MEAN, MOMENTUM, STD, Size, Work, autocast

NOW = Progress(step=50_000, total_steps=100_000, steps_per_epoch=1000)  # no warm-up, no held layer any more


class Ours:
    """Our pretrainer and its optimizer."""

    def __init__(self, work: Work) -> None:
        recipe = recipe_of(work)
        self.pretrainer = build_pretrainer(recipe, list(MEAN), list(STD), layout=Layout(1, work.images, 1)).train()
        self.optimizer: Any = build_optimizer(recipe.optimizer, build_groups(recipe, self.pretrainer))
        self.parameters = [[p for p in self.pretrainer.parameters() if p.requires_grad]]
        self.recipe, self.work = recipe, work
        masks = {} if work.mask is None else {"hidden": work.mask}
        hidden = {name: mask.flatten().nonzero().squeeze(1) for name, mask in masks.items()}
        self.batch = Batch(work.raw, masks, hidden=hidden)

    def forward_backward(self) -> Tensor:
        with autocast(self.work.precision):
            loss, _ = self.pretrainer(self.batch, NOW)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        set_step(self.recipe.optimizer, self.optimizer, self.recipe.optimizer.lr, NOW)
        norm = clip_gradients(None, self.parameters)
        drop_held(self.optimizer, NOW)
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.pretrainer.move_teachers(MOMENTUM)


def recipe_of(work: Work) -> Recipe:
    """The recipe of the work; its data section is never opened."""
    size, method = work.size, work.method
    masks: dict[str, Any] = {}
    if method in HIDDEN:
        view = "global" if method == "ibot" else "plain"
        masks["hidden"] = {"kind": "random", "view": view, "ratio": HIDDEN[method]}
    return build_recipe(
        {
            "run": {"length": "100000 steps", "batch_size": work.images, "precision": work.precision, "out": "none"},
            "encoder": _encoder(work),
            "data": {"source": "none"},
            "views": {
                name: {"crops": len(images) // work.images, "size": images.shape[-1]}
                for name, images in work.raw.items()
            },
            "masks": masks,
            "objectives": {method: {"name": method} | _objective(method, size)},
            "optimizer": {"lr": 1e-4, "lr_per": None, "schedule": "constant", "weight_decay": 0.05},
        }
    )


def _encoder(work: Work) -> dict[str, Any]:
    size = work.size
    args = {"embed_dim": size.dim, "depth": size.depth, "num_heads": size.heads, "patch_size": size.patch}
    return {
        "name": "vit_small_patch16_224",
        "args": args,
        "position": "sincos" if work.method in ("mae", "moco_v3") else "timm",
        "freeze_patch_embed": work.method == "moco_v3",
    }


def _objective(method: str, size: Size) -> dict[str, Any]:
    head = {"hidden": size.head_hidden, "bottleneck": size.bottleneck}
    settings: dict[str, dict[str, Any]] = {
        "mae": {
            "mask": "hidden",
            "decoder_dim": size.decoder_dim,
            "decoder_depth": size.decoder_depth,
            "decoder_heads": size.decoder_heads,
        },
        "simmim": {"mask": "hidden"},
        "moco_v3": {"hidden": size.moco_hidden, "dim": size.moco_dim},
        "dino": {"out_dim": size.dino_prototypes} | head,
        "ibot": {"mask": "hidden", "out_dim": size.ibot_prototypes} | head,
    }
    return settings[method]
