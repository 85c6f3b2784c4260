"""MultiMAE against its published form, computed pixel by pixel on a canvas of all modalities, and its six claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_ssl.assemble import build_loader, build_pretrainer, lay_out
from hybrid_ssl.data.sources import open_source
from hybrid_ssl.encoder import wrap
from hybrid_ssl.nn.adapters import Adapter, standardise
from hybrid_ssl.nn.cross_decoder import CrossDecoder
from hybrid_ssl.objectives.mae import MAE, MAESettings
from hybrid_ssl.objectives.multimae import MultiMAE
from hybrid_ssl.plan import Batch, EncoderSpec, Forward, Modality, Tokens
from hybrid_ssl.train import DONE
from tests.objectives import harness
from tests.runs import (
    MOCO_ENTRY,
    SWIN,
    assert_same_bits,
    newest_tensors,
    pretrain,
    recipe_data,
    tiny_recipe,
    write_recipe,
)

ROWS, COLUMNS, CLASSES = 3, 2, 4
N = ROWS * COLUMNS
VIEWS = ("rgb", "depth", "semseg")
SPEC = EncoderSpec(
    dim=24,
    stride=4,
    grids=dict.fromkeys(VIEWS, (ROWS, COLUMNS)),
    crops=dict.fromkeys(VIEWS, 1),
    modalities={"depth": Modality(patch=4, channels=2), "semseg": Modality(patch=2, classes=CLASSES)},
)
SMALL: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 4}
CASES = {
    "three": SMALL,
    "without the second decoder": SMALL | {"norm_pixels": False},
    "two": SMALL | {"beside": ["semseg"], "mask": "pair", "decoder_depth": 0},
    "one": SMALL | {"beside": [], "mask": "alone"},
}


def build(**more: Any) -> MultiMAE:
    objective = harness.build("multimae", SMALL | more, SPEC)
    assert isinstance(objective, MultiMAE)
    return objective


def make_inputs(objective: MultiMAE, images: int = 4, mask: Tensor | None = None) -> harness.Inputs:
    masks = None if mask is None else {"dirichlet": mask}
    return harness.make_inputs(objective.needs, images, spec=SPEC, masks=masks)


def uneven_mask() -> Tensor:
    """Six of 18 tokens visible: all images of one row, all labels of another, and of two or three modalities."""
    visible = [[0, 1, 2, 3, 4, 5], [1, 6, 7, 8, 10, 11], [0, 4, 8, 13, 16, 17], [12, 13, 14, 15, 16, 17]]
    mask = torch.ones(4, 3 * N, dtype=torch.bool)
    for row, places in enumerate(visible):
        mask[row, places] = False
    return mask


# The published form: one canvas of all slots, context and queries cut out of it, losses in pixels


def canvas_prediction(decoder: CrossDecoder, cls: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
    """[N, out] of one sample; torch's own attention and transformer layers with the decoder's weights."""
    d, heads, (shown,) = decoder.embed.out_features, decoder.cross.heads, (~mask).nonzero(as_tuple=True)
    canvas = decoder.mask_token[0].expand(len(mask), d).clone()
    canvas[shown] = decoder.embed(patches)
    canvas = canvas + decoder.positions.repeat(len(mask) // N, 1) + decoder.modality.repeat_interleave(N, dim=0)
    context = torch.cat([canvas[shown], decoder.embed(cls)[None]])
    queries = canvas[decoder.own * N : (decoder.own + 1) * N]
    attention = nn.MultiheadAttention(d, heads, batch_first=True, dtype=torch.float64)
    attention.in_proj_weight.data = torch.cat([decoder.cross.q.weight, decoder.cross.kv.weight])
    attention.in_proj_bias.data = torch.cat([decoder.cross.q.bias, decoder.cross.kv.bias])
    attention.out_proj.load_state_dict(decoder.cross.proj.state_dict())
    known = decoder.context_norm(context)[None]
    x = attention(decoder.query_norm(queries)[None], known, known)[0][0]
    x = x + decoder.mlp.fc2(F.gelu(decoder.mlp.fc1(decoder.norm(x))))
    for block in decoder.blocks:
        layer = nn.TransformerEncoderLayer(d, heads, 4 * d, 0, "gelu", 1e-6, True, True, dtype=torch.float64).eval()
        renamed = {"attn": "self_attn", "attn.qkv": "self_attn.in_proj", "mlp.fc1": "linear1", "mlp.fc2": "linear2"}
        state = {}
        for name, value in block.state_dict().items():
            part, kind = name.rsplit(".", 1)
            part = {"attn.proj": "self_attn.out_proj"}.get(part, renamed.get(part, part))
            state[f"{part}_{kind}" if part.endswith("in_proj") else f"{part}.{kind}"] = value
        layer.load_state_dict(state)
        x = layer(x[None])[0]
    return decoder.pred(x)


def pixel_loss(objective: MultiMAE, name: str, predicted: list[Tensor], batch: Batch) -> Tensor:
    """Errors in pixels, times the mask in pixels; mean of each sample, then of the samples that have any."""
    task, means = objective.tasks[name], []
    patch = 4 if task.modality is None else task.modality.patch
    for row, rows in enumerate(predicted):
        target = batch.views[task.view][row]
        image = F.fold(rows.T, target.shape[1:], patch, stride=patch)  # channel slowest inside a patch
        hidden = batch.masks["dirichlet"][row, task.number * N : (task.number + 1) * N].view(ROWS, COLUMNS)
        hidden = hidden.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        if name == "semseg":
            ids = target[0].long()
            counted = hidden & (ids < CLASSES)
            error = -image.log_softmax(0).gather(0, ids.clamp(max=CLASSES - 1)[None])[0]
        else:
            if name.endswith("normed"):
                cut = F.unfold(target[None], patch, stride=patch)
                target = F.fold(
                    (cut - cut.mean(1, True)) / (cut.var(1, keepdim=True) + 1e-6).sqrt(), target.shape[1:], patch,
                    stride=patch,
                )[0]  # fmt: skip
            counted, error = hidden, image - target
            error = (error.abs() if name == "depth" else error.square()).mean(0)
        if counted.any():  # the official mean over samples skips the NaN of the others
            means.append(error[counted].mean())
    return torch.stack(means).mean()


def test_loss_and_gradients_equal_the_published_form_in_pixels() -> None:
    objective, mask = build(), uneven_mask()
    for parameter in objective.parameters():
        nn.init.normal_(parameter, std=0.2)  # norms and mask tokens too
    tokens, batch = make_inputs(objective, mask=mask)
    seen = tokens[objective.visible]
    expected = {}
    for name, decoder in objective.decoders.items():
        predicted = [canvas_prediction(decoder, seen.cls[i], seen.patches[i], mask[i]) for i in range(4)]
        expected[name] = pixel_loss(objective, name, predicted, batch)
    terms = objective.loss(tokens, batch, harness.now())
    total = torch.stack(list(expected.values())).sum()
    torch.testing.assert_close(terms, {"loss": total} | expected, rtol=1e-10, atol=0)
    ours, theirs = (torch.autograd.grad(loss, seen[:2]) for loss in (terms["loss"], total))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("multimae", CASES[case], SPEC)


def test_state_round_trip() -> None:
    harness.check_state("multimae", SMALL, SPEC)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("multimae", CASES, SPEC)


def test_half_precision() -> None:
    harness.check_half_precision("multimae", SMALL, spec=SPEC)


def test_overfits_eight_images() -> None:
    objective = build(decoder_dim=64, decoder_depth=1, norm_pixels=False)
    tokens, batch = make_inputs(objective, images=8)
    leaves = [nn.Parameter(x.detach()) for x in tokens[objective.visible][:2]]
    optimizer = torch.optim.AdamW([*objective.parameters(), *leaves], lr=1e-2)
    losses = []
    for step in range(100):
        loss = objective.loss({objective.visible: Tokens(*leaves)}, batch, harness.now(step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_visible_tokens_are_no_targets() -> None:
    objective = build(norm_pixels=False)
    tokens, batch = make_inputs(objective, mask=uneven_mask())
    changed = {name: view.clone() for name, view in batch.views.items()}
    changed["rgb"][0, :, :4, :4] += 1  # token 0 of the images, visible in row 0
    changed["depth"][1, :, :4, :8] -= 1  # tokens 0 and 1 of the depth, visible in row 1
    changed["semseg"][2, :, 4:, 2:] = 1  # token 5 of the labels, visible in row 2
    before, after = (
        objective.loss(tokens, batch._replace(views=views), harness.now()) for views in (batch.views, changed)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_wholly_visible_modality_costs_nothing_and_keeps_its_graph() -> None:
    objective, mask = build(norm_pixels=False), torch.ones(4, 3 * N, dtype=torch.bool)
    mask[:, N : 2 * N] = False
    tokens, batch = make_inputs(objective, mask=mask)
    terms = objective.loss(tokens, batch, harness.now())
    terms["loss"].backward()
    assert terms["depth"] == 0 and terms["rgb"] > 0
    assert all(p.grad is not None and not p.grad.any() for p in objective.decoders["depth"].parameters())


def test_alone_the_images_share_the_pass_of_mae_and_average_as_it_does() -> None:
    objective = harness.build("multimae", CASES["one"] | {"norm_pixels": False}, SPEC)
    mae = MAE(MAESettings(name="mae", view="rgb", mask="alone", **SMALL), SPEC)
    assert isinstance(objective, MultiMAE) and objective.needs == mae.needs
    tokens, batch = harness.make_inputs(objective.needs, spec=SPEC)
    decoder = objective.decoders["rgb"]
    assert isinstance(decoder, CrossDecoder)
    nn.init.zeros_(decoder.pred.weight)  # predicts 0: the loss is the mean square of the hidden pixels
    hidden = F.unfold(batch.views["rgb"], 4, stride=4).transpose(1, 2)[batch.masks["alone"]]
    torch.testing.assert_close(objective.loss(tokens, batch, harness.now())["loss"], hidden.square().mean())


def test_reconstruction_keeps_visible_pixels() -> None:
    objective = build()
    tokens, batch = make_inputs(objective, mask=uneven_mask())
    nn.init.zeros_(objective.decoders["rgb"].pred.weight)
    painted = objective.reconstruct(tokens, batch)
    hidden = batch.masks["dirichlet"][:, :N].view(4, 1, ROWS, COLUMNS).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(painted, batch.views["rgb"].masked_fill(hidden, 0))


@pytest.mark.parametrize(
    "settings", [{"decoder_heads": 5}, {"beside": ["depth", "depth"]}, {"beside": ["rgb"]}], ids=str
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"does not divide|different views"):
        build(**settings)


def test_view_of_images_is_refused_as_a_modality() -> None:
    spec = EncoderSpec(24, 4, grids={"rgb": (2, 2), "other": (2, 2)}, crops={"rgb": 1, "other": 1})
    with pytest.raises(ValueError, match=r"view 'other' is of no other modality.*modality: depth"):
        harness.build("multimae", SMALL | {"beside": ["other"]}, spec)


# The encoder's part


def tiny_vit(**more: Any) -> Any:
    torch.manual_seed(0)
    args: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return wrap(timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **args | more)).double()


@pytest.mark.parametrize("more", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_hidden_modalities_leave_the_pass_of_the_images_as_it_is(more: dict[str, Any]) -> None:
    encoder = tiny_vit(**more)
    encoder.add_adapter("depth", Modality(4), (4, 4))
    encoder.add_adapter("semseg", Modality(2, classes=3), (4, 4))
    encoder.double()
    images, own = torch.randn(2, 3, 16, 16).double(), torch.rand(2, 16).argsort(1) < 12
    maps = {"depth": torch.randn(2, 1, 16, 16), "semseg": torch.randint(4, (2, 1, 8, 8)).to(torch.int16)}
    mask = torch.cat([own, torch.ones(2, 32, dtype=torch.bool)], dim=1)
    both = encoder(images, mask, visible=4, beside=maps), encoder(images, own, visible=4)
    torch.testing.assert_close(*both)
    mask[:, [0, 20, 40]] = ~mask[:, [0, 20, 40]]
    mask = torch.ones_like(mask).scatter(1, torch.tensor([[1, 17, 30, 45], [2, 3, 18, 33]]), False)
    tokens = encoder(images, mask, visible=4, beside=maps)
    assert tokens.patches.shape == (2, 4, 32) and not torch.allclose(tokens.patches, both[0].patches)


def test_adapter_is_a_convolution_with_positions() -> None:
    torch.manual_seed(0)
    adapter, x = Adapter(24, (3, 2), patch=4, channels=2), torch.randn(5, 2, 12, 8)
    kernel = adapter.proj.weight.view(24, 2, 4, 4)
    expected = F.conv2d(x, kernel, adapter.proj.bias, stride=4).flatten(2).transpose(1, 2) + adapter.positions
    torch.testing.assert_close(adapter(x), expected)


def test_label_adapter_embeds_each_class_and_pixels_without_label() -> None:
    torch.manual_seed(0)
    adapter = Adapter(24, (1, 1), patch=2, classes=3)
    assert adapter.classes is not None and adapter.classes.num_embeddings == 4
    ids = torch.tensor([[[[0, 3], [2, 2]]]], dtype=torch.int16)
    embedded = adapter.classes(torch.tensor([0, 3, 2, 2])).T.reshape(1, -1)  # channel slowest
    torch.testing.assert_close(adapter(ids)[:, 0], adapter.proj(embedded) + adapter.positions)


def test_standardising_uses_the_middle_values_only() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 10, 10, generator=draw).double() * 5 + 7
    middle = x.flatten(1).sort(1).values[:, 10:90]
    expected = (x - middle.mean(1).view(-1, 1, 1, 1)) / (middle.var(1).view(-1, 1, 1, 1) + 1e-6).sqrt()
    torch.testing.assert_close(standardise(x), expected)
    far = x.clone()
    far.view(3, -1).scatter_(1, x.flatten(1).argmax(1, True), 1e6)  # one broken pixel in each
    others = far < 1e6
    torch.testing.assert_close(standardise(far)[others], standardise(x)[others])
    assert torch.equal(standardise(torch.full((1, 1, 4, 4), 3.0)), torch.zeros(1, 1, 4, 4))


# Whole runs: views, masks and plan from a recipe

MAPS = {"edges": {"derive": "sobel"}, "levels": {"derive": "levels", "classes": 5}}
SECTIONS: dict[str, Any] = {
    "encoder": {"drop_path": 0.1},
    "data": {"modalities": MAPS},
    "views": {
        "plain": {"size": 16},
        "depth": {"size": 16, "like": "plain", "modality": "edges"},
        "semseg": {"size": 8, "like": "plain", "modality": "levels"},
    },
    "masks": {"dirichlet": {"kind": "dirichlet", "view": "plain", "beside": ["depth", "semseg"], "ratio": 0.8}},
}
ENTRY = {"multimae": SMALL | {"view": "plain"}}


def pretrainer_of(sections: dict[str, Any], entry: dict[str, Any] = ENTRY) -> Any:
    recipe = tiny_recipe(entry, **sections)
    return build_pretrainer(recipe, [0.3], [0.3], layout=lay_out(recipe, 1))


def test_one_pass_sees_a_part_of_all_modalities() -> None:
    pretrainer = pretrainer_of(SECTIONS)
    assert pretrainer.plan == (Forward("student", "plain", "dirichlet", drop=True, beside=("depth", "semseg")),)
    assert str(pretrainer.plan[0]) == "student plain+depth+semseg, dirichlet dropped"
    assert pretrainer.visible["dirichlet"] == 9  # of 48
    assert pretrainer.spec.modalities == {"depth": Modality(4), "semseg": Modality(2, classes=5)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"encoder": SWIN}, "every patch in its windows, so hidden ones cannot be dropped"),
        ({"encoder": {"name": "eva02_tiny_patch14_224"}}, "has its positions inside attention"),
        ({"masks": {"dirichlet": SECTIONS["masks"]["dirichlet"] | {"beside": ["depth"]}}}, r"is over plain, depth,"),
        ({"masks": {"dirichlet": {"kind": "random", "view": "plain", "ratio": 0.5}}}, "of kind: dirichlet"),
        ({"views": SECTIONS["views"] | {"depth": {"size": 16}}}, "'depth' is of no other modality"),
        ({"views": SECTIONS["views"] | {"semseg": {"size": 6, "like": "plain", "modality": "levels"}}}, "whole patch"),
    ],
    ids=["swin", "eva", "other views", "random mask", "images", "size"],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        pretrainer_of(SECTIONS | changes)


def test_run_resumes_to_the_bit_and_leaves_an_encoder_of_images(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = {"length": "4 steps", "checkpoint_every": "2 steps"}
    path = write_recipe(tmp_path, recipe_data(whole, ENTRY, run=run, **SECTIONS))
    assert pretrain(path) == DONE
    assert pretrain(path, f"run.out={parts}", "run.workers=2") == DONE
    assert_same_bits(newest_tensors(parts), newest_tensors(whole))
    for folder in (parts / "checkpoints" / "step-00000004", parts / "encoder"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert pretrain(path, f"run.out={parts}", "--resume") == DONE
    assert_same_bits(newest_tensors(parts), newest_tensors(whole))
    exported = timm.create_model(f"local-dir:{whole / 'encoder'}", pretrained=True).eval()
    assert exported(torch.randn(2, 1, 16, 16)).shape == (2, 32)
    assert not [name for name in exported.state_dict() if "adapter" in name]
    assert (whole / "views.png").is_file() and (whole / "reconstruction_multimae.png").is_file()


def test_beside_an_objective_with_a_teacher_every_parameter_has_a_user_and_a_layer() -> None:
    """The teacher sees images only; adapters are of the encoder's first layer."""
    views = {"global": {"size": 16, "crops": 2}, **SECTIONS["views"]}
    recipe = tiny_recipe(ENTRY | {"moco_v3": MOCO_ENTRY}, **SECTIONS | {"views": views})
    pretrainer = build_pretrainer(recipe, [0.3], [0.3], layout=lay_out(recipe, 1))
    source = open_source(recipe.data)
    loader = build_loader(recipe, source, pretrainer, lay_out(recipe, 1), total_steps=1)
    pretrainer(next(loader.iterate()), harness.now())[0].backward()
    assert [n for n, p in pretrainer.named_parameters() if p.requires_grad and p.grad is None] == []
    assert pretrainer.teacher is not None and not len(pretrainer.teacher.adapters)
    layers, _ = pretrainer.student.layer_ids()
    assert layers.keys() >= dict(pretrainer.student.named_parameters()).keys()
    assert layers["adapters.depth.proj.weight"] == layers["model.patch_embed.proj.weight"] == 0
