"""From a recipe to the objects of a run: data, encoder, objectives, the plan, the optimizer.

Everything that can be wrong with a recipe is found here, before an output folder exists.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode

from .config import Recipe, RunSettings
from .data.dirichlet import mask_grid
from .data.loader import Broken, Loader
from .data.masks import hidden_count
from .data.sources import Images, Source
from .encoder import Encoder, build_encoder, load_frozen
from .frozen import Frozen
from .nn.batchnorm import SyncBatchNorm1d
from .objectives import objective_class
from .objectives.base import Objective, ParamRule
from .optim import param_groups
from .plan import EncoderSpec, Forward, Modality, union
from .pretrainer import Pretrainer
from .schedule import to_steps


@dataclass(frozen=True)
class Layout:
    """How the global batch is spread.

    Attributes:
        world: processes.
        micro_batch: images in one forward pass of one process.
        accumulation: forward passes in one optimizer step.
    """

    world: int
    micro_batch: int
    accumulation: int


class HasRun(Protocol):
    """A recipe of pretraining or fine-tuning."""

    @property
    def run(self) -> RunSettings: ...


def lay_out(recipe: HasRun, world: int) -> Layout:
    """Split `run.batch_size`; ValueError when it does not divide."""
    batch, micro = recipe.run.batch_size, recipe.run.micro_batch
    if micro is None:
        if batch % world:
            raise ValueError(
                f"run.batch_size {batch} does not divide by {world} processes; nearest: {_near(batch, world)}"
            )
        return Layout(world, batch // world, 1)
    micro = min(micro, max(1, batch // world))
    if batch % (micro * world):
        raise ValueError(
            f"run.batch_size {batch} does not divide by run.micro_batch {micro} x {world} processes; nearest batch "
            f"sizes: {_near(batch, micro * world)}"
        )
    return Layout(world, micro, batch // (micro * world))


def _near(batch: int, unit: int) -> str:
    below = batch // unit * unit
    return ", ".join(str(n) for n in (below, below + unit) if n)


def total_steps(recipe: HasRun, steps_per_epoch: int) -> int:
    """Optimizer steps of the run."""
    steps = round(to_steps(recipe.run.length, 0, steps_per_epoch))
    if steps < 1:
        raise ValueError(f"run.length {recipe.run.length!r} is less than one step of {steps_per_epoch} an epoch")
    return steps


def build_pretrainer(
    recipe: Recipe, mean: list[float], std: list[float], *, layout: Layout, rank: int = 0
) -> Pretrainer:
    """Encoder and objectives of a recipe under one root; initial weights depend on `run.seed` alone."""
    torch.manual_seed(recipe.run.seed)
    sizes = recipe.sizes
    encoder = build_encoder(recipe.encoder, in_chans=recipe.data.channels, sizes=sizes, native=recipe.native_size)
    crops = {name: view.crops for name, view in recipe.views.items()}
    frozen = build_frozen(recipe, encoder, mean, std)
    spec = encoder.spec(sizes, crops)
    modalities = {name: _modality(recipe, name, spec.stride) for name, view in recipe.views.items() if view.modality}
    spec = dataclasses.replace(
        spec,
        grids={name: spec.grids[(view.modality and view.like) or name] for name, view in recipe.views.items()},
        modalities=modalities,
        mean=tuple(mean),
        std=tuple(std),
        made={name: view.made for name, view in recipe.views.items()},
        frozen={name: _spec_as_seen(other, sizes, crops) for name, other in frozen.items()},
    )
    objectives = build_objectives(recipe, spec)
    plan = union(need for objective in objectives.values() for need in objective.needs)
    check_masks(recipe, plan)
    assert all(spec.of(need.net).grids[need.view] for need in plan)  # a ValueError for a view that does not fit
    check_targets(recipe, objectives)
    if any(need.mask and not need.drop for need in plan):
        encoder.add_mask_token()
    beside = {view: need.view for need in plan for view in need.beside}
    for view, base in beside.items():
        encoder.add_adapter(view, spec.modality(view), spec.grids[base])
    heads = (module for objective in objectives.values() for module in objective.modules())
    if layout.world * layout.micro_batch < 2 and any(isinstance(module, SyncBatchNorm1d) for module in heads):
        raise ValueError("BatchNorm over one image gives zeros: raise run.batch_size or run.micro_batch to 2 or more")
    encoder.gradient_checkpointing = recipe.run.gradient_checkpointing
    for option in ("gradient_checkpointing", "compile"):
        if getattr(recipe.run, option) and not encoder.blocks():
            raise ValueError(f"run.{option} works on the blocks of a ViT or Swin; {recipe.encoder.name} has none")
    return Pretrainer(
        encoder,
        objectives,
        {label: settings.weight for label, settings in recipe.objectives.items()},
        spec=spec,
        visible=_visible(recipe, spec),
        mean=mean,
        std=std,
        frozen=frozen,
        rank=rank,
        world=layout.world,
        batch_size=recipe.run.batch_size,
        hold_encoder=recipe.optimizer.hold_encoder,
    )


def _modality(recipe: Recipe, view: str, stride: int) -> Modality:
    """What a view of another modality holds; ValueError when its size gives no whole patches."""
    settings = recipe.views[view]
    assert settings.modality is not None and settings.like is not None
    own, images = settings.height_width, recipe.views[settings.like].height_width
    patch = own[0] * stride // images[0]
    if patch < 1 or any(a * stride != b * patch for a, b in zip(own, images, strict=True)):
        raise ValueError(
            f"view {view!r} of {own[0]} x {own[1]} pixels has no whole patches where {settings.like!r} of "
            f"{images[0]} x {images[1]} has patches of {stride}: use the same size, or a half or a quarter of it"
        )
    kind = recipe.data.modalities[settings.modality]
    return Modality(patch, kind.channels, kind.classes, kind.standardise)


def build_frozen(recipe: Recipe, student: Encoder, mean: list[float], std: list[float]) -> dict[str, Frozen]:
    """Name -> frozen encoder; copies hold the initial weights until their first update."""
    built = {}
    for name, cfg in recipe.frozen.items():
        if cfg.weights is None:
            built[name] = Frozen(copy.deepcopy(student), cfg, mean, std)
            continue
        try:
            with torch.random.fork_rng(devices=[]):  # the objectives' initial weights do not depend on it
                size = cfg.height_width or recipe.native_size
                encoder = load_frozen(cfg.weights, name=cfg.name, in_chans=recipe.data.channels, size=size)
        except ValueError as error:
            hint = f"; frozen.{name}.size resizes its views" if "image size" in str(error) else ""
            raise ValueError(f"frozen.{name}: {error}{hint}") from error
        built[name] = Frozen(encoder, cfg, mean, std, own=encoder.mean_std)
    return built


def _spec_as_seen(frozen: Frozen, sizes: dict[str, tuple[int, int]], crops: dict[str, int]) -> EncoderSpec:
    """What objectives may know of a frozen encoder; it sees few views, so that others need not fit its patches."""
    own = frozen.cfg.height_width
    return frozen.encoder.spec({view: own or size for view, size in sizes.items()}, crops)


def build_objectives(recipe: Recipe, spec: EncoderSpec) -> dict[str, Objective]:
    """Label -> objective."""
    built = {}
    for label, settings in recipe.objectives.items():
        try:
            built[label] = objective_class(settings.name)(settings, spec)
        except ValueError as error:
            raise ValueError(f"objectives.{label}: {error}") from error
    return built


def check_masks(recipe: Recipe, plan: tuple[Forward, ...]) -> None:
    """ValueError for a pass with a view or mask that the recipe lacks, or with a mask of another view."""
    for need in plan:
        if need.view not in recipe.views:
            raise ValueError(f"'{need}': there is no view {need.view!r}; views are: {', '.join(recipe.views)}")
        if need.mask is None:
            continue
        if need.mask not in recipe.masks:
            known = ", ".join(recipe.masks) or "none"
            raise ValueError(f"'{need}': there is no mask {need.mask!r}; masks of the recipe: {known}")
        other = recipe.masks[need.mask].view
        if other != need.view:
            raise ValueError(
                f"mask {need.mask!r} is for view {other!r}, but an objective uses it on {need.view!r}: set "
                f"masks.{need.mask}.view={need.view} or choose another mask"
            )
        _check_beside(recipe, need)


def _check_beside(recipe: Recipe, need: Forward) -> None:
    """ValueError unless a pass and its mask are over the same views, and these are cut alike."""
    assert need.mask is not None
    other = tuple(getattr(recipe.masks[need.mask], "beside", ()))
    if other != need.beside:
        raise ValueError(
            f"mask {need.mask!r} is over {', '.join((need.view, *other))}, but an objective uses it on "
            f"{', '.join((need.view, *need.beside))}: "
            + (f"set masks.{need.mask}.beside=[{', '.join(need.beside)}]" if need.beside else "choose another mask")
            + (", of kind: dirichlet" if need.beside and recipe.masks[need.mask].kind != "dirichlet" else "")
        )
    for view in need.beside:
        if view not in recipe.views or recipe.views[view].like != need.view or not recipe.views[view].modality:
            raise ValueError(
                f"'{need}': set views.{view}={{like: {need.view}, modality: NAME}}, with a NAME of data.modalities"
            )


def check_targets(recipe: Recipe, objectives: Mapping[str, Objective]) -> None:
    """ValueError for a mask without the target blocks that an objective reads."""
    for label, objective in objectives.items():
        for name in objective.target_masks:
            if recipe.masks[name].kind != "multiblock":
                raise ValueError(
                    f"objectives.{label} predicts the target blocks of mask {name!r}, which is of kind "
                    f"{recipe.masks[name].kind}: set masks.{name}={{kind: multiblock, view: {recipe.masks[name].view}}}"
                )


def _visible(recipe: Recipe, spec: EncoderSpec) -> dict[str, int]:
    counts = {}
    for name, mask in recipe.masks.items():
        rows, columns = mask_grid(mask, spec.grids)
        hidden = hidden_count(mask, (rows, columns), spec.stride)
        if hidden is not None:
            counts[name] = rows * columns - hidden
    return counts


def used_views(recipe: Recipe, pretrainer: Pretrainer) -> tuple[list[str], list[str]]:
    """Names of views and masks that some pass reads, and of the views whose crops those copy; no others are made."""
    views = {need.view for need in pretrainer.plan} | {v for part in pretrainer.parts.values() for v in part.reads}
    views |= {view for need in pretrainer.plan for view in need.beside}
    views |= {base for view in views if (base := recipe.views[view].like)}
    masks = {need.mask for need in pretrainer.plan if need.mask}
    return [v for v in recipe.views if v in views], [m for m in recipe.masks if m in masks]


def check_labels(pretrainer: Pretrainer, source: Source) -> None:
    """ValueError when an objective needs labels that the data has not; a stream's are only known while it is read."""
    for label, part in pretrainer.parts.items():
        if part.needs_labels and isinstance(source, Images) and source.labels is None:
            raise ValueError(
                f"objectives.{label} needs labels, and there are none in {source.describe()}: use class folders, or "
                "name a column with data.label"
            )


def build_loader(
    recipe: Recipe,
    source: Source,
    pretrainer: Pretrainer,
    layout: Layout,
    *,
    total_steps: int,
    pin_memory: bool = False,
    on_broken: Callable[[Broken], None] | None = None,
) -> Loader:
    """The micro-batches of this process."""
    views, masks = used_views(recipe, pretrainer)
    data = recipe.data
    if layout.world > 1:  # the limit is for all processes together, which one alone does not know: `Run` counts
        data = data.model_copy(update={"max_broken": 1.0})
    return Loader(
        source,
        data,
        {name: recipe.views[name] for name in views},
        {name: recipe.masks[name] for name in masks},
        grids=pretrainer.spec.grids,
        stride=pretrainer.spec.stride,
        batch_size=recipe.run.batch_size,
        micro_batch=layout.micro_batch,
        seed=recipe.run.seed,
        rank=pretrainer.rank,
        world=layout.world,
        workers=recipe.run.workers,
        total_steps=total_steps,
        pin_memory=pin_memory,
        on_broken=on_broken,
    )


def build_groups(recipe: Recipe, pretrainer: Pretrainer) -> list[dict[str, Any]]:
    """Parameter groups after the recipe's and the objectives' rules."""
    rules = [rule for objective in pretrainer.parts.values() for rule in objective.param_rules()]
    if hold := recipe.optimizer.hold_encoder:
        rules.append(ParamRule(tuple(pretrainer.student.model.parameters()), hold=hold, warm=True))
    layer_ids, last = ({}, 0) if recipe.optimizer.layer_decay is None else pretrainer.student.layer_ids()

    def layer(name: str) -> float:
        if not name.startswith("student."):
            return 1.0
        decay, name = recipe.optimizer.layer_decay, name.removeprefix("student.")
        stem = recipe.optimizer.patch_embed_lr if name.startswith("model.patch_embed.") else 1.0
        return stem if decay is None else float(stem * decay ** (last - layer_ids[name]))

    return param_groups(recipe.optimizer, pretrainer.named_parameters(), rules, layer)


def describe_origin(pretrainer: Pretrainer) -> list[str]:
    """Where the weights came from that the run does not make itself, as lines."""
    lines = list(pretrainer.student.origin)
    for name, part in pretrainer.frozen.items():
        assert isinstance(part, Frozen)
        lines += [f"frozen {name}: {line.strip()}" for line in part.encoder.origin if part.cfg.weights]
    return lines


def describe_start(recipe: Recipe, pretrainer: Pretrainer) -> list[str]:
    """What is done with the weights of `encoder.init`, as lines; nothing for random ones."""
    if recipe.encoder.init is None:
        return []
    hold, spec, given = recipe.optimizer.hold_encoder, pretrainer.spec, pretrainer.student.model.pretrained_cfg
    lines = [f"the encoder is held for {hold}: heads, decoder and mask token learn first"] if hold else []
    pairs = zip((*given["mean"], *given["std"]), (*spec.mean, *spec.std), strict=False)
    if len(given["mean"]) == len(spec.mean) and any(abs(theirs - ours) > 0.01 for theirs, ours in pairs):
        lines.append(
            f"note: these weights know images with mean {list(given['mean'])} and std {list(given['std'])}, this run "
            f"makes it {[round(v, 3) for v in spec.mean]} and {[round(v, 3) for v in spec.std]}: set data.mean and "
            "data.std to the former to begin with unchanged features"
        )
    return lines


def describe_plan(pretrainer: Pretrainer) -> list[str]:
    """The plan as lines: each pass with tokens and cost, and what sharing saves."""
    requested = [need for objective in pretrainer.parts.values() for need in objective.needs]
    costs = {need: _cost(pretrainer, need) for need in pretrainer.plan}
    lines = [f"plan: {len(pretrainer.plan)} encoder passes for {len(requested)} requested"]
    for need, cost in costs.items():
        hidden = pretrainer.visible.get(need.mask) if need.drop and need.mask else None
        tokens = hidden if hidden is not None else pretrainer.spec.of(need.net).tokens(need.view)
        crops = pretrainer.spec.crops[need.view]
        lines.append(f"  {need!s:<40} {crops} x {tokens} tokens  {cost / 1e9:8.2f} GFLOP an image")
    total, asked = sum(costs.values()), sum(costs[need] for need in requested)
    saved = f", sharing saves {1 - total / asked:.0%}" if asked > total else ""
    lines.append(f"  encoder {total / 1e9:.2f} GFLOP an image, forward and backward{saved}")
    return lines


def _cost(pretrainer: Pretrainer, need: Forward) -> float:
    """FLOPs of one image in one pass, backward included (twice the forward), counted on meta tensors."""
    encoder: Encoder = copy.deepcopy(pretrainer.encoder(need.net)).to("meta", torch.float32)
    crops, spec = pretrainer.spec.crops[need.view], pretrainer.spec.of(need.net)
    rows, columns = spec.grids[need.view]
    images = torch.empty(crops, spec.in_chans, rows * spec.stride, columns * spec.stride, device="meta")
    tokens = (1 + len(need.beside)) * rows * columns
    mask = torch.empty(crops, tokens, dtype=torch.bool, device="meta") if need.mask else None
    beside = {view: _empty_maps(spec.modality(view), crops, (rows, columns)) for view in need.beside}
    visible = pretrainer.visible[need.mask] if need.drop and need.mask else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(images, mask, visible=visible, positions=need.positions, beside=beside)
    return float(counter.get_total_flops()) * (3 if need.net == "student" else 1)


def _empty_maps(kind: Modality, crops: int, grid: tuple[int, int]) -> torch.Tensor:
    """Crops of another modality without memory."""
    size = (grid[0] * kind.patch, grid[1] * kind.patch)
    dtype = torch.float32 if kind.classes is None else torch.int16
    return torch.empty(crops, kind.channels, *size, dtype=dtype, device="meta")
