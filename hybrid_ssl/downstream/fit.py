"""The loop of every fine-tuning: read `Fit.step` first.

As in pretraining, a run's state is the step and the tensors: order, augmentation and the model's own noise (stochastic
depth, sampled boxes) are functions of (seed, step, process), so a resumed run goes on to the same bits. What is
reported is the model after the last step, never the best one on the test set; the best is told beside it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import checkpoint, storage
from ..assemble import lay_out, total_steps
from ..contract import check_folder, check_same
from ..data.order import BatchOrder, key
from ..encoder.base import layer_ids
from ..engine import (
    DONE,
    NON_FINITE,
    STORAGE,
    StopSignal,
    environment,
    hardware,
    launch,
    read_state,
    stop_code,
    total,
    write_state,
)
from ..monitor.collapse import FiniteGuard
from ..monitor.log import RunLog, duration
from ..monitor.meter import Means, Meter
from ..monitor.trackers import check_trackers
from ..optim import build_optimizer, clip_gradients, param_groups, peak_lr, set_step
from ..reading import dump_yaml
from ..schedule import Progress, to_steps
from .batches import Counter, test_batches, train_batches
from .results import encoded, write_results
from .settings import FinetuneRecipe
from .stored import save_model
from .tasks import build_task

MODEL, PREDICTIONS = "model", "predictions.png"
_LOG_EVERY = 20  # steps between two lines


def finetune(kind: str, recipe: FinetuneRecipe, *, resume: bool = False) -> int:
    """Fine-tune an encoder for a task.

    Args:
        kind: of `tasks.KINDS`.
        recipe: of that task.
        resume: continue the run in `run.out` at its very step.

    Returns:
        exit code: 0 done, 3 non-finite, 5 storage, 130 or 143 stopped by a signal after saving.

    Raises:
        ValueError: what the user has to change; nothing was written.
    """
    check_trackers(recipe.run.trackers)
    out = Path(recipe.run.out)
    found = check_folder(out, resume)
    run = Fit(kind, recipe)
    try:
        with storage.lock(out) if run.main else nullcontext():
            return run.run(out, found)
    except storage.StorageError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return STORAGE


class Fit:
    """Everything of one fine-tuning. Building it writes nothing."""

    def __init__(self, kind: str, recipe: FinetuneRecipe) -> None:
        self.recipe = recipe
        self.accelerator = launch(recipe.run)
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.layout = lay_out(recipe, self.world)
        torch.manual_seed(recipe.run.seed)  # of new heads
        self.task = build_task(recipe, kind)
        if not len(self.task.test):
            raise ValueError("there are no test samples: nothing could be measured")
        run = recipe.run
        self.order = self._order(0)
        self.total = total_steps(recipe, self.order.steps_per_epoch)
        self.peak, self.lr_sentence = peak_lr(recipe.optimizer, run.batch_size)
        self.net = self.task.model
        self.encoder = cast(Any, self.net.encoder)
        if run.gradient_checkpointing:
            self.encoder.set_grad_checkpointing()
        groups = build_groups(recipe, self.net)
        optimizer = build_optimizer(recipe.optimizer, groups)
        self.average = None
        if recipe.ema is not None:
            self.average = AveragedModel(
                self.net, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True, device=self.device
            )
        if run.compile:
            self.encoder.compile()
        self.model, self.optimizer = self.accelerator.prepare(self.net, optimizer)
        self.trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        self.means, self.meter = Means(), Meter(run.batch_size, self.total)
        self.guard = FiniteGuard(3, fp16=run.precision == "fp16")
        self.finite: list[Tensor] = []
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.log: RunLog | None = None
        self.broken = {
            what: Counter(what, samples, run.max_broken, self._tell)
            for what, samples in (("training", self.task.train), ("test", self.task.test))
        }

    def _order(self, start: int) -> BatchOrder:
        run = self.recipe.run
        return BatchOrder(
            len(self.task.train),
            run.batch_size,
            self.layout.micro_batch,
            run.seed,
            rank=self.rank,
            world=self.world,
            start=start,
        )

    def say(self, text: str) -> None:
        """One line to the terminal and the log, of the main process."""
        if self.log is not None:
            self.log.line(text)
        elif self.main:
            print(text, flush=True)

    def _tell(self, text: str) -> None:
        """One line of this process, which no other can say."""
        if self.main:
            self.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def run(self, out: Path, found: Path | None) -> int:
        """Train to the end, from the checkpoint `found` if there is one."""
        self.out = out
        start = self.restore(found) if found else 0
        if self.main:
            out.mkdir(parents=True, exist_ok=True)
            storage.sweep(out)
            if (out / "checkpoints").is_dir():
                storage.sweep(out / "checkpoints")
            (out / "recipe.yaml").write_text(dump_yaml(self.recipe.model_dump(mode="json")))
            (out / "environment.json").write_text(json.dumps(environment(self.accelerator), indent=1))
        self.meter = Meter(self.recipe.run.batch_size, self.total, start)
        trackers, config = self.recipe.run.trackers, self.recipe.model_dump(mode="json")
        with RunLog(out, self.total, start, main=self.main, trackers=trackers, config=config) as self.log:
            try:
                code = self._loop(start)
            finally:
                self.log = None
        self.accelerator.end_training()
        return code

    def _introduce(self) -> None:
        run, cfg = self.recipe.run, self.recipe.encoder
        size = sum(p.numel() for p in self.net.parameters()) / 1e6
        about = encoded(cfg.name, self.encoder, cfg.random)
        weights = "random weights" if cfg.random else "pretrained"
        facts = ", ".join(f"{name} {value}" for name, value in self.task.facts().items() if name != "fingerprint")
        self.say(f"{self.task.kind}: {facts}")
        self.say(
            f"encoder: {about.name} ({about.architecture}, {weights}), {size:.1f} M parameters with the head, on "
            f"{hardware(self.accelerator)}, {run.precision}"
        )
        decay = self.recipe.optimizer.layer_decay
        self.say(f"{self.lr_sentence}, layer decay {decay}; {self.total} steps, {self.order.steps_per_epoch} an epoch")

    def _loop(self, start: int) -> int:
        self._introduce()
        stop, code, done = StopSignal(self.accelerator), DONE, start
        began, earlier = time.perf_counter(), self.seconds
        order, counter = self._order(start), self.broken["training"]
        batches = train_batches(self.task, order, workers=self.recipe.run.workers, device=self.device, counter=counter)
        self._train_mode()
        try:
            while done < self.total and not code:
                self.step(Progress(done, self.total, self.order.steps_per_epoch), batches)
                done += 1
                self.seconds = earlier + time.perf_counter() - began
                code = self._after(done) or self._stopped(stop, done)
        except ValueError:  # too many broken samples: what was learned is kept
            self.save(done)
            raise
        finally:
            stop.restore()
        if code == NON_FINITE:
            return code
        if code:
            self.save(done)
            self.say(f"stopped by a signal at step {done} of {self.total}; saved. Continue with --resume")
            return code
        return self._finish(done)

    def _stopped(self, stop: StopSignal, done: int) -> int:
        """Exit code if a signal has come to any process; ValueError if together they met too many broken samples."""
        counter = self.broken["training"]
        number, broken = stop.agreed(done, counter.names, counter.limit)
        counter.check(broken)
        return stop_code(number)

    def step(self, now: Progress, batches: Any) -> None:
        """One optimizer step."""
        lr, _ = set_step(self.recipe.optimizer, self.optimizer, self.peak, now)
        accumulation = self.layout.accumulation
        for micro in range(accumulation):
            with self.meter.waiting():
                batch = next(batches)
            torch.manual_seed(key(self.recipe.run.seed, now.step, micro * self.world + self.rank, "model"))
            with nullcontext() if micro == accumulation - 1 else self.accelerator.no_sync(self.model):
                losses = self.model(batch.images, batch.targets)
                loss = torch.stack([value.float() for value in losses.values()]).sum()
                self.accelerator.backward(loss / accumulation)
            self.means.add({"loss": loss, **losses} if len(losses) > 1 else {"loss": loss})
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        norm = clip_gradients(self.recipe.optimizer.clip, [self.trained])
        if self.accelerator.scaler is None:  # no step on NaN, and no waiting to find out (see train.py)
            self.optimizer.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.net)
        self.means.add({"grad_norm": norm})
        self.finite.append(norm.isfinite())
        self.meter.step()
        self.rates = {"lr": lr}

    def _after(self, done: int) -> int:
        """Lines, checkpoints and measurements that are due; an exit code if the run must stop."""
        assert self.log is not None
        self.log.advance(done)
        run = self.recipe.run
        if done % _LOG_EVERY == 0 or done == self.total:
            self.log.train(done, self.means.read(total(self.accelerator)) | self.rates, self.meter.read())
            flags = torch.stack(self.finite).tolist()
            self.finite.clear()
            for step, finite in enumerate(flags, start=done - len(flags)):
                problem = self.guard.saw(step, finite)
                if problem:
                    self.say(f"stopped: {problem}")
                    return NON_FINITE
        if done < self.total:
            with self.meter.paused():
                if self._due(run.evaluate_every, done):
                    self.measure(done)
                if self._due(run.checkpoint_every, done):
                    self.save(done)
        return DONE

    def _due(self, every: str, done: int) -> bool:
        return done % max(1, round(to_steps(every, self.total, self.order.steps_per_epoch))) == 0

    def _train_mode(self) -> None:
        self.model.train()
        if self.recipe.encoder.frozen:
            self.encoder.eval()

    @property
    def result(self) -> nn.Module:
        """The module that is measured and stored: the average, if there is one."""
        return self.net if self.average is None else self.average.module

    def measure(self, done: int) -> dict[str, float]:
        """Measure on the test set; every process gets the same numbers."""
        model, run = self.result.eval(), self.recipe.run
        batches = test_batches(
            self.task,
            size=run.test_batch,
            rank=self.rank,
            world=self.world,
            workers=run.workers,
            device=self.device,
            counter=self.broken["test"],
        )
        with torch.inference_mode(), self.accelerator.autocast():
            metrics = self.task.evaluate(model, batches, self.accelerator)
        self._train_mode()
        self.broken["test"].merge()
        self.broken["test"].check(len(self.broken["test"].names))
        self.history.append({"step": done, **metrics})
        if self.log is not None:
            self.log.record(done, {f"test/{name}": value for name, value in metrics.items()})
        few = {name: value for name, value in metrics.items() if "/" not in name}
        self.say(f"step {done}: " + "  ".join(f"{name} {value:.4g}" for name, value in few.items()))
        return metrics

    def _finish(self, done: int) -> int:
        self.save(done)  # before anything can go wrong with the test set
        metrics = self.measure(done)
        self.broken["training"].merge()
        if not self.main:
            return DONE
        task, cfg, run = self.task, self.recipe.encoder, self.recipe.run
        save_model(self.out / MODEL, task, self.result.eval())
        with torch.inference_mode():
            task.draw(self.result, self.out / PREDICTIONS)
        values = [row[task.headline] for row in self.history if math.isfinite(row[task.headline])]
        settings = self.recipe.model_dump(
            mode="json", exclude={"encoder": {"name"}, "run": {"out"}, "data": {"source"}}
        )
        write_results(
            self.out,
            task=task.kind,
            metric=task.headline,
            metrics=metrics,
            encoder=encoded(cfg.name, self.encoder, cfg.random),
            data=task.facts(),
            seed=run.seed,
            seconds=self.seconds,
            hardware=hardware(self.accelerator),
            steps=done,
            batch_size=run.batch_size,
            best=max(values, default=None),
            classes=task.classes,
            broken={what: counter.names for what, counter in self.broken.items()},
            history=self.history,
            settings=settings,
        )
        if line := task.export(self.result, self.out, metrics):
            self.say(line)
        self.say(
            f"done in {duration(self.seconds)}: {task.headline} {metrics[task.headline]:.4g} after the last step; "
            f"numbers, {PREDICTIONS} and the model are in {self.out}"
        )
        return DONE

    def save(self, done: int) -> None:
        """Write a checkpoint; a disk that refuses does not end the run."""
        model, optimizer = read_state(self.net, self.optimizer.optimizer)
        tensors = {f"model.{name}": tensor for name, tensor in model.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        flat, tree = checkpoint.flatten(optimizer, "optimizer")
        scaler = self.accelerator.scaler
        state = {
            "step": done,
            "task": self.task.kind,
            "recipe": self.recipe.model_dump(mode="json"),
            "facts": self.facts(),
            "optimizer": tree,
            "scaler": None if scaler is None else scaler.state_dict(),
            "history": self.history,
            "seconds": self.seconds,
        }
        if self.main:
            try:
                checkpoint.save(self.out / "checkpoints", done, tensors | flat, state, self.recipe.run.keep)
            except (storage.StorageError, checkpoint.NonFiniteError) as error:
                self.say(f"error: the checkpoint of step {done} was not written, training goes on: {error}")

    def facts(self) -> dict[str, Any]:
        """What decides the run and is in no recipe."""
        return {
            "the task": self.task.kind,
            "the labelled data": self.task.facts().get("fingerprint"),
            "the number of micro-batches in a step": self.layout.accumulation,
            "the number of processes": self.world,  # each draws its own noise
        }

    def restore(self, path: Path) -> int:
        """Load a checkpoint; the step to continue at."""
        tensors, state = checkpoint.load(path)
        before = state["recipe"]
        with suppress(ValidationError):  # written by another version: the differences say what
            # keys that are newer than the checkpoint: the defaults
            before = type(self.recipe).model_validate(before).model_dump(mode="json")
        check_same(before, self.recipe.model_dump(mode="json"), state["facts"], self.facts())
        optimizer = checkpoint.unflatten(tensors, state["optimizer"])
        write_state(self.net, self.optimizer.optimizer, _below(tensors, "model."), optimizer)
        if self.average is not None:
            self.average.load_state_dict(_below(tensors, "average."))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.history, self.seconds = list(state["history"]), state["seconds"]
        return int(state["step"])


def build_groups(recipe: FinetuneRecipe, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups: the recipe's rules, and layer-wise decay over `model.encoder` (everything else: full rate)."""
    decay = recipe.optimizer.layer_decay
    ids, last = ({}, 0) if decay is None or recipe.encoder.frozen else layer_ids(model.get_submodule("encoder"))

    def factor(name: str) -> float:
        name, _, rest = name.partition(".")
        if decay is None or name != "encoder" or rest not in ids:
            return 1.0
        return float(decay ** (last - ids[rest]))

    return param_groups(recipe.optimizer, model.named_parameters(), (), factor)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
