"""Views are torchvision's, drawn from keys: same key same pixels, other samples other pixels."""

from __future__ import annotations

import math
import random
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from hybrid_ssl.data.colour import Colour, apply_colour, blur, draw_colour, solarize
from hybrid_ssl.data.order import keyed
from hybrid_ssl.data.settings import JitterSettings, ViewSettings
from hybrid_ssl.data.views import Box, Views, center_box, cut, draw_boxes

PLAIN = Colour((), {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}, False, 0.0, False)


def picture(height: int = 60, width: int = 80, channels: int = 3, seed: int = 0) -> Tensor:
    """Smooth and colourful, like a photograph."""
    noise = torch.rand(1, channels, 6, 8, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")[0].clamp(0, 1) * 255).to(
        torch.uint8
    )


DINO = {
    "global": ViewSettings(
        size=32, crops=2, scale=[0.4, 1], jitter=JitterSettings(), gray=0.2, blur=[1.0, 0.1], solarize=[0.0, 0.2]
    ),
    "local": ViewSettings(size=16, crops=4, scale=[0.05, 0.4], jitter=JitterSettings(), gray=0.2, blur=0.5),
}


def test_views_have_the_asked_shapes() -> None:
    views = Views(DINO)(picture(), 0, 0, 7)
    assert {name: (tuple(v.shape), v.dtype) for name, v in views.items()} == {
        "global": ((2, 3, 32, 32), torch.uint8),
        "local": ((4, 3, 16, 16), torch.uint8),
    }
    oblong = Views({"a": ViewSettings(size=[16, 24])})(picture(), 0, 0, 0)["a"]
    assert oblong.shape == (1, 3, 16, 24)


@pytest.mark.parametrize("jitter", ["fast", "exact"])
def test_views_depend_on_nothing_but_the_key(jitter: str) -> None:
    make = Views(DINO, jitter)
    first = make(picture(), 1, 2, 3)
    torch.manual_seed(5)
    random.seed(5)
    make(picture(), 9, 9, 9)
    again = make(picture(), 1, 2, 3)
    alone = Views({"local": DINO["local"]}, jitter)(picture(), 1, 2, 3)
    assert all(torch.equal(first[name], again[name]) for name in first) and torch.equal(first["local"], alone["local"])
    for other in (make(picture(), 0, 2, 3), make(picture(), 1, 0, 3), make(picture(), 1, 2, 0)):
        assert not any(torch.equal(first[name], other[name]) for name in first)


def test_no_two_samples_or_epochs_share_an_augmentation() -> None:
    make, image = Views({"global": DINO["global"]}), picture()
    seen = {
        make(image, 0, epoch, i)["global"][v].numpy().tobytes() for epoch in range(3) for i in range(40) for v in (0, 1)
    }
    assert len(seen) == 3 * 40 * 2


def test_boxes_are_distributed_as_torchvisions() -> None:
    view = ViewSettings(scale=[0.2, 1.0])
    ours = np.array([draw_boxes(view, 60, 80, keyed(0, 0, i, "box"))[0][:4] for i in range(4000)], float)
    torch.manual_seed(0)
    image = torch.empty(3, 60, 80)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)], float)
    spread = theirs.std(0) / math.sqrt(2000)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * spread).all()
    assert (np.abs(ours.std(0) - theirs.std(0)) < 0.1 * theirs.std(0) + 0.1).all()


@pytest.mark.parametrize(("height", "width"), [(2, 500), (500, 2), (1, 1), (7, 7)])
def test_boxes_stay_inside_extreme_images(height: int, width: int) -> None:
    for i in range(200):
        box = draw_boxes(ViewSettings(scale=[0.05, 0.4]), height, width, keyed(0, 0, i, "box"))[0]
        assert box.height >= 1 and box.width >= 1 and box.top >= 0 and box.left >= 0
        assert box.top + box.height <= height and box.left + box.width <= width
    assert Views({"a": ViewSettings(size=8)})(picture(height, width), 0, 0, 0)["a"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("box", [Box(0, 0, 60, 80), Box(5, 11, 40, 30), Box(20, 20, 10, 12)])
def test_resize_is_pils(box: Box, interpolation: str) -> None:
    image = picture()
    ours = cut(image, box, (24, 24), interpolation)
    region = Image.fromarray(image.permute(1, 2, 0).numpy()).crop(
        (box.left, box.top, box.left + box.width, box.top + box.height)
    )
    theirs = torch.from_numpy(np.array(region.resize((24, 24), getattr(Image, interpolation.upper())))).permute(2, 0, 1)
    assert (ours.int() - theirs.int()).abs().max() <= 1
    if interpolation == "bilinear":
        resized = tv.resized_crop(image, *box[:4], [24, 24], InterpolationMode.BILINEAR, antialias=True)
        assert (ours.int() - resized.int()).abs().max() <= 1


def test_flips_mirror_the_crop() -> None:
    image, box = picture(), Box(3, 4, 30, 20)
    plain = cut(image, box, (16, 16), "bicubic")
    assert torch.equal(cut(image, box._replace(hflip=True), (16, 16), "bicubic"), plain.flip(-1))
    assert torch.equal(cut(image, box._replace(vflip=True), (16, 16), "bicubic"), plain.flip(-2))
    flips = [draw_boxes(ViewSettings(hflip=0.5, vflip=0.0), 60, 80, keyed(0, 0, i, "box"))[0] for i in range(400)]
    assert 150 < sum(b.hflip for b in flips) < 250 and not any(b.vflip for b in flips)


def test_center_crop_takes_the_largest_middle_part() -> None:
    assert center_box(60, 80, (32, 32)) == Box(0, 10, 60, 60)
    assert center_box(60, 80, (32, 64)) == Box(10, 0, 40, 80)
    view = ViewSettings(size=32, crop="center", hflip=0.0)
    image = picture()
    first, second = (Views({"a": view})(image, seed, 0, 0)["a"][0] for seed in (0, 1))
    assert torch.equal(first, second) and torch.equal(first, cut(image, Box(0, 10, 60, 60), (32, 32), "bicubic"))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_fast_jitter_is_torchvisions_operation(name: str, factor: float) -> None:
    image = (picture() * 0.4).to(torch.uint8) + 60  # nothing reaches 0 or 255
    colour = PLAIN._replace(order=(name,), factors=PLAIN.factors | {name: factor})
    theirs = getattr(tv, f"adjust_{name}")(image, factor)
    assert (apply_colour(image, colour, 0.5, "fast").int() - theirs.int()).abs().max() <= 2
    assert torch.equal(apply_colour(image, colour, 0.5, "exact"), theirs)


@pytest.mark.parametrize("shift", [-0.1, 0.05, 0.1])
def test_fast_hue_turns_the_same_way_as_hsv(shift: float) -> None:
    image = (picture() * 0.3).to(torch.uint8) + 80
    colour = PLAIN._replace(order=("hue",), factors=PLAIN.factors | {"hue": shift})
    fast, exact = (apply_colour(image, colour, 0.5, mode).float() for mode in ("fast", "exact"))
    turned = (
        hue(fast) - hue(exact) + 0.5
    ) % 1 - 0.5  # rotation and hexagon differ a little within a sixth of the circle
    assert turned.abs().mean() < 0.015
    assert (fast - exact).abs().mean() < (image.float() - exact).abs().mean()


def hue(image: Tensor) -> Tensor:
    red, green, blue = image.double()
    return torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * math.pi)


def test_composed_jitter_follows_the_exact_sequence() -> None:
    image = (picture() * 0.4).to(torch.uint8) + 60
    factors = {"brightness": 0.9, "contrast": 1.2, "saturation": 0.8, "hue": 0.0}
    for order in (("contrast", "brightness", "saturation", "hue"), ("saturation", "hue", "contrast", "brightness")):
        colour = PLAIN._replace(order=order, factors=factors, gray=True)
        fast, exact = (apply_colour(image, colour, 0.5, mode).int() for mode in ("fast", "exact"))
        assert (fast - exact).abs().max() <= 3


def test_gray_leaves_three_equal_channels() -> None:
    out = apply_colour(picture(), PLAIN._replace(gray=True), 0.5, "fast")
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
    assert (out[0].int() - tv.rgb_to_grayscale(picture())[0].int()).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 2, 13])
@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_other_channel_counts_get_brightness_and_contrast_only(channels: int, mode: str) -> None:
    image = (picture(channels=channels) * 0.4).to(torch.uint8) + 60
    strong = PLAIN._replace(
        order=("saturation", "hue"), factors=PLAIN.factors | {"saturation": 0.1, "hue": 0.5}, gray=True
    )
    assert torch.equal(apply_colour(image, strong, 0.5, mode), image)
    bright = PLAIN._replace(
        order=("brightness", "contrast"), factors=PLAIN.factors | {"brightness": 1.2, "contrast": 0.5}
    )
    values = image.float() * 1.2
    expected = 0.5 * values + 0.5 * values.mean()
    assert (apply_colour(image, bright, 0.5, mode).float() - expected).abs().max() <= 2


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_is_gaussian(sigma: float) -> None:
    image = picture().float()
    reference = tv.gaussian_blur(image, [23, 23], [sigma, sigma])
    assert (blur(image, sigma) - reference).abs().max() < 1.0
    pil = Image.fromarray(picture().permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(sigma))
    assert (blur(image, sigma) - torch.from_numpy(np.array(pil)).permute(2, 0, 1)).abs().mean() < 1.5


@pytest.mark.parametrize("size", [1, 2, 5])
def test_blur_of_tiny_images_keeps_their_size(size: int) -> None:
    assert blur(torch.rand(3, size, size), 2.0).shape == (3, size, size)


@pytest.mark.parametrize("threshold", [0.5, 0.25, 0.0, 1.0])
def test_solarize_inverts_bright_values(threshold: float) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    expected = torch.tensor([255 - v if v >= threshold * 255 else v for v in range(256)]).view(1, 16, 16)
    assert torch.equal(solarize(values, threshold).long(), expected)


def test_probabilities_are_those_of_the_crop() -> None:
    view = ViewSettings(
        crops=2, gray=[1.0, 0.0], blur=[0.0, 1.0], solarize=[0.3, 0.0], jitter=JitterSettings(p=[0.8, 0.0])
    )
    rng = Random(0)
    drawn = [[draw_colour(view, crop, rng) for crop in (0, 1)] for _ in range(600)]
    first, second = zip(*drawn, strict=True)
    assert all(c.gray and not c.sigma for c in first) and all(c.sigma and not c.gray and not c.order for c in second)
    assert 430 < sum(bool(c.order) for c in first) < 530 and 130 < sum(c.solarize for c in first) < 230
    assert len({c.order for c in first if c.order}) == 24  # every order comes up
    assert all(0.1 <= c.sigma <= 2.0 for c in second)


def test_changing_one_probability_leaves_the_other_draws_alone() -> None:
    plain = DINO["local"].model_copy(update={"blur": 0.0})
    with_blur = DINO["local"].model_copy(update={"blur": 1.0})
    a, b = draw_colour(plain, 0, Random(1)), draw_colour(with_blur, 0, Random(1))
    assert a.factors == b.factors and a.order == b.order and a.gray == b.gray and not a.sigma and b.sigma


def test_like_cuts_the_same_box_at_another_size() -> None:
    views = {
        "plain": ViewSettings(size=32, hflip=0.5),
        "small": ViewSettings(size=16, hflip=0.0, scale=[0.9, 1.0], like="plain"),
    }
    for i in range(6):
        out = Views(views)(picture(), 0, 0, i)
        shrunk = tv.resize(out["plain"][0], [16, 16], antialias=True)
        assert (shrunk.float() - out["small"][0].float()).abs().mean() < 4


def test_like_shares_colours_where_settings_are_equal() -> None:
    jitter = JitterSettings(p=1.0, brightness=0.8)
    views = {"plain": ViewSettings(size=32, jitter=jitter), "small": ViewSettings(size=16, jitter=jitter, like="plain")}
    out = Views(views)(picture(), 0, 0, 1)
    assert (out["plain"].float().mean((0, 2, 3)) - out["small"].float().mean((0, 2, 3))).abs().max() < 2


def test_like_must_name_a_view_with_as_many_crops() -> None:
    plain = ViewSettings()
    for other, message in (
        (ViewSettings(like="nothing"), "the other views are: plain"),
        (ViewSettings(like="plain", crops=2), "must be as many"),
    ):
        with pytest.raises(ValueError, match=message):
            Views({"plain": plain, "other": other})
    with pytest.raises(ValueError, match="name that one"):
        Views({"plain": plain, "a": ViewSettings(like="plain"), "b": ViewSettings(like="a")})
