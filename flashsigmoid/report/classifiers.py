"""What is said of runs on images: accuracy with its standard error, parity or not, speed, files left out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .arms import ACCURACY, IMAGES_PER_S, Arm, Run, Spread, accuracy_differences, accuracy_name
from .words import NOT_RECORDED, count, join, number_text, quoted, run_name

LEARNED = 3.0  # standard errors above the most frequent class from which on a classifier has learned something


def are_of_images(arms: Sequence[Arm]) -> bool:
    """Whether any run was trained on images."""
    return are_classifiers(arms) or any(run.series(IMAGES_PER_S) for arm in arms for run in arm.runs)


def are_classifiers(arms: Sequence[Arm]) -> bool:
    """Whether any run recorded an accuracy."""
    return any(arm.accuracies.values for arm in arms)


def accuracy_label(arms: Sequence[Arm]) -> str:
    """What the accuracy is called: a classifier's, or that of nearest neighbours."""
    return "accuracy" if accuracy_name(arms) == ACCURACY else "kNN accuracy"


def majorities(arm: Arm) -> Spread:
    """What the most frequent class alone gets, in each run."""
    return arm.over_runs(lambda run: run.majority)


def rows(arm: Arm, base: Arm) -> dict[str, str]:
    """The accuracy of an arm and what it is compared with: name -> text, the same names for every arm."""
    return {
        accuracy_label([arm, base]): accuracy_text(arm),
        f"minus {base.label}, points": "" if arm is base else accuracy_difference_text(arm, base),
        "most frequent class": _range_text(majorities(arm)),
        "standard errors above it": NOT_RECORDED if (above := above_majority(arm)) is None else _times(above),
    }


def speed_rows(arm: Arm) -> dict[str, str]:
    """How fast the runs of an arm were, and what they did not read."""
    step_ms, rate, skipped = (
        arm.over_runs(of) for of in (lambda run: run.step_ms, lambda run: run.images_per_s, lambda run: run.skipped)
    )
    return {
        "time per step": f"{number_text(step_ms.mean)} ms" if step_ms.values else NOT_RECORDED,
        "images per second": f"{rate.mean:,.0f}" if rate.values else NOT_RECORDED,
        "corrupt files left out": join(list(dict.fromkeys(f"{value:.0f}" for value in skipped.values))) or NOT_RECORDED,
    }


def accuracy_text(arm: Arm) -> str:
    """In percent: mean, its standard error, and the range if there are several seeds that differ."""
    if not arm.accuracies.values:
        return NOT_RECORDED
    errors = arm.over_runs(lambda run: run.accuracy_se)
    mean, *of_seeds = _range_text(arm.accuracies).split(" ", 1)
    return " ".join([mean, *([f"± {errors.mean:.1%}"] if errors.values else []), *of_seeds])


def run_accuracy_text(run: Run) -> str:
    """The last accuracy of one run, "" if it has none."""
    if run.accuracy is None:
        return ""
    return f"{run.accuracy:.1%}" + ("" if run.accuracy_se is None else f" ± {run.accuracy_se:.1%}")


def accuracy_difference_text(arm: Arm, base: Arm) -> str:
    """arm - base in points of a percent, signed, with its standard error."""
    spread, error = accuracy_differences(arm, base)
    if not _comparable(arm, base) or not spread.values:
        return "open"
    return f"{100 * spread.mean:+.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def above_majority(arm: Arm) -> float | None:
    """By how many of its standard errors the accuracy is above the most frequent class, the least of the runs."""
    found = []
    for run in arm.runs:
        if run.accuracy is not None and run.accuracy_se is not None and run.majority is not None:
            above = run.accuracy - run.majority
            found.append(above / run.accuracy_se if run.accuracy_se else math.copysign(math.inf, above))
    return min(found, default=None)


def sentences(arms: Sequence[Arm], base: Arm) -> list[str]:
    """Where the accuracies ended, whether anything was learned, and whether each arm is at parity with `base`."""
    known = [arm for arm in arms if arm.accuracies.values]
    if not known:
        return []
    ends = join([f"{accuracy_text(arm)} for {quoted(arm)}" for arm in known])
    has_errors = any(arm.over_runs(lambda run: run.accuracy_se).values for arm in known)
    constant = join([f"{value:.1%}" for value in sorted({value for arm in known for value in majorities(arm).values})])
    said = [
        f"The validation {accuracy_label(arms)} ended at {ends}"
        + (f"; the most frequent class alone gets {constant}" if constant else "")
        + ("; ± is the standard error by the number of validation images." if has_errors else ".")
    ]
    above = {quoted(arm): value for arm in known if (value := above_majority(arm)) is not None}
    if above:
        (name, value), *others = above.items()
        clauses = [f"{_times(value)} standard errors above the most frequent class for {name}"]
        clauses += [f"{_times(value)} for {name}" for name, value in others]
        few = [name for name, value in above.items() if value < LEARNED]
        short = f"; fewer than {LEARNED:.0f} are no sign of learning: {join(few)}" if few else ""
        said.append(f"That is {join(clauses)}{short}.")
    return said + [_parity(arm, base) for arm in known if arm is not base and _comparable(arm, base)]


def warnings(arms: Sequence[Arm]) -> list[str]:
    """Files that were left out, run by run."""
    runs = [(arm, run) for arm in arms for run in arm.runs if run.skipped]
    return [f"{run_name(arm, run)}: {count(run.skipped or 0, 'corrupt file')} left out." for arm, run in runs]


def _parity(arm: Arm, base: Arm) -> str:
    spread, error = accuracy_differences(arm, base)
    points, several = 100 * spread.mean, len(spread.values) > 1
    where = "above" if points > 0 else "below"
    label = accuracy_label([arm, base])
    what = f"the {label} of {quoted(arm)} is {abs(points):.2f} points {where} that of {quoted(base)}"
    if points == 0:
        what = f"the {label} of {quoted(arm)} is that of {quoted(base)}"
    if several:
        least, most = 100 * min(spread.values), 100 * max(spread.values)
        what += f" (seed by seed {least:+.2f} to {most:+.2f}, standard deviation {100 * spread.deviation:.2f})"
    if error is None:
        return f"{what}; without a standard error on record that says nothing about parity."
    of = f"over {len(spread.values)} seeds" if several else "by the number of validation images"
    measure = f"the standard error of the difference, {100 * error:.2f} points {of}"
    if abs(spread.mean) <= error:
        return f"{what}, within {measure}: at parity, as far as these runs can tell."
    ratio = abs(spread.mean) / error if error else math.inf
    doubt = "; fewer than two standard errors are no proof of a difference" if ratio < 2 else ""
    return f"not at parity: {what}, beyond {measure}, by a factor of {number_text(ratio)}{doubt}."


def _comparable(arm: Arm, base: Arm) -> bool:
    """Whether both have a finished run with an accuracy."""

    def ends(run: Run) -> bool:
        return run.accuracy is not None and math.isfinite(run.accuracy) and not run.is_unfinished

    return all(any(map(ends, each.runs)) for each in (arm, base))


def _range_text(spread: Spread) -> str:
    """In percent: mean, and the range if there are several that differ."""
    if not spread.values:
        return NOT_RECORDED
    least, most = min(spread.values), max(spread.values)
    return f"{spread.mean:.1%}" + (f" ({least:.1%} to {most:.1%})" if least < most else "")


def _times(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}"
