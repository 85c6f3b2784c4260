"""The Gumbel softmax samples the right distribution, and the divergence is the textbook's."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_ssl.schedule import Progress, Ramp
from hybrid_ssl.tokenizer.dvae import DVAE, DVAESettings, gumbel_softmax, kl_to_uniform


def tiny(**changes: object) -> DVAE:
    torch.manual_seed(0)
    settings = {"channels": 1, "stride": 4, "codes": 8, "dim": 5, "width": 6, **changes}
    return DVAE(DVAESettings.model_validate(settings)).double()


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 4) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=draw(1), dtype=torch.float64)


def test_cold_samples_are_draws_from_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    samples = gumbel_softmax(logits.expand(20000, 4), 0.01, draw())
    torch.testing.assert_close(samples.sum(1), torch.ones(20000))
    assert samples.max(1).values.mean() > 0.98
    torch.testing.assert_close(samples.mean(0), logits.softmax(0), rtol=0, atol=0.015)


def test_divergence_is_zero_for_uniform_and_ln_k_for_one_code() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [100.0, 0.0, 0.0], [1.0, 2.0, 3.0]]).double()
    q = logits[2].softmax(0)
    expected = [0.0, math.log(3), (q * (q * 3).log()).sum().item()]
    torch.testing.assert_close(kl_to_uniform(logits), torch.tensor(expected).double())


def test_loss_is_pixels_and_divergence_per_pixel_value() -> None:
    tokenizer = tiny(temperature=0.5, kl=2.0)
    images, now = pictures(), Progress(3, 10, 10)
    loss, ids = tokenizer.loss(images, now, draw())
    logits = tokenizer.encoder(images).movedim(1, -1)
    sample = gumbel_softmax(logits, 0.5, draw())
    pixels = F.mse_loss(tokenizer.decoder((sample @ tokenizer.codes).movedim(-1, 1)), images)
    torch.testing.assert_close(loss, pixels + 2.0 * kl_to_uniform(logits).mean() / 16)
    assert torch.equal(ids, tokenizer.ids(images).flatten())
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in tokenizer.parameters())


def test_temperature_and_divergence_follow_their_ramps() -> None:
    settings = DVAESettings()
    assert isinstance(settings.temperature, Ramp) and isinstance(settings.kl, Ramp)
    ends = [
        (settings.temperature.at(now), settings.kl.at(now)) for now in (Progress(0, 100, 10), Progress(60, 100, 10))
    ]
    assert ends == [(1.0, 0.0), (1 / 16, 0.01)]
    images = pictures()
    losses = [tiny().loss(images, Progress(step, 100, 10), draw())[0].item() for step in (0, 60)]
    assert losses[0] != losses[1]


def test_noise_is_a_function_of_its_generator() -> None:
    one, same, other = (tiny().loss(pictures(), Progress(0, 10, 10), draw(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
