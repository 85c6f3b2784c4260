"""How other modalities than the image become tokens of the encoder: one linear layer on patches, plus positions.

After MultiMAE (arXiv 2204.01678, section 3.1): each modality has its own projection, whose bias tells the
encoder which modality a token is from; positions are fixed sine-cosine ones. Label maps are embedded class by class
before they are cut into patches. Shapes: R crops, c channels, p pixels of a token's side, N tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .patches import patchify
from .precision import full_precision
from .sincos import sincos_2d

_CLASS_WIDTH = 64  # values of one class's embedding, as in the paper's released configuration
_KEPT = (0.1, 0.9)  # MultiMAE: the part of the sorted values that a depth map is standardised by


class Adapter(nn.Module):
    """Tokens of one modality.

    Args:
        dim: D, width of the encoder.
        grid: (rows, columns) of tokens.
        patch: p.
        channels: c of a continuous modality; of a label map it does not matter.
        classes: number of classes of a label map; None: continuous. One more embedding is for pixels without label.
    """

    positions: Tensor

    def __init__(
        self, dim: int, grid: tuple[int, int], patch: int, channels: int = 1, classes: int | None = None
    ) -> None:
        super().__init__()
        self.patch = patch
        self.classes = None if classes is None else nn.Embedding(classes + 1, _CLASS_WIDTH)
        if self.classes is not None:
            nn.init.trunc_normal_(self.classes.weight, std=0.02)
        self.proj = nn.Linear((channels if classes is None else _CLASS_WIDTH) * patch**2, dim)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        self.register_buffer("positions", sincos_2d(dim, grid), persistent=False)  # [N, D], a function of the grid

    def forward(self, x: Tensor) -> Tensor:
        """[R, c, h, w] float, or ids [R, 1, h, w] int -> [R, N, D]."""
        if self.classes is not None:
            x = self.classes(x[:, 0].long()).permute(0, 3, 1, 2)  # [R, 64, h, w]
        patches = patchify(x, self.patch, "c p q")  # [R, N, c*p*p]
        return self.proj(patches.to(self.proj.weight.dtype)) + self.positions


def standardise(x: Tensor) -> Tensor:
    """Each crop by mean and deviation of the middle 80 % of its values, which a few far points cannot move.

    [R, c, h, w] -> the same; the variance is the unbiased one plus 1e-6. A constant crop becomes zeros.
    """
    x = full_precision(x)
    values = x.flatten(1).sort(dim=1).values
    first, end = (int(share * values.shape[1]) for share in _KEPT)
    variance, mean = torch.var_mean(values[:, first:end], dim=1, keepdim=True)  # [R, 1]
    return (x - mean[..., None, None]) / (variance + 1e-6).sqrt()[..., None, None]
