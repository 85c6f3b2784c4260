"""The same steps from lightly's public modules, put together as its documentation and examples do.

lightly ships losses, heads and masked encoders; its examples join them in a loop, one forward pass for each crop
(DINO) or one for all crops of a size (iBOT). `dino_joined` is DINO in iBOT's way, which its users can write as well.
SimMIM runs on the timm encoder that its other examples use. For MoCo v3 it has the heads, but no example.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import timm
import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss, IBOTPatchLoss
from lightly.models import utils
from lightly.models.modules import (
    DINOProjectionHead,
    MaskedVisionTransformerDecoderTIMM,
    MaskedVisionTransformerTIMM,
    MoCoProjectionHead,
)
from torch import Tensor, nn

from .work import MOMENTUM, Work, autocast


class Lightly:
    """One method's modules, its loss as a function, and torch's default AdamW.

    Args:
        work: sizes and inputs.
        build: returns (trained modules, their teachers, the loss).
    """

    def __init__(self, work: Work, build: Callable[[Work], Parts]) -> None:
        torch.manual_seed(0)
        self.work = work
        modules, teachers, self.loss = build(work)
        self.modules = nn.ModuleList(modules).train()
        self.pairs = list(zip(modules, teachers, strict=False))  # what comes after has no teacher: predictors
        self.optimizer = torch.optim.AdamW([p for p in self.modules.parameters() if p.requires_grad], lr=1e-4)

    def forward_backward(self) -> Tensor:
        with autocast(self.work.precision):
            loss = self.loss()
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        for student, teacher in self.pairs:
            utils.update_momentum(student, teacher, m=MOMENTUM)


Net = TypeVar("Net", bound=nn.Module)
Parts = tuple[Sequence[nn.Module], Sequence[nn.Module], Callable[[], Tensor]]


def _encoder(work: Work, positions: str) -> MaskedVisionTransformerTIMM:
    size = work.size
    vit = timm.create_model(
        "vit_small_patch16_224",
        embed_dim=size.dim,
        depth=size.depth,
        num_heads=size.heads,
        patch_size=size.patch,
        img_size=size.side,
        num_classes=0,
        dynamic_img_size=True,
    )
    return MaskedVisionTransformerTIMM(vit=vit, pos_embed_initialization=positions)


def _teacher(module: Net) -> Net:
    teacher = copy.deepcopy(module)
    utils.deactivate_requires_grad(teacher)
    return teacher


def _token_ids(work: Work) -> tuple[Tensor, Tensor]:
    """Kept and masked tokens, class token first among the kept: [B, 1 + visible], [B, hidden]."""
    assert work.mask is not None
    order = work.mask.to(torch.uint8).argsort(dim=1, stable=True) + 1
    visible = int((~work.mask[0]).sum())
    return F.pad(order[:, :visible], (1, 0)), order[:, visible:]


def mae(work: Work) -> Parts:
    size, images = work.size, work.views["plain"]
    encoder = _encoder(work, "sincos")
    embed = nn.Linear(size.dim, size.decoder_dim)
    decoder = MaskedVisionTransformerDecoderTIMM(work.grid**2, size.decoder_dim, size.decoder_depth, size.decoder_heads)
    head = nn.Linear(size.decoder_dim, 3 * size.patch**2)
    keep, hidden = _token_ids(work)
    criterion = nn.MSELoss()

    def loss() -> Tensor:
        encoded = embed(encoder.encode(images, idx_keep=keep))
        tokens = utils.repeat_token(decoder.mask_token, (len(images), decoder.sequence_length))
        tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
        predicted = head(utils.get_at_index(decoder(tokens), hidden))
        target = utils.get_at_index(utils.patchify(images, size.patch), hidden - 1)
        return criterion(predicted, utils.normalize_mean_var(target))

    return (encoder, embed, decoder, head), (), loss


def simmim(work: Work) -> Parts:
    images, patch = work.views["plain"], work.size.patch
    encoder = _encoder(work, "learn")
    head = nn.Linear(work.size.dim, 3 * patch**2)
    _, hidden = _token_ids(work)
    criterion = nn.L1Loss()

    def loss() -> Tensor:
        encoded = encoder.encode(images, idx_mask=hidden)
        predicted = head(utils.get_at_index(encoded, hidden))
        return criterion(predicted, utils.get_at_index(utils.patchify(images, patch), hidden - 1))

    return (encoder, head), (), loss


def moco_v3(work: Work) -> Parts:
    size, crops = work.size, work.views["global"]
    encoder = _encoder(work, "sincos")
    encoder.vit.patch_embed.requires_grad_(False)
    encoder.mask_token.requires_grad_(False)
    projector = MoCoProjectionHead(size.dim, size.moco_hidden, size.moco_dim, num_layers=3, batch_norm=True)
    predictor = MoCoProjectionHead(size.moco_dim, size.moco_hidden, size.moco_dim, num_layers=2, batch_norm=True)
    key_encoder, key_projector = _teacher(encoder), _teacher(projector)

    def loss() -> Tensor:
        queries = [predictor(part) for part in map(projector, encoder(crops).chunk(2))]
        with torch.no_grad():
            keys = [key_projector(part) for part in key_encoder(crops).chunk(2)]
        return _contrast(queries[0], keys[1]) + _contrast(queries[1], keys[0])

    return (encoder, projector, predictor), (key_encoder, key_projector), loss


def _contrast(queries: Tensor, keys: Tensor, temperature: float = 0.2) -> Tensor:
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(logits)))


def _dino_heads(work: Work, prototypes: int) -> tuple[nn.Module, nn.Module]:
    size = work.size
    head = DINOProjectionHead(size.dim, size.head_hidden, size.bottleneck, prototypes)
    teacher = DINOProjectionHead(size.dim, size.head_hidden, size.bottleneck, prototypes)
    teacher.load_state_dict(head.state_dict())  # weight norm cannot be deep-copied after a forward pass
    utils.deactivate_requires_grad(teacher)
    return head, teacher


def dino(work: Work, joined: bool = False) -> Parts:
    encoder = _encoder(work, "learn")
    encoder.mask_token.requires_grad_(False)
    teacher = _teacher(encoder)
    head, teacher_head = _dino_heads(work, work.size.dino_prototypes)
    criterion = DINOLoss(work.size.dino_prototypes)
    crops = [list(work.views[name].split(work.images)) for name in ("global", "local")]

    def each() -> Tensor:
        targets = [teacher_head(teacher(crop)) for crop in crops[0]]
        return criterion(targets, [head(encoder(crop)) for crop in crops[0] + crops[1]])

    def together() -> Tensor:
        with torch.no_grad():
            targets = teacher_head(teacher(work.views["global"]))
        tokens = torch.cat([encoder(work.views[name]) for name in ("global", "local")])
        return criterion(list(targets.split(work.images)), list(head(tokens).split(work.images)))

    return (encoder, head), (teacher, teacher_head), together if joined else each


def dino_joined(work: Work) -> Parts:
    return dino(work, joined=True)


def ibot(work: Work) -> Parts:
    assert work.mask is not None
    encoder = _encoder(work, "learn")
    teacher = _teacher(encoder)
    head, teacher_head = _dino_heads(work, work.size.ibot_prototypes)
    class_loss = DINOLoss(work.size.ibot_prototypes)
    patch_loss = IBOTPatchLoss(work.size.ibot_prototypes)
    mask = F.pad(work.mask, (1, 0))  # the class token is never hidden
    block_mask = work.mask.unflatten(1, (work.grid, work.grid))

    def loss() -> Tensor:
        with torch.no_grad():
            features = teacher.encode(work.views["global"])
            class_targets, patch_targets = teacher_head(features[:, 0]), teacher_head(features[mask])
        masked = encoder.encode(work.views["global"], mask=mask)
        local = encoder.encode(work.views["local"])
        classes = torch.cat([head(masked[:, 0]), head(local[:, 0])])
        patches = head(masked[mask])
        term = class_loss(list(class_targets.split(work.images)), list(classes.split(work.images)))
        return term + patch_loss(patch_targets, patches, block_mask)

    return (encoder, head), (teacher, teacher_head), loss
