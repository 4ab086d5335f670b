"""What happened, in words and in one row per arm. Every number in them is computed from the records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import classifiers, recognisers, texts
from .arms import BIGRAM, FLOOR, Arm, Spread, differing, group_arms, load_runs, paired_differences, show
from .classifiers import are_classifiers, are_of_images
from .recognisers import are_of_speech, are_of_text
from .words import NOT_RECORDED, count, join, loss_text, number_text, quoted, run_name, time_text


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
        row = {"arm": arm.label, "seeds": str(len(arm.runs)), "steps": steps_text(arm)}
        if are_classifiers(arms):
            row |= classifiers.rows(arm, base)
        if are_of_speech(arms):
            row |= recognisers.rows(arm, base) | recognisers.long_rows(arm, arms)
        row |= {f"final loss, {unit}": spread_text(arm.finals), "best loss": spread_text(arm.bests)}
        if len(arms) > 1:
            row[f"minus {base.label}"] = "" if arm is base else difference_text(arm, base)
        if are_of_text(arms):
            row["below bigram"] = below_text(arm, BIGRAM)
            row["below any bigram"] = below_text(arm, FLOOR)
            row |= texts.rows(arm, arms)
        row |= texts.kernel_rows(arm, arms)
        row["first |A V|"] = norm_text(arm)
        if are_of_images(arms):
            row |= classifiers.speed_rows(arm)
        else:
            row |= texts.speed_rows(arm, arms)
        row["time"] = time_text(arm.time_s)
        rows.append(row)
    return rows


def accuracy_statement(runs: Iterable[str | Path]) -> list[str]:
    """What the runs on images or speech reached, and whether an arm is at parity with softmax, sentence by sentence.

    Args:
        runs: run directories, or folders of them.

    Raises:
        ValueError: a folder is missing, holds no run, or its records are damaged.
    """
    arms = group_arms(load_runs(runs))
    base = base_of(arms)
    return _capitalised([*classifiers.sentences(arms, base), *recognisers.sentences(arms, base)])


def difference_statement(runs: Iterable[str | Path]) -> list[str]:
    """How the arms differ from softmax, or from the first one: as `accuracy_statement`, then in validation loss.

    Args:
        runs: run directories, or folders of them.

    Raises:
        ValueError: a folder is missing, holds no run, or its records are damaged.
    """
    arms = group_arms(load_runs(runs))
    return [*accuracy_statement(runs), *_capitalised(_differences(arms, base_of(arms)))]


def title(arms: Sequence[Arm]) -> str:
    """What is compared, as a heading."""
    kinds = list(dict.fromkeys(str(arm.settings.get("attention", arm.label)) for arm in arms))
    return f"{' against '.join(kinds)} attention".capitalize()


def statement(arms: Sequence[Arm]) -> list[str]:
    """What was compared and what happened, sentence by sentence."""
    base = base_of(arms)
    reached = [*classifiers.sentences(arms, base), *recognisers.sentences(arms, base)]
    sentences = [_compared(arms), *reached, *_ended(arms)]
    sentences += _differences(arms, base)
    sentences += _against_bigrams(arms) if are_of_text(arms) else []
    norms = [f"{norm_text(arm)} for {quoted(arm)}" for arm in arms if first_norm(arm) is not None]
    if norms:
        sentences.append(f"When first measured, the largest attention norm |A V| of a layer was {join(norms)}.")
    return _capitalised(sentences)


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
            elif run.baseline() is None and are_of_text(arms):
                found.append(f"{who} has no bigram baseline on record.")
    if len({run.loss_name for arm in arms for run in arm.runs if run.loss_name}) > 1:
        found.append("Some losses are per byte and some per token.")
    baselines = {round(value, 6) for arm in arms for value in arm.baselines().values}
    if len(baselines) > 1:
        found.append(f"The runs have different bigram baselines: {join([loss_text(b) for b in sorted(baselines)])}.")
    if len(arms) > 1 and len({seeds_text(arm) for arm in arms}) > 1:
        found.append(f"The arms have different seeds: {join([f'{quoted(a)} {seeds_text(a)}' for a in arms])}.")
    found += recognisers.warnings(arms) if are_of_speech(arms) else classifiers.warnings(arms)
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


def loss_unit(arms: Sequence[Arm]) -> str:
    """As "nats per byte"; the unit that the records of the validation loss carry."""
    units = dict.fromkeys(record.unit for arm in arms for run in arm.runs for record in run.losses)
    return " or ".join(unit.replace("_", " ") for unit in units if unit) or "no unit"


def spread_text(spread: Spread) -> str:
    """Mean, and the range if there are several."""
    if not spread.values:
        return "none finite"
    mean = loss_text(spread.mean)
    if len(spread.values) == 1:
        return mean
    return f"{mean} ({loss_text(min(spread.values))} to {loss_text(max(spread.values))})"


def difference_text(arm: Arm, base: Arm) -> str:
    """arm - base of the final losses, signed, with the standard error of their mean over seeds."""
    spread = paired_differences(arm, base)
    if _is_open(arm, base) or not spread.values:
        return "open"
    error = f" ± {loss_text(spread.standard_error)}" if len(spread.values) > 1 else ""
    return f"{spread.mean:+.3f}{error}"


def below_text(arm: Arm, baseline: str) -> str:
    below = arm.below(baseline)
    if below is None:
        return NOT_RECORDED
    if below[0] in (0, below[1]):
        return "yes" if below[0] else "no"
    return f"{below[0]} of {below[1]} seeds"


def steps_text(arm: Arm) -> str:
    steps = [run.steps for run in arm.runs]
    text = f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,} to {max(steps):,}"
    planned = max((run.planned_steps or 0 for run in arm.runs), default=0)
    return f"{text} of {planned:,}" if any(run.is_unfinished for run in arm.runs) else text


def seeds_text(arm: Arm) -> str:
    return join([show(run.seed) for run in arm.runs])


def first_norm(arm: Arm) -> float | None:
    """The largest layer's attention norm when it was first measured, mean over seeds."""
    firsts = [points[0].mean for points in map(arm.points, arm.layers("attn_norm")) if points]
    return math.nan if any(map(math.isnan, firsts)) else max(firsts, default=None)


def norm_text(arm: Arm) -> str:
    norm = first_norm(arm)
    return NOT_RECORDED if norm is None else number_text(norm)


def _compared(arms: Sequence[Arm]) -> str:
    recipes = dict.fromkeys(str(arm.settings["recipe"]) for arm in arms if arm.settings.get("recipe"))
    of_recipe = f" of the recipe {join(list(recipes))}" if recipes else ""
    steps = join(list(dict.fromkeys(steps_text(arm) for arm in arms)))
    seeds = dict.fromkeys(seeds_text(arm) for arm in arms)
    trained = f"{steps} steps" + (f", with {_plural('seed', arms[0])} {next(iter(seeds))}" if len(seeds) == 1 else "")
    if len(arms) == 1:
        return f"{count(len(arms[0].runs), 'run')}{of_recipe}: {quoted(arms[0])}, {trained}."
    fields = differing([arm.settings for arm in arms])
    return (
        f"{count(len(arms), 'arm')}{of_recipe}, {join([quoted(arm) for arm in arms])}, differ in "
        f"{count(len(fields), 'setting')}, {join(fields)}. They were trained for {trained}."
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
        over = f", mean of {join([str(count) for count in sorted(counts)])} seeds" if max(counts) > 1 else ""
        ends = [f"{loss_text(arm.finals.mean)} for {quoted(arm)}{_best_and_lost(arm)}" for arm in done]
        sentences.insert(0, f"The validation loss ({loss_unit(done)}{over}) ended at {join(ends)}.")
    return sentences


def _best_and_lost(arm: Arm) -> str:
    """In brackets, the best loss on the way if it is not the last, and how many runs the mean leaves out."""
    best, lost = loss_text(arm.bests.mean), len(arm.runs) - len(arm.finals.values)
    remarks = [f"best on the way {best}"] if best != loss_text(arm.finals.mean) else []
    remarks += [f"without {count(lost, 'run')}, unfinished or not finite"] if lost else []
    return f" ({', '.join(remarks)})" if remarks else ""


def _differences(arms: Sequence[Arm], base: Arm) -> list[str]:
    """The difference in loss of every arm that can be compared."""
    of_loss = "in loss, " if are_classifiers(arms) or are_of_speech(arms) else ""
    return [of_loss + _difference(arm, base) for arm in arms if arm is not base and not _is_open(arm, base)]


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
    error = f"standard error of the mean {loss_text(spread.standard_error)}"
    return f"{text} (seed by seed {least:+.3f} to {most:+.3f}, {deviation}, {error})."


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
                who = "Both arms" if len(arms) == 2 else f"All {count(len(arms), 'arm')}"
                sentences.append(f"{who} are below the {value} {what}.")
                continue
            clauses = [f"{join(under)} {'are' if len(under) > 1 else 'is'} below"] if under else []
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


def _plural(noun: str, arm: Arm) -> str:
    return noun if len(arm.runs) == 1 else f"{noun}s"


def _capitalised(sentences: Sequence[str]) -> list[str]:
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]
