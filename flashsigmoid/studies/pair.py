"""Arms of a recipe over several seeds, and the recipes that begin with what they learned: planned, run side by side.

A training is the command `flashsigmoid train`, in a process of its own; the comparison is the report's.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..recipes.fields import field_path, override
from ..record import RECORDS_NAME
from ..training.callbacks import Progress, Show
from ..training.checkpoint import checkpoints, load_config
from ..training.run import Run, check_unchanged
from .jobs import Job, Process, Schedule, State, least_busy, run_jobs, start_process, visible_gpus

Fields = Mapping[str, str]
ARMS: Mapping[str, Fields] = {"sigmoid": {"attention": "sigmoid"}, "softmax": {"attention": "softmax"}}
LOG = "log.txt"  # what a training printed, in its folder
_CARRIED = ("model.", "data.")  # fields of the first recipe that hold for those which begin with its encoder too


@dataclass(frozen=True)
class Trial:
    """One training: an arm of a recipe with a seed."""

    name: str
    stage: Path  # the folder of all trials of its recipe
    folder: Path
    run: Run
    fields: Fields  # in which the run differs from the recipe
    recipe: str
    after: str | None = None  # name of the trial whose encoder it begins with

    def command(self, device: str) -> tuple[str, ...]:
        """What trains it, or goes on with it."""
        sets = [word for field, value in self.fields.items() for word in ("--set", f"{field}={value}")]
        words = ("train", self.recipe, *sets, "--out", str(self.folder), "--resume", "--device", device)
        return (sys.executable, "-m", "flashsigmoid", *words)

    @property
    def is_finished(self) -> bool:
        """Whether its last checkpoint is there.

        Raises:
            ValueError: the folder has another run.
        """
        found = checkpoints(self.folder)
        if not found:
            return False
        config = load_config(found[-1])
        try:
            check_unchanged(config, {**self.run.sections(), "fingerprint": config["fingerprint"]})
        except ValueError as error:
            raise ValueError(f"{error} in {self.folder}; --out names another folder") from error
        return found[-1].name == f"step-{self.run.steps:08d}"


def plan(
    recipes: Mapping[str, Callable[[], Run]],
    recipe: str,
    out: Path,
    *,
    seeds: int = 3,
    arms: Mapping[str, Fields] = ARMS,
    fields: Fields | None = None,
    then: Mapping[str, Fields] | None = None,
) -> list[Trial]:
    """Every training of a comparison: out/ARM/seed-S, and out/then-RECIPE/ARM/seed-S of what begins with it.

    Seed by seed, so that pairs are complete early, and a trial before those that begin with it.

    Args:
        recipes: by name.
        recipe: the first one.
        out: folder of all of it.
        seeds: how many: that of the recipe, which `fields` may set, and the next ones.
        arms: fields by which each differs.
        fields: of all arms. Those of the model and of the data, the arms' too, hold for the recipes of `then` as well.
        then: fields by recipe for images, each begun with the encoder of every trial of the first one.

    Raises:
        ValueError: a recipe or a field that is not there; fewer than one seed; arms that do not differ, or whose names
            are no folders' names; a bias that has no effect; a recipe that does not begin with an encoder.
    """
    fields, then = fields or {}, then or {}
    for name in (recipe, *then):
        if name not in recipes:
            raise ValueError(f"RECIPE must be one of {', '.join(recipes)}, got {name}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    for arm in arms:
        if not re.fullmatch(r"\w[\w.+-]*", arm) or arm.startswith("then-"):
            raise ValueError(f"an arm must have a name of letters, digits, . + and -, got {arm!r}")
    described: dict[str, str] = {}
    for arm, own in arms.items():
        base = recipes[recipe]()
        if twice := sorted(_full(base, fields).keys() & _full(base, own).keys()):
            raise ValueError(f"{', '.join(twice)} must be set for all arms or by an arm, got both for the arm {arm}")
        told = json.dumps(override(base, dict(fields), dict(own)).sections(), sort_keys=True)
        if told in described:
            raise ValueError(f"arms must differ in a field, got {described[told]} and {arm}")
        described[told] = arm
    first = int(_full(recipes[recipe](), fields).get("seed", recipes[recipe]().seed))
    return [
        trial
        for seed in range(first, first + seeds)
        for arm, own in arms.items()
        for trial in _chain(recipes, recipe, out, arm, seed, fields, own, then)
    ]


def _chain(
    recipes: Mapping[str, Callable[[], Run]],
    recipe: str,
    out: Path,
    arm: str,
    seed: int,
    fields: Fields,
    own: Fields,
    then: Mapping[str, Fields],
) -> Iterator[Trial]:
    """The trial of an arm and a seed, and those that begin with it."""
    base = recipes[recipe]()
    given = {**_full(base, fields), **_full(base, own)}
    begin = _trial(recipe, base, out, arm, seed, given)
    yield begin
    carried = {path: text for path, text in given.items() if path.startswith(_CARRIED)}
    for name, changes in then.items():
        later = recipes[name]()
        if not hasattr(later, "init"):
            raise ValueError(f"--then must be a recipe that begins with an encoder, as probe_digits, got {name}")
        later_fields = {**carried, **_full(later, changes), "init": str(begin.folder)}
        trial = _trial(name, later, out / f"then-{name}", arm, seed, later_fields)
        yield replace(trial, name=f"{name} {trial.name}", after=begin.name)


def _trial(recipe: str, base: Run, stage: Path, arm: str, seed: int, fields: Fields) -> Trial:
    fields = {**fields, "seed": str(seed)}
    run = override(base, fields)
    if run.model.sigmoid_bias is not None and run.model.attention != "sigmoid":
        attention = run.model.attention
        raise ValueError(f"sigmoid_bias has no effect with attention={attention}, got it for the arm {arm}")
    return Trial(f"{arm}-{seed}", stage, stage / arm / f"seed-{seed}", run, fields, recipe)


def _full(run: Run, fields: Fields) -> dict[str, str]:
    """Fields by their whole names."""
    return {field_path(run, name): text for name, text in fields.items()}


def train_trials(
    trials: Sequence[Trial],
    *,
    jobs: int = 1,
    device: str = "auto",
    max_minutes: float | None = None,
    show: Show,
    say: Callable[[str], None],
) -> Schedule:
    """Train what is not trained, `jobs` at a time; what stopped goes on from its checkpoint.

    A failed training is named with the end of its log, and the others go on.

    Args:
        trials: of `plan`.
        jobs: processes at once; they share the machine, and each has one of its GPUs.
        device: of each, as `Options.device`.
        max_minutes: for all of them together. Default: no limit.
        show: told where each stands, as its records say.
        say: told what else there is to say.

    Returns:
        The schedule, with how each ended.

    Raises:
        ValueError: a folder has another run; fewer than one job; max_minutes is not positive.
        KeyboardInterrupt: this process was interrupted; all trainings have saved a checkpoint and stopped.
    """
    if max_minutes is not None and not max_minutes > 0.0:
        raise ValueError(f"max_minutes must be positive or None, got {max_minutes}")
    finished = [trial.name for trial in trials if trial.is_finished]
    queue = [Job(trial.name, trial.command(device), trial.folder / LOG, trial.after) for trial in trials]
    schedule = Schedule(queue, jobs, finished)
    if jobs > 1:
        _fetch([trial.run for trial in trials if trial.name not in finished])
    if finished:
        say(f"trained already, taken as they are: {', '.join(finished)}")
    watched: dict[str, Watch] = {}
    gpus: list[str] = [] if device == "cpu" else visible_gpus()
    taken: dict[str, str | None] = {}  # by the running trainings
    by_name = {trial.name: trial for trial in trials}

    def start(job: Job, minutes: float | None) -> Process:
        trial = by_name[job.name]
        watched[job.name] = Watch(job.name, trial.folder / RECORDS_NAME, trial.run.steps)
        show(watched[job.name].progress)
        limit = () if minutes is None else ("--max-minutes", f"{minutes:.3f}")
        taken[job.name] = least_busy(gpus, filter(None, taken.values()))
        return start_process(replace(job, command=(*job.command, *limit)), jobs, taken[job.name])

    def watch() -> None:
        for each in watched.values():
            if each.read():
                show(each.progress)

    def ended(job: Job, state: State) -> None:
        watch()
        del watched[job.name], taken[job.name]
        if state == "failed":
            say(f"{job.name} failed; the end of {job.log}:\n{last_lines(job.log)}")

    run_jobs(schedule, start, max_minutes=max_minutes, watch=watch, ended=ended)
    for name in schedule.named("waiting"):
        if (after := by_name[name].after) is not None and schedule.states[after] == "failed":
            say(f"{name} did not start: {after} failed")
    return schedule


def _fetch(runs: Sequence[Run]) -> None:
    """Have public images on the disk: processes at once would write the same files."""
    described: list[Any] = [getattr(run, "data", None) for run in runs]
    for data in {data for data in described if getattr(data, "download", False)}:
        from ..training.images import load_images

        load_images(data)


class Watch:
    """Where a training in another process stands, from what is added to its records.

    Args:
        name: of the training.
        path: of its records, which need not be there yet.
        steps: of all of it.
    """

    def __init__(self, name: str, path: Path, steps: int) -> None:
        self.path, self.offset, self.file = path, 0, 0
        self.progress = Progress(name, 0, steps, 0.0, {}, False)

    def read(self) -> bool:
        """Take what is new; whether there was anything that `progress` has not."""
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            if (number := os.fstat(file.fileno()).st_ino) != self.file:  # begun anew, or cut back to a checkpoint
                self.file, self.offset = number, 0
            file.seek(self.offset)
            *lines, rest = file.read().split(b"\n")
            self.offset = file.tell() - len(rest)
        before = self.progress
        metrics, step, time_s, validated = dict(before.metrics), before.step, before.time_s, False
        for record in map(json.loads, lines):
            name: Any = record.get("name", "")
            if not (name == "train/loss" or name.startswith("val/")) or "step" not in record:
                continue
            step, time_s = record["step"], record.get("time_s", time_s)
            metrics[name] = float(record.get("value", "nan"))
            validated = validated or name.startswith("val/")
        self.progress = Progress(before.name, step, before.steps, time_s, metrics, validated)
        return validated or (step, metrics) != (before.step, before.metrics)


def last_lines(log: Path, count: int = 8) -> str:
    """The end of a log, indented."""
    lines = log.read_text("utf-8", errors="replace").rstrip().splitlines()[-count:] if log.exists() else []
    return "\n".join(f"  {line}" for line in lines) or "  (it is empty)"


def compared(trials: Sequence[Trial], schedule: Schedule) -> dict[Path, list[Path]]:
    """Folders of the finished trials, by the folder of their recipe."""
    found: dict[Path, list[Path]] = {}
    for trial in trials:
        if schedule.states[trial.name] == "finished":
            found.setdefault(trial.stage, []).append(trial.folder)
    return found
