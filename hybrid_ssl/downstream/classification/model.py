"""A timm model with its own classifier: the encoder of a fine-tuning is the whole network, so it leaves as one.

Shapes: B images, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from timm.models.eva import Eva
from torch import Tensor, nn

from ...monitor.pictures import font
from ..encoders import Normalise, Opened, rebuild
from .samples import centre
from .settings import HeadSettings

_TOLD = 5  # classes that a prediction names


class Classifier(nn.Module):
    """Images -> logits; in training images and soft targets -> loss.

    Args:
        encoder: timm model with a classifier for `classes`.
        mean, std: per channel in 0..1.
        size, crop: how `predict` cuts the centre, as `samples.centre`.
        value_range: of the images' numbers in training; None: that of their type.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classes: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int],
        crop: float,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.value_range = value_range
        self.encoder, self.classes, self.size, self.crop = encoder, list(classes), size, crop
        self.normalise = Normalise(mean, std)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        """uint8 [B, C, H, W] -> float32 [B, K]; in training, with targets [B, K], {"loss": cross-entropy}."""
        logits = self.encoder(self.normalise(images)).float()  # float32: softmax
        if not self.training:
            return logits
        assert targets is not None
        return {"loss": F.cross_entropy(logits, targets)}

    @torch.no_grad()
    def predict(self, image: Tensor) -> dict[str, Any]:
        """uint8 [C, H, W] of any size -> {"label", "probability", "class", "top": [[name, probability], ...]}."""
        shown = centre(image, self.size, self.crop)[None].to(self.normalise.mean.device)
        probabilities = self(shown)[0].softmax(0).cpu()
        best = probabilities.topk(min(_TOLD, len(self.classes)))
        top = [[self.classes[i], round(p, 6)] for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        return {"label": top[0][0], "probability": top[0][1], "class": int(best.indices[0]), "top": top}

    def draw(self, image: Tensor, found: dict[str, Any]) -> Tensor:
        """uint8 [3, H, W]: the image with its label and probability in a strip below."""
        pixels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
        height, width = pixels.shape[-2:]
        letters = max(11, min(32, width // 14))
        page = Image.new("RGB", (width, height + letters + 8), "#ffffff")
        page.paste(Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy()), (0, 0))
        text = f"{found['label']} {found['probability']:.0%}"
        ImageDraw.Draw(page).text((4, height + 3), text, "#22262b", font(letters))
        return (
            torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).view(page.height, width, 3).permute(2, 0, 1)
        )


def add_head(
    opened: Opened, cfg: HeadSettings, classes: int, *, drop_path: float, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder once more, with a new classifier, and how timm builds it again (`Opened.again`).

    Raises:
        ValueError: the encoder cannot pool so.
    """
    args = dict(opened.again["args"]) | {"num_classes": classes}
    if cfg.pool is not None:
        _check_pool(opened.model, cfg.pool)
        args["global_pool"] = cfg.pool
        if hasattr(opened.model, "fc_norm"):
            args["use_fc_norm" if isinstance(opened.model, Eva) else "fc_norm"] = cfg.pool == "avg"
    again = {"architecture": opened.again["architecture"], "args": args}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = timm.create_model(again["architecture"], **args, drop_path_rate=drop_path)
        _fill(model, opened.model)
        head = model.get_classifier()
        nn.init.trunc_normal_(head.weight, std=cfg.std)
        nn.init.zeros_(head.bias)
    return model, again


def restore(config: dict[str, Any]) -> Classifier:
    """A classifier with random weights, of `ClassificationTask.config()`."""
    size = (config["size"][0], config["size"][1])
    span = config["value_range"]
    again, mean, std = config["encoder"], config["mean"], config["std"]
    value_range = (span[0], span[1]) if span else None
    return Classifier(rebuild(again), config["classes"], mean, std, size, config["crop"], value_range)


def _check_pool(model: Any, pool: str) -> None:
    family = type(model).__name__
    if not hasattr(model, "num_prefix_tokens"):
        if pool != "avg":
            raise ValueError(f"head.pool: {family} has no class token: use avg or null")
    elif pool == "token" and not model.num_prefix_tokens:
        raise ValueError("head.pool: this encoder has no class token: use avg or null")


def _fill(model: Any, trained: nn.Module) -> None:
    """Take over all weights; nothing but the new head and its norm may stay random, which timm would not say."""
    missing, unexpected = model.load_state_dict(trained.state_dict(), strict=False)
    head = tuple(f"{name}." for name, module in model.named_modules() if module is model.get_classifier())
    new = [name for name in missing if not name.startswith((*head, "fc_norm."))]
    lost = [name for name in unexpected if not name.startswith(("norm.", "fc_norm."))]
    if new or lost:
        raise ValueError(f"the encoder's weights do not fit its own architecture: {', '.join((new + lost)[:5])}")
