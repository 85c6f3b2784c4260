"""timm models as encoders that return `Tokens`: the only file that knows timm's insides.

Models come from `timm.create_model` and are never rewritten; their own parts are called one after the other, so that
patches can be hidden in between. An unmasked pass equals timm's `forward_features`. ViT (also with rotary positions):
hidden patches are dropped before they are embedded, or replaced by a mask token. Swin: replaced after the patch
embedding, each 32-pixel unit as a whole. Other families give pooled features only.
Shapes: R = V*B crops, N patches, D width.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchEmbed
from timm.models import group_parameters
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .nn.adapters import Adapter
from .nn.attention import prefers_fused
from .nn.patches import gather_rows
from .nn.sincos import sincos_2d
from .plan import EncoderSpec, Modality, Tokens, visible_rows
from .settings import EncoderSettings


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
        values = [list(self.model.pretrained_cfg[key]) for key in ("mean", "std")]
        if len(values[0]) != self.in_chans:  # timm adapted the first layer to other channels
            values = [[sum(each) / len(each)] * self.in_chans for each in values]
        return values[0], values[1]

    def layer_ids(self) -> tuple[dict[str, int], int]:
        """Parameter name -> layer for layer-wise lr decay (0 stem, b + 1 block b, last the norm), and the last id."""
        ids: dict[str, int] = group_parameters(self.model, self.model.group_matcher(coarse=False), reverse=True)
        last = max(ids.values(), default=0) + 1  # of the norm, and of heads behind it: the full rate
        norms = ("norm.", "fc_norm.")  # timm counts them to the last block
        named = {f"model.{name}": last if name.startswith(norms) else layer for name, layer in ids.items()}
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


def _set_noise(module: nn.Module, noise: Tensor | None) -> None:
    for branch in module.modules():
        if isinstance(branch, StochasticDepth):
            branch.noise = None if noise is None else noise[branch.row]


def _run_block(block: nn.Module, x: Tensor, noise: Tensor | None, rope: Tensor | None) -> Tensor:
    _set_noise(block, noise)
    out: Tensor = block(x) if rope is None else block(x, rope=rope)
    return out


class VitEncoder(Encoder):
    """timm VisionTransformer and Eva (rotary positions): with or without class token and registers, any position."""

    family = "vit"

    @property
    def stride(self) -> int:
        ratio = self.model.patch_embed.feat_ratio()
        return int(ratio)

    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks)

    @property
    def forgets_positions(self) -> bool:
        return isinstance(self.model, VisionTransformer)  # Eva's are rotary, as a rule

    def _token_dim(self) -> int:
        return int(self.model.embed_dim)

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
        grid = (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        if visible is not None:
            assert mask is not None
            ids = visible_rows(mask, visible)
            if beside:
                x, rope = self._embed_several(images, beside, ids, grid)
            else:
                x, rope = self._embed_visible(images, ids, grid) if positions else self._as_set(images, ids, grid)
        elif not positions:
            assert mask is None, "without positions one mask token is as good as another"
            x, rope = self._as_set(images, None, grid)
        else:
            x = self._embed(images, None)  # [R, N, D]
            if mask is not None:
                assert self.mask_token is not None, "built without mask token"
                x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
            x, rope = self._positions(x, grid)
        x = self.model.norm_pre(x)  # [R, prefix + N, D]
        self._choose_attention(x.shape[1])
        outputs: list[Tensor] = []
        first = len(self.model.blocks) - layers
        for number, (block, block_rope) in enumerate(zip(self.model.blocks, self._ropes(rope), strict=True)):
            x = self._run(block, x, noise, block_rope)
            if number >= first:
                outputs.append(x[:, self.model.num_prefix_tokens :])
        x = self.model.norm(x)
        pooled = self.model.forward_head(x, pre_logits=True)
        return Tokens(pooled, x[:, self.model.num_prefix_tokens :], tuple(outputs))

    def _embed(self, images: Tensor, ids: Tensor | None) -> Tensor:
        """Patch embedding of all patches, or of those at `ids` [R, n]: [R, n, D]."""
        stem = self.model.patch_embed
        if type(stem) is not PatchEmbed:  # a convolutional stem needs the whole image
            x = stem(images)
            x = x if isinstance(x, Tensor) else x[0]
            x = x.flatten(1, 2) if x.ndim == 4 else x
            return x if ids is None else x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        p, q = stem.patch_size
        rows, channels, height, width = images.shape
        columns = width // q
        patches = images.view(rows, channels, height // p, p, columns, q).permute(0, 2, 4, 1, 3, 5)
        if ids is None:
            patches = patches.flatten(3).flatten(1, 2)  # [R, N, C*p*q]
        else:  # gathered first: a quarter of the work at 75 % hidden
            row = torch.arange(rows, device=images.device).unsqueeze(1)
            patches = patches[row, ids // columns, ids % columns].flatten(2)  # [R, n, C*p*q]
        # a linear layer on unfolded patches: the same sums as the convolution, 3 times faster in bf16 on CPU
        return stem.norm(F.linear(patches, stem.proj.weight.flatten(1), stem.proj.bias))

    def _embed_visible(self, images: Tensor, ids: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        x = self._embed(images, ids)
        # timm adds positions to a row of zeros: the positions themselves, whatever their kind
        positions, rope = self._positions(x.new_zeros(1, grid[0] * grid[1], x.shape[-1]), grid)
        prefix = self.model.num_prefix_tokens
        x = x + positions[0, prefix:][ids]
        x = torch.cat([positions[:, :prefix].expand(len(x), -1, -1), x], dim=1)
        if rope is None:
            return x, None
        if rope.ndim == 2:  # [N, d], the same in every block
            return x, rope[ids].unsqueeze(1)  # [R, 1, n, d]
        return x, rope[:, :, ids].transpose(1, 2)  # [depth, heads, N, d] -> [depth, R, heads, n, d]

    def _embed_several(
        self, images: Tensor, beside: Mapping[str, Tensor], ids: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, None]:
        """Tokens at `ids` [R, n] of the images and then the other modalities, behind the images' prefix.

        All tokens are embedded, since rows differ in how many of a modality they keep: 4 % of a ViT-B's work.
        """
        x, _ = self._positions(self._embed(images, None), grid)  # [R, prefix + N, D]
        prefix = self.model.num_prefix_tokens
        others = [self.adapters[view](crops).to(x.dtype) for view, crops in beside.items()]
        tokens = gather_rows(torch.cat([x[:, prefix:], *others], dim=1), ids)  # [R, M*N, D] -> [R, n, D]
        return torch.cat([x[:, :prefix], tokens], dim=1), None

    def _as_set(self, images: Tensor, ids: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, None]:
        """Patches without positions behind the class token and registers, which keep theirs."""
        x = self._embed(images, ids)
        zeros = x.new_zeros(1, grid[0] * grid[1], x.shape[-1])
        prefix = self._positions(zeros, grid)[0][:, : self.model.num_prefix_tokens]
        return torch.cat([prefix.expand(len(x), -1, -1), x], dim=1), None

    def _positions(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        if self.model.dynamic_img_size:
            x = x.unflatten(1, grid)
        out = self.model._pos_embed(x)
        return out if isinstance(out, tuple) else (out, None)

    def _ropes(self, rope: Tensor | None) -> list[Tensor | None]:
        """One rotary embedding for each block."""
        if rope is not None and getattr(self.model, "rope_mixed", False):
            return list(rope)
        return [rope] * len(self.model.blocks)


class SwinEncoder(Encoder):
    """timm SwinTransformer and SwinTransformerV2. A mask is given on the output grid, one bit for 32 pixels."""

    family = "swin"

    @property
    def stride(self) -> int:
        return int(self.model.patch_embed.patch_size[0]) * 2 ** (len(self.model.layers) - 1)

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.model.layers for block in stage.blocks]

    def _token_dim(self) -> int:
        return int(self.model.embed_dim)

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
        if visible is not None:
            raise ValueError(
                "Swin's windows need every patch: hidden patches can be replaced (SimMIM), not dropped (MAE)"
            )
        x = self.model.patch_embed(images)  # [R, H/4, W/4, C]
        if mask is not None:
            assert self.mask_token is not None, "built without mask token"
            unit = 2 ** (len(self.model.layers) - 1)
            units = mask.view(len(x), x.shape[1] // unit, x.shape[2] // unit)
            hidden = units.repeat_interleave(unit, 1).repeat_interleave(unit, 2)  # [R, H/4, W/4]
            x = torch.where(hidden.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        self._choose_attention(math.prod(self.model.layers[0].blocks[0].window_size))
        for stage in self.model.layers:
            x, outputs = stage.downsample(x), []  # [R, h, w, c], and each block's
            for block in stage.blocks:
                x = self._run(block, x, noise)
                outputs.append(x.flatten(1, 2))
        x = self.model.norm(x)  # [R, H/32, W/32, D]
        kept = tuple(outputs[len(outputs) - layers :])  # of the last stage
        return Tokens(self.model.forward_head(x, pre_logits=True), x.flatten(1, 2), kept)

    @property
    def layers(self) -> int:
        return len(self.model.layers[-1].blocks)

    def check_windows(self, height: int, width: int) -> None:
        """ValueError when some stage's grid is larger than its window and no multiple of it."""
        patch = int(self.model.patch_embed.patch_size[0])
        for depth, stage in enumerate(self.model.layers):
            window = stage.blocks[0].window_size
            grid = (height // (patch * 2**depth), width // (patch * 2**depth))
            if any(side > w and side % w for side, w in zip(grid, window, strict=True)):
                raise ValueError(
                    f"image size {height} x {width}: stage {depth + 1} has {grid[0]} x {grid[1]} tokens, no multiple of "
                    f"its {window[0]} x {window[1]} window; set encoder.args.window_size to a divisor (6 for 192 pixels, "
                    f"7 for 224, 8 for 256) or choose a size that is a multiple of {self.stride * window[0]}"
                )


def build_encoder(
    cfg: EncoderSettings,
    *,
    in_chans: int,
    sizes: Mapping[str, tuple[int, int]],
    native: tuple[int, int] | None = None,
) -> Encoder:
    """Build the student of a recipe.

    Args:
        cfg: the recipe's section.
        in_chans: channels of the images.
        sizes: view -> (height, width).
        native: the model's image size; None: the largest of `sizes`.

    Raises:
        ValueError: timm does not know the name, or a size does not fit the patches or windows.
    """
    largest = native or max(sizes.values(), key=lambda size: size[0] * size[1])
    model = _create(cfg, in_chans, largest, several=len(set(sizes.values())) > 1)
    _refuse_dropout(model)
    if cfg.init is None:
        _initialise(model, cfg.scheme)
    encoder = wrap(model)
    rows, columns = encoder.grid(*largest)
    if isinstance(encoder, SwinEncoder):
        encoder.check_windows(*largest)
    if cfg.position == "sincos":
        _fix_positions(model, rows, columns)
    if cfg.freeze_patch_embed:
        model.get_submodule("patch_embed").requires_grad_(False)
    return encoder


def load_frozen(weights: str, *, in_chans: int, size: tuple[int, int]) -> Encoder:
    """A trained encoder that is only to be looked with.

    Args:
        weights: an exported folder, or a timm model name for timm's weights.
        in_chans: channels of the images.
        size: height and width that its positions are resampled to.

    Raises:
        ValueError: there is no such model, or the size does not fit it.
    """
    init = weights if Path(weights).is_dir() else "timm"
    return build_encoder(EncoderSettings(name=weights, init=init), in_chans=in_chans, sizes={"frozen": size})


def wrap(model: nn.Module) -> Encoder:
    """The `Encoder` for a timm model's family."""
    if isinstance(model, VisionTransformer | Eva):
        return VitEncoder(model)
    if isinstance(model, SwinTransformer | SwinTransformerV2):
        return SwinEncoder(model)
    return Encoder(model)


def _create(cfg: EncoderSettings, in_chans: int, size: tuple[int, int], several: bool) -> nn.Module:
    """timm's own factory, without classifier, with the arguments that the family takes."""
    name = cfg.name if cfg.init in (None, "timm") else f"local-dir:{cfg.init}"
    if name == cfg.name and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        raise ValueError(f"encoder.name: timm {timm.__version__} has no model {name!r}; similar: {', '.join(near)}")
    args: dict[str, Any] = {"num_classes": 0, "in_chans": in_chans} | cfg.args
    try:
        with torch.device("meta"):  # costs nothing; says which family it is
            plain = timm.create_model(name, **args)
        args = _family_args(plain, size, several, fresh=cfg.init is None) | args
        if cfg.drop_path:
            args["drop_path_rate"] = cfg.drop_path
        return timm.create_model(name, pretrained=cfg.init is not None, **args)
    except (TypeError, AssertionError, RuntimeError, FileNotFoundError) as error:
        raise ValueError(f"encoder: timm cannot build {name!r} with {args}: {error}") from error


def _family_args(plain: nn.Module, size: tuple[int, int], several: bool, fresh: bool) -> dict[str, Any]:
    if isinstance(plain, SwinTransformer | SwinTransformerV2):
        # smaller crops than the model's size: windows are padded, as timm does
        return {"img_size": size} | ({"strict_img_size": False} if several else {})
    if not isinstance(plain, VisionTransformer | Eva):
        return {}
    args: dict[str, Any] = {"img_size": size, "dynamic_img_size": True}
    if plain.attn_pool is not None:
        args["global_pool"] = "avg"  # an attention pool has no gradient under masked objectives
    if fresh and (plain.attn_pool is not None or isinstance(plain.norm, nn.Identity)):
        # the last norm before the pool, so that every objective trains it
        args["use_fc_norm" if isinstance(plain, Eva) else "fc_norm"] = False
    return args


def _refuse_dropout(model: nn.Module) -> None:
    """Dropout draws from a global random stream: a resumed run would differ. Stochastic depth does not."""
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    drops_patches = not isinstance(getattr(model, "patch_drop", None) or nn.Identity(), nn.Identity)
    if any(rates) or drops_patches:
        raise ValueError(
            "encoder.args: dropout rates must be 0 in pretraining; use encoder.drop_path and masks instead"
        )


@torch.no_grad()
def _initialise(model: nn.Module, scheme: str) -> None:
    """`mae`: arXiv:2111.06377; `moco`: arXiv:2104.02057, which treats q, k and v as matrices of their own."""
    if scheme == "timm":
        return
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"encoder.scheme: {scheme!r} is for timm VisionTransformers, not {type(model).__name__}: use timm"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            fan_out = module.out_features // (3 if scheme == "moco" and name.endswith("qkv") else 1)
            bound = math.sqrt(6 / (module.in_features + fan_out))
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    stem = model.patch_embed.proj
    bound = math.sqrt(6 / (stem.weight[0].numel() + stem.out_channels))
    nn.init.uniform_(stem.weight, -bound, bound)
    if scheme == "moco" and stem.bias is not None:
        nn.init.zeros_(stem.bias)
    if model.cls_token is not None:
        nn.init.normal_(model.cls_token, std=0.02 if scheme == "mae" else 1e-6)


def _fix_positions(model: nn.Module, rows: int, columns: int) -> None:
    """Write the fixed sine-cosine table into timm's own position parameter; prefix tokens get zeros."""
    positions = getattr(model, "pos_embed", None)
    if not isinstance(model, VisionTransformer) or positions is None:
        raise ValueError(f"encoder.position: {type(model).__name__} has no absolute positions to replace: use timm")
    table = sincos_2d(positions.shape[-1], (rows, columns))  # [N, D]
    with torch.no_grad():
        positions.zero_()
        positions[0, positions.shape[1] - rows * columns :] = table.to(positions.dtype)
    positions.requires_grad_(False)
