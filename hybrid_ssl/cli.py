"""The command line: argument parsing, exit codes, and errors as sentences. Everything else is a call into a room.

Exit codes: 0 done, 2 something the user has to change (one message on stderr, no traceback), 5 the disk
refused, 130 interrupted; others
are those of the command. Rooms are imported inside the commands, so that help and a wrong recipe answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .downstream import KINDS
from .storage import StorageError

USER_ERROR = 2
STORAGE = 5
INTERRUPTED = 130


def pretrain(args: argparse.Namespace) -> int:
    """Train what the recipe describes and hand over the encoder."""
    from .config import read_recipe

    recipe = read_recipe(args.recipe, args.overrides)

    from .train import pretrain as run  # timm, accelerate and datasets: seconds, spent only on a recipe that is right

    return run(recipe, resume=args.resume, dry_run=args.dry_run, show=args.show)


def finetune(args: argparse.Namespace) -> int:
    """Train an encoder with a head for labels, boxes, masks or pixels, and measure what it reaches."""
    from .downstream.tasks import read_task_recipe

    given = {"encoder.name": args.encoder, "data.source": args.data, "encoder.random": args.random or None}
    given |= {"run.out": args.out, "run.seed": args.seed}
    given = {key: value for key, value in given.items() if value is not None}
    recipe = read_task_recipe(args.task, args.recipe, args.overrides, given)

    from .downstream.fit import finetune as run

    return run(args.task, recipe, resume=args.resume)


def evaluate(args: argparse.Namespace) -> int:
    """Measure frozen features: k-NN, linear and attentive probes, logistic regression, few labels, retrieval."""
    from .downstream.evaluation.settings import read_evaluate_recipe

    asked = [name for text in args.protocol or () for name in text.split(",") if name]
    given = {"encoder.name": args.encoder, "data.source": args.data, "encoder.random": args.random or None}
    given |= {"run.out": args.out, "run.cache": args.cache, "run.seed": args.seed, "protocols": asked or None}
    given = {key: value for key, value in given.items() if value is not None}
    recipe = read_evaluate_recipe(args.recipe, args.overrides, given)

    from .downstream.evaluation.run import evaluate as run

    run(recipe)
    return 0


def results(args: argparse.Namespace) -> int:
    """Put the numbers of evaluations and fine-tunings side by side, over seeds: Markdown, a picture and JSON."""
    from .downstream.tables import write_tables

    table = write_tables([Path(folder) for folder in args.folders], Path(args.out))
    print("\n".join([*table.remarks, f"{len(table.rows)} rows: {args.out}/table.md, table.png and table.json"]))
    return 0


def predict(args: argparse.Namespace) -> int:
    """Draw what a fine-tuned model finds on images: labels, boxes, masks or classes of pixels."""
    from .downstream.predict import predict as run

    print(run(args.model, args.images, Path(args.out), device=args.device, split=args.split, score=args.score))
    return 0


def anomaly(args: argparse.Namespace) -> int:
    """Learn what is normal from a folder of good pictures, and score those of another folder."""
    from .anomaly import find_anomalies

    options = {"good_name": args.good_name, "size": args.size, "shown": args.shown, "device": args.device}
    for name, value in find_anomalies(args.encoder, args.good, args.test, Path(args.out), **options).items():
        print(f"{name} {value:.4g}")
    print(f"scores and the map of the most abnormal pictures: {args.out}")
    return 0


def export(args: argparse.Namespace) -> int:
    """Write the encoder of a run as a folder for timm and transformers, or as a file for something else."""
    from .hub.targets import export_to

    options = {"network": args.network, "licence": args.licence, "verify": not args.no_verify}
    lines = export_to(args.to, Path(args.place), Path(args.out), **options)
    print("\n".join([f"written to {args.out}", *lines]))
    return 0


def push(args: argparse.Namespace) -> int:
    """Upload an exported folder to the Hugging Face Hub. The token is HF_TOKEN's or that of `hf auth login`."""
    from .hub.push import push_export

    print(push_export(Path(args.export), args.repo, private=args.private, message=args.message))
    return 0


def tokenizer(args: argparse.Namespace) -> int:
    """Train a discrete tokenizer on pictures; the objective beit predicts its ids."""
    from .tokenizer.train import TrainingSettings, train_tokenizer

    names = ("kind", "channels", "stride", "codes", "dim", "width")
    model = {name: value for name in names if (value := getattr(args, name)) is not None}
    run = ("out", "steps", "batch_size", "seed", "workers", "log_every", "device")
    asked = {name: getattr(args, name) for name in run}
    data = {"source": args.source, "split": args.split, "image": args.image, "channels": args.channels}
    view = {"size": args.size, "scale": [args.scale, 1.0]}
    lr = {"start": args.lr, "end": args.lr / 100, "shape": "cosine"}
    train_tokenizer(TrainingSettings.model_validate({"data": data, "view": view, "model": model, "lr": lr, **asked}))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hybrid-ssl", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _pretrain_arguments,
        _finetune_arguments,
        _evaluate_arguments,
        _results_arguments,
        _predict_arguments,
        _anomaly_arguments,
        _export_arguments,
        _push_arguments,
        _tokenizer_arguments,
    ):
        add(commands)
    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="on an error, show where it was raised")
    return parser


def _pretrain_arguments(commands: Any) -> None:
    command = commands.add_parser("pretrain", help="pretrain an encoder after a recipe", description=pretrain.__doc__)
    command.set_defaults(run=pretrain)
    command.add_argument("recipe", metavar="RECIPE", help="a .yaml file, see recipes/")
    command.add_argument("overrides", metavar="KEY.PATH=VALUE", nargs="*", help="e.g. data.source=./images run.seed=1")
    command.add_argument("--show", action="store_true", help="print the resolved recipe and the plan, then stop")
    command.add_argument("--dry-run", action="store_true", help="build everything, run one step, keep nothing")
    command.add_argument("--resume", action="store_true", help="continue the run in run.out at its very step")


def _finetune_arguments(commands: Any) -> None:
    command = commands.add_parser(
        "finetune", help="train an encoder for labels, boxes, masks or pixels", description=finetune.__doc__
    )
    command.set_defaults(run=finetune)
    command.add_argument("task", metavar="TASK", choices=KINDS, help=", ".join(KINDS))
    command.add_argument(
        "encoder", metavar="ENCODER", help="an exported folder, a run's folder, a Hub id, a timm model"
    )
    command.add_argument("overrides", metavar="KEY.PATH=VALUE", nargs="*", help="e.g. run.length='20 epochs'")
    command.add_argument("--data", metavar="D", help="labelled images; docs/downstream.md tells the layouts")
    command.add_argument("--recipe", help="a .yaml file, see recipes/finetune/; default: the task's defaults")
    command.add_argument("--random", action="store_true", help="the same architecture with random weights")
    command.add_argument("--out", help="folder to write; default: as the recipe says")
    command.add_argument("--seed", type=int, help="of new heads, order and augmentation")
    command.add_argument("--resume", action="store_true", help="continue the run in run.out at its very step")


def _evaluate_arguments(commands: Any) -> None:
    command = commands.add_parser("evaluate", help="measure frozen features", description=evaluate.__doc__)
    command.set_defaults(run=evaluate)
    command.add_argument(
        "encoder", metavar="ENCODER", help="an exported folder, a run's folder, a Hub id, a timm model"
    )
    command.add_argument("overrides", metavar="KEY.PATH=VALUE", nargs="*", help="e.g. knn.k=[5,20] data.size=224")
    command.add_argument("--data", metavar="D", help="labelled images; docs/downstream.md tells the layouts")
    protocols = "knn, linear, logistic, lowshot, retrieval, attentive"
    command.add_argument("--protocol", action="append", metavar="P", help=f"{protocols}; several with commas, one pass")
    command.add_argument("--recipe", help="a .yaml file; default: the papers' protocols")
    command.add_argument("--random", action="store_true", help="the same architecture with random weights")
    command.add_argument("--out", help="folder for results and features (default: runs/evaluate)")
    command.add_argument("--cache", help="folder for features that several evaluations share; default: in OUT")
    command.add_argument("--seed", type=int, help="of random weights, heads and held-out images")


def _results_arguments(commands: Any) -> None:
    command = commands.add_parser("results", help="put numbers side by side", description=results.__doc__)
    command.set_defaults(run=results)
    command.add_argument("folders", metavar="FOLDER", nargs="+", help="searched for results.json, at any depth")
    command.add_argument("--out", default="tables", help="folder for table.md, table.png and table.json")


def _predict_arguments(commands: Any) -> None:
    command = commands.add_parser("predict", help="run a fine-tuned model on images", description=predict.__doc__)
    command.set_defaults(run=predict)
    command.add_argument("model", metavar="MODEL", help="a fine-tuning run's folder, or its `model` folder")
    command.add_argument("images", metavar="IMAGES", nargs="+", help="image files, or a folder, list or data set")
    command.add_argument("--out", default="predictions", help="a new folder")
    command.add_argument("--split", default="train", help="of a data set, or of a folder with train, val, test")
    command.add_argument("--score", type=float, help="detection: least score of what is drawn (default: 0.5)")
    command.add_argument("--device", default="auto", help="default: a GPU if there is one")


def _anomaly_arguments(commands: Any) -> None:
    command = commands.add_parser(
        "anomaly", help="score pictures by how abnormal they are", description=anomaly.__doc__
    )
    command.set_defaults(run=anomaly)
    command.add_argument("encoder", metavar="ENCODER", help="an exported folder, a run's folder, or a timm model")
    command.add_argument("good", metavar="GOOD", help="folder of good pictures")
    command.add_argument("test", metavar="TEST", help="folder to score; with sub-folders `good` and others: also AUROC")
    command.add_argument("--out", default="anomalies", help="folder for scores.csv, summary.json and heat.png")
    command.add_argument("--good-name", default="good", help="the sub-folder of TEST that holds good pictures")
    command.add_argument("--size", type=int, help="side in pixels; default: as the encoder was trained")
    command.add_argument("--shown", type=int, default=16, help="pictures on heat.png")
    command.add_argument("--device", default="cpu", help="where the encoder runs")


def _export_arguments(commands: Any) -> None:
    command = commands.add_parser("export", help="write an encoder for others", description=export.__doc__)
    command.set_defaults(run=export)
    command.add_argument("place", metavar="RUN_OR_CHECKPOINT", help="a run's folder, one checkpoint, or an export")
    command.add_argument("out", metavar="OUT", help="folder (timm) or file to write; an earlier export is replaced")
    targets = ("timm", "onnx", "torch-export", "mmdet", "mmseg", "detectron2")
    command.add_argument("--to", choices=targets, default="timm", help="default: timm, which is transformers', too")
    command.add_argument("--network", choices=("auto", "teacher", "student"), help="default: as the recipe says")
    command.add_argument("--licence", help="licence of the weights, as the Hub names it; default: as the recipe says")
    command.add_argument("--no-verify", action="store_true", help="do not load it again to compare outputs")


def _push_arguments(commands: Any) -> None:
    command = commands.add_parser("push", help="upload an exported encoder", description=push.__doc__)
    command.set_defaults(run=push)
    command.add_argument("export", metavar="EXPORT", help="an exported folder, or a run's folder")
    command.add_argument("repo", metavar="USER/NAME", help="repository; made if it is missing")
    command.add_argument("--private", action="store_true", help="make it private; refuse one that is public")
    command.add_argument("--message", help="of the commit")


def _tokenizer_arguments(commands: Any) -> None:
    command = commands.add_parser(
        "tokenizer", help="train the tokenizer whose ids beit predicts", description=tokenizer.__doc__
    )
    command.set_defaults(run=tokenizer)
    command.add_argument("--source", required=True, help="pictures, in any form that data.source of a recipe takes")
    command.add_argument("--out", required=True, help="folder to write")
    command.add_argument("--kind", choices=("vq", "dvae"), default="vq", help="default: vq, the more robust one")
    command.add_argument("--size", type=int, default=112, help="pixels of a picture's side (default: 112)")
    command.add_argument("--stride", type=int, default=8, help="pixels of a square's side that gets an id (default: 8)")
    command.add_argument("--scale", type=float, default=0.08, help="smallest share of a picture that a crop has")
    command.add_argument("--codes", type=int, default=8192, help="number of ids (default: 8192)")
    command.add_argument("--dim", type=int, help="width of a code (default: 32; dvae: 128)")
    command.add_argument("--width", type=int, default=128, help="channels inside the network (default: 128)")
    command.add_argument("--channels", type=int, default=3, help="channels of the pictures (default: 3)")
    command.add_argument("--split", default="train", help="split of a data set (default: train)")
    command.add_argument("--image", help="column of the picture; default: the first image column")
    command.add_argument("--steps", type=int, default=20000, help="default: 20000")
    command.add_argument("--batch-size", type=int, default=128, help="default: 128")
    command.add_argument("--lr", type=float, default=1e-3, help="learning rate, falling to a hundredth (default: 1e-3)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--workers", type=int, default=2, help="loader processes (default: 2)")
    command.add_argument("--log-every", type=int, default=500, help="steps between two lines (default: 500)")
    command.add_argument("--device", default="auto", help="default: a GPU if there is one")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may also stand behind flags, which argparse alone refuses for positionals of any number."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    stray = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}; settings of the recipe are written key.path=value")
    if rest:
        args.overrides.extend(rest)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    args = parse(argv)
    try:
        return int(args.run(args))
    except ValueError as error:  # RecipeError is one: for users, by house rule
        if args.traceback:
            raise
        if os.environ.get("RANK", "0") == "0":  # every process finds the same error; one message is enough
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # launchers stop all processes when one ends: let the first say why
        return USER_ERROR
    except StorageError as error:  # what is written is complete or absent
        if args.traceback:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return STORAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
