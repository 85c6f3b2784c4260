"""BEiT: predict the visual tokens of hidden patches, as a frozen tokenizer names them.

Source: Bao et al., "BEiT: BERT Pre-Training of Image Transformers", arXiv 2106.08254. Written from the paper and a fact
sheet. The student sees the image with mask tokens; the tokenizer sees the same crop, flip and colours in a second view
that is `like` the first, at the size at which it has one id for each patch (112 pixels and squares of 8 for a ViT-B/16
at 224). The loss is the cross-entropy of one linear layer at hidden patches, the mean over those of all processes
together: an image with more hidden patches weighs more, as published. At the start it is near ln K.

The published tokenizer is DALL-E's. Here it is one that was trained before by `hybrid-ssl tokenizer`. It is frozen and
lies with its hash in the run's checkpoints: a resumed run goes on with its own weights, even if the folder, which says
how large the network is, has been trained anew. It reads pixels in 0..1, so the normalisation of the encoder's images
is undone, to the loader's 8 bits exactly.

Works on Swin with masks on the grid of output tokens and a tokenizer view of that grid (56 pixels for 7 x 7 tokens).
Shapes: B images (V * B with several crops), N patches, n hidden ones in the micro-batch, D encoder width, K codes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..nn.distributed import ragged_mean
from ..nn.precision import for_weight, full_precision
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from ..tokenizer.files import HOW_TO_TRAIN, load_tokenizer
from .base import Objective, ObjectiveSettings, crops_of


class BEiTSettings(ObjectiveSettings):
    """Defaults: the paper's, but for the tokenizer, which has to be named."""

    view: str = "plain"
    mask: str = "block"
    """paper: blocks, at most 75 of 196 patches"""
    tokenizer: str | None = None
    """folder that `hybrid-ssl tokenizer` wrote"""
    sha256: str | None = Field(None, min_length=8)
    """hash of the tokenizer's weights, or its first digits: another tokenizer is refused; null: any"""
    tokenizer_view: str | None = "tokenizer"
    """view that is `like` the first and has one id for each patch; null: the tokenizer reads the encoder's own view"""


class BEiT(Objective):
    """Classify hidden patches by their visual token."""

    Config = BEiTSettings
    compares_views = False
    mean: Tensor
    std: Tensor

    def __init__(self, cfg: BEiTSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        if cfg.tokenizer is None:
            raise ValueError(f"beit predicts the ids of a tokenizer: set `tokenizer` to its folder; {HOW_TO_TRAIN}")
        self.cfg = cfg
        self.tokenizer, digest = load_tokenizer(cfg.tokenizer, cfg.sha256)
        self.masked = Forward("student", cfg.view, cfg.mask)
        self.needs = (self.masked,)
        self.picture = cfg.tokenizer_view or cfg.view
        self.reads = (self.picture,)
        self._check_fit(encoder)
        self.head = nn.Linear(encoder.dim, self.tokenizer.settings.codes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        channels = encoder.in_chans
        for name, values, default in (("mean", encoder.mean, 0.0), ("std", encoder.std, 1.0)):
            value = torch.tensor(values or [default] * channels).view(1, -1, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("fingerprint", torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8))

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`: cross-entropy; `accuracy` of the predictions; `perplexity`: codes in use among the hidden patches."""
        rows = batch.hidden_rows(self.cfg.mask)  # [n]
        target = self.ids(batch.views[self.picture]).flatten().index_select(0, rows)  # [n]
        hidden = tokens[self.masked].patches.flatten(0, 1).index_select(0, rows)  # [n, D]
        logits = full_precision(self.head(for_weight(hidden, self.head.weight)))  # [n, K]
        each = F.cross_entropy(logits, target, reduction="none")  # [n]
        with torch.no_grad():
            hits = (logits.argmax(dim=1) == target).to(each.dtype)
            counts = torch.zeros_like(self.head.bias, dtype=each.dtype).index_add_(0, target, torch.ones_like(each))
            share = counts / counts.sum().clamp(min=1)
        return {
            "loss": ragged_mean(each),
            "accuracy": hits.sum() / max(1, len(hits)),
            "perplexity": torch.special.entr(share).sum().exp(),
        }

    @torch.no_grad()
    def ids(self, images: Tensor) -> Tensor:
        """The visual tokens of normalised images [B, C, H, W]: int64 [B, N]."""
        pixels = (full_precision(images) * self.std + self.mean).mul(255).round().div(255)  # the loader's bits
        return self.tokenizer.ids(pixels.to(self.tokenizer.codes.dtype))

    def train(self, mode: bool = True) -> BEiT:
        """Like any module's, but the tokenizer stays in `eval`."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def _check_fit(self, encoder: EncoderSpec) -> None:
        """ValueError unless the tokenizer gives one id for each patch of the same crops."""
        cfg, model = self.cfg, self.tokenizer.settings
        if model.channels != encoder.in_chans:
            raise ValueError(
                f"the tokenizer in {cfg.tokenizer!r} reads {model.channels} channels, the images have "
                f"{encoder.in_chans}: train one with --channels {encoder.in_chans}"
            )
        crops_of(encoder, self.picture)
        made = encoder.made.get(self.picture)
        if made is not None and self.picture != cfg.view and f"like={cfg.view}" not in made:
            raise ValueError(
                f"view {self.picture!r} shows other crops than {cfg.view!r}, so its ids are not those of the patches: "
                f"set views.{self.picture}.like={cfg.view}"
            )
        grid, stride = encoder.grids[cfg.view], encoder.stride
        height, width = encoder.sizes.get(self.picture, (grid[0] * stride, grid[1] * stride))
        if (height, width) != (grid[0] * model.stride, grid[1] * model.stride):
            raise ValueError(
                f"view {self.picture!r} of {height} x {width} pixels does not have one square of {model.stride} pixels "
                f"for each of {grid[0]} x {grid[1]} patches of view {cfg.view!r}: set views.{self.picture}.size="
                f"[{grid[0] * model.stride}, {grid[1] * model.stride}], or use a tokenizer of another stride"
            )
