import torch

from hybrid_ssl.nn.decoder import Decoder
from hybrid_ssl.nn.sincos import sincos_2d


def positions() -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.stack([torch.randperm(6), torch.randperm(6)])
    return order[:, :2].sort().values, order[:, 2:].sort().values


def test_equals_the_decoder_that_restores_the_order_and_decodes_every_token() -> None:
    decoder = Decoder(width=10, grid=(2, 3), out=7, dim=16, depth=2, heads=4).double()
    cls, patches = torch.randn(2, 10).double(), torch.randn(2, 2, 10).double()
    visible, hidden = positions()

    x = decoder.mask_token.expand(2, 6, -1).clone()
    for image in range(2):
        x[image, visible[image]] = decoder.embed(patches[image])
    x = torch.cat([decoder.embed(cls)[:, None], x], dim=1) + sincos_2d(16, (2, 3), cls=True).double()
    for block in decoder.blocks:
        x = block(x)
    everywhere = decoder.pred(decoder.norm(x))[:, 1:]

    there = torch.stack([everywhere[image, hidden[image]] for image in range(2)])
    here = decoder(cls, patches, visible, hidden)
    torch.testing.assert_close(here, there)
    weights = list(decoder.parameters())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), weights) for y in (here, there)), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_start_as_in_the_paper() -> None:
    decoder = Decoder(width=96, grid=(14, 14), out=768, dim=128, depth=1, heads=4)
    bound = (6 / (128 + 3 * 128)) ** 0.5  # queries, keys and values drawn as one matrix
    weight = decoder.blocks[0].attn.qkv.weight
    assert bound * 0.99 < weight.abs().max() <= bound
    assert not any(module.bias.any() for module in decoder.modules() if isinstance(module, torch.nn.Linear))
    assert 0.015 < decoder.mask_token.std() < 0.025


def test_positions_are_neither_trained_nor_saved() -> None:
    decoder = Decoder(width=8, grid=(2, 2), out=4, dim=8, depth=1, heads=2)
    assert "pos_embed" not in decoder.state_dict() and not decoder.pos_embed.requires_grad
