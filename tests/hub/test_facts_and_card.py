"""The card says what tensors and run say, in valid YAML, and nothing private."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

from hybrid_ssl.config import build_recipe
from hybrid_ssl.hub.card import write_card
from hybrid_ssl.hub.facts import CardFacts, facts_of, is_public, method_of, without_places
from hybrid_ssl.objectives import OBJECTIVES

CONFIG = {
    "architecture": "vit_tiny_patch16_224",
    "num_features": 48,
    "global_pool": "token",
    "pretrained_cfg": {"input_size": [4, 64, 32], "mean": [0.1, 0.2, 0.3, 0.4], "std": [0.5] * 4},
}
FACTS = CardFacts(
    title="vit_tiny pretrained with mae + moco_v3",
    network="teacher",
    objectives={"mae": "1", "moco_v3": "0.1 to 1 over 50%"},
    methods={"mae": ("Masked autoencoder.", "2111.06377"), "moco_v3": ("Contrast.", "2104.02057")},
    data=["embedded:fashion_mnist", "user/plankton"],
    images=10_000,
    steps=780,
    epochs=20,
    batch_size=256,
    seconds=270,
    hardware="2 CPU cores",
    probe={"this encoder": 0.8223, "before training": 0.54, "raw pixels": 0.81},
)


def card(facts: CardFacts = FACTS, licence: str = "mit", heads: tuple[str, ...] = ()) -> tuple[dict[str, Any], str]:
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, depth=1, embed_dim=48, num_heads=3, img_size=64, in_chans=4
    )
    text = write_card(model, CONFIG, facts, licence, heads)
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_header_is_yaml_that_the_hub_reads() -> None:
    header, _ = card()
    assert header["license"] == "mit" and header["library_name"] == "timm"
    assert header["pipeline_tag"] == "image-feature-extraction"
    assert {"self-supervised-learning", "mae", "moco_v3", "timm", "transformers"} <= set(header["tags"])
    assert header["datasets"] == ["user/plankton"] and "base_model" not in header
    metrics = header["model-index"][0]["results"][0]["metrics"]
    assert {m["name"]: m["value"] for m in metrics} == {
        "k-NN top-1 (this encoder)": 0.8223,
        "k-NN top-1 (before training)": 0.54,
        "k-NN top-1 (raw pixels)": 0.81,
    }


def test_a_licence_of_ones_own_is_written_as_the_hub_wants_it() -> None:
    header, body = card(licence="Museum of Plankton, internal use")
    assert header["license"] == "other" and header["license_name"] == "museum-of-plankton-internal-use"
    assert "`Museum of Plankton, internal use`, chosen by who trained them" in body
    assert "license_name" not in card(licence="cc-by-nc-4.0")[0] and card(licence="other")[0]["license"] == "other"


def test_body_says_how_to_load_and_what_was_measured() -> None:
    _, body = card(heads=("mae.w", "moco_v3.w"))
    for text in (
        "timm.create_model('local-dir:FOLDER', pretrained=True)",
        "AutoModel.from_pretrained('FOLDER')",
        "4 channels, 64 x 32 pixels",
        "mean [0.1, 0.2, 0.3, 0.4]",
        "teacher encoder",
        "| raw pixels | 0.8100 |",
        "2 tensors of the heads (mae, moco_v3)",
        "https://arxiv.org/abs/2111.06377",
        "moco_v3 (0.1 to 1 over 50%)",
        "780",
        "2 CPU cores",
        "normalise the 4 of this encoder yourself",
    ):
        assert text in body, text


def test_what_is_unknown_is_not_mentioned() -> None:
    header, body = card(CardFacts())
    assert "model-index" not in header and "datasets" not in header
    assert "None" not in body and "## Training" not in body and "## Numbers" not in body


@pytest.mark.parametrize(
    ("source", "public"),
    [
        ("embedded:fashion_mnist", True),
        ("cifar10", True),
        ("user/data-set", True),
        ("/home/lovelace/scans", False),
        ("./images", False),
        ("../images", False),
        ("~/images", False),
        ("C:\\scans", False),
        ("a/b/c", False),
        ("list.txt", False),
        ("shards-{0..9}.tar", False),
        ("s3://bucket/scans", False),
        ("tests", False),  # exists here
    ],
)
def test_only_what_anybody_can_look_up_is_public(
    source: str, public: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    assert is_public(source) is public


def recipe(**encoder: Any) -> Any:
    return build_recipe(
        {
            "run": {"length": "10 epochs", "batch_size": 64, "out": "/home/lovelace/runs/secret"},
            "encoder": {"name": "vit_tiny_patch16_224", **encoder},
            "data": {"source": ["/home/lovelace/patients", "user/plankton"], "channels": 3},
            "views": {"plain": {"size": 64}},
            "masks": {"random": {"kind": "random", "view": "plain", "ratio": 0.75}},
            "objectives": {"mae": {"weight": {"start": 0.1, "end": 1, "over": "50%"}}},
            "optimizer": {"lr": 1e-3},
        }
    )


def test_facts_of_a_run_hold_no_place_and_no_token(tmp_path: Path) -> None:
    facts = facts_of(recipe(init="/home/lovelace/old"), network="student", step=30, steps_per_epoch=10, images=640)
    assert facts.objectives == {"mae": "0.1 to 1 over 50%"} and facts.epochs == 3 and facts.batch_size == 64
    assert facts.methods["mae"][1] == "2111.06377"
    header, body = card(facts)
    text = json.dumps(facts.summary()) + json.dumps(header) + body
    assert "lovelace" not in text and "patients" not in text and "secret" not in text
    assert "user/plankton" in text and "local images" in text
    canary = "hf_" + "AbCdEf1234" * 3
    assert canary not in json.dumps(without_places({"a": [f"x {canary}"], "b": {"c": f"https://u:{canary}@h/x"}}))


def test_published_weights_that_a_run_started_from_are_named() -> None:
    facts = facts_of(recipe(init="timm"), network="student", step=1, steps_per_epoch=1)
    assert facts.base_model == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert card(facts)[0]["base_model"] == facts.base_model


@pytest.mark.parametrize(
    ("init", "base_model", "spoken"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", "timm/vit_tiny_patch16_224.augreg_in21k", None),
        ("hf-hub:user/encoder", "user/encoder", None),
        ("mae_pretrain_vit_tiny.pth", None, "a checkpoint file"),
        ("/home/lovelace/dino.pth", None, "a checkpoint file"),
        ("/home/lovelace/old", None, "an earlier run"),
    ],
)
def test_card_says_what_a_run_started_from(init: str, base_model: str | None, spoken: str | None) -> None:
    header, body = card(facts_of(recipe(init=init), network="student", step=1, steps_per_epoch=1))
    assert header.get("base_model") == base_model
    assert f"| started from | {base_model or spoken} |" in body


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_names_its_paper(name: str) -> None:
    method = method_of(name)
    assert method is not None and len(method[0]) > 10 and method[1][:2].isdigit()
