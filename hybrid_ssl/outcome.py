"""What a run shows for itself: the probe while it trains, and the encoder at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from accelerate import Accelerator
from torch import Tensor

from .config import Recipe
from .data.labelled import open_probe, read_images
from .data.settings import ProbeSettings
from .data.sources import Source
from .engine import gathered, hardware, is_sharded
from .hub.export import export_encoder
from .hub.facts import facts_of
from .hub.from_run import export_run, kept_of, probe_of
from .hub.pushes import PushesOfRun
from .monitor.probe import Probe
from .pretrainer import Pretrainer

Say = Callable[[str], None]
Found = TypeVar("Found")


class Spent(NamedTuple):
    """What an encoder has cost so far."""

    steps: int
    steps_per_epoch: int
    seconds: float


class Outcome:
    """Probe and export of one run.

    Raises:
        ValueError: a probe was asked for, but there are no labels.
    """

    def __init__(
        self, recipe: Recipe, source: Source, accelerator: Accelerator, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.recipe, self.source, self.accelerator, self.mean, self.std = recipe, source, accelerator, mean, std
        self.numbers: dict[str, float] = {}
        """k-NN accuracy of `raw pixels`, `before training` and the newest of `teacher` and `student`; continued,
        also the newest likeness to the start, as `student start_cosine` and `student start_cka`"""
        self.pushes: PushesOfRun | None = None
        self._probe = self._build_probe()

    def state(self) -> dict[str, float]:
        return dict(self.numbers)

    def restore(self, state: dict[str, float]) -> None:
        self.numbers = dict(state)

    def remember_start(self, pretrainer: Pretrainer) -> None:
        """Before the first step, and before a checkpoint is loaded: what the given weights of `encoder.init` see."""
        if self.recipe.encoder.init is not None and not is_sharded(pretrainer):
            self._look(pretrainer, "student", self._probe.remember)

    def probe(self, pretrainer: Pretrainer, *, say: Say, step: int) -> dict[str, dict[str, float]]:
        """Network -> its numbers; says them in one line. Nothing for an encoder that is spread over processes."""
        if is_sharded(pretrainer):
            if step == 0:
                say("the probe is left out: no process holds the whole encoder")
            return {}
        networks = ["student"] if pretrainer.teacher is None or step == 0 else ["teacher", "student"]  # equal at first
        results = {network: self._look(pretrainer, network, self._probe.measure) for network in networks}
        if self._probe.labelled:
            self.numbers["raw pixels"] = self._probe.raw_pixels()
            if step == 0:
                self.numbers["before training"] = results["student"]["knn"]
            self.numbers |= {network: numbers["knn"] for network, numbers in results.items()}
        for network, numbers in results.items():
            kept = {name: value for name, value in numbers.items() if name.startswith("start_") and isfinite(value)}
            self.numbers |= {f"{network} {name}": value for name, value in kept.items()}
        parts = [f"{net} " + self._describe(numbers) for net, numbers in results.items()]
        if self._probe.labelled:
            parts.append(f"raw pixels {self.numbers['raw pixels']:.3f}")
        say(f"probe at step {step}: " + "; ".join(parts))
        return results

    def export(
        self,
        pretrainer: Pretrainer,
        out: Path,
        spent: Spent,
        *,
        say: Say,
        push: bool = False,
        last: bool = False,
    ) -> None:
        """Write and check `out/encoder`, and begin to push it; at the end also say how to load it.

        At the end the other processes are past their last meeting when the main one waits for the Hub.
        """
        if self.accelerator.is_main_process:
            self._export(pretrainer, out / "encoder", spent, say)
            if last:
                self._goodbye(pretrainer, out / "encoder", say)
        self.accelerator.wait_for_everyone()
        hub = self.recipe.hub
        if hub.repo is None or not self.accelerator.is_main_process or not (push or last):
            return
        self.pushes = self.pushes or PushesOfRun(out, hub.repo, private=hub.private, say=say)
        if last:
            self.pushes.finish()
        self.pushes.start(out / "encoder", f"step {spent.steps}")
        if last:
            self.pushes.finish()

    def stop_pushing(self) -> None:
        """The run ends early: a push that goes on is ended."""
        if self.pushes is not None:
            self.pushes.stop()

    def _look(self, pretrainer: Pretrainer, network: str, use: Callable[..., Found]) -> Found:
        encoder = pretrainer.encoder(network)
        encoder.eval()

        def encode(images: Tensor) -> Tensor:
            return encoder(images).cls

        batch = 256 if self.accelerator.device.type == "cuda" else 128
        precision = self.recipe.run.precision if self.accelerator.device.type == "cuda" else "fp32"
        found = use(encode, self.accelerator.device, batch, precision)
        pretrainer.train()
        return found

    def _describe(self, numbers: dict[str, float]) -> str:
        knn = f"k-NN top-1 {numbers['knn']:.3f}, " if "knn" in numbers else ""
        kept = f", cosine to the start {numbers['start_cosine']:.3f}" if "start_cosine" in numbers else ""
        return f"{knn}feature std {numbers['std']:.3f}, rank {numbers['rank_centred']:.1f}{kept}"

    def network(self, pretrainer: Pretrainer) -> str:
        """The one that is exported; ValueError if the run will not have it."""
        wanted = self.recipe.export.which
        if wanted == "auto":
            return "student" if pretrainer.teacher is None else "teacher"
        if wanted == "teacher" and pretrainer.teacher is None:
            raise ValueError("export.which: teacher, but no objective of this recipe has one; use student or auto")
        return wanted

    def _export(self, pretrainer: Pretrainer, folder: Path, spent: Spent, say: Say) -> None:
        if is_sharded(pretrainer):  # no process holds it; the newest checkpoint does
            export = export_run(folder.parent, folder, verify=self.recipe.export.verify)
            say(f"encoder written to {export.folder}" + (f"; {export.report}" if export.report else ""))
            return
        network = self.network(pretrainer)
        encoder = pretrainer.encoder(network)
        height, width = self.recipe.native_size
        export = export_encoder(
            encoder.model,
            folder,
            input_size=(self.recipe.data.channels, height, width),
            mean=self.mean,
            std=self.std,
            licence=self.recipe.export.licence,
            heads=pretrainer.objectives.state_dict(),
            verify=self.recipe.export.verify,
            card=facts_of(
                self.recipe,
                network=network,
                step=spent.steps,
                steps_per_epoch=spent.steps_per_epoch,
                images=len(self.source),
                seconds=spent.seconds,
                hardware=hardware(self.accelerator),
                probe=probe_of(self.numbers, network),
                kept=kept_of(self.numbers, network),
            ),
        )
        say(f"encoder ({network}) written to {export.folder}" + (f"; {export.report}" if export.report else ""))

    def _goodbye(self, pretrainer: Pretrainer, folder: Path, say: Say) -> None:
        if "raw pixels" in self.numbers:
            accuracies = {name: value for name, value in self.numbers.items() if "start_" not in name}
            say("k-NN top-1: " + ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))
        if kept := self._kept(self.network(pretrainer)):
            say(kept)
        say("load it:")
        say("  import timm")
        say(f"  encoder = timm.create_model('local-dir:{folder}', pretrained=True).eval()")
        say("  features = encoder(images)  # normalise with encoder.pretrained_cfg['mean'] and ['std']")

    def _kept(self, network: str) -> str:
        """What a continued run gained and forgot, in a sentence; empty for runs from random weights."""
        kept = kept_of(self.numbers, network)
        if not kept:
            return ""
        before, now = self.numbers.get("before training"), self.numbers.get(network)
        gained = "" if before is None or now is None else f"k-NN {before:.3f} at the start -> {now:.3f} now; "
        cka = f" (linear CKA {kept['linear CKA']:.3f})" if "linear CKA" in kept else ""
        return f"{gained}features keep {kept['cosine']:.3f} cosine similarity to the start{cka}"

    def _build_probe(self) -> Probe:
        """The labelled probe of the recipe or of the data's own labels, else an unlabelled one."""
        recipe, settings = self.recipe, self.recipe.data.probe
        view = next(iter(recipe.views.values()))
        size = view.height_width
        if settings is not None and settings.size is not None:
            size = (
                (settings.size, settings.size)
                if isinstance(settings.size, int)
                else (settings.size[0], settings.size[1])
            )
        place = {"rank": self.accelerator.process_index, "world": self.accelerator.num_processes}
        common: dict[str, Any] = {
            "mean": self.mean, "std": self.std, "k": recipe.monitor.k, "temperature": recipe.monitor.temperature,
            "gather": gathered(self.accelerator), **place,
        }  # fmt: skip
        if settings is None and self.source.labels is None:
            images = read_images(self.source, recipe.monitor.feature_images, size, recipe.data).images
            return Probe(images, **common)
        if settings is None:  # the data's own labels, on few images: nobody asked for the time it takes
            settings = ProbeSettings(train_images=2_000, test_images=500)
        sources = open_probe(recipe.data.model_copy(update={"probe": settings}), self.source)
        train = read_images(sources.train, settings.train_images, size, recipe.data)
        test = read_images(sources.test, settings.test_images, size, recipe.data)
        return Probe(train.images, train.labels, test.images, test.labels, **common)
