"""Tables and figures of the studies neighbours and speculative: attentions of the literature, and drafts."""

from __future__ import annotations

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..record import RecordFile
from .seeds import legend, line, loss_text, panels, percent_text, spread_text, tags_of, title, values_of
from .speed import COLOURS
from .summary import number_text

Rows = list[dict[str, str]]


def neighbours_rows(file: RecordFile) -> Rows:
    """A row for each attention."""
    records, rows = file.records, []
    n = min(tags_of(records, "accuracy", "length"))
    pairs = max(r.tags["pairs"] for r in records if r.name == "accuracy")  # pyright: ignore[reportArgumentType]
    for arm in tags_of(records, "train_s", "arm"):
        norms = values_of(records, "attn_norm", 0, arm=arm, stage="text")
        rows.append(
            {
                "attention": str(arm),
                "loss": spread_text(values_of(records, "val/loss", arm=arm, length=1), loss_text),
                "loss at 4 n": spread_text(values_of(records, "val/loss", arm=arm, length=4), loss_text),
                f"recall of {pairs}, %": spread_text(
                    values_of(records, "accuracy", arm=arm, task="recall", length=n, pairs=pairs), percent_text
                ),
                "at 4 n, %": spread_text(
                    values_of(records, "accuracy", arm=arm, task="recall", length=4 * n, pairs=pairs), percent_text
                ),
                "needle, %": spread_text(
                    values_of(records, "accuracy", arm=arm, task="needle", length=n), percent_text
                ),
                "first |A V|": number_text(statistics.fmean(norms)),
                "ms per step": number_text(statistics.fmean(values_of(records, "step_ms", arm=arm, stage="text"))),
            }
        )
    return rows


def neighbours_figure(file: RecordFile) -> Figure:
    """Losses, and accuracies of recall and needle, a line of the panel for each attention."""
    records = file.records
    arms = tags_of(records, "train_s", "arm")
    n, longest = (pick(tags_of(records, "accuracy", "length")) for pick in (min, max))
    drawn, (left, right) = panels(2, 5.6)
    for axes, points in (
        (left, [("val/loss", {"length": 1}, "n"), ("val/loss", {"length": 4}, "4 n")]),
        (
            right,
            [
                ("accuracy", {"task": "recall", "length": n}, f"recall, length {n}"),
                ("accuracy", {"task": "recall", "length": longest}, f"recall, length {longest}"),
                ("accuracy", {"task": "needle", "length": n}, f"needle, length {n}"),
            ],
        ),
    ):
        for index, (name, tags, label) in enumerate(points):
            for place, arm in enumerate(arms):
                values = values_of(records, name, arm=arm, **tags)
                _bar(axes, place + 0.2 * (index - 1), values, index, label if place == 0 else "")
        axes.set_yticks(range(len(arms)), arms)
        axes.invert_yaxis()
        axes.legend(frameon=False, fontsize=8)
    right.set_xlim(-0.02, 1.02)
    title(left, "text", "nats per byte", "")
    title(right, "retrieval", "accuracy", "")
    return drawn


def _bar(axes: Axes, y: float, values: list[float], index: int, label: str) -> None:
    """The mean, and a bar from the least to the largest."""
    if values:
        axes.plot([min(values), max(values)], [y, y], color=COLOURS[index], linewidth=1.2)
        axes.plot([statistics.fmean(values)], [y], "o", color=COLOURS[index], markersize=5, label=label or None)


def speculative_rows(file: RecordFile) -> Rows:
    """A row for each draft."""
    records, rows = file.records, []
    for draft in tags_of(records, "overlap", "draft"):
        row = {"draft": str(draft), "loss": spread_text(values_of(records, "val/loss", draft=draft), loss_text)}
        row["kept, %"] = spread_text(values_of(records, "overlap", draft=draft), percent_text)
        for ahead in tags_of(records, "tokens_per_call", "ahead"):
            found = values_of(records, "tokens_per_call", draft=draft, ahead=ahead)
            row[f"tokens a call, {ahead} ahead"] = spread_text(found, number_text)
        rows.append(row)
    return rows


def speculative_figure(file: RecordFile) -> Figure:
    """Tokens that a call of the model gives, against how many are drafted."""
    drawn, (axes,) = panels(1, 6.0)
    ahead = tags_of(file.records, "tokens_per_call", "ahead")
    for index, draft in enumerate(tags_of(file.records, "overlap", "draft")):
        points = {x: values_of(file.records, "tokens_per_call", draft=draft, ahead=x) for x in ahead}
        line(axes, points, index, str(draft))
    axes.axhline(1.0, color="#888888", linewidth=1, linestyle="--", label="without a draft")
    axes.set_xticks(ahead)
    axes.set_ylim(bottom=0.0)
    title(axes, "speculative sampling", "tokens drafted at a time", "tokens a call of the model")
    legend(drawn, axes, 3)
    return drawn
