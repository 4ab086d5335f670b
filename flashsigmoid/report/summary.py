"""What happened, in words and in one row per arm. Every number in them is computed from the records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from .arms import ACCURACY, BIGRAM, FLOOR, Arm, Run, Spread, differing, group_arms, load_runs, paired_differences, show

NOT_RECORDED = "not recorded"


def summary_rows(runs: Iterable[str | Path]) -> list[dict[str, str]]:
    """One row per arm for a table: column name -> text, the same columns in every row.

    Args:
        runs: run directories, or folders of them.

    Raises:
        ValueError: a folder is missing, holds no run, or its records are damaged.
    """
    return arm_rows(group_arms(load_runs(runs)))


def arm_rows(arms: Sequence[Arm]) -> list[dict[str, str]]:
    """As `summary_rows`, of arms."""
    unit, base = loss_unit(arms), base_of(arms)
    rows = []
    for arm in arms:
        row = {
            "arm": arm.label,
            "seeds": str(len(arm.runs)),
            "steps": steps_text(arm),
            f"final loss, {unit}": spread_text(arm.finals),
            "best loss": spread_text(arm.bests),
        }
        if len(arms) > 1:
            row[f"minus {base.label}"] = "" if arm is base else difference_text(arm, base)
        if are_classifiers(arms):
            row[accuracy_label(arms)] = accuracy_text(arm.accuracies)
            row["most frequent class"] = accuracy_text(majorities(arm))
        else:
            row["below bigram"] = below_text(arm, BIGRAM)
            row["below any bigram"] = below_text(arm, FLOOR)
        row["first |A V|"] = norm_text(arm)
        row["time"] = time_text(arm.time_s)
        rows.append(row)
    return rows


def title(arms: Sequence[Arm]) -> str:
    """What is compared, as a heading."""
    kinds = list(dict.fromkeys(str(arm.settings.get("attention", arm.label)) for arm in arms))
    return f"{' against '.join(kinds)} attention".capitalize()


def statement(arms: Sequence[Arm]) -> list[str]:
    """What was compared and what happened, sentence by sentence."""
    base = base_of(arms)
    sentences = [_compared(arms), *_ended(arms)]
    sentences += [_difference(arm, base) for arm in arms if arm is not base and not _is_open(arm, base)]
    sentences += _accuracies(arms) if are_classifiers(arms) else _against_bigrams(arms)
    norms = [f"{norm_text(arm)} for {quoted(arm)}" for arm in arms if first_norm(arm) is not None]
    if norms:
        sentences.append(f"When first measured, the largest attention norm |A V| of a layer was {_join(norms)}.")
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def warnings(arms: Sequence[Arm]) -> list[str]:
    """What keeps the comparison from being taken at its face value."""
    found = []
    for arm in arms:
        for run in arm.runs:
            who = run_name(arm, run)
            broke = run.broke_at
            if broke is not None:
                found.append(f"{who}: {broke.name} became {broke.value} at step {broke.step:,}.")
            if run.is_unfinished:
                found.append(f"{who} is unfinished: {run.steps:,} of {run.planned_steps:,} steps are recorded.")
            if run.final is None:
                found.append(f"{who} has no validation loss on record.")
            elif run.baseline() is None and run.accuracy is None:
                found.append(f"{who} has no bigram baseline on record.")
    if len({run.loss_name for arm in arms for run in arm.runs if run.loss_name}) > 1:
        found.append("Some losses are per byte and some per token.")
    baselines = {round(value, 6) for arm in arms for value in arm.baselines().values}
    if len(baselines) > 1:
        found.append(f"The runs have different bigram baselines: {_join([loss_text(b) for b in sorted(baselines)])}.")
    if len(arms) > 1 and len({seeds_text(arm) for arm in arms}) > 1:
        found.append(f"The arms have different seeds: {_join([f'{quoted(a)} {seeds_text(a)}' for a in arms])}.")
    base = base_of(arms)
    found += [
        f"No difference between {quoted(arm)} and {quoted(base)} is given: they cannot be compared yet."
        for arm in arms
        if arm is not base and _is_open(arm, base)
    ]
    if len(arms) > 1 and max(len(arm.runs) for arm in arms) == 1:
        found.append("One seed per arm says nothing about the spread between seeds.")
    return found


def base_of(arms: Sequence[Arm]) -> Arm:
    """The arm that the others are compared with: softmax if there is one."""
    return next((arm for arm in arms if arm.settings.get("attention") == "softmax"), arms[0])


def quoted(arm: Arm) -> str:
    """The label, in quotes where it would run into the sentence."""
    return f"“{arm.label}”" if "," in arm.label or " " in arm.label else arm.label


def run_name(arm: Arm, run: Run) -> str:
    """The arm, and the seed if it has several."""
    return quoted(arm) if len(arm.runs) == 1 else f"{quoted(arm)} of seed {show(run.seed)}"


def loss_unit(arms: Sequence[Arm]) -> str:
    """As "nats per byte"; the unit that the records of the validation loss carry."""
    units = dict.fromkeys(record.unit for arm in arms for run in arm.runs for record in run.losses)
    return " or ".join(unit.replace("_", " ") for unit in units if unit) or "no unit"


def loss_text(value: float) -> str:
    return f"{value:.3f}"


def number_text(value: float) -> str:
    """Three significant digits, without an exponent where that can be read."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, digits)}f}" if -4 <= 2 - digits <= 5 else f"{value:.2e}"


def spread_text(spread: Spread) -> str:
    """Mean, and the range if there are several."""
    if not spread.values:
        return "none finite"
    mean = loss_text(spread.mean)
    if len(spread.values) == 1:
        return mean
    return f"{mean} ({loss_text(min(spread.values))} to {loss_text(max(spread.values))})"


def difference_text(arm: Arm, base: Arm) -> str:
    """arm - base of the final losses, signed, with the standard deviation over seeds."""
    spread = paired_differences(arm, base)
    if _is_open(arm, base) or not spread.values:
        return "open"
    deviation = f" ± {loss_text(spread.deviation)}" if len(spread.values) > 1 else ""
    return f"{spread.mean:+.3f}{deviation}"


def below_text(arm: Arm, baseline: str) -> str:
    below = arm.below(baseline)
    if below is None:
        return NOT_RECORDED
    if below[0] in (0, below[1]):
        return "yes" if below[0] else "no"
    return f"{below[0]} of {below[1]} seeds"


def are_classifiers(arms: Sequence[Arm]) -> bool:
    """Whether any run recorded an accuracy."""
    return any(arm.accuracies.values for arm in arms)


def accuracy_label(arms: Sequence[Arm]) -> str:
    """What the accuracy is of: classifiers, or nearest neighbours if no run is one."""
    return "accuracy" if any(run.series(ACCURACY) for arm in arms for run in arm.runs) else "kNN accuracy"


def majorities(arm: Arm) -> Spread:
    """What the most frequent class alone gets, in each run."""
    return Spread(tuple(run.majority for run in arm.runs if run.majority is not None))


def accuracy_text(spread: Spread) -> str:
    """In percent: mean, and the range if there are several that differ."""
    if not spread.values:
        return NOT_RECORDED
    least, most = min(spread.values), max(spread.values)
    return f"{spread.mean:.1%}" + (f" ({least:.1%} to {most:.1%})" if least < most else "")


def steps_text(arm: Arm) -> str:
    steps = [run.steps for run in arm.runs]
    text = f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,} to {max(steps):,}"
    planned = max((run.planned_steps or 0 for run in arm.runs), default=0)
    return f"{text} of {planned:,}" if any(run.is_unfinished for run in arm.runs) else text


def seeds_text(arm: Arm) -> str:
    return _join([show(run.seed) for run in arm.runs])


def time_text(time_s: float | None) -> str:
    if time_s is None:
        return NOT_RECORDED
    if time_s < 120:
        return f"{time_s:.0f} s"
    return f"{time_s / 60:.1f} min" if time_s < 7200 else f"{time_s / 3600:.1f} h"


def first_norm(arm: Arm) -> float | None:
    """The largest layer's attention norm when it was first measured, mean over seeds."""
    firsts = [points[0].mean for points in map(arm.points, arm.layers("attn_norm")) if points]
    return math.nan if any(map(math.isnan, firsts)) else max(firsts, default=None)


def norm_text(arm: Arm) -> str:
    norm = first_norm(arm)
    return NOT_RECORDED if norm is None else number_text(norm)


def _compared(arms: Sequence[Arm]) -> str:
    recipes = dict.fromkeys(str(arm.settings["recipe"]) for arm in arms if arm.settings.get("recipe"))
    of_recipe = f" of the recipe {_join(list(recipes))}" if recipes else ""
    steps = _join(list(dict.fromkeys(steps_text(arm) for arm in arms)))
    seeds = dict.fromkeys(seeds_text(arm) for arm in arms)
    trained = f"{steps} steps" + (f", with {_plural('seed', arms[0])} {next(iter(seeds))}" if len(seeds) == 1 else "")
    if len(arms) == 1:
        return f"{_count(len(arms[0].runs), 'run')}{of_recipe}: {quoted(arms[0])}, {trained}."
    fields = differing([arm.settings for arm in arms])
    return (
        f"{_count(len(arms), 'arm')}{of_recipe}, {_join([quoted(arm) for arm in arms])}, differ in "
        f"{_count(len(fields), 'setting')}, {_join(fields)}. They were trained for {trained}."
    )


def _ended(arms: Sequence[Arm]) -> list[str]:
    """Where the losses ended: one sentence for the arms that finished, one each for the others."""
    done, sentences = [], []
    for arm in arms:
        if all(run.final is None for run in arm.runs):
            sentences.append(f"{quoted(arm)} has no validation loss on record.")
        elif not arm.finals.values:
            best = loss_text(min(arm.bests.values)) if arm.bests.values else "none finite"
            sentences.append(f"{quoted(arm)} ended without a finite validation loss (best on the way: {best}).")
        elif all(run.is_unfinished for run in arm.runs):
            loss = loss_text(arm.finals.mean)
            sentences.append(f"{quoted(arm)} is unfinished and stands at a validation loss of {loss}.")
        else:
            done.append(arm)
    if done:
        counts = {len(arm.finals.values) for arm in done}
        over = f", mean of {_join([str(count) for count in sorted(counts)])} seeds" if max(counts) > 1 else ""
        ends = [f"{loss_text(arm.finals.mean)} for {quoted(arm)}{_best_and_lost(arm)}" for arm in done]
        sentences.insert(0, f"The validation loss ({loss_unit(done)}{over}) ended at {_join(ends)}.")
    return sentences


def _best_and_lost(arm: Arm) -> str:
    """In brackets, the best loss on the way if it is not the last, and how many runs the mean leaves out."""
    best, lost = loss_text(arm.bests.mean), len(arm.runs) - len(arm.finals.values)
    remarks = [f"best on the way {best}"] if best != loss_text(arm.finals.mean) else []
    remarks += [f"without {_count(lost, 'run')}, unfinished or not finite"] if lost else []
    return f" ({', '.join(remarks)})" if remarks else ""


def _difference(arm: Arm, base: Arm) -> str:
    spread = paired_differences(arm, base)
    size = loss_text(abs(spread.mean))
    if size == loss_text(0.0):
        text = f"{quoted(arm)} and {quoted(base)} end equal to three decimals"
    else:
        text = f"{quoted(arm)} ends {size} {'above' if spread.mean > 0 else 'below'} {quoted(base)}"
    if len(spread.values) < 2:
        return f"{text}."
    least, most = min(spread.values), max(spread.values)
    deviation = f"standard deviation {loss_text(spread.deviation)}"
    return f"{text} (seed by seed {least:+.3f} to {most:+.3f}, {deviation})."


def _accuracies(arms: Sequence[Arm]) -> list[str]:
    """Shares of right answers, and what the most frequent class alone gets."""
    ends = [f"{accuracy_text(arm.accuracies)} for {quoted(arm)}" for arm in arms if arm.accuracies.values]
    constant = sorted({value for arm in arms for value in majorities(arm).values})
    beside = f"; the most frequent class alone gets {_join([f'{value:.1%}' for value in constant])}" if constant else ""
    return [f"The validation {accuracy_label(arms)} ended at {_join(ends)}{beside}."]


def _against_bigrams(arms: Sequence[Arm]) -> list[str]:
    """Whether the last losses are below each baseline: one sentence for each value of it."""
    sentences = []
    for name, what in (
        (BIGRAM, "of a bigram model of the same text"),
        (FLOOR, "that the best function of the previous token alone could reach"),
    ):
        known = [(arm, below, loss_text(arm.baselines(name).mean)) for arm in arms if (below := arm.below(name))]
        for value in dict.fromkeys(value for *_, value in known):
            ends = [(arm, below, of) for arm, (below, of), each in known if each == value]
            under = [quoted(arm) for arm, below, of in ends if below == of]
            if len(under) == len(arms) > 1:
                who = "Both arms" if len(arms) == 2 else f"All {_count(len(arms), 'arm')}"
                sentences.append(f"{who} are below the {value} {what}.")
                continue
            clauses = [f"{_join(under)} {'are' if len(under) > 1 else 'is'} below"] if under else []
            clauses += [f"{quoted(arm)} {_where(below, of)}" for arm, below, of in ends if below < of]
            clauses[0] += f" the {value} {what}"
            sentences.append(f"{', '.join(clauses)}.")
    return sentences


def _where(below: int, of: int) -> str:
    return f"is below in {below} of {of} runs" if below else "is not below"


def _is_open(arm: Arm, base: Arm) -> bool:
    """Whether there is nothing to compare: no finished run with a finite loss, or losses of two units."""
    ends = all(each.finals.values and not all(r.is_unfinished for r in each.runs) for each in (arm, base))
    return not ends or loss_unit([arm]) != loss_unit([base])


def _count(number: int, noun: str) -> str:
    words = dict(enumerate(("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")))
    return f"{words.get(number, number)} {noun}{'' if number == 1 else 's'}"


def _plural(noun: str, arm: Arm) -> str:
    return noun if len(arm.runs) == 1 else f"{noun}s"


def _join(words: Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
