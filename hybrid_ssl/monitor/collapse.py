"""Says in a sentence when a run has gone wrong: collapsed features, a teacher without opinion, non-finite steps.

What the loss shows is not enough: BYOL's falls to 0 while all features become one. Each kind has its own sign
(`features.py`), and no sign is used where it means nothing: masked-image models have a small pooled std by nature, so
without a joint-embedding objective nothing is said about it. The first tenth of a run is left alone, since random
encoders look collapsed too.

Both classes keep their memory as plain data, to be stored in a checkpoint and given back on resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..schedule import Progress
from .settings import MonitorSettings

_WARM_UP = 0.1  # share of the run in which nothing is judged
_PATIENCE = 3  # probes in a row before a run is stopped
_LOW_STD = 0.05  # worth a warning already
_STD_DROP = 0.2  # of the run's own best
_RANK_SHARE = 0.02  # of the width; centred rank below it is dimensional collapse
_RANK_DROP = 0.5  # within one probe interval
_UNIFORM = 0.98  # teacher entropy / ln K
_AGREED = 0.01  # teacher-student KL in nats
_ONE_HOT = 0.1  # entropy of the mean prediction / ln K
_TRIVIAL = 0.01  # relative distance of a loss to what a constant answer gets
_STRANGERS = 0.1  # teacher-student cosine


@dataclass(frozen=True)
class Verdict:
    """Something is wrong: which kind, a sentence with numbers and advice, and whether the run should stop."""

    kind: str
    sentence: str
    stop: bool = False


@dataclass(frozen=True)
class _Sign:
    """One rule's finding at one probe; `urgent` ones stop a run after `_PATIENCE` probes in a row."""

    kind: str
    sentence: str
    urgent: bool = False


class CollapseWatch:
    """Judges probe results and objective metrics; speaks when something begins, and again when it must stop.

    Args:
        settings: thresholds and whether to stop or to warn.
        dim: width of the features.
        joint_embedding: whether an objective compares views by their features (anything but pure masked-image ones).
    """

    def __init__(self, settings: MonitorSettings, dim: int, joint_embedding: bool) -> None:
        self.settings, self.dim, self.joint_embedding = settings, dim, joint_embedding
        self._streaks: dict[str, int] = {}  # sign -> probes in a row
        self._best_std: dict[str, float] = {}
        self._last_rank: dict[str, float] = {}

    def look(
        self, now: Progress, probes: Mapping[str, Mapping[str, float]], metrics: Mapping[str, float] | None = None
    ) -> list[Verdict]:
        """Judge one probe; nothing to say is an empty list.

        Args:
            now: where the run is.
            probes: network ("student", "teacher") -> `Probe.measure`'s numbers, with `teacher_cosine` if known.
            metrics: the objectives' latest means. Looked at are names that end in `/teacher_entropy` (of one target)
                and `/teacher_spread` (of the mean target), both divided by ln K, `/kl` (nats, teacher to student), and
                `/loss` beside `/chance`, the loss that a constant answer gets.
        """
        if now.fraction < _WARM_UP:
            return []
        signs: list[_Sign] = []
        for net, numbers in probes.items():
            signs += self._features(net, numbers)
        signs += self._teacher(metrics or {}) + self._chance(metrics or {})
        self._streaks = {sign.kind: self._streaks.get(sign.kind, 0) + 1 for sign in signs}
        verdicts = (self._judge(sign) for sign in signs)
        return [verdict for verdict in verdicts if verdict]

    def state(self) -> dict[str, Any]:
        """Everything it remembers, as JSON data."""
        return {"streaks": self._streaks, "best_std": self._best_std, "last_rank": self._last_rank}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        self._streaks = dict(state["streaks"])
        self._best_std = dict(state["best_std"])
        self._last_rank = dict(state["last_rank"])

    def _judge(self, sign: _Sign) -> Verdict | None:
        count = self._streaks[sign.kind]
        if sign.urgent and count == _PATIENCE:
            stop = self.settings.on_collapse == "stop"
            return Verdict(sign.kind, f"{sign.sentence} This is the third probe in a row.", stop)
        return Verdict(sign.kind, sign.sentence) if count == 1 else None

    def _features(self, net: str, numbers: Mapping[str, float]) -> list[_Sign]:
        found = []
        if self.joint_embedding:
            found += self._std(net, numbers["std"])
        found += self._rank(net, numbers["rank_centred"])
        cosine = numbers.get("teacher_cosine", 1.0)
        if cosine < _STRANGERS:
            text = f"{net}: features of teacher and student have a cosine of {cosine:.2f} (< {_STRANGERS})"
            found.append(_Sign(f"{net}/strangers", f"{text}; check teacher.momentum: the teacher no longer follows."))
        return found

    def _std(self, net: str, std: float) -> list[_Sign]:
        best = self._best_std[net] = max(std, self._best_std.get(net, 0.0))
        limit = self.settings.collapse_std
        if std < limit:
            text = f"{net}: features have collapsed to a point: normalised std {std:.4f} (< {limit:g})"
            advice = "lower optimizer.lr, raise teacher.momentum, and check that no stop-gradient or predictor is lost."
            return [_Sign(f"{net}/point", f"{text}; {advice}", urgent=True)]
        if std < _LOW_STD or std < _STD_DROP * best:
            reason = f"< {_LOW_STD}" if std < _LOW_STD else f"its best was {best:.3f}"
            text = f"{net}: features are drawing together: normalised std {std:.3f} ({reason})"
            return [_Sign(f"{net}/shrinking", f"{text}; if it goes on falling, lower optimizer.lr.")]
        return []

    def _rank(self, net: str, rank: float) -> list[_Sign]:
        last, self._last_rank[net] = self._last_rank.get(net, rank), rank
        limit = max(2.0, _RANK_SHARE * self.dim)
        if rank < limit:
            text = f"{net}: features have collapsed to few directions: centred rank {rank:.1f} (< {limit:.1f})"
            advice = (
                "weaken the augmentation that gives the answer away (colour?), or add an objective that decorrelates."
            )
            return [_Sign(f"{net}/directions", f"{text}; {advice}", urgent=self.joint_embedding)]
        if rank < (1 - _RANK_DROP) * last:
            text = f"{net}: centred rank of the features fell from {last:.1f} to {rank:.1f} since the last probe"
            return [_Sign(f"{net}/rank fell", f"{text}; if the next one is lower still, lower optimizer.lr.")]
        return []

    def _teacher(self, metrics: Mapping[str, float]) -> list[_Sign]:
        found = []
        for name, value in metrics.items():
            label, _, what = name.rpartition("/")
            kl = metrics.get(f"{label}/kl", 0.0)
            if what == "teacher_entropy" and value > _UNIFORM and kl < _AGREED:
                text = f"{label}: the teacher has no opinion: its entropy is {value:.3f} of ln K (> {_UNIFORM})"
                advice = "lower the teacher temperature or optimizer.lr, or warm up longer."
                found.append(_Sign(f"{label}/uniform", f"{text}; {advice}", urgent=f"{label}/kl" in metrics))
            if what == "teacher_spread" and value < _ONE_HOT:
                text = f"{label}: all images get one prototype: entropy of the mean {value:.3f} of ln K (< {_ONE_HOT})"
                advice = "check the centring, raise the teacher temperature or the batch."
                found.append(_Sign(f"{label}/one prototype", f"{text}; {advice}", urgent=True))
        return found

    def _chance(self, metrics: Mapping[str, float]) -> list[_Sign]:
        found = []
        for name, chance in metrics.items():
            label, _, what = name.rpartition("/")
            loss = metrics.get(f"{label}/loss")
            if what == "chance" and loss is not None and abs(loss - chance) < _TRIVIAL * abs(chance):
                text = f"{label}: the loss {loss:.3f} is what a constant answer gets ({chance:.3f})"
                found.append(_Sign(f"{label}/constant", f"{text}; raise optimizer.lr or check views, masks and data."))
        return found


class FiniteGuard:
    """Counts skipped steps, those with a non-finite loss or gradient, and says when a run cannot go on.

    That is after `max_skipped` in a row, or when more than 1 % of the last 1000 steps were skipped.

    Args:
        max_skipped: from the settings.
        fp16: the loss scaler starts too high by design; skips in its first 20 steps are free.
    """

    def __init__(self, max_skipped: int, fp16: bool = False) -> None:
        self.max_skipped, self.fp16 = max_skipped, fp16
        self.in_a_row = 0
        self.total = 0
        self._recent: list[int] = []

    def saw(self, step: int, finite: bool) -> str | None:
        """Report a step; a sentence if the run must stop."""
        if finite:
            self.in_a_row = 0
            return None
        if self.fp16 and step < 20:
            return None
        self.in_a_row += 1
        self.total += 1
        self._recent = [s for s in self._recent if s > step - 1000] + [step]
        advice = "lower optimizer.lr, or use run.precision=bf16 or fp32; the newest checkpoint is from before."
        if self.in_a_row >= self.max_skipped:
            return f"loss or gradient was not finite in {self.in_a_row} steps in a row, up to step {step}; {advice}"
        if len(self._recent) > 10:
            return f"loss or gradient was not finite in {len(self._recent)} of the last 1000 steps; {advice}"
        return None

    def state(self) -> dict[str, Any]:
        """Everything it remembers, as JSON data."""
        return {"in_a_row": self.in_a_row, "total": self.total, "recent": self._recent}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        self.in_a_row, self.total, self._recent = state["in_a_row"], state["total"], list(state["recent"])
