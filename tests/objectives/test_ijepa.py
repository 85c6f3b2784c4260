import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_ssl.assemble import build_pretrainer, lay_out
from hybrid_ssl.config import Recipe, build_recipe
from hybrid_ssl.data.loader import Loader
from hybrid_ssl.data.sources import open_source
from hybrid_ssl.objectives.ijepa import IJEPA, IJEPASettings, normed_targets, target_positions
from hybrid_ssl.plan import Forward, Progress, Tokens
from tests.objectives import harness

SMALL = {"predictor_dim": 16, "predictor_depth": 2, "predictor_heads": 2}
CASES = {"two blocks": SMALL, "one block": {**SMALL, "predictor_depth": 1}}


def build(settings: harness.Settings = SMALL) -> IJEPA:
    objective = harness.build("ijepa", settings)
    assert isinstance(objective, IJEPA)
    return objective


def test_loss_is_the_papers_block_by_block() -> None:
    objective = build()
    tokens, batch = harness.make_inputs(objective.needs)
    for parameter in objective.parameters():
        nn.init.normal_(parameter, std=0.4)
    terms = []
    for image in range(4):
        teacher = F.layer_norm(tokens[objective.whole].patches[image], [32])  # all tokens, then the block's
        seen = (~batch.masks["blocks"][image]).nonzero().squeeze(1)[None]
        for block in range(2):
            where = batch.masks["blocks.targets"][image, block].nonzero().squeeze(1)
            context = tokens[objective.context].patches[image : image + 1]
            predicted = objective.predictor(context, seen, where[None, None])[0, 0]
            for a, b in zip(predicted.flatten().tolist(), teacher[where].flatten().tolist(), strict=True):
                terms.append((a - b) ** 2 / 2 if abs(a - b) < 1 else abs(a - b) - 0.5)
    assert {t > 0.5 for t in terms} == {True, False}, "both branches of smooth L1 have to be met"
    found = objective.loss(tokens, batch, harness.now())["loss"]
    torch.testing.assert_close(found.item(), sum(terms) / len(terms))


def test_targets_picked_before_the_norm_equal_those_picked_after() -> None:
    objective = build()
    tokens, batch = harness.make_inputs(objective.needs)
    wanted = target_positions(batch, "blocks.targets")
    found = normed_targets(tokens[objective.whole].patches, wanted)
    everything = F.layer_norm(tokens[objective.whole].patches, [32])
    for image, block in [(0, 0), (3, 1)]:
        assert torch.equal(found[image, block], everything[image, batch.masks["blocks.targets"][image, block]])


def test_positions_from_the_loaders_numbers_equal_those_of_the_mask() -> None:
    objective = build()
    _, batch = harness.make_inputs(objective.needs)
    numbers = {name: mask.flatten().nonzero().squeeze(1) for name, mask in batch.masks.items()}
    ready = batch._replace(hidden=numbers)
    found = target_positions(ready, "blocks.targets")
    assert found.shape == (4, 2, 3) and torch.equal(found, target_positions(batch, "blocks.targets"))
    hit = torch.zeros_like(batch.masks["blocks.targets"]).scatter(2, found, True)
    assert torch.equal(hit, batch.masks["blocks.targets"])


def test_context_is_dropped_and_the_teacher_sees_everything() -> None:
    objective = build()
    assert objective.needs == (Forward("student", "plain", "blocks", drop=True), Forward("teacher", "plain"))


def recipe(encoder: str, args: dict[str, object], mask: dict[str, object]) -> Recipe:
    return build_recipe(
        {
            "run": {"length": "3 steps", "batch_size": 8, "out": "never", "workers": 0},
            "encoder": {"name": encoder, "args": args},
            "data": {"source": "embedded:fashion_mnist", "limit": 32, "channels": 1, "mean": [0.3], "std": [0.3]},
            "views": {"plain": {"size": 32}},
            "masks": {"blocks": {"view": "plain", **mask}},
            "objectives": {"ijepa": SMALL},
            "optimizer": {"lr": 1e-3},
        }
    )


VIT: dict[str, object] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}


def loader_of(made: Recipe, **options: int) -> Loader:
    sizes = {"batch_size": 8, "grids": {"plain": (8, 8)}, "stride": 4, **options}
    return Loader(open_source(made.data), made.data, made.views, made.masks, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [{}, {"class_token": False, "global_pool": "avg"}], ids=["class token", "none"])
def test_trains_a_vit_on_the_loaders_masks(tokens: dict[str, object]) -> None:
    made = recipe("vit_tiny_patch16_224", {**VIT, **tokens}, {"kind": "multiblock"})
    pretrainer = build_pretrainer(made, [0.3], [0.3], layout=lay_out(made, 1))
    sizes = set()
    for step, batch in zip(range(3), loader_of(made).iterate(), strict=False):
        loss, logs = pretrainer(batch, Progress(step, 3, 4))
        loss.backward()
        sizes.add(target_positions(batch, "blocks.targets").shape[2])
        assert (~batch.masks["blocks"]).sum(1).tolist() == [16] * 8 and logs["ijepa/target_spread"] > 0.1
    assert len(sizes) > 1, "a new size for each step"
    assert not [n for n, p in pretrainer.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_two_processes_draw_the_blocks_of_one() -> None:
    made = recipe("vit_tiny_patch16_224", VIT, {"kind": "multiblock"})
    whole = next(loader_of(made).iterate(2))
    parts = [next(loader_of(made, rank=rank, world=2).iterate(2)) for rank in range(2)]
    for name in ("blocks", "blocks.targets"):
        assert torch.equal(torch.cat([part.masks[name] for part in parts]), whole.masks[name])


def test_a_swin_and_a_mask_of_another_kind_are_refused() -> None:
    swin = recipe("swin_tiny_patch4_window7_224", {"window_size": 2, "patch_size": 2}, {"kind": "multiblock"})
    with pytest.raises(ValueError, match="needs every patch in its windows, so hidden ones cannot be dropped"):
        build_pretrainer(
            swin.model_copy(update={"views": {"plain": swin.views["plain"].model_copy(update={"size": 128})}}),
            [0.3], [0.3], layout=lay_out(swin, 1),
        )  # fmt: skip
    random = recipe("vit_tiny_patch16_224", VIT, {"kind": "random", "ratio": 0.75})
    with pytest.raises(ValueError, match="predicts the target blocks of mask 'blocks', which is of kind random: set"):
        build_pretrainer(random, [0.3], [0.3], layout=lay_out(random, 1))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="predictor_heads 5 does not divide predictor_dim 16"):
        IJEPASettings(name="ijepa", predictor_dim=16, predictor_heads=5)


def test_spread_of_targets_tells_a_collapse() -> None:
    objective = build()
    tokens, batch = harness.make_inputs(objective.needs)
    healthy = objective.loss(tokens, batch, harness.now())["target_spread"]
    one = torch.randn(32, dtype=torch.float64).expand(4, 16, 32)
    tokens[objective.whole] = tokens[objective.whole]._replace(patches=one)
    assert healthy > 0.8 and objective.loss(tokens, batch, harness.now())["target_spread"] < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("ijepa", CASES[case])


def test_state_round_trip() -> None:
    harness.check_state("ijepa", SMALL)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("ijepa", CASES)


def test_half_precision() -> None:
    harness.check_half_precision("ijepa", SMALL)


def test_overfits_eight_images() -> None:
    objective = build({**SMALL, "predictor_dim": 32, "predictor_depth": 1})
    tokens, batch = harness.make_inputs(objective.needs, images=8)
    leaves = [nn.Parameter(x.detach()) for x in tokens[objective.context][:2]]
    optimizer = torch.optim.AdamW([*objective.parameters(), *leaves], lr=2e-2)
    losses: list[Tensor] = []
    for _ in range(100):
        optimizer.zero_grad()
        losses.append(objective.loss({**tokens, objective.context: Tokens(*leaves)}, batch, harness.now())["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.25 * losses[0]
