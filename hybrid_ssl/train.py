"""The run: from a resolved recipe to an encoder in a folder.

Read `Run.step` first: the order of schedule, forward, backward, clip, held layers, optimizer and teacher is written
once, there. A run's state is the step, the tensors, and the little that its journal remembers; order and randomness of
the data are functions of the step.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import checkpoint, storage
from .assemble import (
    build_groups,
    build_loader,
    build_pretrainer,
    check_labels,
    describe_origin,
    describe_plan,
    describe_start,
    lay_out,
    total_steps,
    used_views,
)
from .config import Recipe, dump_recipe
from .contract import check_folder, check_resume
from .data.loader import Broken
from .data.sources import open_source
from .data.stats import resolve_mean_std
from .engine import (
    COLLAPSED,
    DONE,
    NON_FINITE,
    STORAGE,
    StopSignal,
    agreed,
    environment,
    hardware,
    is_sharded,
    launch,
    moved,
    read_state,
    stop_code,
    total,
    whole,
    write_state,
)
from .gallery import IMAGES, draw_curves, draw_reconstructions, draw_views
from .hub.from_run import recipe_of
from .journal import Journal
from .monitor.trackers import check_trackers
from .optim import build_optimizer, clip_gradients, drop_held, peak_lr, set_step
from .outcome import Outcome, Spent
from .schedule import Progress, to_steps, value_at

BAD_FILES = "bad_files.jsonl"


def pretrain(recipe: Recipe, *, resume: bool = False, dry_run: bool = False, show: bool = False) -> int:
    """Run a recipe.

    Args:
        recipe: what `config.read_recipe` returned.
        resume: continue the run in `run.out` at its very step.
        dry_run: build everything and train one step; nothing is written.
        show: print the resolved recipe and the plan, and stop.

    Returns:
        exit code: 0 done, 3 non-finite, 4 collapsed, 5 storage, 130 or 143 stopped by a signal after saving.

    Raises:
        ValueError: what the user has to change; nothing was written.
    """
    check_trackers(recipe.run.trackers)
    out = Path(recipe.run.out)
    # every process looks before `Run` brings them together, and therefore before the first one writes
    found = None if show or dry_run else check_folder(out, resume)
    run = Run(recipe)
    if show:
        run.say(dump_recipe(recipe))
    for line in run.introduction():
        run.say(f"# {line}" if show else line)  # what --show prints is a recipe again
    if show:
        return DONE
    if dry_run:
        return run.rehearse()
    try:
        with storage.lock(out) if run.main else nullcontext():
            return run.fit(out, found)
    except storage.StorageError as error:  # a checkpoint that fails does not end a run; its last export does
        print(f"error: {error}", file=sys.stderr, flush=True)
        return STORAGE


class Run:
    """Everything of one run. Building it writes nothing."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.accelerator = launch(recipe.run)
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.layout = lay_out(recipe, self.accelerator.num_processes)
        self.source = open_source(recipe.data)
        self.mean, self.std = resolve_mean_std(recipe.data, self.source)
        rank = self.accelerator.process_index
        self.pretrainer = build_pretrainer(recipe, self.mean, self.std, layout=self.layout, rank=rank)
        check_labels(self.pretrainer, self.source)
        if self.layout.world > 1 and self.device.type == "cuda":
            for encoder in filter(None, (self.pretrainer.student, self.pretrainer.teacher)):
                encoder.synchronise_batchnorm()
        self.steps_per_epoch = max(1, len(self.source) // recipe.run.batch_size)
        self.total = total_steps(recipe, self.steps_per_epoch)
        self.pretrainer.check_schedule(self.total, self.steps_per_epoch)
        self.loader = build_loader(
            recipe,
            self.source,
            self.pretrainer,
            self.layout,
            total_steps=self.total,
            pin_memory=self.device.type == "cuda",
            on_broken=self._note_broken,
        )
        self.outcome = Outcome(recipe, self.source, self.accelerator, self.mean, self.std)
        self.outcome.network(self.pretrainer)  # refuses one that the run will not have
        self.peak, self.lr_sentence = peak_lr(recipe.optimizer, recipe.run.batch_size)
        optimizer = build_optimizer(recipe.optimizer, build_groups(recipe, self.pretrainer))
        if recipe.run.compile:
            for block in self.pretrainer.student.blocks():
                block.compile()
        self.plan = describe_plan(self.pretrainer) if self.main else []  # before it is sharded: it takes a copy
        self.model, self.optimizer = self.accelerator.prepare(self.pretrainer, optimizer)
        self.model.train()
        self.sharded = is_sharded(self.pretrainer)
        self.modules = [
            [p for p in part.parameters() if p.requires_grad]
            for part in (self.pretrainer.student, *self.pretrainer.objectives.values())
        ]
        self.compares_views = any(objective.compares_views for objective in self.pretrainer.parts.values())
        self.journal = Journal(
            recipe, self.accelerator, self.total, self.pretrainer.spec.dim, compares_views=self.compares_views
        )
        self.say = self.journal.say
        self.seconds = 0.0  # of training, over all sittings

    def introduction(self) -> list[str]:
        """What is about to happen, as lines."""
        run, layout = self.recipe.run, self.layout
        size = sum(p.numel() for p in self.pretrainer.student.parameters())
        views, _ = used_views(self.recipe, self.pretrainer)
        idle = [view for view in self.recipe.views if view not in views]
        machine = f"{hardware(self.accelerator)}, {run.precision}"
        parts = f"{layout.world} processes x {layout.accumulation} accumulated x {layout.micro_batch}"
        lines = [
            f"data: {self.source.describe()}",
            f"encoder: {self.recipe.encoder.name}, {size / 1e6:.1f} M parameters, on {machine}",
            *describe_origin(self.pretrainer),
            *describe_start(self.recipe, self.pretrainer),
            *self.plan,
            f"batch: {run.batch_size} = {parts}",
            f"{self.lr_sentence}; {self.total} steps, {self.steps_per_epoch} an epoch",
        ]
        if layout.accumulation > 1:
            lines.append(
                "accumulation: objectives that compare images see a micro-batch at a time, not the whole batch"
            )
        return lines + [f"view {view!r} is used by no objective and is not made" for view in idle]

    def rehearse(self) -> int:
        """One step, nothing kept."""
        now = Progress(0, self.total, self.steps_per_epoch, self.recipe.run.seed)
        self.step(now, moved(self.loader.iterate(0), self.device))
        values = self.journal.means.read(total(self.accelerator))
        self.say("dry run: one step done, " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.accelerator.end_training()
        return DONE

    def fit(self, out: Path, found: Path | None) -> int:
        """Train to the end, from the checkpoint `found` if there is one."""
        self.out = out
        self.outcome.remember_start(self.pretrainer)
        start = self.restore(found) if found else 0
        if self.main:
            storage.sweep(out)
            (out / "checkpoints").mkdir(parents=True, exist_ok=True)
            storage.sweep(out / "checkpoints")
            (out / "recipe.yaml").write_text(dump_recipe(self.recipe))
            (out / "environment.json").write_text(json.dumps(environment(self.accelerator), indent=1))
        with self.journal.open(out, start):
            try:
                code = self._loop(start)
            finally:
                self.outcome.stop_pushing()
        self.accelerator.end_training()
        return code

    def _loop(self, start: int) -> int:
        stop = StopSignal(self.accelerator)
        code, done = DONE, start
        began, earlier = time.perf_counter(), self.seconds
        if start:
            self.say(f"continuing at step {start} of {self.total}")
        else:
            if self.main:
                draw_views(self.recipe, self.pretrainer, self.loader.preview(IMAGES), self.out)
            self._probe(0)
        batches = moved(self.loader.iterate(start), self.device)
        try:
            while done < self.total and not code:
                self.step(Progress(done, self.total, self.steps_per_epoch, self.recipe.run.seed), batches)
                self.seconds = earlier + time.perf_counter() - began
                done += 1
                code = self._after(done) or self._stopped(stop, done)
        except ValueError:  # too many broken images: what was learned is kept
            self.save(done)
            raise
        finally:
            stop.restore()
        return self._finish(done, code)

    def _stopped(self, stop: StopSignal, done: int) -> int:
        """Exit code if a signal has come to any process; ValueError if together they met too many broken images."""
        limit = self.recipe.data.max_broken
        number, broken = stop.agreed(done, self.loader.broken, limit * len(self.source))
        if broken > limit * len(self.source):
            raise ValueError(
                f"{broken} of {len(self.source)} images are broken, more than data.max_broken={limit:g}; their names "
                f"are in {self.out / BAD_FILES}"
            )
        return stop_code(number)

    def step(self, now: Progress, batches: Any) -> None:
        """One optimizer step."""
        recipe, accumulation = self.recipe, self.layout.accumulation
        lr, decay = set_step(recipe.optimizer, self.optimizer, self.peak, now)
        for micro in range(accumulation):
            with self.journal.meter.waiting():
                batch = next(batches)
            last = micro == accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, logs = self.model(batch, replace(now, micro=micro))
                self.accelerator.backward(loss / accumulation)
            self.journal.means.add(logs)
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        norm = clip_gradients(recipe.optimizer.clip, self.modules)  # the same on all processes
        drop_held(self.optimizer, now)
        if self.accelerator.scaler is None:
            # where found_inf is 1 fused optimizers leave everything as it was: no step on NaN, no waiting to find out
            self.optimizer.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # after a skipped step the student is as before, and the teacher moves on towards it
        later = replace(now, step=now.step + recipe.teacher.offset)
        self.pretrainer.move_teachers(value_at(recipe.teacher.momentum, later))
        self.pretrainer.refresh_frozen(replace(now, step=now.step + 1))
        self.journal.step(whole(norm), {"lr": lr, "weight_decay": decay})

    def _after(self, done: int) -> int:
        """Logs, probes, checkpoints and exports that are due after `done` steps; an exit code if the run must stop."""
        if self.journal.advance(done):
            return NON_FINITE
        if done == self.total:
            return DONE
        with self.journal.meter.paused():
            if self._due(self.recipe.monitor.probe_every, done) and self._probe(done):
                return COLLAPSED
            if self._due(self.recipe.run.checkpoint_every, done) and not self.save(done):
                return NON_FINITE
            push = self._due(self.recipe.hub.push, done)
            if push or self._due(self.recipe.export.every, done):
                self._export(done, push=push)
        return DONE

    def _due(self, every: str | None, done: int) -> bool:
        if every is None:
            return False
        interval = max(1, round(to_steps(every, self.total, self.steps_per_epoch)))
        return done % interval == 0

    def _probe(self, done: int) -> bool:
        """Measure the encoders; True if the run has collapsed and must stop."""
        results = self.outcome.probe(self.pretrainer, say=self.say, step=done)
        if not results:
            return False
        now = Progress(done, self.total, self.steps_per_epoch)
        return self.journal.judge(now, results, self.outcome.numbers.get("raw pixels"))

    def save(self, done: int) -> bool:
        """Write a checkpoint; False when the state is not finite (the previous checkpoint stays)."""
        model, optimizer = read_state(self.pretrainer, self.optimizer.optimizer)
        tensors = {f"model.{name}": tensor for name, tensor in model.items()}
        flat, tree = checkpoint.flatten(optimizer, "optimizer")
        scaler = self.accelerator.scaler
        state = {
            "step": done,
            "total_steps": self.total,
            "steps_per_epoch": self.steps_per_epoch,
            "facts": self.facts(),
            "recipe": self.recipe.model_dump(mode="json"),
            "mean_std": [list(self.mean), list(self.std)],
            "images": len(self.source),
            "timm": recipe_of(self.pretrainer.student.model),
            "hardware": hardware(self.accelerator),
            "optimizer": tree,
            "scaler": None if scaler is None else scaler.state_dict(),
            "journal": self.journal.state(),
            "outcome": self.outcome.state(),
            "seconds": self.seconds,
        }
        ok = True
        if self.main:
            try:
                checkpoint.save(self.out / "checkpoints", done, tensors | flat, state, self.recipe.run.keep)
            except checkpoint.NonFiniteError as error:
                self.say(f"error: {error}")
                ok = False
            except storage.StorageError as error:
                self.say(f"error: the checkpoint of step {done} was not written, training goes on: {error}")
            draw_curves(self.out)
        return agreed(self.accelerator, ok)

    def facts(self) -> dict[str, Any]:
        """What decides the run and is in no recipe."""
        facts: dict[str, Any] = {"the images (added, removed or changed files?)": self.source.fingerprint}
        if self.compares_views:  # BatchNorm, negatives and centres see a micro-batch of all processes
            facts["the number of micro-batches in a step"] = self.layout.accumulation
        if self.recipe.data.streaming:
            facts["the number of processes that share the stream"] = self.layout.world
        for name, frozen in self.pretrainer.frozen.items():
            if frozen.digest is not None:  # given weights, which no checkpoint holds
                facts[f"the weights of frozen.{name} (sha256)"] = frozen.digest
        return facts

    def restore(self, path: Path) -> int:
        """Load a checkpoint; the step to continue at. ValueError when recipe or data differ in what decides a run."""
        tensors, state = checkpoint.load(path)
        check_resume(state["recipe"], self.recipe, state["facts"], self.facts())
        model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        optimizer = checkpoint.unflatten(tensors, state["optimizer"])
        write_state(self.pretrainer, self.optimizer.optimizer, model, optimizer)
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.journal.restore(state["journal"])
        self.outcome.restore(state["outcome"])
        self.seconds = state["seconds"]
        return int(state["step"])

    def _finish(self, done: int, code: int) -> int:
        if code == NON_FINITE:
            return code
        with self.journal.meter.paused():
            if not self.save(done):
                return NON_FINITE
        if code:
            name = {130: "SIGINT", 143: "SIGTERM or SIGUSR1", COLLAPSED: "the collapse watch"}[code]
            self.say(f"stopped by {name} at step {done} of {self.total}; saved. Continue with --resume")
            return code
        self._probe(done)
        if self.main:
            draw_curves(self.out)
        if self.main and not self.sharded:
            now = Progress(done, self.total, self.steps_per_epoch, self.recipe.run.seed)
            draw_reconstructions(self.recipe, self.pretrainer, self.loader.preview(IMAGES), now, self.out)
        self._export(done, last=True)
        return DONE

    def _export(self, done: int, push: bool = False, last: bool = False) -> None:
        if self.sharded and not last:
            self.save(done)  # the export is made from it
        spent = Spent(done, self.steps_per_epoch, self.seconds)
        self.outcome.export(self.pretrainer, self.out, spent, say=self.say, push=push, last=last)

    def _note_broken(self, image: Broken) -> None:
        text = f"broken image, replaced: {image.name}: {image.reason}"
        if self.main:
            self.say(text)
        else:  # no other process knows
            print(text, file=sys.stderr, flush=True)
        if self.journal.is_open and self.out.is_dir():  # other machines may not have the folder
            with (self.out / BAD_FILES).open("a") as file:
                file.write(json.dumps({"id": image.id, "name": image.name, "reason": image.reason}) + "\n")
