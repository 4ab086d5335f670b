"""Runs joined into arms: what each was set to, what it reached, how it ended. No text and no drawing here."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..record import RECORDS_NAME, Record, RecordFile, find_runs, read_records

SEED = "seed"
STEPS = "steps"  # the setting that says how long a run is meant to be
TRAIN_LOSS = "train/loss"
VAL_LOSSES = ("val/loss_bytes", "val/loss")  # per byte first: tokens of two tokenizers do not compare
BIGRAM = "baseline/bigram"
FLOOR = "baseline/bigram_floor"  # no function of the previous token alone is below it
# accuracies of a classifier, else of the nearest neighbours of an encoder's features, and their standard errors
ACCURACY, KNN_ACCURACY = "val/accuracy", "val/knn_accuracy"
MAJORITY = "baseline/majority"  # the share of the most frequent class
IMAGES_PER_S = "images_per_s"
SKIPPED = "data/skipped"  # corrupt files that were left out
SAMPLE = "sample"


@dataclass(frozen=True)
class Point:
    """One number over several runs at one step: its mean, least and largest value, and the mean time."""

    step: int
    time_s: float | None
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """A handful of finite numbers."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def deviation(self) -> float:
        """Sample standard deviation, nan for fewer than two values."""
        if len(self.values) < 2:
            return math.nan
        return math.sqrt(sum((x - self.mean) ** 2 for x in self.values) / (len(self.values) - 1))

    @property
    def standard_error(self) -> float:
        """Of the mean, nan for fewer than two values."""
        return self.deviation / math.sqrt(len(self.values)) if self.values else math.nan


@dataclass(frozen=True)
class Run:
    """One run directory as read."""

    path: Path
    file: RecordFile

    @property
    def settings(self) -> dict[str, Any]:
        return self.file.settings

    @property
    def seed(self) -> Any:
        return self.settings.get(SEED)

    def series(self, name: str) -> list[Record]:
        """The records of a name that have a value and a step, by step; of one step the last counts."""
        return self._series.get(name, [])

    @cached_property
    def _series(self) -> dict[str, list[Record]]:
        by_name: dict[str, dict[int, Record]] = {}
        for record in self.file.records:
            if record.value is not None and record.step is not None:
                by_name.setdefault(record.name, {})[record.step] = record
        return {name: [steps[s] for s in sorted(steps)] for name, steps in by_name.items()}

    @cached_property
    def loss_name(self) -> str | None:
        """Name of the validation loss: per byte where it is recorded."""
        return next((name for name in VAL_LOSSES if self.series(name)), None)

    @property
    def losses(self) -> list[Record]:
        """The validation losses by step."""
        return self.series(self.loss_name) if self.loss_name else []

    @property
    def final(self) -> Record | None:
        """The last validation loss, finite or not."""
        return self.losses[-1] if self.losses else None

    @property
    def best(self) -> Record | None:
        """The least finite validation loss."""
        finite = [record for record in self.losses if math.isfinite(value_of(record))]
        return min(finite, key=value_of, default=None)

    @property
    def accuracy(self) -> float | None:
        """The last validation accuracy, of a classifier, or of the nearest neighbours of an encoder's features."""
        series = self.series(ACCURACY) or self.series(KNN_ACCURACY)
        return value_of(series[-1]) if series else None

    @property
    def majority(self) -> float | None:
        """What the most frequent class alone gets."""
        series = self.series(MAJORITY)
        return value_of(series[-1]) if series else None

    @property
    def accuracy_se(self) -> float | None:
        """The standard error of the last validation accuracy, of the validation images."""
        series = self.series(f"{ACCURACY}_se") or self.series(f"{KNN_ACCURACY}_se")
        return value_of(series[-1]) if series else None

    @property
    def skipped(self) -> int | None:
        """How many corrupt files were left out."""
        series = self.series(SKIPPED)
        return int(value_of(series[-1])) if series else None

    @property
    def step_ms(self) -> float | None:
        """Milliseconds of training for a step, median over the records of the training loss."""
        timed = [r for r in self.series(TRAIN_LOSS) if r.time_s is not None]
        spans = [
            ((b.time_s or 0.0) - (a.time_s or 0.0), (b.step or 0) - (a.step or 0)) for a, b in itertools.pairwise(timed)
        ]
        return statistics.median(1e3 * time_s / steps for time_s, steps in spans) if spans else None

    @property
    def images_per_s(self) -> float | None:
        """Images trained on in a second, median over the records."""
        series = self.series(IMAGES_PER_S)
        return statistics.median(map(value_of, series)) if series else None

    def baseline(self, name: str = BIGRAM) -> float | None:
        """The baseline of that name that has the unit of the validation loss."""
        units = {record.unit for record in self.losses}
        found = [r.value for r in self.file.records if r.name == name and r.unit in units]
        return found[-1] if found else None

    @property
    def bytes_per_token(self) -> float:
        """The ratio of the validation losses per token and per byte, 1 if only one of them is used."""
        per_byte, per_token = (
            {r.step: value_of(r) for r in self.series(name) if math.isfinite(value_of(r))} for name in VAL_LOSSES
        )
        both = per_byte.keys() & per_token.keys()
        if not both:
            return 1.0
        step = max(both, key=lambda step: step or 0)
        return per_token[step] / per_byte[step]

    @cached_property
    def broke_at(self) -> Record | None:
        """The first training or validation loss that is not finite."""
        losses = [record for name in (TRAIN_LOSS, *VAL_LOSSES) for record in self.series(name)]
        broken = [record for record in losses if not math.isfinite(value_of(record))]
        return min(broken, key=lambda record: record.step or 0, default=None)

    @property
    def steps(self) -> int:
        """The last step that any record speaks of."""
        return max((r.step for r in self.file.records if r.step is not None), default=0)

    @property
    def planned_steps(self) -> int | None:
        """How many steps the settings ask for, None if they do not say."""
        planned = self.settings.get(STEPS)
        return planned if type(planned) is int else None

    @property
    def is_unfinished(self) -> bool:
        """Whether the records end before the steps that the settings ask for."""
        return self.planned_steps is not None and self.steps < self.planned_steps

    @property
    def time_s(self) -> float | None:
        """Seconds of training at the last record."""
        return max((r.time_s for r in self.file.records if r.time_s is not None), default=None)

    def layers(self, statistic: str) -> list[str]:
        """The names statistic/layer_0, statistic/layer_1, ... that have records, in order of layers."""
        prefix = f"{statistic}/layer_"
        numbers = {name: name.removeprefix(prefix) for name in self._series if name.startswith(prefix)}
        numbers = {name: int(number) for name, number in numbers.items() if number.isdecimal()}
        return sorted(numbers, key=lambda name: numbers[name])

    def sample(self) -> tuple[Record, str] | None:
        """The last text sample whose file is there."""
        for record in reversed(self.file.records):
            if record.name == SAMPLE and record.artifact is not None:
                file = self.path / record.artifact
                if file.is_file():
                    return record, file.read_text(encoding="utf-8", errors="replace")
        return None


@dataclass(frozen=True)
class Arm:
    """The runs whose settings differ in nothing but the seed."""

    label: str
    index: int  # its colour
    runs: tuple[Run, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """What all its runs share, and the seed of the first."""
        return self.runs[0].settings

    @property
    def finals(self) -> Spread:
        """Finite final validation losses, of the finished runs if there are any such."""
        finite = [r for r in self.runs if r.final is not None and math.isfinite(value_of(r.final))]
        chosen = [run for run in finite if not run.is_unfinished] or finite
        return Spread(tuple(value_of(run.final) for run in chosen if run.final is not None))

    @property
    def bests(self) -> Spread:
        """The least validation losses of the runs."""
        return Spread(tuple(value_of(run.best) for run in self.runs if run.best is not None))

    @property
    def accuracies(self) -> Spread:
        """Last validation accuracies, of the finished runs if there are any such."""
        known = [run for run in self.runs if run.accuracy is not None]
        chosen = [run for run in known if not run.is_unfinished] or known
        return Spread(tuple(run.accuracy for run in chosen if run.accuracy is not None))

    def over_runs(self, of: Callable[[Run], float | None]) -> Spread:
        """A number of each run that has it."""
        return Spread(tuple(value for run in self.runs if (value := of(run)) is not None))

    def baselines(self, name: str = BIGRAM) -> Spread:
        """The baselines of the runs."""
        return self.over_runs(lambda run: run.baseline(name))

    def below(self, name: str = BIGRAM) -> tuple[int, int] | None:
        """(runs whose final loss is below their baseline, runs that recorded both); None if no run did."""
        both = [
            (value_of(run.final), baseline)
            for run in self.runs
            if run.final is not None and (baseline := run.baseline(name)) is not None
        ]
        return (sum(final < baseline for final, baseline in both), len(both)) if both else None

    @property
    def time_s(self) -> float | None:
        """Seconds of training of the longest run."""
        return max((run.time_s for run in self.runs if run.time_s is not None), default=None)

    @property
    def losses(self) -> list[Point]:
        """The validation losses over the runs."""
        name = next((run.loss_name for run in self.runs if run.loss_name is not None), None)
        return self.points(name) if name else []

    @property
    def train_losses(self) -> list[Point]:
        """The training losses over the runs, in the unit of the validation losses."""
        return self.points(TRAIN_LOSS, 1.0 / self.bytes_per_token)

    @property
    def bytes_per_token(self) -> float:
        """Mean over the runs; 1 if they record a single validation loss."""
        return sum(run.bytes_per_token for run in self.runs) / len(self.runs)

    def points(self, name: str, factor: float = 1.0) -> list[Point]:
        """Mean and range over the runs that recorded `name` at a step, times `factor`."""
        by_step: dict[int, list[Record]] = {}
        for run in self.runs:
            for record in run.series(name):
                by_step.setdefault(record.step or 0, []).append(record)
        points = []
        for step, records in sorted(by_step.items()):
            values = [value_of(record) * factor for record in records]
            times = [record.time_s for record in records if record.time_s is not None]
            mean = sum(values) / len(values)
            # the least of numbers among which is a nan depends on their order
            low, high = (mean, mean) if math.isnan(mean) else (min(values), max(values))
            points.append(Point(step, sum(times) / len(times) if times else None, mean, low, high))
        return points

    def layers(self, statistic: str) -> list[str]:
        """As `Run.layers`, of all runs."""
        return max((run.layers(statistic) for run in self.runs), key=len)


def load_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs at or below the paths, each once.

    Raises:
        ValueError: a path is missing or holds no run, no path is given, or records are damaged.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"a run must be a folder with {RECORDS_NAME}, got {path}, which is no folder")
        found = find_runs(path)
        if not found:
            raise ValueError(f"a run must be a folder with {RECORDS_NAME}, found none at or below {path}")
        folders.update({folder.resolve(): folder for folder in found})
    if not folders:
        raise ValueError("at least one run must be given, got none")
    return [Run(folder, read_records(folder / RECORDS_NAME)) for folder in folders.values()]


def group_arms(runs: Sequence[Run]) -> list[Arm]:
    """Join runs that differ in nothing but the seed; pairs of two kinds of attention come first.

    The label of an arm is its kind of attention, and what distinguishes it from the first arm of that kind.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        shared = {name: value for name, value in run.settings.items() if name != SEED}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(run)
    unordered = [sorted(group, key=_seed_order) for group in groups.values()]

    def distance_to_other_kinds(group: list[Run]) -> int:
        others = [other for other in unordered if _kind(other[0]) != _kind(group[0])]
        return min((len(differing([group[0].settings, o[0].settings])) for o in others), default=0)

    # of several arms of a kind, the one that differs least from another kind stands for it
    ordered = sorted(unordered, key=lambda group: (distance_to_other_kinds(group), _kind(group[0])))
    first: dict[str, list[Run]] = {}
    for group in ordered:
        first.setdefault(_kind(group[0]), group)
    arms = []
    for group in [*first.values(), *(group for group in ordered if group is not first[_kind(group[0])])]:
        settings, kind = group[0].settings, _kind(group[0])
        fields = differing([first[kind][0].settings, settings])
        label = ", ".join([kind, *(f"{name}={show(settings.get(name))}" for name in fields)])
        arms.append(Arm(label, len(arms), tuple(group)))
    return arms


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The fields, but for the seed, in which settings differ, in the order in which they come."""
    names = dict.fromkeys(name for each in settings for name in each if name != SEED)
    return [name for name in names if len({_comparable(each, name) for each in settings}) > 1]


def paired_differences(arm: Arm, base: Arm) -> Spread:
    """arm - base of the final losses: seed by seed if all runs of both finished and have the same seeds.

    Otherwise the one difference of the means; nothing where an arm has no finite loss.
    """

    def final(run: Run) -> float | None:
        return None if run.final is None else value_of(run.final)

    return _paired(arm, base, final) or _of_means(arm.finals, base.finals)


def accuracy_name(arms: Sequence[Arm]) -> str:
    """The record of the accuracy: a classifier's, or that of nearest neighbours if no run is a classifier's."""
    return ACCURACY if any(run.series(ACCURACY) for arm in arms for run in arm.runs) else KNN_ACCURACY


def accuracy_differences(arm: Arm, base: Arm) -> tuple[Spread, float | None]:
    """arm - base of the last accuracies, as `paired_differences`, and the standard error of their mean.

    Of several seeds it is that of the mean over seeds; of one difference, that of two samples of validation images,
    None where it was not recorded. Both arms are judged on the same images, so the latter is rather too large.
    """
    paired = _paired(arm, base, lambda run: run.accuracy)
    if paired is not None and len(paired.values) > 1:
        return paired, paired.standard_error
    errors = [each.over_runs(lambda run: run.accuracy_se) for each in (arm, base)]
    error = math.hypot(*(each.mean for each in errors)) if all(each.values for each in errors) else None
    return paired or _of_means(arm.accuracies, base.accuracies), error


def last(run: Run, name: str) -> float | None:
    """The last number of that name."""
    series = run.series(name)
    return value_of(series[-1]) if series else None


def value_of(record: Record) -> float:
    """The value, nan if there is none."""
    return math.nan if record.value is None else record.value


def show(value: object) -> str:
    """A setting as text."""
    if isinstance(value, list | tuple):
        return f"({', '.join(map(show, value))})"
    return f"{value:.6g}" if isinstance(value, float) and not value.is_integer() else str(value)


def _kind(run: Run) -> str:
    return str(run.settings.get("attention", run.path.name))


def _seed_order(run: Run) -> tuple[str, Any]:
    return type(run.seed).__name__, 0 if run.seed is None else run.seed


def _comparable(settings: dict[str, Any], name: str) -> str | None:
    return json.dumps(settings[name]) if name in settings else None


def _paired(arm: Arm, base: Arm, of: Callable[[Run], float | None]) -> Spread | None:
    """arm - base of a number seed by seed, None if they have not the same seeds, all finished with a finite number."""
    ours, theirs = _by_seed(arm, of), _by_seed(base, of)
    if not ours or ours.keys() != theirs.keys():
        return None
    return Spread(tuple(ours[seed] - theirs[seed] for seed in ours))


def _by_seed(arm: Arm, of: Callable[[Run], float | None]) -> dict[str, float]:
    """Empty if two runs share a seed, or one is unfinished or ended without a finite number."""
    numbers = {
        str(run.seed): value
        for run in arm.runs
        if (value := of(run)) is not None and math.isfinite(value) and not run.is_unfinished
    }
    return numbers if len(numbers) == len(arm.runs) else {}


def _of_means(ours: Spread, theirs: Spread) -> Spread:
    return Spread((ours.mean - theirs.mean,) if ours.values and theirs.values else ())
