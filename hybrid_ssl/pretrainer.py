"""The one module that is wrapped for training: runs the plan, sums the weighted losses, moves the teachers.

Everything that has a gradient goes through `Pretrainer.forward`; a call around the wrapper would leave each process
with other gradients. The plan never changes, so DDP needs no search for unused parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from .encoder import Encoder
from .frozen import Frozen
from .nn.adapters import standardise
from .objectives.base import Objective
from .plan import Batch, EncoderSpec, Forward, Tokens, union
from .schedule import Duration, Progress, to_steps, value_at


class Pretrainer(nn.Module):
    """Student, teacher and objectives under one root.

    Args:
        student: the encoder that is trained.
        objectives: label -> objective.
        weights: label -> factor of its loss, a number or a `Ramp`.
        spec: what the objectives were built with.
        visible: mask -> number of visible tokens, for masks whose patches are dropped.
        mean, std: per channel, in 0..1; uint8 views are normalised with them.
        frozen: name -> encoder that is not trained.
        rank, world: this process among all, so that noise belongs to a sample's place in the global batch.
        batch_size: images of an optimizer step; None: one micro-batch of every process.
        hold_encoder: how long the student's encoder is held; mask token, adapters and heads are not.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        student: Encoder,
        objectives: Mapping[str, Objective],
        weights: Mapping[str, Any],
        *,
        spec: EncoderSpec,
        visible: Mapping[str, int],
        mean: Sequence[float],
        std: Sequence[float],
        frozen: Mapping[str, Frozen] | None = None,
        rank: int = 0,
        world: int = 1,
        batch_size: int | None = None,
        hold_encoder: Duration | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.objectives = nn.ModuleDict(objectives)
        self.weights = dict(weights)
        self.spec = spec
        self.visible = dict(visible)
        self.rank, self.world, self.batch_size = rank, world, batch_size
        self.hold_encoder = hold_encoder
        self.plan = union(need for objective in objectives.values() for need in objective.needs)
        _check_plan(self.plan, student, self.visible)
        self.teacher: Encoder | None = None
        if any(need.net == "teacher" for need in self.plan):
            self.teacher = copy.deepcopy(student)
            self.teacher.mask_token = None  # a teacher sees whole images
            self.teacher.adapters = nn.ModuleDict()
            self.teacher.requires_grad_(False)
        self.frozen = nn.ModuleDict(frozen or {})
        self._check_frozen()
        for _, (teacher, student_head) in self._ema_pairs():
            teacher.load_state_dict(student_head.state_dict())
            teacher.requires_grad_(False)
        shape = (1, -1, 1, 1)
        self.register_buffer("mean", torch.tensor(mean).view(shape) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(shape) * 255, persistent=False)

    def forward(self, batch: Batch, now: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch: (the weighted sum of losses, what to log as `label/term`)."""
        resting = self._resting(now)
        batch, tokens = self.encode(batch, now, resting)
        total: Tensor | None = None
        logs: dict[str, Tensor] = {}
        for label, objective in self.parts.items():
            terms = {"loss": _nothing(objective, tokens)} if label in resting else objective.loss(tokens, batch, now)
            weighted = terms["loss"] * value_at(self.weights[label], now)
            total = weighted if total is None else total + weighted
            logs |= {f"{label}/{term}": value.detach() for term, value in terms.items()}
        assert total is not None
        logs = {"loss": total.detach()} | logs
        return (self._without_gradients(total) if self.held(now) else total), logs

    def encode(
        self, batch: Batch, now: Progress, resting: frozenset[str] = frozenset()
    ) -> tuple[Batch, dict[Forward, Tokens]]:
        """Run the plan: (the batch with normalised views, the tokens of every pass). Frozen passes are left out that
        only objectives ask for which rest."""
        awake = {need for label, part in self.parts.items() if label not in resting for need in part.needs}
        batch = batch._replace(views={name: self._ready(name, crops) for name, crops in batch.views.items()})
        return batch, {
            need: self._run(need, batch, now, index)
            for index, need in enumerate(self.plan)
            if need in awake or need.net not in self.frozen
        }

    def _ready(self, view: str, crops: Tensor) -> Tensor:
        """A view as encoder and losses want it: normalised, standardised, or ids as they are."""
        modality = self.spec.modalities.get(view)
        if modality is None:
            return self.normalise(crops)
        return standardise(crops) if modality.classes is None and modality.standardise else crops

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 in 0..255 -> normalised float; float images pass as they are."""
        if images.dtype != torch.uint8:
            return images
        return (images.to(self.mean.dtype) - self.mean) / self.std

    @torch.no_grad()
    def move_teachers(self, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, for the encoder and every teacher head."""
        teachers, students = self._ema_tensors()
        if teachers:
            torch._foreach_lerp_(teachers, students, 1.0 - momentum)

    @torch.no_grad()
    def refresh_frozen(self, now: Progress) -> None:
        """Before step `now`: copy student or teacher into the frozen encoders that are due."""
        for frozen in self._frozen().values():
            if frozen.due(now):
                frozen.copy_from(self.encoder(frozen.cfg.of or "student"))

    def held(self, now: Progress) -> bool:
        """Whether the student's encoder stands still at this step: the teacher, its copy, then does so as well."""
        hold = self.hold_encoder
        return hold is not None and now.step < to_steps(hold, now.total_steps, now.steps_per_epoch)

    def check_schedule(self, total_steps: int, steps_per_epoch: int) -> None:
        """ValueError for an objective that would pull towards a copy before it was taken: towards initial weights."""
        for label, objective in self.parts.items():
            for name in {need.net for need in objective.needs} & self._frozen().keys():
                cfg = self._frozen()[name].cfg
                first = round(to_steps(cfg.after, total_steps, steps_per_epoch)) if cfg.of else 0
                steps = (Progress(step, total_steps, steps_per_epoch) for step in {0, first - 1} if first)
                early = max((value_at(self.weights[label], step) for step in steps), default=0.0)
                if early:
                    raise ValueError(
                        f"objectives.{label} has weight {early:g} before frozen.{name} is copied at step {first}: set "
                        f"objectives.{label}.weight={{start: 0.0, end: 2.0, after: {cfg.after}}}, or copy earlier"
                    )

    def train(self, mode: bool = True) -> Pretrainer:
        """The teacher encoder stays in `eval`, without stochastic depth; its BatchNorm and its heads follow `mode`."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
            for module in self.teacher.modules():
                if isinstance(module, _BatchNorm):  # a ResNet's statistics do not follow the student: they are its own
                    module.train(mode)
        return self

    @property
    def parts(self) -> dict[str, Objective]:
        """Label -> objective."""
        return cast(dict[str, Objective], dict(self.objectives.items()))

    def encoder(self, which: str) -> Encoder:
        """The `student`, the `teacher` if the run has one, or a frozen encoder by its name."""
        if which in self.frozen:
            return self._frozen()[which].encoder
        return self.teacher if which == "teacher" and self.teacher is not None else self.student

    def _run(self, need: Forward, batch: Batch, now: Progress, index: int) -> Tokens:
        images = batch.views[need.view]
        mask = None if need.mask is None else batch.masks[need.mask]
        visible = self.visible[need.mask] if need.drop and need.mask is not None else None
        if need.net in self.frozen:
            seen: Tokens = self.frozen[need.net](images)
            return seen
        if need.net == "teacher":
            assert self.teacher is not None
            with torch.no_grad():
                return self.teacher(images, positions=need.positions, layers=need.layers)
        noise = self._noise(images, now, index, crops=self.spec.crops[need.view]) if self.training else None
        # the gradients of mask token and adapters, which are never held, go through all blocks
        learns = (mask is not None and not need.drop) or bool(need.beside) or not self.held(now)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            tokens: Tokens = self.student(
                images,
                mask,
                visible=visible,
                positions=need.positions,
                layers=need.layers,
                beside={view: batch.views[view] for view in need.beside},
                noise=noise,
            )
        return tokens

    def _without_gradients(self, total: Tensor) -> Tensor:
        """The same number, with gradients of 0 for the held encoder: DDP waits for the same ones in every step, FSDP
        for none. An empty slice is not read, so that it costs nothing and 0 x NaN does not come up."""
        held = (p for p in self.student.model.parameters() if p.requires_grad and not isinstance(p, DTensor))
        return sum((p.flatten()[:0].sum() for p in held), total)

    def _resting(self, now: Progress) -> frozenset[str]:
        """Objectives whose weight is 0 at this step, and for which a frozen encoder would look in vain. Not those with
        parameters: DDP waits for the same gradients in every step."""
        return frozenset(
            label
            for label, objective in self.parts.items()
            if value_at(self.weights[label], now) == 0
            and any(need.net in self.frozen for need in objective.needs)
            and not any(parameter.requires_grad for parameter in objective.parameters())
        )

    def _frozen(self) -> dict[str, Frozen]:
        return cast(dict[str, Frozen], dict(self.frozen.items()))

    def _check_frozen(self) -> None:
        """ValueError for a frozen encoder that nobody asks for, or that copies a teacher which is not there."""
        for name, frozen in self._frozen().items():
            if not any(need.net == name for need in self.plan):
                raise ValueError(f"frozen.{name} is used by no objective: take it out, or name it in one")
            if frozen.cfg.of == "teacher" and self.teacher is None:
                raise ValueError(f"frozen.{name} copies the teacher, but no objective has one: set of: student")

    def _noise(self, images: Tensor, now: Progress, index: int, crops: int) -> Tensor | None:
        """Uniform noise for stochastic depth, a function of (seed, step, pass, place in the batch): [rows, V*B]."""
        rows, local = self.student.noise_rows, len(images) // crops
        if not rows:
            return None
        generator = torch.Generator().manual_seed(hash((now.seed, now.step, index)) & 0x7FFF_FFFF_FFFF_FFFF)
        noise = torch.rand(rows, crops, self.batch_size or self.world * local, generator=generator)
        first = (now.micro * self.world + self.rank) * local
        mine = noise[:, :, first : first + local].flatten(1)  # [rows, V*B]
        return mine.to(images.device, non_blocking=True)

    def _ema_pairs(self) -> Iterable[tuple[str, tuple[nn.Module, nn.Module]]]:
        for label, objective in self.parts.items():
            for pair in objective.ema_pairs():
                yield label, pair

    def _ema_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [("encoder", (self.teacher.model, self.student.model))] if self.teacher is not None else []
        teachers: list[Tensor] = []
        students: list[Tensor] = []
        for label, (teacher, student) in [*pairs, *self._ema_pairs()]:
            sources = dict(student.named_parameters(remove_duplicate=False))
            for name, parameter in teacher.named_parameters(remove_duplicate=False):
                assert name in sources, f"{label}: the student has no {name}"  # matched by name: zip would misalign
                if sources[name].requires_grad:
                    teachers.append(parameter)
                    students.append(sources[name])
        return teachers, students


def _nothing(objective: Objective, tokens: Mapping[Forward, Tokens]) -> Tensor:
    """0, in the graph of the student's passes."""
    seen = [tokens[need] for need in objective.needs if need.net == "student"]
    return torch.stack([0.0 * (both.cls.sum() + both.patches.sum()) for both in seen]).sum()


def _check_plan(plan: tuple[Forward, ...], student: Encoder, visible: Mapping[str, int]) -> None:
    """ValueError for a pass that this encoder cannot run."""
    kind = type(student.model).__name__
    for need in plan:
        if need.mask is not None and student.family == "pooled":
            raise ValueError(
                f"'{need}': {kind} patches cannot be masked; choose a timm ViT or Swin, or unmasked objectives"
            )
        if not need.positions and not student.forgets_positions:
            raise ValueError(
                f"'{need}': {kind} has its positions inside attention (windows, rotary angles), so they cannot be left "
                "out; use a timm VisionTransformer, whose positions are added to the patches"
            )
        if need.drop and student.family == "swin":
            raise ValueError(
                f"'{need}': {kind} needs every patch in its windows, so hidden ones cannot be dropped; use a ViT, or "
                "an objective that replaces them by a mask token: simmim, ibot"
            )
        if need.beside and not student.forgets_positions:
            raise ValueError(
                f"'{need}': {kind} has its positions inside attention, where other modalities have none; use a timm "
                "VisionTransformer, whose positions are added to the patches"
            )
        if need.drop and need.mask not in visible:
            raise ValueError(f"'{need}': dropped masks hide the same number of patches in every crop; use kind: random")
