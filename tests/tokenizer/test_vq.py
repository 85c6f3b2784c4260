"""The codebook does what its formulas say, and the ids are laid out like patch tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_ssl.schedule import Progress
from hybrid_ssl.tokenizer.base import Tokenizer
from hybrid_ssl.tokenizer.files import build_tokenizer
from hybrid_ssl.tokenizer.vq import VQ, VQSettings, move_codes, restart_codes

NOW = Progress(0, 10, 10)


def tiny(**changes: int | float) -> VQ:
    torch.manual_seed(0)
    settings = {"channels": 2, "stride": 4, "codes": 6, "dim": 4, "width": 5, **changes}
    return VQ(VQSettings.model_validate(settings)).double()


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(height: int = 8, width: int = 12, count: int = 3) -> Tensor:
    return torch.rand(count, 2, height, width, generator=draw(1), dtype=torch.float64)


def units(rows: int, dim: int = 4) -> Tensor:
    return F.normalize(torch.randn(rows, dim, generator=draw(2), dtype=torch.float64), dim=1)


def test_codes_move_towards_the_mean_of_their_rows() -> None:
    codes, rows, sizes = units(3), units(5), torch.tensor([2.0, 4.0, 1.0]).double()
    ids = torch.tensor([0, 0, 2, 0, 2])
    moved, new_sizes = move_codes(codes, sizes, rows, ids, decay=0.9)
    mean = F.normalize(rows[[0, 1, 3]].mean(0), dim=0)
    torch.testing.assert_close(moved[0], F.normalize(0.9 * codes[0] + 0.1 * mean, dim=0))
    assert torch.equal(moved[1], codes[1]), "nothing was assigned to it"
    torch.testing.assert_close(new_sizes, torch.tensor([2.1, 3.6, 1.1]).double())


def test_dead_codes_become_rows_of_the_batch() -> None:
    codes, rows = units(4), units(7)
    sizes = torch.tensor([1.75, 0.1, 0.0, 0.9], dtype=torch.float64)  # average 7 / 4
    new, new_sizes = restart_codes(codes, sizes, rows, share=0.2, draw=draw())
    assert torch.equal(new[[0, 3]], codes[[0, 3]])
    assert all(any(torch.equal(new[k], row) for row in rows) for k in (1, 2))
    assert new_sizes.tolist() == [1.75, 1.75, 1.75, sizes[3]]


def test_all_codes_begin_as_rows_of_the_first_batch() -> None:
    tokenizer = tiny()
    before = tokenizer.codes.clone()
    tokenizer.loss(pictures(), NOW, draw())
    assert not (tokenizer.codes == before).all(1).any()
    torch.testing.assert_close(tokenizer.codes.norm(dim=1), torch.ones(6).double())


def test_the_decoder_sees_codes_and_its_gradient_passes_to_the_encoder() -> None:
    tokenizer = tiny(commitment=0.0).eval()
    images = pictures()
    loss, ids = tokenizer.loss(images, NOW, draw())
    grid = (2, 3)
    expected = F.mse_loss(tokenizer.decoder(tokenizer.codes[ids.view(3, 6)].transpose(1, 2).unflatten(2, grid)), images)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in tokenizer.parameters())


def test_commitment_pulls_features_to_their_codes_only() -> None:
    tokenizer = tiny().eval()
    plain, _ = tiny(commitment=0.0).eval().loss(pictures(), NOW, draw())
    loss, ids = tokenizer.loss(pictures(), NOW, draw())
    rows = tokenizer._features(pictures()).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(loss - plain, (rows - tokenizer.codes[ids]).square().mean())
    assert not tokenizer.codes.requires_grad


def test_evaluation_moves_nothing() -> None:
    tokenizer = tiny().eval()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    tokenizer.loss(pictures(), NOW, draw())
    tokenizer.ids(pictures())
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())


def test_ids_are_row_major_like_patch_tokens() -> None:
    tokenizer = tiny(codes=64).eval()
    image = torch.zeros(1, 2, 16, 24, dtype=torch.float64)
    before = tokenizer.ids(image).view(4, 6)
    image[:, :, 8:12, 16:20] = torch.rand(2, 4, 4, generator=draw(), dtype=torch.float64) * 40
    changed = (tokenizer.ids(image).view(4, 6) != before).nonzero()
    assert changed[:, 0].tolist() and abs(changed.double().mean(0) - torch.tensor([2.0, 4.0])).max() < 0.7


def test_ids_are_the_codes_of_the_highest_cosine() -> None:
    tokenizer = tiny().eval()
    rows = tokenizer._features(pictures()).flatten(2).transpose(1, 2)
    expected = F.cosine_similarity(rows.unsqueeze(2), tokenizer.codes, dim=-1).argmax(-1)
    assert torch.equal(tokenizer.ids(pictures()), expected)


def test_ids_do_not_depend_on_autocast() -> None:
    tokenizer = tiny(codes=64).float().eval()
    images = pictures().float()
    with torch.autocast("cpu", torch.bfloat16):
        low = tokenizer.ids(images)
    assert torch.equal(low, tokenizer.ids(images))


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_strides_give_one_id_for_each_square(stride: int) -> None:
    tokenizer = tiny(stride=stride).eval()
    ids = tokenizer.ids(pictures(16, 8))
    assert ids.shape == (3, (16 // stride) * (8 // stride))
    assert tokenizer.decode(ids, tokenizer.grid(16, 8)).shape == (3, 2, 16, 8)


def test_training_uses_most_codes_and_learns_to_reconstruct() -> None:
    tokenizer: Tokenizer = build_tokenizer(VQSettings(channels=1, stride=4, codes=16, dim=4, width=8))
    torch.manual_seed(0)
    shades = torch.rand(32, 1, 2, 2, generator=draw(3)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=5e-3)
    for step in range(80):
        loss, ids = tokenizer.loss(shades, Progress(step, 80, 80), draw(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokenizer.eval()
    error = F.mse_loss(tokenizer.decode(tokenizer.ids(shades), (2, 2)), shades)
    assert len(ids.unique()) > 8 and error < 0.25 * shades.var()


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="stride is 2, 4, 8, ..., not 6"):
        VQSettings(stride=6)
    with pytest.raises(ValueError, match="pictures of 30 x 32 pixels have no whole number of squares of 4 pixels"):
        tiny().grid(30, 32)
