"""Records of `flashsigmoid bench` as numbers side by side and as a figure: speed beside error beside memory.

`python -m flashsigmoid.report.speed RECORDS... FIGURE` draws files that are there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..record import Record, RecordFile, read_records

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5608f", "#a67c00", "#3a3a3a", "#56b4e9", "#e69f00")
MARKERS = "os^Dv<>Px*hd"
_ROW_INCHES, _MARGIN_INCHES = 0.42, 1.9
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.alpha": 0.2,
    "svg.hashsalt": "flashsigmoid",
}
_WORKS = {"forward": "fwd", "backward": "bwd", "both": "fwd+bwd"}

Cells = dict[tuple[str, str], dict[str, "Speed"]]


@dataclass(frozen=True)
class Speed:
    """What one candidate did on one work of one problem; None: not recorded."""

    tflops: float
    low_tflops: float  # of p90 and p10 of the time
    high_tflops: float
    over_softmax: float | None  # the median time of the fastest softmax divided by this one's
    error_rms: float | None  # relative, of the worst tensor
    peak_mib: float | None


def speeds(records: Sequence[Record]) -> Cells:
    """(problem, work) -> candidate -> its numbers, in the order in which they were measured."""
    softmaxes = {str(r.tags["peer"]) for r in records if r.name == "error_rms" and r.tags["kind"] == "softmax"}
    errors: dict[tuple[str, str], float] = {}
    numbers: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for record in records:
        if record.value is None or "problem" not in record.tags:
            continue
        problem, peer = str(record.tags["problem"]), str(record.tags["peer"])
        if record.name == "error_rms":
            errors[problem, peer] = max(record.value, errors.get((problem, peer), 0.0))
        elif "work" in record.tags:
            row = numbers.setdefault((problem, str(record.tags["work"])), {})
            row.setdefault(peer, {})[record.name] = record.value
    cells: Cells = {}
    for (problem, work), row in numbers.items():
        best = min((own["time_ms"] for peer, own in row.items() if peer in softmaxes), default=None)
        for peer, own in row.items():
            ms, tflops, peak = own["time_ms"], own["speed_tflops"], own.get("peak_bytes")
            cells.setdefault((problem, work), {})[peer] = Speed(
                tflops,
                tflops * ms / own["time_p90_ms"],
                tflops * ms / own["time_p10_ms"],
                None if best is None else best / ms,
                errors.get((problem, peer)),
                None if peak is None else peak / 2**20,
            )
    return cells


def ceilings_text(file: RecordFile) -> str:
    """One line: what the device did at best in the same run, and which device it was; "" where neither is recorded."""
    parts = [f"{r.tags['peer']} {r.value:.3g} {r.unit}" for r in file.records if r.name.startswith("ceiling_")]
    gpu = file.header.get("hardware", {}).get("gpu")
    if gpu:
        parts.append(f"{gpu}, {file.settings.get('dtype')}")
    return f"\nIn the same run: {'; '.join(parts)}.\n" if parts else ""


def write_plot(records: Sequence[Record], path: str | Path) -> None:
    """Draw the records to a PNG or SVG.

    Raises:
        ValueError: there is nothing to draw.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure(records).savefig(path, dpi=160, facecolor="white")


def figure(records: Sequence[Record]) -> Figure:
    """Three panels with a line per problem and work and a mark per candidate: TFLOP/s, relative error, peak memory."""
    cells = speeds(records)
    if not cells:
        raise ValueError("records must hold at least one time to be drawn, got none")
    peers = list(dict.fromkeys(peer for row in cells.values() for peer in row))
    drawn = Figure(figsize=(15.0, _MARGIN_INCHES + _ROW_INCHES * len(cells)), layout="constrained")
    speed, error, memory = drawn.subplots(1, 3, sharey=True)
    for index, peer in enumerate(peers):
        own = [(height, row[peer]) for height, row in enumerate(cells.values()) if peer in row]
        # candidates of one row lie a little apart, so that equal numbers stay visible
        shift = 0.6 * ((index + 0.5) / len(peers) - 0.5)
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        for height, cell in own:
            speed.plot([cell.low_tflops, cell.high_tflops], [height + shift] * 2, color=style["color"], linewidth=1)
        _marks(speed, ((height + shift, cell.tflops) for height, cell in own), style, peer)
        _marks(error, ((height + shift, cell.error_rms) for height, cell in own), style, peer)
        _marks(memory, ((height + shift, cell.peak_mib) for height, cell in own), style, peer)
    ceilings: dict[str, float] = {}  # of several runs the highest
    for record in records:
        if record.name == "ceiling_tflops" and record.value is not None:
            name = str(record.tags["peer"])
            ceilings[name] = max(record.value, ceilings.get(name, 0.0))
    for name, ceiling in ceilings.items():
        speed.axvline(ceiling, color="#888888", linestyle="--", linewidth=1, label=name)
    speed.set_yticks(range(len(cells)), [f"{problem} {_WORKS[work]}" for problem, work in cells])
    speed.set_ylim(len(cells) - 0.5, -0.5)
    speed.set_xlim(left=0)
    for axes, title in ((speed, "TFLOP/s"), (error, "relative rms error"), (memory, "peak memory, MiB")):
        axes.set_title(title)
        if axes is not speed and axes.lines:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
    drawn.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return drawn


def _marks(axes: Axes, points: Iterable[tuple[float, float | None]], style: dict[str, str], label: str) -> None:
    """A mark per point that has a positive number."""
    known = [(x, y) for y, x in points if x is not None and x > 0]
    if known:
        axes.plot(*zip(*known, strict=True), linestyle="none", markersize=5, label=label, **style)  # pyright: ignore


if __name__ == "__main__":
    *sources, target = sys.argv[1:]
    write_plot([record for source in sources for record in read_records(source).records], target)
