"""Images with their label maps, decoded, by number; as they are, or as augmented crops."""

from __future__ import annotations

from random import Random

from torch import Tensor

from ...data.decode import Decoder
from .augment import Augment
from .labels import Labels, as_ids
from .layouts import Pairs


class SegmentationSamples:
    """A split of the data.

    Args:
        pairs: what is read.
        decoder: of the images.
        labels: ids -> class numbers.
        augment: makes training crops; None: for a test set.
    """

    def __init__(self, pairs: Pairs, decoder: Decoder, labels: Labels, augment: Augment | None = None) -> None:
        self.pairs, self.decoder, self.labels, self.augment = pairs, decoder, labels, augment

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, i: int) -> str:
        return self.pairs.name(i)

    def read(self, i: int, rng: Random | None) -> tuple[Tensor, Tensor]:
        """uint8 [C, H, W], int16 [H, W]; augmented if there is an `rng`. ValueError with the reason if broken."""
        image = self.decoder(self.pairs.image(i))
        mask = self.labels(as_ids(self.decoder.stored(self.pairs.mask(i))))
        if image.shape[1:] != mask.shape:
            raise ValueError(
                f"its mask is {mask.shape[0]} x {mask.shape[1]} pixels, the image {image.shape[1]} x {image.shape[2]}"
            )
        if rng is None or self.augment is None:
            return image, mask
        return self.augment(image, mask, rng)
