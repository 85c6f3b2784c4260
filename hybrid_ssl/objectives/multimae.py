"""MultiMAE: multi-modal masked autoencoder. See a sixth of the tokens of several modalities, predict all the others.

Source: Bachmann et al., "MultiMAE: Multi-modal Multi-task Masked Autoencoders", arXiv 2204.01678; written from the
paper (the authors' code is non-commercial). Images, depth, label maps or whatever a recipe calls a modality are cut by
the same box; tokens of all of them go through one encoder, how many of each is drawn sample by sample from a Dirichlet
distribution (mask `kind: dirichlet`). Each modality has a decoder of its own; the terms are summed without weights.

Losses count hidden tokens only, average over each sample's, and then over the samples that have any: images by the
squared error, continuous maps by the absolute one, label maps by cross-entropy in every pixel. With `norm_pixels`
another decoder predicts the image normalised patch by patch, as the published models do. Continuous maps arrive
standardised crop by crop (`nn/adapters.py`), as input and as target.

Where we differ: the encoder is timm's with its last norm (the paper's has none), its class token stands for the
paper's global token, and a sample whose modality is wholly visible is left out over all processes, not for each. With
no modality beside the image this is MAE with a cross-attention decoder, and shares MAE's encoder pass.

Shapes: R = V * B crops, M modalities with N tokens each, n visible tokens of all M * N, L values of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..nn.cross_decoder import CrossDecoder
from ..nn.distributed import all_sum_no_grad, world_size
from ..nn.patches import patch_statistics, patchify, unpatchify
from ..nn.precision import full_precision, no_autocast
from ..plan import Batch, EncoderSpec, Forward, Modality, Progress, Tokens, visible_rows
from .base import Objective, ObjectiveSettings


class MultiMAESettings(ObjectiveSettings):
    """Defaults: the paper's."""

    view: str = "rgb"
    """the images, which the encoder embeds itself"""
    beside: list[str] = ["depth", "semseg"]
    """views of other modalities, all `like` that one"""
    mask: str = "dirichlet"
    """a mask of kind dirichlet for the same views (paper: 98 of 588 tokens visible)"""
    norm_pixels: bool = True
    """predict the images a second time, with the pixels of each patch normalised"""
    decoder_dim: int = Field(256, ge=4, multiple_of=4)
    decoder_depth: int = Field(2, ge=0)
    """self-attention blocks after the cross-attention"""
    decoder_heads: int = Field(8, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> MultiMAESettings:
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(f"decoder_heads {self.decoder_heads} does not divide decoder_dim {self.decoder_dim}")
        if len({self.view, *self.beside}) <= len(self.beside):
            raise ValueError(f"view and beside name different views, got {self.view} and {', '.join(self.beside)}")
        return self


class Task(NamedTuple):
    """What one decoder predicts."""

    view: str
    number: int
    """of its modality in 0 .. M-1"""
    modality: Modality | None
    """None: the images"""
    normed: bool = False


class MultiMAE(Objective):
    """Reconstruct the dropped tokens of every modality."""

    Config = MultiMAESettings
    compares_views = False

    def __init__(self, cfg: MultiMAESettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.cfg = cfg
        self.visible = Forward("student", cfg.view, cfg.mask, drop=True, beside=tuple(cfg.beside))
        self.needs = (self.visible,)
        self.grid, self.size = encoder.grids[cfg.view], encoder.stride
        self.views = (cfg.view, *cfg.beside)
        self.tasks = {view: Task(view, k, encoder.modality(view) if k else None) for k, view in enumerate(self.views)}
        if cfg.norm_pixels:
            self.tasks[f"{cfg.view}_normed"] = Task(cfg.view, 0, None, normed=True)
        self.decoders = nn.ModuleDict(
            {
                name: CrossDecoder(
                    encoder.dim,
                    self.grid,
                    task.number,
                    len(self.views),
                    _values(task, encoder),
                    cfg.decoder_dim,
                    cfg.decoder_depth,
                    cfg.decoder_heads,
                    cfg.mlp_ratio,
                )
                for name, task in self.tasks.items()
            }
        )

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`: the sum over decoders; and the loss of each by the name of its view."""
        terms = {}
        for name, task in self.tasks.items():
            predicted = self._predict(name, tokens, batch)
            hidden = self._hidden(task, batch)  # [R, N]
            errors, counted = _errors(predicted, batch.views[task.view], task, self.size)  # [R, N] twice
            terms[name] = sample_mean(errors * hidden, counted * hidden)
        return {"loss": torch.stack(list(terms.values())).sum()} | {k: v.detach() for k, v in terms.items()}

    @torch.no_grad()
    def reconstruct(self, tokens: Mapping[Forward, Tokens], batch: Batch) -> Tensor:
        """The images [R, C, H, W] with predictions in place of their hidden patches."""
        pixels = patchify(full_precision(batch.views[self.cfg.view]), self.size, "c p q")  # [R, N, L]
        hidden = self._hidden(self.tasks[self.cfg.view], batch).unsqueeze(-1)
        predicted = full_precision(self._predict(self.cfg.view, tokens, batch))
        return unpatchify(torch.where(hidden, predicted, pixels), self.grid, self.size, "c p q")

    def _predict(self, name: str, tokens: Mapping[Forward, Tokens], batch: Batch) -> Tensor:
        """[R, N, L] of one decoder."""
        seen = tokens[self.visible]
        visible = visible_rows(batch.masks[self.cfg.mask], seen.patches.shape[1])
        decoder, modality = self.decoders[name], self.tasks[name].modality
        if modality is None or modality.classes is None:
            return decoder(seen.cls, seen.patches, visible)
        with no_autocast(seen.cls):  # [code] the decoder of label maps runs in fp32
            return decoder(seen.cls, seen.patches, visible)

    def _hidden(self, task: Task, batch: Batch) -> Tensor:
        """Which tokens of a task's modality are hidden: bool [R, N]."""
        return batch.masks[self.cfg.mask].chunk(len(self.views), dim=1)[task.number]


def sample_mean(errors: Tensor, counts: Tensor) -> Tensor:
    """Each sample's error per counted value, averaged over the samples of all processes that have any.

    Args:
        errors: [R, N], sums over the counted values of a token; 0 where none is.
        counts: [R, N], how many those are.

    Returns:
        a scalar whose average over processes is the mean; 0, with a graph, where nothing counts.
    """
    totals = counts.sum(dim=1)
    means = errors.sum(dim=1) / totals.clamp(min=1)  # 0 where nothing counts
    samples = all_sum_no_grad((totals > 0).to(means.dtype).sum())
    return means.sum() * (world_size() / samples.clamp(min=1))


def _values(task: Task, encoder: EncoderSpec) -> int:
    """L: predicted values of one token."""
    if task.modality is None:
        return encoder.in_chans * encoder.stride**2
    return (task.modality.classes or task.modality.channels) * task.modality.patch**2


def _errors(predicted: Tensor, target: Tensor, task: Task, size: int) -> tuple[Tensor, Tensor]:
    """Summed errors of each token, and over how many values: [R, N] twice.

    Args:
        predicted: [R, N, L].
        target: [R, c, h, w] of the task's view.
        task: images: squared errors; continuous: absolute ones; label maps: cross-entropy.
        size: pixels of an image patch's side.
    """
    with no_autocast(predicted):
        predicted = full_precision(predicted)
        if task.modality is not None and task.modality.classes is not None:
            return _label_errors(predicted, target, task.modality.classes, task.modality.patch)
        target = patchify(full_precision(target), size if task.modality is None else task.modality.patch, "c p q")
        if task.normed:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        errors = predicted - target
        errors = errors.square() if task.modality is None else errors.abs()
        return errors.sum(dim=2), torch.full_like(errors[..., 0], errors.shape[2])


def _label_errors(predicted: Tensor, ids: Tensor, classes: int, patch: int) -> tuple[Tensor, Tensor]:
    """Pixels without label (id `classes`) do not count."""
    ids = patchify(ids, patch, "c p q").long()  # [R, N, p*q]
    logits = predicted.unflatten(2, (classes, patch * patch))  # [R, N, classes, p*q]
    errors = F.cross_entropy(logits.movedim(2, 1), ids, ignore_index=classes, reduction="none")  # [R, N, p*q]
    return errors.sum(dim=2), (ids < classes).sum(dim=2).to(errors.dtype)
