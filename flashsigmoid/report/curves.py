"""Speed against the length: records of `flashsigmoid bench` on language-model shapes as curves, with the errors beside.

`python -m flashsigmoid.report.curves RECORDS... FIGURE` draws files that are there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..record import Record, read_records
from .speed import COLOURS, MARKERS, STYLE, speeds

_NAME = re.compile(r"lm-(\d+)(k?)-d(\d+)(-causal)?")
_GRADIENTS = ("dq", "dk", "dv")
_DIRECTIONS = {"forward": ("out",), "backward": _GRADIENTS}

Curve = dict[int, float]  # length -> value


def curves(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, Curve]]:
    """(direction, "head_dim 64, causal") -> candidate -> length -> TFLOP/s, in the order of the records."""
    found: dict[tuple[str, str], dict[str, Curve]] = {}
    for (problem, work), row in speeds(records).items():
        place = _place(problem)
        if place is None or work not in _DIRECTIONS:
            continue
        for peer, speed in row.items():
            found.setdefault((work, place[1]), {}).setdefault(peer, {})[place[0]] = speed.tflops
    return found


def error_curves(records: Sequence[Record]) -> dict[str, dict[str, Curve]]:
    """direction -> candidate -> length -> relative rms error of the worst tensor and shape of that length."""
    found: dict[str, dict[str, Curve]] = {name: {} for name in _DIRECTIONS}
    for record in records:
        place = _place(str(record.tags.get("problem")))
        if record.name != "error_rms" or record.value is None or place is None:
            continue
        for direction, tensors in _DIRECTIONS.items():
            if record.tags["tensor"] in tensors:
                curve = found[direction].setdefault(str(record.tags["peer"]), {})
                curve[place[0]] = max(record.value, curve.get(place[0], 0.0))
    return found


def figure(records: Sequence[Record]) -> Figure:
    """A row for each direction: a panel for each head_dim and mask, and one of errors; a line per candidate.

    Raises:
        ValueError: there is nothing to draw.
    """
    lines, errors = curves(records), error_curves(records)
    kinds = list(dict.fromkeys(kind for _, kind in lines))
    if not kinds:
        raise ValueError("records must hold times of lm-N-dD problems to be drawn, got none")
    peers = list(dict.fromkeys(peer for row in lines.values() for peer in row))
    style = {peer: {"color": COLOURS[i % 8], "marker": MARKERS[i % len(MARKERS)]} for i, peer in enumerate(peers)}
    drawn = Figure(figsize=(3.1 * (len(kinds) + 1), 6.6), layout="constrained")
    grid = drawn.subplots(2, len(kinds) + 1, squeeze=False, sharex=True)
    for axes_row, direction in zip(grid, _DIRECTIONS, strict=True):
        top = max((max(c.values()) for (work, _), row in lines.items() if work == direction for c in row.values()))
        for axes, kind in zip(axes_row, kinds, strict=False):
            for peer, curve in lines.get((direction, kind), {}).items():
                _line(axes, curve, peer, style[peer])
            axes.set_title(f"{direction}, {kind}", fontsize=10)
            axes.set_ylim(0, 1.05 * top)
        drawn_errors = {peer: curve for peer, curve in errors[direction].items() if peer in style}
        for peer, curve in drawn_errors.items():
            _line(axes_row[-1], curve, peer, style[peer])
        axes_row[-1].set_title(f"relative rms error of {' '.join(_DIRECTIONS[direction])}", fontsize=10)
        highest = max((max(curve.values()) for curve in drawn_errors.values()), default=1.0)
        axes_row[-1].set_ylim(0, 1.25 * highest)
        axes_row[0].set_ylabel("TFLOP/s")
    lengths = sorted({n for row in lines.values() for curve in row.values() for n in curve})
    for axes in grid.flat:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"))
    for axes in grid[-1]:
        axes.set_xlabel("seqlen")
    drawn.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(peers), frameon=False)
    return drawn


def write_curves(records: Sequence[Record], path: str | Path) -> None:
    """Draw the records to a PNG or SVG.

    Raises:
        ValueError: there is nothing to draw.
    """
    path = Path(path)
    with matplotlib.rc_context(STYLE):
        drawn = figure(records)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=130, facecolor="white")


def _place(problem: str) -> tuple[int, str] | None:
    """(length, head_dim and mask) of a problem lm-N-dD or lm-N-dD-causal, None of others."""
    match = _NAME.fullmatch(problem)
    if match is None:
        return None
    n, kilo, head_dim, causal = match.groups()
    return int(n) * (1024 if kilo else 1), f"head_dim {head_dim}" + (", causal" if causal else "")


def _line(axes: Axes, curve: Curve, peer: str, style: dict[str, str]) -> None:
    lengths = sorted(curve)
    is_ours = peer in ("hopper", "triton")
    width = 2.2 if is_ours else 1.2
    axes.plot(lengths, [curve[n] for n in lengths], label=peer, linewidth=width, markersize=4, **style)  # pyright: ignore


if __name__ == "__main__":
    *sources, target = sys.argv[1:]
    write_curves([record for source in sources for record in read_records(source).records], target)
