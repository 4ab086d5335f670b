"""Records of `flashsigmoid theory NAME` as rows and as one figure for each of them."""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..record import Record, read_records
from .speed import COLOURS, MARKERS, STYLE
from .summary import number_text

T = TypeVar("T")
Rows = list[dict[str, str]]

_BIASES = {
    "closest_bias": "closest",
    "unit_mass_bias": "unit mass",
    "log_n_bias": "-log n",
    "normal_bias": "-log n - s²/2",
}


def theory_rows(path: str | Path) -> Rows:
    """The table of a file of `studies.theory`, the same columns in every row.

    Raises:
        ValueError: the file is damaged, or of no such study.
    """
    return _read(path, _ROWS)


def theory_figure(path: str | Path) -> Figure:
    """The figure of the same file.

    Raises:
        ValueError: the file is damaged, or of no such study.
    """
    return _read(path, _FIGURES)


def write_theory(source: str | Path, target: str | Path | IO[bytes]) -> None:
    """Draw a file of records to a PNG or SVG, with the records' sha256 as its description.

    Raises:
        ValueError: as `theory_figure`.
    """
    metadata = {"Description": f"records sha256 {hashlib.sha256(Path(source).read_bytes()).hexdigest()}"}
    with matplotlib.rc_context(STYLE):
        theory_figure(source).savefig(target, dpi=130, facecolor="white", metadata=metadata)


def _read(path: str | Path, makers: dict[str, Callable[[Sequence[Record]], T]]) -> T:
    file = read_records(path)
    name = file.settings.get("theory")
    if name not in makers:
        raise ValueError(f"records must be of a theory, {', '.join(makers)}, got {name} in {path}")
    return makers[name](file.records)


def _tag(record: Record, name: str) -> float:
    return float(record.tags[name] or 0.0)


def _line(records: Sequence[Record], name: str, x: str, **tags: object) -> dict[float, float]:
    """x -> value of the records of a name that have these tags, ascending; of several, as of seeds, the median."""
    found: dict[float, list[float]] = {}
    for record in records:
        if record.name == name and record.value is not None and all(record.tags[k] == v for k, v in tags.items()):
            found.setdefault(_tag(record, x), []).append(record.value)
    return {key: statistics.median(values) for key, values in sorted(found.items())}


def _values(records: Sequence[Record], name: str, tag: str) -> list:
    """What a tag is in the records of a name, in their order."""
    return list(dict.fromkeys(record.tags[tag] for record in records if record.name == name))


def _plot(axes: Axes, line: dict[float, float], index: int, label: str, style: str = "-", marker: bool = True) -> None:
    axes.plot(
        [*line],
        [*line.values()],
        label=label,
        color=COLOURS[index % len(COLOURS)],
        linestyle=style,
        marker=MARKERS[index % len(MARKERS)] if marker else "",
        markersize=4,
        linewidth=1.2,
    )


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    drawn = Figure(figsize=(4.6 * count, 3.8), layout="constrained")
    return drawn, list(drawn.subplots(1, count, squeeze=False)[0])


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, fontsize=8)


def _bias_rows(records: Sequence[Record]) -> Rows:
    rows = []
    for n in _values(records, "closest_bias", "n"):
        for std in _values(records, "closest_bias", "std"):
            row = {"n": f"{n:g}", "s": f"{std:g}"}
            for name, label in _BIASES.items():
                (b,) = _line(records, name, "n", n=n, std=std).values()
                (distance,) = _line(records, "distance", "n", n=n, std=std, bias=name).values()
                row[f"{label} (distance)"] = f"{b:.2f} ({distance:.2g})"
            rows.append(row)
    return rows


def _bias_figure(records: Sequence[Record]) -> Figure:
    drawn, (left, middle, right) = _panels(3)
    lengths = _values(records, "closest_bias", "n")
    for index, n in enumerate(lengths):
        line = _line(records, "closest_bias", "std", n=n)
        _plot(left, {s: b + math.log(n) for s, b in line.items()}, index, f"closest, n = {n}")
    stds = _values(records, "closest_bias", "std")
    left.plot([0, *stds], [0.0 for _ in (0, *stds)], "--", color="#888888", linewidth=1, label="-log n")
    curve = [max(stds) * i / 50 for i in range(51)]
    left.plot(curve, [-0.5 * s * s for s in curve], ":", color="#3a3a3a", linewidth=1.5, label="-log n - s²/2")
    _finish(left, "the b closest to softmax", "s, standard deviation of scores", "b + log n")
    for index, (name, label) in enumerate(_BIASES.items()):
        style = ("-", "--", "-", ":")[index]  # three of them all but coincide
        _plot(middle, _line(records, "distance", "std", n=lengths[-1], bias=name), index, label, style)
    middle.set_yscale("log")
    _finish(middle, f"distance to softmax, n = {lengths[-1]}", "s, standard deviation of scores", "relative distance")
    for index, (a, c) in enumerate(dict.fromkeys((r.tags["a"], r.tags["c"]) for r in records if r.name == "row_mass")):
        _plot(right, _line(records, "row_mass", "n", a=a, c=c), index, f"a = {a:g}, c = {c:g}")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    _finish(right, "mass of a row of n^-a sigmoid(z - c log n)", "n, keys", "mean mass")
    return drawn


def _regularity_rows(records: Sequence[Record]) -> Rows:
    rows = []
    for n in _values(records, "worst_norm", "n"):
        lines = {kind: _line(records, "worst_norm", "radius", n=n, kind=kind) for kind in ("sigmoid", "softmax")}
        bounds = {kind: _line(records, "bound", "radius", n=n, kind=kind) for kind in lines}
        slopes = {kind: _slopes(line) for kind, line in lines.items()}
        for radius in lines["sigmoid"]:
            row = {"n": f"{n:g}", "R": f"{radius:.2g}"}
            for kind, line in lines.items():
                row[f"{kind}: norm"] = number_text(line[radius])
                row[f"{kind}: of bound"] = f"{line[radius] / bounds[kind][radius]:.2g}"
                row[f"{kind}: exponent"] = f"{slopes[kind][radius]:.2f}" if radius in slopes[kind] else ""
            rows.append(row)
    return rows


def _slopes(line: dict[float, float]) -> dict[float, float]:
    """d log norm / d log R from the radius before."""
    return {
        r1: math.log(line[r1] / line[r0]) / math.log(r1 / r0) for r0, r1 in itertools.pairwise(line) if line[r0] > 0
    }


def _regularity_figure(records: Sequence[Record]) -> Figure:
    lengths = _values(records, "worst_norm", "n")
    drawn, panels = _panels(len(lengths) + 1)
    for axes, n in zip(panels, lengths, strict=False):
        lines = {kind: _line(records, "worst_norm", "radius", n=n, kind=kind) for kind in ("sigmoid", "softmax")}
        for index, (kind, line) in enumerate(lines.items()):
            _plot(axes, line, index, f"{kind}, worst found")
            _plot(axes, _line(records, "bound", "radius", n=n, kind=kind), index, f"{kind}, bound", ":", False)
        last, height = [*lines["softmax"].items()][-1]
        axes.plot(
            [*lines["softmax"]], [height * (r / last) ** 2 for r in lines["softmax"]], "--", color="#888888", label="R²"
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _finish(axes, f"norm of the Jacobian, n = {n}", "R, radius of the ball", "||J||")
    for index, kind in enumerate(("sigmoid", "softmax")):
        for n, style in zip(lengths, ("-", "--", ":"), strict=False):
            slopes = _slopes(_line(records, "worst_norm", "radius", n=n, kind=kind))
            _plot(panels[-1], slopes, index, f"{kind}, n = {n}", style)
    panels[-1].axhline(2.0, color="#888888", linewidth=1)
    panels[-1].set_xscale("log", base=2)
    _finish(panels[-1], "growth: 2 is R²", "R, radius of the ball", "d log ||J|| / d log R")
    return drawn


def _tightness_rows(records: Sequence[Record]) -> Rows:
    rows = []
    for cases in _values(records, "violations", "cases"):
        for over in _values(records, "violations", "over"):
            line = _line(records, "norm_over_bound", "share", cases=cases, over=over)
            (violations,) = _line(records, "violations", "count", cases=cases, over=over).items()
            row = {"cases": f"{violations[0]:,.0f} {cases}", "suprema over": str(over)}
            row |= {f"{share:.0%} below": f"{line[share]:.3f}" for share in (0.5, 0.9, 0.99)}
            rows.append({**row, "largest": f"{line[1.0]:.6f}", "violations": f"{violations[1]:.0f}"})
    return rows


def _tightness_figure(records: Sequence[Record]) -> Figure:
    drawn, (axes,) = _panels(1)
    for index, cases in enumerate(_values(records, "violations", "cases")):
        for over, style in (("scores", "-"), ("reals", ":")):
            line = _line(records, "norm_over_bound", "share", cases=cases, over=over)
            _plot(axes, {value: share for share, value in line.items()}, index, f"{cases}, {over}", style, False)
    axes.axvline(1.0, color="#888888", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(1e-4, 1.5)  # where all weights are 0 or 1 the norm is as good as 0
    _finish(axes, "how tight the bound is", "norm of the Jacobian over its bound", "share of the cases below")
    return drawn


def _numerics_rows(records: Sequence[Record]) -> Rows:
    rows = []
    for formula in _values(records, "weight_error", "formula"):
        line = _line(records, "weight_error", "n", formula=formula)
        some = [n for n in line if math.log2(n) % 4 == 0]
        rows.append({"formula": str(formula), **{f"n = {n:,.0f}": f"{line[n]:.1e}" for n in some}})
    return rows


def _numerics_figure(records: Sequence[Record]) -> Figure:
    drawn, panels = _panels(2)
    for axes, (name, title) in zip(
        panels, {"weight_error": "of a weight, rms", "mass_error": "of the mass of a row"}.items(), strict=True
    ):
        for index, formula in enumerate(_values(records, name, "formula")):
            _plot(axes, _line(records, name, "n", formula=formula), index, str(formula))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _finish(axes, f"relative error {title}, b = -log n", "n, keys", "relative error")
    if (second := panels[1].get_legend()) is not None:  # the same as the first, and in the way
        second.remove()
    return drawn


def _universal_rows(records: Sequence[Record]) -> Rows:
    rows = []
    for target in _values(records, "error/max", "target"):
        lines = {
            name: _line(records, name, "cells", target=target)
            for name in ("error/max", "modulus", "error/mean", "contexts")
        }
        for cells in lines["modulus"]:
            rows.append(
                {
                    "target": str(target),
                    "grid step": f"1/{cells:g}",
                    "largest error": f"{lines['error/max'][cells]:.4f}",
                    "bound": f"{lines['modulus'][cells]:.4f}",
                    "mean error": f"{lines['error/mean'][cells]:.4f}",
                    "contexts": f"{lines['contexts'][cells]:.0f}",
                }
            )
    return rows


def _universal_figure(records: Sequence[Record]) -> Figure:
    drawn, (left, right) = _panels(2)
    for index, target in enumerate(_values(records, "error/max", "target")):
        for name, label, style in (("error/max", "largest error", "-"), ("modulus", "bound", ":")):
            line = {1 / cells: value for cells, value in _line(records, name, "cells", target=target).items()}
            _plot(left, line, index, f"{target}, {label}", style)
    left.set_ylim(bottom=0.0)
    left.set_xlim(left=0.0)
    _finish(left, "approximation of a function", "grid step", "error, maximum norm")
    _plot(right, _line(records, "shift_error", "steepness"), 0, "error")
    _plot(right, _line(records, "shift_error_allowed", "steepness"), 1, "bound", ":")
    right.set_xscale("log", base=2)
    right.set_yscale("symlog", linthresh=1e-16)
    right.set_ylim(bottom=0.0)
    _finish(right, "selective shift by four sigmoid heads", "lambda", "error")
    return drawn


_ROWS: dict[str, Callable[[Sequence[Record]], Rows]] = {
    "bias": _bias_rows,
    "regularity": _regularity_rows,
    "tightness": _tightness_rows,
    "universal": _universal_rows,
    "numerics": _numerics_rows,
}
_FIGURES: dict[str, Callable[[Sequence[Record]], Figure]] = {
    "bias": _bias_figure,
    "regularity": _regularity_figure,
    "tightness": _tightness_figure,
    "universal": _universal_figure,
    "numerics": _numerics_figure,
}
