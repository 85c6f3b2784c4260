"""Every protocol on an exported ViT and an exported Swin: numbers, files, one pass, one or two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from hybrid_ssl.downstream.evaluation import features
from hybrid_ssl.downstream.evaluation.attentive import AttentivePool, heads_of
from hybrid_ssl.downstream.evaluation.embed import Embedder, digest
from hybrid_ssl.downstream.evaluation.heads import Head, seeded
from hybrid_ssl.downstream.evaluation.linear import Linear
from hybrid_ssl.downstream.evaluation.run import evaluate as run
from hybrid_ssl.optim import OptimizerSettings
from hybrid_ssl.schedule import Progress
from tests.downstream.tiny import build
from tests.ranks import run_two_ranks

from .tiny import PROTOCOLS, SIDE, evaluate, pictures, recipe

HEADLINES = {"lowshot": "5%", "retrieval": "mAP"}


@pytest.fixture(scope="module", params=["vit", "swin"])
def done(request: pytest.FixtureRequest, encoders: dict[str, Path], data: Path, tmp_path_factory) -> Path:
    """The output folder of all protocols on one encoder."""
    out = tmp_path_factory.mktemp(request.param)
    run(recipe(encoders[request.param], data, out))
    return out


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_beats_chance_and_says_what_it_measured(done: Path, protocol: str) -> None:
    found = json.loads((done / protocol / "results.json").read_text())
    assert found["task"] == protocol and found["metric"] == HEADLINES.get(protocol, "top1")
    assert found["value"] == found["metrics"][found["metric"]] > 0.5  # three colours, random weights
    assert found["encoder"]["random"] is False and found["encoder"]["parameters"] > 1000
    assert found["data"]["images"] == {"train": 48, "test": 24} and found["data"]["classes"] == 3
    assert found["data"]["source"] == "local images" and str(done.parent) not in json.dumps(found)


def test_knn_stands_beside_raw_pixels_and_leaves_out_what_is_too_large(done: Path) -> None:
    metrics = json.loads((done / "knn/results.json").read_text())["metrics"]
    assert metrics.keys() == {"top1", "mean_class", "k=1", "k=5", "raw_pixels", "raw_pixels/k=1", "raw_pixels/k=5"}


def test_linear_says_what_was_chosen_without_the_test_images(done: Path) -> None:
    found = json.loads((done / "linear/results.json").read_text())
    chosen = found["chosen"]
    assert chosen["sweep"]["lr"] in (0.01, 1.0) and chosen["mae"]["lr"] in (10.0, 100.0)
    assert 0 < chosen["sweep"]["held_out"] <= 1 and chosen["sweep"]["features"].startswith("block1")


def test_draws_are_files_with_names_that_others_find(done: Path, data: Path) -> None:
    for share, count in (("5", 3), ("30", 15)):
        lines = [(done / f"lowshot/{share}percent-seed{number}.txt").read_text().split() for number in (0, 1)]
        assert all(len(set(each)) == count for each in lines) and lines[0] != lines[1]
        assert all((data / "train" / line).is_file() for line in lines[0])


def test_a_second_evaluation_reads_the_features_and_finds_the_same(
    done: Path, encoders: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the encoder ran again")

    kind = done.name.rstrip("0123456789")
    monkeypatch.setattr(features, "_run", refuse)
    again = recipe(
        encoders[kind], data, tmp_path, protocols=["knn", "retrieval"], run={"cache": str(done / "features")}
    )
    run(again)
    for protocol in ("knn", "retrieval"):
        before, after = (json.loads((out / protocol / "results.json").read_text()) for out in (done, tmp_path))
        assert before["metrics"] == after["metrics"]


def two_evaluations(encoder: str, data: str, out: str) -> dict[str, dict[str, float]]:
    """Everything from memory, then probes whose encoder runs in every step."""
    whole = run(recipe(encoder, data, f"{out}/a"))
    live = {"memory": 0.0, "augment": True, "epochs": 2, "lrs": [1e-3]}
    extra = recipe(encoder, data, f"{out}/b", protocols=["attentive"], attentive=live)
    return {name: found.metrics for name, found in whole.items()} | {"live": run(extra)["attentive"].metrics}


def test_two_processes_find_what_one_finds(encoders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    one = two_evaluations(str(encoders["vit"]), str(data), str(tmp_path / "one"))
    both = run_two_ranks(two_evaluations, str(encoders["vit"]), str(data), str(tmp_path / "two"))
    assert both[0] == both[1]
    assert {name: both[0][name] for name in PROTOCOLS} == {name: one[name] for name in PROTOCOLS}
    assert both[0]["live"]["top1"] == pytest.approx(one["live"]["top1"], abs=0.1)  # batches are cut in other places
    assert (tmp_path / "two/a/lowshot/5percent-seed0.txt").is_file()


def test_random_crops_train_a_linear_probe(encoders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    kinds = {"kinds": ["sweep"], "augment": True, "sweep": {"lrs": [0.1], "blocks": [1], "epochs": 3}}
    found = run(
        recipe(encoders["vit"], data, tmp_path, protocols=["linear"], linear=kinds, crops={"scale": [0.5, 1.0]})
    )
    assert found["linear"].metrics["top1"] > 0.5


def test_random_weights_have_a_seed_and_another_place_on_disk(
    encoders: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    words = [encoders["vit"], "--data", data, "--protocol", "knn", "--random", "knn.k=[3]", "run.workers=0"]
    numbers = []
    for seed in ("0", "1", "0"):
        assert evaluate(*words, "--seed", seed, "--out", tmp_path / seed, "--cache", tmp_path / "cache") == 0
        found = json.loads((tmp_path / seed / "knn/results.json").read_text())
        numbers.append(found["metrics"])
        assert found["encoder"]["random"] is True and found["seed"] == int(seed)
    assert numbers[0] == numbers[2]
    kept = sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir())
    assert kept == ["pixels", "pooled", "pooled"]  # the pixels are everybody's


def test_broken_images_are_named_counted_and_left_out(
    encoders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "data", train=12, test=4)
    (folder / "train/red/03.png").write_bytes(b"no picture")
    (folder / "test/blue/00.png").write_bytes(b"")
    found = run(recipe(encoders["vit"], folder, tmp_path / "out", protocols=["knn"]))
    said = capsys.readouterr().out
    assert "red/03.png" in said and "blue/00.png" in said and found["knn"].metrics["top1"] > 0.5
    result = json.loads((tmp_path / "out/knn/results.json").read_text())["data"]
    assert result["broken"] == 2 and result["images"] == {"train": 35, "test": 11}
    strict = recipe(encoders["vit"], folder, tmp_path / "out", protocols=["knn"], run={"max_broken": 0.01})
    with pytest.raises(ValueError, match="run.max_broken"):
        run(strict)


def test_what_is_wrong_ends_in_one_sentence_and_code_2(
    encoders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vit, out = encoders["vit"], tmp_path / "out"
    picture = Image.new("RGB", (8, 8))
    other = ("other/train/a", "other/train/b", "other/test/c", "other/test/d")
    for place in ("single/train/only", "single/test/only", "plain", *other):
        (tmp_path / place).mkdir(parents=True)
        for name in ("1.png", "2.png"):
            picture.save(tmp_path / place / name)
    cases = [
        ([vit, "--data", data, "--protocol", "nearest"], "protocols"),
        ([vit, "--data", data, "knn.kk=3"], "did you mean 'k'"),
        ([vit, "--data", data, "knn.k=[900]"], "900"),
        ([vit], "--data"),
        (["no_such_encoder", "--data", data], "no_such_encoder"),
        ([vit, "--data", tmp_path / "nowhere"], "nowhere"),
        ([vit, "--data", tmp_path / "plain"], "no test set"),
        ([vit, "--data", tmp_path / "plain", "data.hold_out=0.2"], "needs labels"),
        ([vit, "--data", tmp_path / "single"], "needs labels"),
        ([vit, "--data", tmp_path / "other"], "c, d instead of a, b"),
        ([vit, "--data", data, "data.channels=13"], "channel"),
        ([encoders["swin"], "--data", data, "encoder.pooling=cls"], "class token"),
    ]
    for words, message in cases:
        assert evaluate(*words, "--out", out, "run.workers=0") == 2, words
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and "Traceback" not in said, said
    assert not list(out.glob("*/results.json"))


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_pooled_features_are_what_users_get(family: str) -> None:
    model = build(family, 3, SIDE).eval()
    images = torch.randint(0, 256, (5, 3, SIDE, SIDE), dtype=torch.uint8)
    x = (images / 255 - 0.5) / 0.25
    found = Embedder(model, [0.5] * 3, [0.25] * 3)(images, ("pooled", "blocks", "tokens"))
    with torch.no_grad():
        assert torch.equal(found["pooled"], model(x))
        last = model.forward_features(x)
    if family == "vit":
        torch.testing.assert_close(found["block1"], last[:, 0])
        torch.testing.assert_close(found["tokens"], last[:, 1:])
        torch.testing.assert_close(found["avg"], last[:, 1:].mean(1))
        pooled = Embedder(model, [0.5] * 3, [0.25] * 3, pooling="avg")(images, ("pooled",))["pooled"]
        torch.testing.assert_close(pooled, found["avg"])
    else:
        torch.testing.assert_close(found["tokens"], last.flatten(1, 2))
        assert torch.equal(found["block1"], found["pooled"]) and "avg" not in found
        assert found["block2"].shape == (5, 8) and found["block2"].mean().abs() < 1e-5
    half = Embedder(model, [0.5] * 3, [0.25] * 3, precision="bf16")(images, ("pooled",))["pooled"]
    assert half.dtype == torch.float32 and 0 < (half - found["pooled"]).abs().max() < 0.2


def test_features_are_called_after_the_weights() -> None:
    a, b = build("vit", 3, SIDE), build("vit", 3, SIDE)
    assert digest(a) == digest(b)
    with torch.no_grad():
        next(b.parameters()).view(-1)[0] += 1e-3
    assert digest(a) != digest(b)


def test_maes_head_normalises_and_learns_by_steps_relative_to_its_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(36) % 3
    x = {"pooled": 1000 * (torch.randn(36, 8, generator=draw) + 3 * torch.eye(3, 8)[labels]) + 7}
    module = seeded(lambda: Linear(("pooled",), 8, 3, True), 0)
    assert isinstance(module.norm, nn.BatchNorm1d) and not list(module.norm.parameters())
    weight = module.get_parameter("head.weight")
    head = Head(module, OptimizerSettings(name="lars", lr=10.0, lr_per=None, weight_decay=0.0), 36, torch.device("cpu"))
    before = weight.detach().clone()
    head.step(x, labels, Progress(0, 40, 1))
    moved = float((weight.detach() - before).norm() / before.norm())
    assert moved == pytest.approx(10.0 * 0.001, rel=1e-4)  # LARS: lr x trust, whatever the gradient
    for step in range(1, 40):
        head.step(x, labels, Progress(step, 40, 1))
    assert (head.predict(x) == labels).float().mean() > 0.9  # with the averages over the batches


def test_attentive_pooling_is_attention_with_keys_and_values_of_every_token() -> None:
    pool = AttentivePool(12, 3, 5)
    x = torch.randn(4, 7, 12)
    k = torch.einsum("bnc,hdc->bhnd", x, pool.key)
    v = pool.value(x).unflatten(-1, (3, 4)).transpose(1, 2)
    q = pool.query.expand(4, 3, 4).unsqueeze(2)
    plain = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)
    torch.testing.assert_close(pool.pool(x), plain)
    assert [heads_of(dim, 64) for dim in (384, 768, 96, 40, 7)] == [6, 12, 2, 1, 1]
