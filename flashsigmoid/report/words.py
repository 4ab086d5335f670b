"""Numbers and names as text, for the sentences and the tables of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .arms import Arm, Run, show

NOT_RECORDED = "not recorded"


def quoted(arm: Arm) -> str:
    """The label, in quotes where it would run into the sentence."""
    return f"“{arm.label}”" if "," in arm.label or " " in arm.label else arm.label


def run_name(arm: Arm, run: Run) -> str:
    """The arm, and the seed if it has several."""
    return quoted(arm) if len(arm.runs) == 1 else f"{quoted(arm)} of seed {show(run.seed)}"


def loss_text(value: float) -> str:
    return f"{value:.3f}"


def number_text(value: float) -> str:
    """Three significant digits, without an exponent where that can be read."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, digits)}f}" if -4 <= 2 - digits <= 5 else f"{value:.2e}"


def time_text(time_s: float | None) -> str:
    if time_s is None:
        return NOT_RECORDED
    if time_s < 120:
        return f"{time_s:.0f} s"
    return f"{time_s / 60:.1f} min" if time_s < 7200 else f"{time_s / 3600:.1f} h"


def count(number: int, noun: str) -> str:
    words = dict(enumerate(("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")))
    return f"{words.get(number, number)} {noun}{'' if number == 1 else 's'}"


def join(words: Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
