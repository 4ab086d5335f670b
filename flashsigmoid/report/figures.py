"""The figures of the report, drawn by matplotlib: as SVG that takes its colours from the page, and as PNG."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from .arms import BIGRAM, FLOOR, Arm, Point, accuracy_name
from .classifiers import accuracy_label, are_of_images, majorities
from .summary import loss_unit
from .words import loss_text

# after Okabe and Ito, told apart by colour-blind readers: on white, and lighter on black
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b5608f", "#a67c00", "#3a3a3a")
DARK = ("#5bb8f0", "#ff8d4d", "#35c79b", "#e79cc5", "#edc04d", "#c9c9c9")

_INK = "#010203"  # stands for the page's text colour; no other thing is drawn in it
_PANEL_INCHES = (4.9, 3.3)  # small, so that letters stay legible at the width of a phone
_LAYOUT = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.07)
_SMOOTHED_POINTS = 300  # of a training curve
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 10.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.titlesize": 12.5,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10.5,
    "grid.alpha": 0.13,
    "grid.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "flashsigmoid",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str  # "": the figure has one panel
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Drawing:
    """A figure of the report: panels side by side, from four on in two rows, what they show, the name of the PNG."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]  # none: the records have nothing to draw
    height: float = _PANEL_INCHES[1]  # of a panel

    def svgs(self) -> list[str]:
        """Each panel as an <svg> element that names no address and takes its colours from CSS variables."""
        return [
            _inline(self._figure([panel]), f"{self.name}-{index}", f"{self.title} {panel.title}".strip())
            for index, panel in enumerate(self.panels)
        ]

    def png(self) -> bytes:
        """All panels, on white."""
        figure = self._figure(self.panels)
        buffer = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            figure.suptitle(self.title)
            figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()

    def _figure(self, panels: Sequence[Panel]) -> Figure:
        with matplotlib.rc_context(_STYLE):
            width, _ = _PANEL_INCHES
            columns = len(panels) if len(panels) < 4 else math.ceil(len(panels) / 2)
            rows = math.ceil(len(panels) / columns)
            figure = Figure(figsize=(width * columns, self.height * rows), layout=_LAYOUT)
            for index, panel in enumerate(panels, start=1):
                axes = figure.add_subplot(rows, columns, index)
                axes.set_title(panel.title)
                panel.draw(axes)
                axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return figure


def colour(arm: Arm) -> str:
    """The arm's colour on white, which stands for its CSS variable in SVG."""
    return LIGHT[arm.index % len(LIGHT)]


def colour_variable(arm: Arm) -> str:
    """The arm's colour on the page."""
    return f"var(--arm-{arm.index % len(LIGHT)})"


def loss_drawings(arms: Sequence[Arm]) -> list[Drawing]:
    """Loss against step and against time: training thin, validation thick, the bigram baseline dashed."""
    points = [point for arm in arms for point in (*arm.losses, *arm.train_losses)]
    is_timed = any(point.time_s is not None for point in points)
    caption = f"Thick: validation loss, {loss_unit(arms)}. Thin: training loss, smoothed."
    if _baselines(arms, BIGRAM):
        caption += " Dashed: a bigram model of the same text."
    if _baselines(arms, FLOOR):
        caption += " Dotted: no function of the previous token alone can be below it."
    rates = {f"{arm.label} {arm.bytes_per_token:.2f}" for arm in arms if abs(arm.bytes_per_token - 1) > 1e-6}
    if rates:
        caption += f" Training loss is divided by the bytes per token: {'; '.join(sorted(rates))}."
    if any(len(arm.runs) > 1 for arm in arms):
        caption += " Lines are means over seeds, bands go from the least to the largest."
    if any(_last_before_break(arm) for arm in arms):
        caption += " A cross: the loss is not finite from here on."

    def panels(by_time: bool) -> tuple[Panel, ...]:
        return (Panel("", lambda axes: _draw_losses(axes, arms, by_time)),)

    return [
        Drawing("loss-step", "Loss against step", caption, panels(by_time=False) if points else ()),
        Drawing(
            "loss-time",
            "Loss against time",
            "The same losses against the time of training.",
            panels(by_time=True) if is_timed else (),
        ),
    ]


def accuracy_drawing(arms: Sequence[Arm]) -> Drawing:
    """Validation accuracy against step, with what the most frequent class alone gets."""
    name, label = accuracy_name(arms), accuracy_label(arms)
    shown = [arm for arm in arms if arm.points(name)]
    how = "rightly" if label == "accuracy" else "rightly by the nearest neighbours of their features"
    caption = f"Share of validation images that are classified {how}. Bands: one standard error of it, up and down."
    if any(len(arm.runs) > 1 for arm in shown):
        caption = f"Share of validation images that are classified {how}, mean over seeds. Bands: least to largest."
    constant = sorted({value for arm in shown for value in majorities(arm).values})
    if constant:
        caption += " Dashed: the most frequent class alone."

    def draw(axes: Axes) -> None:
        for arm in shown:
            points, own = arm.points(name), colour(arm)
            steps, errors = [p.step for p in points], {p.step: p.mean for p in arm.points(f"{name}_se")}
            lows, highs = [p.low for p in points], [p.high for p in points]
            if len(arm.runs) == 1:
                lows = [p.mean - errors.get(p.step, 0.0) for p in points]
                highs = [p.mean + errors.get(p.step, 0.0) for p in points]
            means = [p.mean for p in points]
            axes.fill_between(steps, lows, highs, color=own, alpha=0.18, linewidth=0)
            axes.plot(steps, means, color=own, linewidth=2.2, marker=_marker(points), label=arm.label)
        for value in constant:
            axes.axhline(value, color=_INK, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.set_xlabel("step")
        axes.set_ylabel(f"validation {label}")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(loc="center right", handlelength=1.4)

    return Drawing("accuracy", "Accuracy against step", caption, (Panel("", draw),) if shown else ())


def layer_drawing(arms: Sequence[Arm], statistic: str, title: str, caption: str) -> Drawing:
    """A statistic of every layer over steps, one panel per arm, all with the same y axis."""
    shown = [arm for arm in arms if arm.layers(statistic)]
    points = [p for arm in shown for name in arm.layers(statistic) for p in arm.points(name)]
    finite = [value for p in points for value in (p.low, p.high) if math.isfinite(value)]
    least, most = min(finite, default=0.0), max(finite, default=1.0)
    smallest = min((value for value in finite if value > 0), default=1.0)

    def panel(arm: Arm) -> Panel:
        def draw(axes: Axes) -> None:
            _draw_layers(axes, arm, statistic)
            axes.set_xlim(0, max(p.step for p in points) or 1)
            if least >= 0 and most / smallest > 20:
                if least > 0:
                    axes.set_yscale("log")
                else:
                    axes.set_yscale("symlog", linthresh=smallest)  # an arm of zeros is a line at the bottom
                    powers = range(math.ceil(math.log10(smallest)), math.ceil(math.log10(most)))
                    axes.set_yticks([0.0, *(10.0**power for power in powers)])
                axes.set_ylim(least / 1.4, most * 1.4)
                axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            else:
                axes.set_ylim(min(0.0, least * 1.08), (most or 1.0) * 1.08)

        return Panel(arm.label, draw)

    missing = [arm.label for arm in arms if arm not in shown]
    if shown and missing:
        caption += f" Not recorded: {'; '.join(missing)}."
    return Drawing(statistic.replace("_", "-"), title, caption, tuple(map(panel, shown)))


def smooth(points: Sequence[Point]) -> list[Point]:
    """A few hundred of the points at most, each the mean of a fortieth of the curve; nan stays nan."""
    stride = max(1, math.ceil(len(points) / _SMOOTHED_POINTS))
    reach = len(points) // 80
    smoothed = []
    for i in range(0, len(points), stride):
        means = [point.mean for point in points[max(0, i - reach) : i + reach + 1]]
        mean = sum(means) / len(means)
        smoothed.append(Point(points[i].step, points[i].time_s, mean, min(means), max(means)))
    return smoothed


def _draw_losses(axes: Axes, arms: Sequence[Arm], by_time: bool) -> None:
    last_s = max((arm.time_s for arm in arms if arm.time_s is not None), default=0.0)
    second, time_unit = (1.0, "s") if last_s < 300 else (60.0, "min") if last_s < 18000 else (3600.0, "h")

    def x(points: Sequence[Point]) -> list[float]:
        if by_time:
            return [math.nan if p.time_s is None else p.time_s / second for p in points]
        return [p.step for p in points]

    for arm in arms:
        train, val, own = smooth(arm.train_losses), arm.losses, colour(arm)
        axes.plot(x(train), [p.mean for p in train], color=own, linewidth=0.9, alpha=0.55)
        if len(arm.runs) > 1:
            axes.fill_between(x(val), [p.low for p in val], [p.high for p in val], color=own, alpha=0.18, linewidth=0)
        axes.plot(x(val), [p.mean for p in val], color=own, linewidth=2.2, marker=_marker(val), label=arm.label)
        broken = _last_before_break(arm)
        axes.plot(x(broken), [p.mean for p in broken], "X", color=own, markersize=9, markeredgecolor="none")
    for name, text, dashes, above in ((BIGRAM, "bigram", (5, 3), True), (FLOOR, "any bigram", (1.2, 2), False)):
        for value in _baselines(arms, name):
            axes.axhline(value, color=_INK, linewidth=1.2, linestyle=(0, dashes))
            label = axes.annotate(
                f"{text} {loss_text(value)}",
                (1.0, value),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4 if above else -4),
                textcoords="offset points",
                ha="right",
                va="bottom" if above else "top",
            )
            label.set_in_layout(False)  # it may lie above or below what is shown
    axes.set_xlabel(f"training time, {time_unit}" if by_time else "step")
    axes.set_ylabel(f"loss, {loss_unit(arms)}")
    axes.set_xlim(left=0)
    limits = _loss_limits(arms)
    if limits is not None:
        axes.set_ylim(*limits)
    axes.legend(loc="upper right", handlelength=1.4)


def _loss_limits(arms: Sequence[Arm]) -> tuple[float, float] | None:
    """The region where the arms differ: the loss of an untrained language model, far above, runs out at the top."""
    points = [point for arm in arms for point in (*arm.losses, *smooth(arm.train_losses))]
    finite = [value for p in points for value in (p.mean, p.low) if math.isfinite(value)]
    if not finite:
        return None
    least, most = min(finite), max([*finite, *_baselines(arms, BIGRAM)])
    ends = max([least, *_baselines(arms, BIGRAM), *(value for arm in arms for value in arm.finals.values)])
    legend = 0.35 + 0.15 * len(arms)  # room for its lines above the curves
    top = ends + legend * (ends - least or 1.0)
    if are_of_images(arms) or not _baselines(arms, BIGRAM):
        # of images it begins near log(classes), in sight of the end; else the second validation is
        first = 0 if are_of_images(arms) else 1
        top = max([top, *(p.mean for arm in arms for p in arm.losses[first : first + 1] if math.isfinite(p.mean))])
    top = min(top, most)
    margin = 0.06 * (top - least or 1.0)
    return least - margin, top + margin


def _draw_layers(axes: Axes, arm: Arm, statistic: str) -> None:
    names = arm.layers(statistic)
    for depth, name in enumerate(names):
        points, weight = arm.points(name), (depth + 1) / len(names)
        steps = [p.step for p in points]
        if len(arm.runs) > 1:
            lows, highs = [p.low for p in points], [p.high for p in points]
            axes.fill_between(steps, lows, highs, color=colour(arm), alpha=0.1, linewidth=0)
        axes.plot(
            steps,
            [p.mean for p in points],
            color=colour(arm),
            alpha=0.4 + 0.6 * weight,
            linewidth=1.0 + 1.2 * weight,
            marker=_marker(points),
            label=f"layer {name.rpartition('_')[2]}" if depth in (0, len(names) - 1) else None,
        )
    axes.set_xlabel("step")
    axes.legend(loc="best", handlelength=1.4)


def _last_before_break(arm: Arm) -> list[Point]:
    """The last point whose loss is finite, if points follow whose loss is not; at most one."""
    for points in (arm.losses, arm.train_losses):
        finite = [point for point in points if math.isfinite(point.mean)]
        if finite and not math.isfinite(points[-1].mean):
            return finite[-1:]
    return []


def _marker(points: Sequence[Point]) -> str | None:
    """A single measurement is no line."""
    return "o" if len(points) == 1 else None


def _baselines(arms: Sequence[Arm], name: str) -> list[float]:
    return sorted({round(value, 6) for arm in arms for value in arm.baselines(name).values})


def _inline(figure: Figure, prefix: str, title: str) -> str:
    """The figure as an <svg> element of an HTML page: no header, no address, its own ids, colours by CSS."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", head)
    svg = f'{head} role="img" aria-label="{html.escape(title)}">{body}'
    # two figures on one page may not share an id
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(|xlink:href=")#', rf"\1#{prefix}-", svg)
    svg = svg.replace(_INK, "currentColor")
    for index, drawn in enumerate(LIGHT):
        svg = svg.replace(drawn, f"var(--arm-{index})")
    return svg.strip()
