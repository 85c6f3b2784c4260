"""What every encoder is: a timm model whose blocks are called one by one, with noise from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import timm
import torch
from timm.layers import DropPath
from timm.models import group_parameters
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn.adapters import Adapter
from ..nn.attention import prefers_fused
from ..plan import EncoderSpec, Modality, Tokens

_LAST = ("norm", "fc_norm", "attn_pool", "head", "classifier", "fc")  # behind all blocks, in timm's names


class StochasticDepth(nn.Module):
    """timm's DropPath with noise from outside, so that a step is a function of (seed, step, sample position)."""

    noise: Tensor | None = None

    def __init__(self, p: float, row: int) -> None:
        super().__init__()
        self.p = p
        self.row = row  # its row in the noise of a pass

    def forward(self, x: Tensor) -> Tensor:
        if self.noise is None:
            return x
        keep = (self.noise >= self.p).to(x.dtype) / (1 - self.p)  # [R]
        return x * keep.view(-1, *[1] * (x.ndim - 1))


class Encoder(nn.Module):
    """A timm model, built by `timm.create_model(..., num_classes=0)`, optionally with a mask token."""

    family: ClassVar[Literal["vit", "swin", "pooled"]] = "pooled"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model  # timm's classes share no typed interface
        self.mask_token: nn.Parameter | None = None
        self.adapters = nn.ModuleDict()
        """view of another modality -> what makes tokens of it"""
        self.gradient_checkpointing = False
        self.origin: tuple[str, ...] = ()
        """where its weights came from, as lines; none for random ones"""
        self.noise_rows = self._replace_drop_path()
        """rows of noise that a pass takes: one for each stochastic residual branch"""
        # found once: asking all modules takes 0.4 ms, in every pass
        self.attentions: list[Any] = [module for module in model.modules() if hasattr(module, "fused_attn")]

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        *,
        visible: int | None = None,
        positions: bool = True,
        layers: int = 0,
        beside: Mapping[str, Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> Tokens:
        """Encode crops.

        Args:
            images: [R, C, H, W], normalised.
            mask: [R, N] bool, True = hidden, or None.
            visible: given: hidden patches are dropped and this many are left in every row; None: the mask token
                replaces them.
            positions: False: patches are embedded without their positions; needs `forgets_positions`.
            layers: how many of the last blocks' outputs to return, at most `self.layers`.
            beside: crops of other modalities by their adapters' names; `mask` is [R, M*N], over all tokens.
            noise: [noise_rows, R] uniform in [0, 1) for stochastic depth; None switches it off.
        """
        if mask is not None:
            raise ValueError(f"{type(self.model).__name__} patches cannot be masked: use a timm ViT, Swin or SwinV2")
        _set_noise(self.model, noise)
        features = self.model.forward_features(images)
        pooled = self.model.forward_head(features, pre_logits=True)
        return Tokens(pooled, pooled.unsqueeze(1))

    @property
    def forgets_positions(self) -> bool:
        """Whether a pass can leave out the positions: they have to be added to the tokens, not built into attention."""
        return False

    def add_mask_token(self) -> None:
        """For runs in which some pass replaces hidden patches; in others the parameter would have no gradient."""
        self.mask_token = nn.Parameter(torch.empty(1, 1, self._token_dim()))
        nn.init.trunc_normal_(self.mask_token, std=0.02)  # as SimMIM; iBOT starts at zero

    def add_adapter(self, view: str, kind: Modality, grid: tuple[int, int]) -> None:
        """For runs in which some pass reads a view of another modality."""
        self.adapters[view] = Adapter(self._token_dim(), grid, kind.patch, kind.channels, kind.classes)

    def blocks(self) -> list[nn.Module]:
        """The residual blocks in order; empty for other families."""
        return []

    @property
    def layers(self) -> int:
        """Blocks at the end whose outputs have the shape of the patches."""
        return len(self.blocks())

    def synchronise_batchnorm(self) -> None:
        """Normalise over all processes where the model has BatchNorm; torch can do that on GPUs only."""
        self.model = timm.layers.convert_sync_batchnorm(self.model)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of output tokens; ValueError when the size does not fit."""
        stride = self.stride
        if height % stride or width % stride:
            near = sorted({max(stride, n // stride * stride) for n in (height, height + stride, width, width + stride)})
            raise ValueError(
                f"image size {height} x {width} is no multiple of {stride} pixels, the side of one output token of "
                f"{type(self.model).__name__}; nearest sizes: {', '.join(map(str, near))}"
            )
        return height // stride, width // stride

    @property
    def stride(self) -> int:
        """Pixels of one output token's side."""
        return 1

    def spec(self, sizes: Mapping[str, tuple[int, int]], crops: Mapping[str, int]) -> EncoderSpec:
        """What objectives may know, for views of these (height, width) and numbers of crops."""
        grids: dict[str, tuple[int, int]] = {}
        misfits: dict[str, str] = {}
        for view, size in sizes.items():
            try:
                grids[view] = self.grid(*size)
            except ValueError as problem:
                misfits[view] = str(problem)
        return EncoderSpec(
            dim=self.model.num_features,
            stride=self.stride,
            in_chans=self.in_chans,
            family=self.family,
            depth=len(self.blocks()),
            layers=self.layers,
            grids=grids,
            crops=dict(crops),
            sizes=dict(sizes),
            misfits=misfits,
        )

    @property
    def in_chans(self) -> int:
        return next(m.in_channels for m in self.model.modules() if isinstance(m, nn.Conv2d))

    @property
    def mean_std(self) -> tuple[list[float], list[float]]:
        """Per channel in 0..1, what the model's weights expect images to be normalised with."""
        return mean_std(self.model)

    def layer_ids(self) -> tuple[dict[str, int], int]:
        """Parameter name -> layer for layer-wise lr decay (0 stem, b + 1 block b, last the norm), and the last id."""
        ids, last = layer_ids(self.model)
        named = {f"model.{name}": layer for name, layer in ids.items()}
        adapters = {f"adapters.{name}": 0 for name, _ in self.adapters.named_parameters()}
        return named | {"mask_token": 0} | adapters, last

    def _token_dim(self) -> int:
        raise ValueError(f"{type(self.model).__name__} takes no mask token: use a timm ViT, Swin or SwinV2")

    def _replace_drop_path(self) -> int:
        row = 0
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, DropPath):
                    setattr(module, name, StochasticDepth(child.drop_prob, row))
                    row += 1
        return row

    def _run(self, block: nn.Module, x: Tensor, noise: Tensor | None, rope: Tensor | None = None) -> Tensor:
        """One block, recomputed in the backward pass if asked for; noise is an argument, to be the same then."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(_run_block, block, x, noise, rope, use_reentrant=False)
            return out
        return _run_block(block, x, noise, rope)

    def _choose_attention(self, length: int) -> None:
        """Sets timm's switch between fused and plain attention for the next pass over `length` tokens."""
        parameter = next(self.model.parameters())
        device = parameter.device.type
        if device == "meta":  # only counting operations
            return
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameter.dtype
        fused = prefers_fused(device, dtype, length, torch.is_grad_enabled())
        for attention in self.attentions:
            attention.fused_attn = fused


def mean_std(model: Any) -> tuple[list[float], list[float]]:
    """Per channel in 0..1, what the weights of a timm model expect images to be normalised with."""
    values = [list(model.pretrained_cfg[key]) for key in ("mean", "std")]
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    if len(values[0]) != channels:  # timm adapted the first layer to other channels
        values = [[sum(each) / len(each)] * channels for each in values]
    return values[0], values[1]


def layer_ids(model: Any) -> tuple[dict[str, int], int]:
    """Parameter name of a timm model -> layer for layer-wise lr decay, and the last id, which has the full rate.

    0: stem, tokens and positions; b + 1: block b; depth + 1: the last norm and the head (MAE, arXiv 2111.06377). A
    Swin's patch merging belongs to the block before it (SimMIM, arXiv 2111.09886); timm has it at the start of the
    stage behind, and counts it to the block there.
    """
    ids: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    below = {name: layer for name, layer in ids.items() if name.split(".")[0] not in _LAST}
    last = max(below.values(), default=0) + 1
    if hasattr(model, "layers"):
        below = {name: layer - (".downsample." in name) for name, layer in below.items()}
    return {name: below.get(name, last) for name in ids}, last


def _set_noise(module: nn.Module, noise: Tensor | None) -> None:
    for branch in module.modules():
        if isinstance(branch, StochasticDepth):
            branch.noise = None if noise is None else noise[branch.row]


def _run_block(block: nn.Module, x: Tensor, noise: Tensor | None, rope: Tensor | None) -> Tensor:
    _set_noise(block, noise)
    out: Tensor = block(x) if rope is None else block(x, rope=rope)
    return out
