"""What is said of language models evaluated on whole texts, and of time and memory per step: rows of the table."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from .arms import Arm, Run, Spread, last, value_of
from .words import NOT_RECORDED, join, number_text

_SPLITS = {"validation": "bits_per_byte/val", "test": "bits_per_byte/test"}


def rows(arm: Arm, arms: Sequence[Arm]) -> dict[str, str]:
    """Bits per byte of whole splits, where any arm recorded them."""
    found: dict[str, str] = {}
    for split, name in _SPLITS.items():
        strides = {tag for each in arms for run in each.runs if (tag := _stride(run, name)) is not None}
        if strides:
            stride = join([f"{stride}" for stride in sorted(strides)])
            found[f"bits per byte, {split}, stride {stride}"] = _bits(arm.over_runs(functools.partial(last, name=name)))
    return found


def kernel_rows(arm: Arm, arms: Sequence[Arm]) -> dict[str, str]:
    """What computed the attention, where any arm recorded it."""
    if not any(kernel(run) for each in arms for run in each.runs):
        return {}
    names = dict.fromkeys(name for run in arm.runs if (name := kernel(run)) is not None)
    return {"attention by": join(list(names)) or NOT_RECORDED}


def speed_rows(arm: Arm, arms: Sequence[Arm]) -> dict[str, str]:
    """Milliseconds of a step, the median of each run, and the peak of memory, each where any arm recorded it."""
    found: dict[str, str] = {}
    every = list(itertools.chain.from_iterable(each.runs for each in arms))
    if any(run.step_ms is not None for run in every):
        times = arm.over_runs(lambda run: run.step_ms)
        found["a step, ms"] = number_text(times.mean) if times.values else NOT_RECORDED
    if any(run.series("peak_memory") for run in every):
        peaks = arm.over_runs(lambda run: max(map(value_of, run.series("peak_memory")), default=None))
        found["peak memory, MiB"] = f"{max(peaks.values):,.0f}" if peaks.values else NOT_RECORDED
    return found


def kernel(run: Run) -> str | None:
    """What computed the attention in training, by name."""
    return next((str(r.tags["kernel"]) for r in run.file.records if r.name == "attention_kernel"), None)


def _stride(run: Run, name: str) -> int | None:
    series = run.series(name)
    return int(str(series[-1].tags["stride"])) if series else None


def _bits(spread: Spread) -> str:
    if not spread.values:
        return NOT_RECORDED
    mean = f"{spread.mean:.4f}"
    if len(spread.values) == 1:
        return mean
    return f"{mean} ({min(spread.values):.4f} to {max(spread.values):.4f})"
