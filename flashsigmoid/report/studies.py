"""Records of `flashsigmoid study` (but vision-ablation) as rows, and as one figure where there is something to draw."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..record import Record, RecordFile, read_records
from .speed import COLOURS, MARKERS, STYLE
from .summary import number_text

Rows = list[dict[str, str]]
_KINDS = {"sigmoid": "b = -log n", "no-bias": "b = 0", "softmax": "softmax"}
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


def has_figure(path: str | Path) -> bool:
    """Whether `write_study` has something to draw.

    Raises:
        ValueError: as `study_rows`.
    """
    return _read(path, _ROWS).settings["study"] in _FIGURES


def study_figure(path: str | Path) -> Figure:
    """The figure of the same file.

    Raises:
        ValueError: as `study_rows`; or a study that is a table only.
    """
    file = _read(path, _FIGURES)
    return _FIGURES[file.settings["study"]](file)


def write_study(source: str | Path, target: str | Path) -> None:
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


def _values(records: Sequence[Record], name: str, step: int | None = None, **tags: object) -> list[float]:
    """Values of a name with these tags, one for each seed (and layer); all steps unless one is given."""
    return [
        r.value
        for r in records
        if r.name == name
        and r.value is not None
        and (step is None or r.step == step)
        and all(r.tags.get(key) == tag for key, tag in tags.items())
    ]


def _tags(records: Sequence[Record], name: str, tag: str) -> list:
    return list(dict.fromkeys(r.tags[tag] for r in records if r.name == name and tag in r.tags))


def _spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    """The mean, and the least to the largest where there are several."""
    if not values:
        return ""
    mean = text(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({text(min(values))} to {text(max(values))})"


def _beside(values: Sequence[Sequence[float]], text: Callable[[float], str]) -> str:
    """The mean of each, a dash where there is none."""
    return " / ".join(text(statistics.fmean(some)) if some else "–" for some in values)


def _loss(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _panels(count: int, width: float = 4.6) -> tuple[Figure, list[Axes]]:
    drawn = Figure(figsize=(width * count, 4.2), layout="constrained")
    return drawn, list(drawn.subplots(1, count, squeeze=False)[0])


def _line(axes: Axes, points: Mapping[float, Sequence[float]], index: int, label: str, style: str = "-") -> None:
    """The mean with a bar from the least to the largest."""
    points = {x: values for x, values in points.items() if values and all(map(math.isfinite, values))}
    means = [statistics.fmean(values) for values in points.values()]
    below = [mean - min(values) for mean, values in zip(means, points.values(), strict=True)]
    above = [max(values) - mean for mean, values in zip(means, points.values(), strict=True)]
    axes.errorbar(
        [*points],
        means,
        [below, above],
        label=label,
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=style,
        markersize=4,
        linewidth=1.2,
        elinewidth=0.8,
        capsize=2,
    )


def _legend(drawn: Figure, axes: Axes, ncols: int = 7) -> None:
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)


def _multiples(axes: Axes, lengths: Sequence[float], text: Callable[[float], str] = str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(lengths), [text(length) for length in lengths])
    axes.minorticks_off()


def _title(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _diagnosis_rows(file: RecordFile) -> Rows:
    rows = []
    last = max(_tags(file.records, "val/loss", "length"))
    for position, position_text in _POSITIONS.items():
        for qk_norm in (True, False):
            for layer_scale in (None, 1e-4):
                same = {"position": position, "qk_norm": qk_norm, "layer_scale": layer_scale}
                row = {
                    "position": position_text,
                    "QK-norm": "yes" if qk_norm else "no",
                    "LayerScale": "yes" if layer_scale else "no",
                }
                norms = [_values(file.records, "attn_norm", 0, kind=kind, **same) for kind in _KINDS]
                row[f"first |A V|: {' / '.join(_KINDS.values())}"] = _beside(norms, number_text)
                for length, name in ((1, "loss at n"), (last, f"loss at {last} n")):
                    losses = [_values(file.records, "val/loss", kind=kind, length=length, **same) for kind in _KINDS]
                    row[name] = _beside(losses, _loss)
                if any(norms):
                    rows.append(row)
    return rows


def _diagnosis_figure(file: RecordFile) -> Figure:
    drawn, (left, middle, right) = _panels(3)
    # filled with QK-norm, hollow without; those with LayerScale stand to the right
    for axes, name, tags, step in ((left, "attn_norm", {}, 0), (middle, "val/loss", {"length": 1}, None)):
        for index, (kind, kind_text) in enumerate(_KINDS.items()):
            for qk_norm in (True, False):
                for layer_scale, shift in ((None, -0.06), (1e-4, 0.06)):
                    same = {"kind": kind, "qk_norm": qk_norm, "layer_scale": layer_scale}
                    points = [
                        (place + 0.24 * (index - 1) + shift, value)
                        for place, position in enumerate(_POSITIONS)
                        for value in _values(file.records, name, step, position=position, **same, **tags)
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
    _title(left, "attention norm before the first step", "", "|A V|, mean over tokens")
    _title(middle, f"loss at the training length, n = {n}", "", "nats per byte")
    lengths = _tags(file.records, "val/loss", "length")
    for index, kind in enumerate(_KINDS):
        for (position, text), style in zip(_POSITIONS.items(), ("-", "--", ":"), strict=True):
            same = {"kind": kind, "position": position, "qk_norm": True, "layer_scale": None}
            points = {x: _values(file.records, "val/loss", length=x, **same) for x in lengths}
            _line(right, points, index, f"{_KINDS[kind]}, {text}", style)
    _multiples(right, lengths)
    _title(right, "longer than in training (QK-norm, no LayerScale)", "length, multiples of n", "nats per byte")
    for text, style in zip(_POSITIONS.values(), ("-", "--", ":"), strict=True):
        right.plot([], [], color="#3a3a3a", linestyle=style, label=text)
    right.legend(handles=right.get_lines()[-3:], frameon=False, fontsize=9)
    left.plot([], [], "o", color="#3a3a3a", markerfacecolor="none", markersize=8, label="hollow: without QK-norm")
    left.plot([], [], " ", label="the right one of two: with LayerScale")
    _legend(drawn, left)
    return drawn


def _retrieval_rows(file: RecordFile) -> Rows:
    records, rows = file.records, []
    arms = _tags(records, "accuracy", "arm")
    for task in _tags(records, "accuracy", "task"):
        places = dict.fromkeys(
            (r.tags["length"], r.tags["pairs"]) for r in records if r.name == "accuracy" and r.tags["task"] == task
        )
        for length, pairs in places:
            row = {"task": str(task), "length": str(length), "pairs": str(pairs)}
            same = {"task": task, "length": length, "pairs": pairs}
            for arm in arms:
                row[f"{arm}, %"] = _spread(_values(records, "accuracy", arm=arm, **same), _percent)
            rows.append(row)
    return rows


def _retrieval_figure(file: RecordFile) -> Figure:
    records, n, most = file.records, file.settings["seqlen"], file.settings["trained_pairs"]
    drawn, (left, middle, right) = _panels(3)
    pairs = [p for p in file.settings["pairs"] if _values(records, "accuracy", task="recall", length=n, pairs=p)]
    lengths = _tags(records, "accuracy", "length")
    trained = max(p for p in pairs if p <= most)
    for index, arm in enumerate(_tags(records, "accuracy", "arm")):
        recall = {"arm": arm, "task": "recall"}
        _line(left, {p: _values(records, "accuracy", length=n, pairs=p, **recall) for p in pairs}, index, arm)
        points = {x: _values(records, "accuracy", length=x, pairs=trained, **recall) for x in lengths}
        _line(middle, points, index, arm)
        points = {x: _values(records, "accuracy", length=x, pairs=1, arm=arm, task="needle") for x in lengths}
        _line(right, points, index, arm)
    for axes in (left, middle, right):
        axes.set_ylim(-0.02, 1.02)
        axes.axhline(1 / file.settings["each"], color="#888888", linewidth=1, linestyle="--", label="any value")
    for axes, level in ((left, [1 / p for p in pairs]), (middle, [1 / trained] * len(lengths))):
        x = pairs if axes is left else lengths
        axes.plot(x, level, color="#888888", linewidth=1, linestyle=":", label="any value that was given")
    left.axvline(most, color="#888888", linewidth=1, linestyle="-.", label="most pairs in training")
    left.set_xticks(pairs)
    for axes in (middle, right):
        _multiples(axes, lengths)
    _title(left, f"recall at the training length, {n}", "pairs", "accuracy")
    _title(middle, f"recall of {trained} pairs", "length", "accuracy")
    _title(right, "needle", "length", "accuracy")
    _legend(drawn, left)
    return drawn


def _neighbours_rows(file: RecordFile) -> Rows:
    records, rows = file.records, []
    n = min(_tags(records, "accuracy", "length"))
    pairs = max(r.tags["pairs"] for r in records if r.name == "accuracy")  # pyright: ignore[reportArgumentType]
    for arm in _tags(records, "train_s", "arm"):
        norms = _values(records, "attn_norm", 0, arm=arm, stage="text")
        rows.append(
            {
                "attention": str(arm),
                "loss": _spread(_values(records, "val/loss", arm=arm, length=1), _loss),
                "loss at 4 n": _spread(_values(records, "val/loss", arm=arm, length=4), _loss),
                f"recall of {pairs}, %": _spread(
                    _values(records, "accuracy", arm=arm, task="recall", length=n, pairs=pairs), _percent
                ),
                "at 4 n, %": _spread(
                    _values(records, "accuracy", arm=arm, task="recall", length=4 * n, pairs=pairs), _percent
                ),
                "needle, %": _spread(_values(records, "accuracy", arm=arm, task="needle", length=n), _percent),
                "first |A V|": number_text(statistics.fmean(norms)),
                "ms per step": number_text(statistics.fmean(_values(records, "step_ms", arm=arm, stage="text"))),
            }
        )
    return rows


def _sinks_rows(file: RecordFile) -> Rows:
    records, steps, rows = file.records, file.settings["steps"], []
    for arm in _tags(records, "sink_mass", "arm"):
        row = {"attention": str(arm)}
        for keys, name in ((1, "first key"), (4, "first four")):
            row[f"{name}, %"] = _spread(_by_seed(records, "sink_mass", steps, arm=arm, keys=keys), _percent)
            (even, *_) = _values(records, "even", keys=keys)
            row[f"{name} of even weights, %"] = _percent(even)
        row["greatest head, %"] = _percent(max(_values(records, "sink_head", steps, arm=arm), default=math.nan))
        row["heads above 30 %, %"] = _spread(_values(records, "sink_heads", steps, arm=arm), _percent)
        row["row mass"] = number_text(statistics.fmean(_values(records, "row_mass", steps, arm=arm)))
        row["loss"] = _spread(_values(records, "val/loss", arm=arm), _loss)
        rows.append(row)
    return rows


def _by_seed(records: Sequence[Record], name: str, step: int, **tags: object) -> list[float]:
    """Of each seed the mean over layers."""
    seeds = _tags(records, name, "seed")
    found = [_values(records, name, step, seed=seed, **tags) for seed in seeds]
    return [statistics.fmean(values) for values in found if values]


def _sinks_figure(file: RecordFile) -> Figure:
    records, end = file.records, file.settings["steps"]
    drawn, (left, middle, right) = _panels(3)
    steps = sorted({r.step for r in records if r.name == "sink_mass" and r.step is not None})
    layers = _tags(records, "sink_mass", "layer")
    for index, arm in enumerate(_tags(records, "sink_mass", "arm")):
        one = {"arm": arm, "keys": 1}
        _line(left, {x: _by_seed(records, "sink_mass", x, **one) for x in steps}, index, str(arm))
        points = {x: _values(records, "sink_mass", end, layer=x, **one) for x in layers}
        _line(middle, points, index, str(arm))
        points = {x: _values(records, "sink_head", end, layer=x, arm=arm) for x in layers}
        _line(right, points, index, str(arm))
    (even, *_) = _values(records, "even", keys=1)
    for axes in (left, middle, right):
        axes.axhline(even, color="#888888", linewidth=1, linestyle="--", label="even weights")
        axes.set_ylim(bottom=0.0)
    for axes in (middle, right):
        axes.set_xticks(layers)
    _title(left, "share on the first key, mean over layers", "step", "share of a row's mass")
    _title(middle, "share on the first key at the end", "layer", "mean over heads")
    _title(right, "the same of the head with the largest", "layer", "largest over heads")
    _legend(drawn, left)
    return drawn


_ROWS: dict[str, Callable[[RecordFile], Rows]] = {
    "diagnosis": _diagnosis_rows,
    "retrieval": _retrieval_rows,
    "neighbours": _neighbours_rows,
    "sinks": _sinks_rows,
}
_FIGURES: dict[str, Callable[[RecordFile], Figure]] = {
    "diagnosis": _diagnosis_figure,
    "retrieval": _retrieval_figure,
    "sinks": _sinks_figure,
}
