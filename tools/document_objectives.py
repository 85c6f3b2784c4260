#!/usr/bin/env python3
"""Write docs/objectives.md: one table of all objectives, from the code where possible, so that it cannot drift.

    python tools/document_objectives.py            # rewrites the file; a test compares it with what this prints

What an objective needs is read from the objective itself, built after its recipe; its paper from its module's
docstring; what was run here from docs/trials.json (written by `python -m tests.trials docs/trials.json`). Only
judgements and published numbers stand in this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the reduced recipes are the tests'

from hybrid_ssl.assemble import build_pretrainer, lay_out  # noqa: E402
from hybrid_ssl.config import build_recipe  # noqa: E402
from hybrid_ssl.hub.facts import method_of  # noqa: E402
from hybrid_ssl.objectives import OBJECTIVES  # noqa: E402
from tests.trials import BATCH, IMAGES, STEPS, alone  # noqa: E402

TARGET, TRIALS = ROOT / "docs/objectives.md", ROOT / "docs/trials.json"


class Note(NamedTuple):
    """What the code does not know."""

    batch: str
    """how much it suffers from small batches"""
    good_for: str
    published: str


FROZEN, TUNING, BOTH = "frozen features", "fine-tuning", "both"
NOTES = {
    "mae": Note("none", TUNING, "ViT-B fine-tuned 83.6, linear 68.0"),
    "simmim": Note("none", TUNING, "Swin-B fine-tuned 84.0 (800 epochs), ViT-B 83.8"),
    "moco_v3": Note("high (negatives, BatchNorm)", FROZEN, "ViT-S linear 73.2, ViT-B 76.7"),
    "dino": Note("medium", FROZEN, "ViT-S/16 k-NN 74.5, linear 77.0; ViT-B/16 76.1, 78.2"),
    "ibot": Note("medium", BOTH, "ViT-S k-NN 75.2, linear 77.9, fine-tuned 82.3; ViT-B 77.1, 79.5, 84.0"),
    "simclr": Note("high (negatives)", FROZEN, "ResNet-50 linear 69.3"),
    "supcon": Note("high (two of a class in a batch)", "classes that are labelled", "ResNet-50 78.7 (labels used)"),
    "moco_v1": Note("low (queue)", FROZEN, "ResNet-50 linear 60.6"),
    "moco_v2": Note("low (queue)", FROZEN, "ResNet-50 linear 67.5 (200 epochs), 71.1 (800)"),
    "byol": Note("medium (BatchNorm)", FROZEN, "ResNet-50 linear 74.3"),
    "simsiam": Note("low", FROZEN, "ResNet-50 linear 68.1 (100 epochs)"),
    "barlow_twins": Note("medium (statistics)", FROZEN, "ResNet-50 linear 73.2"),
    "vicreg": Note("medium (statistics)", FROZEN, "ResNet-50 linear 73.2"),
    "swav": Note("medium (queue helps)", FROZEN, "ResNet-50 linear 75.3 (800 epochs)"),
    "msn": Note("medium", "few labels", "ViT-S linear 76.9"),
    "dinov2": Note("high", BOTH, "ViT-L/16, ImageNet-1k: k-NN 81.6, linear 82.9"),
    "gram": Note("none", "dense features of long runs", "part of DINOv3"),
    "distil": Note("none", "what its teacher is good for; as an anchor: continued training", "no run to compare with"),
    "lejepa": Note("medium (statistics)", FROZEN, "ViT-S/8, Imagenette: linear 90.7"),
    "beit": Note("none", TUNING, "ViT-B fine-tuned 83.2"),
    "multimae": Note("none", "fine-tuning on several modalities", "ViT-B fine-tuned 83.3, ADE20K 46.2"),
    "ijepa": Note("none", BOTH, "see the paper"),
    "data2vec": Note("low", TUNING, "see the paper"),
    "maskfeat": Note("none", TUNING, "see the paper"),
    "cmae": Note("high (negatives)", BOTH, "ViT-B fine-tuned 83.8 (300 epochs), 84.7 (1600)"),
    "sit": Note("high (negatives)", "small data sets", "see the paper"),
    "rotation": Note("none", "a baseline", "ResNet-50 linear 48.9"),
    "jigsaw": Note("none", "a baseline", "ResNet-50 linear 45.7 (tiles, not tokens)"),
    "colorization": Note("none", "a baseline", "ResNet-50 linear 39.6"),
    "cutpaste": Note("none", "anomaly detection", "MVTec image AUROC 95.2 (3-way, ResNet-18)"),
}

HEAD = """# Objectives

Every objective can stand beside any other in one recipe: entries under `objectives:`, each with a `weight` that may be
a ramp. Equal encoder passes are computed once. This page is written by `python tools/document_objectives.py`; do not
edit it.

*needs*: views with their crops in the recipe, `~mask`: hidden patches replaced by mask tokens, `-mask`: dropped; T: a
moving-average teacher, F: a frozen encoder, L: labels. *Swin*: timm's SwinTransformer and V2. *batch*: how much it
suffers from small batches. Published numbers are ImageNet-1k top-1 unless said otherwise; none was reproduced here.
"""

RUNS = """
## What was run here

{steps} steps of batch {batch} on {images} images of embedded Fashion-MNIST, enlarged to 64 pixels, with a 2-block,
96-wide ViT on one CPU core: a test that losses fall and features live, no comparison of methods. k-NN top-1 (k 20) is
the better of student and teacher; untrained, it depends on the encoder's pool and initialisation alone. *std* is the
student's normalised feature std (1: isotropic, 0: collapsed).

What cannot be expected of so few steps: masked-image objectives (simmim, beit, ijepa, data2vec, multimae) and pretext
tasks (cutpaste, colorization) learn pixels or tokens before k-NN rises; DINO and iBOT hold their prototypes for an
epoch and sharpen their targets meanwhile, so that the loss itself may rise. Mixes were drawn at random; their recipes
are in `tests/trials.py`.

| objective | loss, first to last | k-NN, start to end | std |
|---|---|---|---|
"""

OWN = """
## An objective of your own

An entry's `name` may be `my_package.my_module:MyObjective`; nothing has to be registered. The class below is run by the
tests as it stands here ({readme}).

{code}

```
hybrid-ssl pretrain recipes/quickstart.yaml 'objectives={{agree: {{name: "my_package.my_module:Agree"}}}}'
```
"""


def needs_of(name: str) -> tuple[str, str]:
    """(what the objective asks for, whether Swin can serve it), from the object that its recipe builds."""
    recipe = build_recipe(alone()[name])
    pretrainer = build_pretrainer(recipe, [0.5] * 3, [0.5] * 3, layout=lay_out(recipe, 1))
    label = next(label for label, other in recipe.used_names.items() if other == name)
    part = pretrainer.parts[label]
    texts, kinds = [], []
    for need in part.needs:
        views = " + ".join((need.view, *need.beside))
        mask = "" if need.mask is None else f" {'-' if need.drop else '~'}mask"
        crops = pretrainer.spec.crops[need.view]
        texts.append(
            views + (f" x{crops}" if crops > 1 else "") + mask + ("" if need.positions else " without positions")
        )
        kinds.append({"student": "", "teacher": "T"}.get(need.net, "F"))
    kinds.append("L" if part.needs_labels else "")
    swin = not any(need.drop or not need.positions or need.beside for need in part.needs)
    return ", ".join(dict.fromkeys([*texts, *filter(None, kinds)])), "yes" if swin else "no"


def trials() -> str:
    found: dict[str, dict[str, float]] = json.loads(TRIALS.read_text())
    rows = [
        f"| {name.replace('+', ' + ')} | {r['loss_first']:.3g} to {r['loss_last']:.3g} | "
        f"{r['knn_start']:.3f} to {r['knn_end']:.3f} | {r['std']:.2f} |"
        for name, r in found.items()
    ]
    return RUNS.format(steps=STEPS, batch=BATCH, images=IMAGES) + "\n".join(rows) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def document() -> str:
    """The page."""
    titles = ["name", "what it does", "needs", "Swin", "batch", "good for", "published"]
    lines = [HEAD, _row(titles), _row(["---"] * len(titles))]
    for name in OBJECTIVES:
        what, paper = method_of(name) or ("", "")
        needs, swin = needs_of(name)
        note = NOTES[name]
        link = f" [{paper}](https://arxiv.org/abs/{paper})" if paper else ""
        lines.append(_row([f"`{name}`", what + link, needs, swin, note.batch, note.good_for, note.published]))
    readme = (ROOT / "README.md").read_text()
    start = readme.index("```python\nimport torch.nn.functional")
    code = readme[start : readme.index("```", start + 3) + 3]
    return "\n".join(lines) + "\n" + trials() + OWN.format(readme="tests/test_readme.py", code=code)


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(document())
    print(f"wrote {TARGET.relative_to(ROOT)}")
