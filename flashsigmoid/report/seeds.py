"""What tables and figures of studies are made of: the values of several seeds as text, as lines, on panels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..record import Record
from .speed import COLOURS, MARKERS

KINDS = {"sigmoid": "b = -log n", "no-bias": "b = 0", "softmax": "softmax"}  # arms of several studies, as text


def values_of(records: Sequence[Record], name: str, step: int | None = None, **tags: object) -> list[float]:
    """Values of a name with these tags, one for each seed (and layer); all steps unless one is given."""
    return [
        r.value
        for r in records
        if r.name == name
        and r.value is not None
        and (step is None or r.step == step)
        and all(r.tags.get(key) == tag for key, tag in tags.items())
    ]


def tags_of(records: Sequence[Record], name: str, tag: str) -> list:
    """The values that a tag has among records of a name, in their order."""
    return list(dict.fromkeys(r.tags[tag] for r in records if r.name == name and tag in r.tags))


def spread_text(values: Sequence[float], text: Callable[[float], str]) -> str:
    """The mean, and the least to the largest where there are several."""
    if not values:
        return ""
    mean = text(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({text(min(values))} to {text(max(values))})"


def beside_text(values: Sequence[Sequence[float]], text: Callable[[float], str]) -> str:
    """The mean of each, a dash where there is none."""
    return " / ".join(text(statistics.fmean(some)) if some else "–" for some in values)


def loss_text(value: float) -> str:
    """Three digits behind the point."""
    return f"{value:.3f}"


def percent_text(value: float) -> str:
    """A share in whole percent."""
    return f"{100 * value:.0f}"


def panels(count: int, width: float = 4.6) -> tuple[Figure, list[Axes]]:
    """Panels side by side, width in inches."""
    drawn = Figure(figsize=(width * count, 4.2), layout="constrained")
    return drawn, list(drawn.subplots(1, count, squeeze=False)[0])


def line(axes: Axes, points: Mapping[float, Sequence[float]], index: int, label: str, style: str = "-") -> None:
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


def legend(drawn: Figure, axes: Axes, ncols: int = 7) -> None:
    """Below all panels, of the lines of one."""
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)


def multiples_axis(axes: Axes, lengths: Sequence[float], text: Callable[[float], str] = str) -> None:
    """A logarithmic axis of x with these ticks only."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(lengths), [text(length) for length in lengths])
    axes.minorticks_off()


def title(axes: Axes, title: str, x: str, y: str) -> None:
    """A title and the names of both axes."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def means_by_seed(records: Sequence[Record], name: str, step: int, **tags: object) -> list[float]:
    """Of each seed the mean over layers."""
    seeds = tags_of(records, name, "seed")
    found = [values_of(records, name, step, seed=seed, **tags) for seed in seeds]
    return [statistics.fmean(values) for values in found if values]
