"""Tables and figures of the studies k-summation and pair-repeat."""

from __future__ import annotations

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..record import RecordFile
from .seeds import KINDS, legend, line, multiples_axis, panels, percent_text, spread_text, tags_of, title, values_of
from .summary import number_text

Rows = list[dict[str, str]]


def k_summation_rows(file: RecordFile) -> Rows:
    """A row for each k."""
    rows = []
    for k in tags_of(file.records, "error", "k"):
        row = {"k": str(k), "in training": "yes" if k <= file.settings["trained_k"] else "no"}
        for kind in tags_of(file.records, "error", "arm"):
            row[f"error, {KINDS[kind]}"] = spread_text(values_of(file.records, "error", arm=kind, k=k), number_text)
        rows.append(row)
    return rows


def k_summation_figure(file: RecordFile) -> Figure:
    """Error against k, and the loss through training."""
    drawn, (left, right) = panels(2)
    ks = tags_of(file.records, "error", "k")
    for index, kind in enumerate(tags_of(file.records, "error", "arm")):
        line(left, {k: values_of(file.records, "error", arm=kind, k=k) for k in ks}, index, KINDS[kind])
    left.axhline(1.0, color="#888888", linewidth=1, linestyle="--", label="always 0")
    left.axvline(file.settings["trained_k"], color="#888888", linewidth=1, linestyle="-.", label="most in training")
    _draw_losses(file, right)
    for axes in (left, right):
        axes.set_yscale("log")
    n = file.settings["seqlen"]
    title(left, f"sums of k of {n // 2} numbers", "k", "mean of (answer - target)$^2$ / k")
    title(right, "training", "step", "mean of (answer - target)$^2$")
    legend(drawn, left)
    return drawn


def pair_repeat_rows(file: RecordFile) -> Rows:
    """A row for each arm."""
    rows = []
    for kind in tags_of(file.records, "accuracy", "arm"):
        norms = values_of(file.records, "attn_norm", 0, arm=kind)
        row = {"attention": KINDS[kind], "first |A V|": number_text(statistics.fmean(norms))}
        for length in tags_of(file.records, "accuracy", "length"):
            found = values_of(file.records, "accuracy", arm=kind, length=length)
            row[f"right at {length}, %"] = spread_text(found, percent_text)
        rows.append(row)
    return rows


def pair_repeat_figure(file: RecordFile) -> Figure:
    """Accuracy against length, and the loss through training."""
    drawn, (left, right) = panels(2)
    lengths = tags_of(file.records, "accuracy", "length")
    for index, kind in enumerate(tags_of(file.records, "accuracy", "arm")):
        points = {x: values_of(file.records, "accuracy", arm=kind, length=x) for x in lengths}
        line(left, points, index, KINDS[kind])
    left.axhline(0.5, color="#888888", linewidth=1, linestyle="--", label="guessed")
    left.set_ylim(0.45, 1.02)
    multiples_axis(left, lengths)
    _draw_losses(file, right)
    right.set_ylim(bottom=0.0)
    title(left, "has the first pair come again", "length", "accuracy")
    title(right, "training, one length a batch", "step", "nats")
    legend(drawn, left)
    return drawn


def _draw_losses(file: RecordFile, axes: Axes) -> None:
    steps = sorted({r.step for r in file.records if r.name == "train/loss" and r.step is not None})
    for index, kind in enumerate(tags_of(file.records, "train/loss", "arm")):
        line(axes, {x: values_of(file.records, "train/loss", x, arm=kind) for x in steps}, index, KINDS[kind])
