"""What one pass of a frozen timm encoder gives: pooled features, the last blocks' tokens, patch tokens.

Names of what is given: `pooled` [B, D]; `block1` .. `block4`, the class token after the last block, the one before
and so on, with the encoder's final norm, as DINO's and DINOv2's linear probes read them; `avg`, the mean of the last
patch tokens beside a class token; `tokens` [B, N, D]. An encoder without class token gives means of patch tokens
instead, a Swin (or any network of stages) those of its stages: the last one as the encoder pools it, earlier ones
brought to zero mean and unit variance, since nothing normalises them.

Shapes: B images, C channels, N patches, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ..encoders import Normalise

Part = Literal["pooled", "blocks", "tokens", "pixels"]
BLOCKS = 4  # of which DINOv2's probe tries the last one and the last four


class Embedder:
    """A frozen encoder on its device.

    Args:
        model: timm's, without classifier.
        mean, std: per channel in 0..1, what it expects.
        pooling: of `pooled`.
        precision: of the pass; what comes out is float32.

    Raises:
        ValueError: the encoder has no class token, or no intermediate features, and they are asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        pooling: Literal["own", "cls", "avg"] = "own",
        precision: Literal["fp32", "bf16"] = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        self.normalise = Normalise(mean, std).to(self.device)
        self.pooling, self.precision = pooling, precision
        self.tokenwise = hasattr(model, "num_prefix_tokens")  # a ViT: tokens and prefix, instead of maps
        if pooling == "cls" and getattr(model, "cls_token", None) is None:
            raise ValueError(f"{type(model).__name__} has no class token: set encoder.pooling to own or avg")

    @cached_property
    def digest(self) -> str:
        """Differs when the weights do."""
        return digest(self.model)

    @torch.no_grad()  # not inference_mode: heads learn from what comes out
    def __call__(self, images: Tensor, wanted: Collection[Part]) -> dict[str, Tensor]:
        """uint8 [B, C, H, W] on any device -> what is wanted, float32 on this encoder's device."""
        x = self.normalise(images.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            if set(wanted) <= {"pooled"} and self.pooling == "own":
                found = {"pooled": self.model(x)} if wanted else {}
            else:
                found = self._tokens(x) if self.tokenwise else self._maps(x)
        keep = {"blocks": ("block", "avg")}
        kept = tuple(prefix for part in wanted for prefix in keep.get(part, (part,)))
        return {name: value.float() for name, value in found.items() if name.startswith(kept)} if kept else {}

    def _tokens(self, x: Tensor) -> dict[str, Tensor]:
        """Of a ViT."""
        final, layers = self._intermediates(x, output_fmt="NLC", return_prefix_tokens=True, norm=True)
        own = self.model.forward_head(final, pre_logits=True)
        if self.model.cls_token is None:
            patches = [layer[0] if isinstance(layer, tuple) else layer for layer in layers]  # a tuple with registers
            firsts = [layer.mean(1) for layer in patches]
        else:
            patches, firsts = [layer[0] for layer in layers], [layer[1][:, 0] for layer in layers]
        avg = patches[-1].mean(1)
        pooled = {"own": own, "cls": firsts[-1], "avg": avg}[self.pooling]
        blocks = {f"block{depth}": first for depth, first in enumerate(reversed(firsts), start=1)}
        beside = {} if self.model.cls_token is None else {"avg": avg}
        return {"pooled": pooled, "tokens": patches[-1]} | blocks | beside

    def _maps(self, x: Tensor) -> dict[str, Tensor]:
        """Of a Swin, or of a convolutional network."""
        final, stages = self._intermediates(x, output_fmt="NCHW")
        last_channels = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        tokens = final.flatten(1, 2) if last_channels else final.flatten(2).transpose(1, 2)  # [B, N, D]
        own = self.model.forward_head(final, pre_logits=True)
        earlier = [stage.float().mean((2, 3)) for stage in reversed(stages[:-1])]
        normed = {f"block{i}": layer_norm(mean, mean.shape[1:]) for i, mean in enumerate(earlier, start=2)}
        return {"pooled": tokens.mean(1) if self.pooling == "avg" else own, "tokens": tokens, "block1": own} | normed

    def _intermediates(self, x: Tensor, **options: Any) -> Any:
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(
                f"{type(self.model).__name__} gives no intermediate features: use --protocol knn, logistic, lowshot "
                "or retrieval with encoder.pooling=own"
            )
        return self.model.forward_intermediates(x, indices=min(BLOCKS, len(self.model.feature_info)), **options)


def digest(model: torch.nn.Module) -> str:
    """Of all weights and buffers, of the class and its arguments."""
    out = hashlib.blake2b(repr(model.__class__).encode(), digest_size=16)
    out.update(json.dumps(getattr(model, "_model_args", {}), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        out.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        out.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return out.hexdigest()
