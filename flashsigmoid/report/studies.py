"""Records of `flashsigmoid study` (but vision-ablation) as rows, and as one figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import matplotlib
from matplotlib.figure import Figure

from ..record import RecordFile, read_records
from .literature import neighbours_figure, neighbours_rows, speculative_figure, speculative_rows
from .seeds import (
    KINDS,
    beside_text,
    legend,
    line,
    loss_text,
    means_by_seed,
    multiples_axis,
    panels,
    percent_text,
    spread_text,
    tags_of,
    title,
    values_of,
)
from .speed import COLOURS, MARKERS, STYLE
from .summary import number_text
from .synthetic import k_summation_figure, k_summation_rows, pair_repeat_figure, pair_repeat_rows

Rows = list[dict[str, str]]
_POSITIONS = {"sincos": "sin-cos", "rope": "RoPE", "alibi": "ALiBi"}


def study_rows(path: str | Path) -> Rows:
    """The table of a file of a study, the same columns in every row.

    Raises:
        ValueError: the file is damaged, of no such study, or has no complete trial.
    """
    file = _read(path, _ROWS)
    return _ROWS[file.settings["study"]](file)


def study_note(path: str | Path) -> str:
    """What one must know to read the table: seeds, hardware, whether it is the quick one.

    Raises:
        ValueError: as `study_rows`.
    """
    file = _read(path, _ROWS)
    ends = [record for record in file.records if record.name == "train_s"]
    seeds = {record.tags["seed"] for record in ends}
    devices = sorted({str(record.tags.get("hardware")) for record in ends})
    seconds = sum(record.value or 0.0 for record in ends)
    spread = "one seed: hints, not findings" if len(seeds) == 1 else f"{len(seeds)} seeds, mean (least to largest)"
    size = "quick" if file.settings.get("quick") else "full"
    trials = f"{len(ends)} trainings" if len(ends) > 1 else "1 training"
    return f"The {size} study: {trials}, {seconds / 60:.0f} min in all, on {', '.join(devices)}; {spread}."


def study_figure(path: str | Path) -> Figure:
    """The figure of the same file.

    Raises:
        ValueError: as `study_rows`.
    """
    file = _read(path, _FIGURES)
    return _FIGURES[file.settings["study"]](file)


def write_study(source: str | Path, target: str | Path | IO[bytes]) -> None:
    """Draw a file of records to a PNG or SVG.

    Raises:
        ValueError: as `study_figure`.
    """
    with matplotlib.rc_context(STYLE):
        study_figure(source).savefig(target, dpi=130, facecolor="white")


def _read(path: str | Path, makers: Mapping[str, object]) -> RecordFile:
    file = read_records(path)
    name = file.settings.get("study")
    if name not in makers:
        raise ValueError(f"records must be of a study, {', '.join(makers)}, got {name} in {path}")
    if not any(record.name == "train_s" for record in file.records):
        raise ValueError(f"records must have at least one complete trial, got none in {path}")
    return file


def _diagnosis_rows(file: RecordFile) -> Rows:
    rows = []
    last = max(tags_of(file.records, "val/loss", "length"))
    matched = "matched" in tags_of(file.records, "val/loss", "kind")
    kinds = {**KINDS, "matched": "b by slope"} if matched else KINDS
    for position, position_text in _POSITIONS.items():
        for qk_norm in (True, False):
            for layer_scale in (None, 1e-4):
                same = {"position": position, "qk_norm": qk_norm, "layer_scale": layer_scale}
                row = {
                    "position": position_text,
                    "QK-norm": "yes" if qk_norm else "no",
                    "LayerScale": "yes" if layer_scale else "no",
                }
                norms = [values_of(file.records, "attn_norm", 0, kind=kind, **same) for kind in kinds]
                row[f"first |A V|: {' / '.join(kinds.values())}"] = beside_text(norms, number_text)
                for length, name in ((1, "loss at n"), (last, f"loss at {last} n")):
                    losses = [values_of(file.records, "val/loss", kind=kind, length=length, **same) for kind in kinds]
                    row[name] = beside_text(losses, loss_text)
                if any(norms):
                    rows.append(row)
    return rows


def _diagnosis_figure(file: RecordFile) -> Figure:
    drawn, (left, middle, right) = panels(3)
    # filled with QK-norm, hollow without; those with LayerScale stand to the right
    for axes, name, tags, step in ((left, "attn_norm", {}, 0), (middle, "val/loss", {"length": 1}, None)):
        for index, (kind, kind_text) in enumerate(KINDS.items()):
            for qk_norm in (True, False):
                for layer_scale, shift in ((None, -0.06), (1e-4, 0.06)):
                    same = {"kind": kind, "qk_norm": qk_norm, "layer_scale": layer_scale}
                    points = [
                        (place + 0.24 * (index - 1) + shift, value)
                        for place, position in enumerate(_POSITIONS)
                        for value in values_of(file.records, name, step, position=position, **same, **tags)
                    ]
                    if points:
                        axes.plot(
                            *zip(*points, strict=True),
                            marker=MARKERS[index],
                            color=COLOURS[index],
                            markerfacecolor=COLOURS[index] if qk_norm else "none",
                            linestyle="none",
                            markersize=5 if qk_norm else 8,  # equal numbers stay visible
                            label=kind_text if qk_norm and layer_scale is None else None,
                        )
        axes.set_xticks(range(len(_POSITIONS)), list(_POSITIONS.values()))
    left.set_yscale("log")
    n = file.settings["seqlen"]
    title(left, "attention norm before the first step", "", "|A V|, mean over tokens")
    title(middle, f"loss at the training length, n = {n}", "", "nats per byte")
    lengths = tags_of(file.records, "val/loss", "length")
    for index, kind in enumerate(KINDS):
        for (position, text), style in zip(_POSITIONS.items(), ("-", "--", ":"), strict=True):
            same = {"kind": kind, "position": position, "qk_norm": True, "layer_scale": None}
            points = {x: values_of(file.records, "val/loss", length=x, **same) for x in lengths}
            line(right, points, index, f"{KINDS[kind]}, {text}", style)
    multiples_axis(right, lengths)
    title(right, "longer than in training (QK-norm, no LayerScale)", "length, multiples of n", "nats per byte")
    for text, style in zip(_POSITIONS.values(), ("-", "--", ":"), strict=True):
        right.plot([], [], color="#3a3a3a", linestyle=style, label=text)
    right.legend(handles=right.get_lines()[-3:], frameon=False, fontsize=9)
    left.plot([], [], "o", color="#3a3a3a", markerfacecolor="none", markersize=8, label="hollow: without QK-norm")
    left.plot([], [], " ", label="the right one of two: with LayerScale")
    legend(drawn, left)
    return drawn


def _retrieval_rows(file: RecordFile) -> Rows:
    records, rows = file.records, []
    arms = tags_of(records, "accuracy", "arm")
    for task in tags_of(records, "accuracy", "task"):
        places = dict.fromkeys(
            (r.tags["length"], r.tags["pairs"]) for r in records if r.name == "accuracy" and r.tags["task"] == task
        )
        for length, pairs in places:
            row = {"task": str(task), "length": str(length), "pairs": str(pairs)}
            same = {"task": task, "length": length, "pairs": pairs}
            for arm in arms:
                row[f"{arm}, %"] = spread_text(values_of(records, "accuracy", arm=arm, **same), percent_text)
            rows.append(row)
    return rows


def _retrieval_figure(file: RecordFile) -> Figure:
    records, n, most = file.records, file.settings["seqlen"], file.settings["trained_pairs"]
    drawn, (left, middle, right) = panels(3)
    pairs = [p for p in file.settings["pairs"] if values_of(records, "accuracy", task="recall", length=n, pairs=p)]
    lengths = tags_of(records, "accuracy", "length")
    trained = max(p for p in pairs if p <= most)
    for index, arm in enumerate(tags_of(records, "accuracy", "arm")):
        recall = {"arm": arm, "task": "recall"}
        line(left, {p: values_of(records, "accuracy", length=n, pairs=p, **recall) for p in pairs}, index, arm)
        points = {x: values_of(records, "accuracy", length=x, pairs=trained, **recall) for x in lengths}
        line(middle, points, index, arm)
        points = {x: values_of(records, "accuracy", length=x, pairs=1, arm=arm, task="needle") for x in lengths}
        line(right, points, index, arm)
    for axes in (left, middle, right):
        axes.set_ylim(-0.02, 1.02)
        axes.axhline(1 / file.settings["each"], color="#888888", linewidth=1, linestyle="--", label="any value")
    for axes, level in ((left, [1 / p for p in pairs]), (middle, [1 / trained] * len(lengths))):
        x = pairs if axes is left else lengths
        axes.plot(x, level, color="#888888", linewidth=1, linestyle=":", label="any value that was given")
    left.axvline(most, color="#888888", linewidth=1, linestyle="-.", label="most pairs in training")
    left.set_xticks(pairs)
    for axes in (middle, right):
        multiples_axis(axes, lengths)
    title(left, f"recall at the training length, {n}", "pairs", "accuracy")
    title(middle, f"recall of {trained} pairs", "length", "accuracy")
    title(right, "needle", "length", "accuracy")
    legend(drawn, left)
    return drawn


def _sinks_rows(file: RecordFile) -> Rows:
    records, steps, rows = file.records, file.settings["steps"], []
    for arm in tags_of(records, "sink_mass", "arm"):
        row = {"attention": str(arm)}
        for keys, name in ((1, "first key"), (4, "first four")):
            row[f"{name}, %"] = spread_text(
                means_by_seed(records, "sink_mass", steps, arm=arm, keys=keys), percent_text
            )
            (even, *_) = values_of(records, "even", keys=keys)
            row[f"{name} of even weights, %"] = percent_text(even)
        row["greatest head, %"] = percent_text(max(values_of(records, "sink_head", steps, arm=arm), default=math.nan))
        row["heads above 30 %, %"] = spread_text(values_of(records, "sink_heads", steps, arm=arm), percent_text)
        row["row mass"] = number_text(statistics.fmean(values_of(records, "row_mass", steps, arm=arm)))
        row["loss"] = spread_text(values_of(records, "val/loss", arm=arm), loss_text)
        rows.append(row)
    return rows


def _sinks_figure(file: RecordFile) -> Figure:
    records, end = file.records, file.settings["steps"]
    drawn, (left, middle, right) = panels(3)
    steps = sorted({r.step for r in records if r.name == "sink_mass" and r.step is not None})
    layers = tags_of(records, "sink_mass", "layer")
    for index, arm in enumerate(tags_of(records, "sink_mass", "arm")):
        one = {"arm": arm, "keys": 1}
        line(left, {x: means_by_seed(records, "sink_mass", x, **one) for x in steps}, index, str(arm))
        points = {x: values_of(records, "sink_mass", end, layer=x, **one) for x in layers}
        line(middle, points, index, str(arm))
        points = {x: values_of(records, "sink_head", end, layer=x, arm=arm) for x in layers}
        line(right, points, index, str(arm))
    (even, *_) = values_of(records, "even", keys=1)
    for axes in (left, middle, right):
        axes.axhline(even, color="#888888", linewidth=1, linestyle="--", label="even weights")
        axes.set_ylim(bottom=0.0)
    for axes in (middle, right):
        axes.set_xticks(layers)
    title(left, "share on the first key, mean over layers", "step", "share of a row's mass")
    title(middle, "share on the first key at the end", "layer", "mean over heads")
    title(right, "the same of the head with the largest", "layer", "largest over heads")
    legend(drawn, left)
    return drawn


_ROWS: dict[str, Callable[[RecordFile], Rows]] = {
    "diagnosis": _diagnosis_rows,
    "retrieval": _retrieval_rows,
    "k-summation": k_summation_rows,
    "pair-repeat": pair_repeat_rows,
    "neighbours": neighbours_rows,
    "sinks": _sinks_rows,
    "speculative": speculative_rows,
}
_FIGURES: dict[str, Callable[[RecordFile], Figure]] = {
    "diagnosis": _diagnosis_figure,
    "retrieval": _retrieval_figure,
    "k-summation": k_summation_figure,
    "pair-repeat": pair_repeat_figure,
    "neighbours": neighbours_figure,
    "sinks": _sinks_figure,
    "speculative": speculative_figure,
}
