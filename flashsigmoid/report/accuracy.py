"""Errors of `tests/gpu` over the budget, against the length: python -m flashsigmoid.report.accuracy RECORDS FIGURE.

Names of tensors after the figure select some of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..record import Record, read_records
from .speed import COLOURS, MARKERS, STYLE

Lines = dict[str, dict[int, float]]  # label -> length -> the largest error, in multiples of the budget
_DTYPES = ("bfloat16", "float16")


def by_scores(records: Iterable[Record], dtype: str) -> Lines:
    """out and dq of 64 rows by the default formula, the worst of b = 0, -log n and a tensor of it."""
    return _lines((r, "scores", "seqlen_k") for r in records if r.tags.get("dtype") == dtype)


def by_tensor(records: Iterable[Record], dtype: str) -> Lines:
    """Every result of n queries and n keys, b = -log n, the worse of causal and not."""
    return _lines((r, "tensor", "seqlen") for r in records if r.tags.get("dtype") == dtype)


def figure(records: Sequence[Record], tensors: Sequence[str] = ()) -> Figure:
    """Two rows, by scores and by tensor (some, or all), and a column for each dtype.

    Raises:
        ValueError: there is nothing to draw.
    """
    drawn = Figure(figsize=(11.0, 7.0), layout="constrained")
    grid = drawn.subplots(2, len(_DTYPES), sharex=True, sharey=True, squeeze=False)
    for column, dtype in enumerate(_DTYPES):
        whole = by_tensor(records, dtype)
        for row, (title, lines) in enumerate(
            (
                (f"{dtype}: out and dq of 64 rows", by_scores(records, dtype)),
                (f"{dtype}: n x n, scores N(0, 1)", {x: y for x, y in whole.items() if not tensors or x in tensors}),
            )
        ):
            if not lines:
                raise ValueError(f"records must hold errors over the budget of {dtype}, got none")
            _draw(grid[row, column], title, lines)
    for axes in grid[1]:
        axes.set_xlabel("n, keys")
    for axes in grid[:, 0]:
        axes.set_ylabel("error, of the budget")
    return drawn


def draw(source: str | Path, target: str | Path, tensors: Sequence[str] = ()) -> None:
    """Draw a record file to a PNG or SVG."""
    records = [r for r in read_records(source).records if r.name == "error_over_budget"]
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure(records, tensors).savefig(target, dpi=160, facecolor="white")


def _lines(found: Iterable[tuple[Record, str, str]]) -> Lines:
    lines: Lines = {}
    for record, label, length in found:
        if record.value is not None and label in record.tags and length in record.tags:
            line, n = lines.setdefault(str(record.tags[label]), {}), int(str(record.tags[length]))
            line[n] = max(line.get(n, 0.0), record.value)
    return {label: dict(sorted(line.items())) for label, line in lines.items()}


def _draw(axes: Axes, title: str, lines: Lines) -> None:
    for index, (label, line) in enumerate(lines.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        axes.plot([*line], [*line.values()], label=label, markersize=4, linewidth=1, **style)  # pyright: ignore
    axes.axhline(1.0, color="#888888", linestyle="--", linewidth=1, label="budget")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0.0)
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="center right")


if __name__ == "__main__":
    draw(sys.argv[1], sys.argv[2], sys.argv[3:])
