"""What is said of runs on speech: character and word errors with their standard errors, against the best constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..record import read_records
from .arms import Arm, Run, Spread, group_arms, last, load_runs
from .classifiers import LEARNED, are_of_images
from .words import NOT_RECORDED, count, join, quoted, run_name

CER, WER, CONSTANT = "val/cer", "val/wer", "baseline/constant_cer"
_FILE = "long-audio.jsonl"
Lengths = dict[int, dict[str, float]]  # factor to "cer", "cer_se", "wer", "wer_se", "seconds"


def are_of_speech(arms: Sequence[Arm]) -> bool:
    """Whether any run recorded character errors."""
    return any(run.series(CER) for arm in arms for run in arm.runs)


def are_of_text(arms: Sequence[Arm]) -> bool:
    """Whether the runs are neither on images nor on speech: language models have bigrams and samples."""
    return not are_of_images(arms) and not are_of_speech(arms)


def rows(arm: Arm, base: Arm) -> dict[str, str]:
    """The errors of an arm and what they are compared with: name -> text, the same names for every arm."""
    below = _below_constant(arm)
    return {
        "character errors": error_text(arm, CER),
        f"minus {base.label}, points": "" if arm is base else _difference_text(arm, base),
        "word errors": error_text(arm, WER),
        "best constant answer": _percent(arm, CONSTANT),
        "standard errors below it": NOT_RECORDED if below is None else _signed(below),
    }


def read_lengths(run: Run) -> Lengths:
    """What a run has recorded, by factor; empty if nothing.

    Raises:
        ValueError: the file is damaged.
    """
    path, found = run.path / _FILE, Lengths()
    if not path.is_file():
        return found
    for record in read_records(path).records:
        if record.value is not None and "factor" in record.tags:
            found.setdefault(int(str(record.tags["factor"])), {})[record.name.rpartition("/")[2]] = record.value
    return found


def long_rows(arm: Arm, arms: Sequence[Arm]) -> dict[str, str]:
    """Character errors by the utterances that were joined, mean over seeds and range; none where no run has them."""
    known = {each.label: [lengths for run in each.runs if (lengths := read_lengths(run))] for each in arms}
    factors = sorted({factor for runs in known.values() for lengths in runs for factor in lengths})
    found = {}
    for factor in factors:
        values = Spread(tuple(lengths[factor]["cer"] for lengths in known[arm.label] if factor in lengths))
        text = f"{values.mean:.1%}" if values.values else NOT_RECORDED
        if len(values.values) > 1:
            text += f" ({min(values.values):.1%} to {max(values.values):.1%})"
        found[f"character errors, {factor} joined"] = text
    return found


def position_rows(path: str | Path) -> list[dict[str, str]]:
    """One row per folder in a folder, each with the runs of both arms by one position encoding: column name -> text.

    An arm that differs in more than its attention is left out.

    Raises:
        ValueError: it has none, or records that cannot be read.
    """
    rows: list[dict[str, str]] = []
    for folder in sorted(each for each in Path(path).iterdir() if each.is_dir()):
        every = sorted(group_arms(load_runs([folder])), key=lambda arm: str(arm.settings["attention"]))
        arms = [arm for arm in every if arm.label == arm.settings["attention"]]
        rows.append({"positions": folder.name, "seeds": str(len(arms[0].runs)), "character errors": _both(arms, CER)})
        rows[-1]["word errors"] = _both(arms, WER)
        by_arm = [long_rows(arm, arms) for arm in arms]
        for name in by_arm[0]:
            if "1 joined" not in name:
                rows[-1][name.removeprefix("character errors, ")] = " / ".join(row[name] for row in by_arm)
    if not rows:
        raise ValueError(f"a folder must have one for each position encoding, got none in {path}")
    return rows


def _both(arms: Sequence[Arm], name: str) -> str:
    return " / ".join(error_text(arm, name) for arm in arms)


def error_text(arm: Arm, name: str) -> str:
    """In percent: mean over seeds, and the mean of the standard errors that the validation utterances leave."""
    errors = arm.over_runs(lambda run: last(run, f"{name}_se"))
    return _percent(arm, name) + (f" ± {errors.mean:.1%}" if errors.values else "")


def sentences(arms: Sequence[Arm], base: Arm) -> list[str]:
    """Where the errors ended, whether anything was learned, and how each arm stands to `base`."""
    known = [arm for arm in arms if arm.over_runs(lambda run: last(run, CER)).values]
    if not known:
        return []
    ends = join([f"{error_text(arm, CER)} for {quoted(arm)}" for arm in known])
    constants = join(list(dict.fromkeys(_percent(arm, CONSTANT) for arm in known)))
    said = [
        f"The validation character errors ended at {ends}; the best constant answer has {constants}; ± is the "
        "standard error by the number of validation utterances."
    ]
    few = [quoted(arm) for arm in known if (below := _below_constant(arm)) is not None and below < LEARNED]
    if few:
        said.append(
            f"Fewer than {LEARNED:.0f} standard errors below the constant are no sign of learning: {join(few)}."
        )
    for arm in known:
        if arm is not base and base in known:
            points, error = _difference(arm, base)
            where = "within" if abs(points) <= error else "beyond"
            said.append(
                f"the character errors of {quoted(arm)} minus those of {quoted(base)} are {points:+.1f} points, "
                f"{where} the standard error of the difference, {error:.1f} points by the number of validation "
                "utterances."
            )
    return said


def warnings(arms: Sequence[Arm]) -> list[str]:
    """Utterances that were left out, run by run."""
    runs = [(arm, run) for arm in arms for run in arm.runs if run.skipped and run.series(CER)]
    return [f"{run_name(arm, run)}: {count(run.skipped or 0, 'unusable utterance')} left out." for arm, run in runs]


def _difference(arm: Arm, base: Arm) -> tuple[float, float]:
    """arm - base of the errors, in points, and its standard error: rather too large, since both hear the same."""
    means = [each.over_runs(lambda run: last(run, CER)).mean for each in (arm, base)]
    errors = [each.over_runs(lambda run: last(run, f"{CER}_se")).mean for each in (arm, base)]
    return 100 * (means[0] - means[1]), 100 * math.hypot(*errors)


def _difference_text(arm: Arm, base: Arm) -> str:
    points, error = _difference(arm, base)
    return f"{points:+.1f} ± {error:.1f}"


def _below_constant(arm: Arm) -> float | None:
    """By how many of its standard errors the error is below that of the best constant answer, the least of the runs."""
    found = []
    for run in arm.runs:
        cer, error, constant = (last(run, name) for name in (CER, f"{CER}_se", CONSTANT))
        if cer is not None and error is not None and constant is not None:
            found.append((constant - cer) / error if error else math.copysign(math.inf, constant - cer))
    return min(found, default=None)


def _signed(below: float) -> str:
    """In words where the answers have no spread, all empty ones say."""
    return f"{below:.1f}" if math.isfinite(below) else "no spread, and " + ("below" if below > 0 else "above")


def _percent(arm: Arm, name: str) -> str:
    values = arm.over_runs(lambda run: last(run, name))
    return f"{values.mean:.1%}" if values.values else NOT_RECORDED
