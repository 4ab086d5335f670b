"""Figures of runs that were trained under the microscope: what each attention did, and norms of everything by block."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..record import Record
from .arms import Arm
from .figures import Drawing, Panel, colour, layer_drawing

_FIRST = "Of the first sequence of a batch in training."
_ATTENTION = (
    ("probe_attn_norm", "Attention norm in training", "|A V| of a batch in training, mean over tokens."),
    ("probe_attn_grad", "Gradient at A V", "Its L2 norm, mean over tokens."),
    ("probe_row_mass", "Row mass in training", f"What the weights of a row add up to, mean over rows. {_FIRST}"),
    (
        "probe_effective_keys",
        "Effective number of keys",
        f"exp of the entropy of a row divided by its sum, mean over rows: k where it is even on k keys. {_FIRST}",
    ),
    ("probe_sink", "Share of the first key in training", f"Of a row's mass, mean over rows. {_FIRST}"),
    (
        "probe_saturation",
        "Saturation",
        f"Share of a row's mass on weights above 0.99, whose scores hardly get a gradient; mean over rows. {_FIRST}",
    ),
    (
        "probe_bound_share",
        "Distance to the bound",
        "|dL/dX| / |dL/dY| of input X and output Y, over a bound of the norm of the Jacobian at X, which it cannot "
        f"exceed. Sigmoid only. {_FIRST}",
    ),
)
_NORMS = (
    ("probe_output", "Outputs", "L2 norms of the outputs of all modules"),
    ("probe_output_grad", "Gradients at outputs", "L2 norms of the gradients at the outputs of all modules"),
    ("probe_param", "Parameters", "L2 norms of the rows of all parameters"),
    (
        "probe_param_grad",
        "Gradients of parameters",
        "L2 norms of the rows of all gradients, clipped as the optimizer got",
    ),
    ("probe_exp_avg", "First moments of the optimizer", "L2 norms of the rows of Adam's mean of gradients"),
    ("probe_exp_avg_sq", "Second moments", "L2 norms of the rows of Adam's mean of squares"),
)


def watched_drawings(arms: Sequence[Arm]) -> list[Drawing]:
    """A figure of everything that `diagnostics.watch.Watch` has recorded; those without records have no panels."""
    return [layer_drawing(arms, *words) for words in _ATTENTION] + [_norms_drawing(arms, *words) for words in _NORMS]


def _norms_drawing(arms: Sequence[Arm], name: str, title: str, caption: str) -> Drawing:
    shown = {arm.label: (arm, blocks) for arm in arms if (blocks := _by_block(arm, name))}

    def panel(arm: Arm, blocks: dict[str, dict[int, list[Record]]]) -> Panel:
        def draw(axes: Axes) -> None:
            for depth, (block, by_step) in enumerate(blocks.items()):
                weight, steps = (depth + 1) / len(blocks), sorted(by_step)
                means = [statistics.fmean(r.value or 0.0 for r in by_step[step]) for step in steps]
                most = [max(float(r.tags["max"] or 0.0) for r in by_step[step]) for step in steps]
                ends = depth in (0, len(blocks) - 1)
                axes.fill_between(steps, means, most, color=colour(arm), alpha=0.06, linewidth=0)
                axes.plot(
                    steps,
                    means,
                    color=colour(arm),
                    alpha=0.4 + 0.6 * weight,
                    linewidth=1.0 + 1.2 * weight,
                    marker="o" if len(steps) == 1 else None,
                    label=block if ends else None,
                )
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("step")
            axes.legend(loc="best", handlelength=1.4)

        return Panel(arm.label, draw)

    about = f"{caption}, those of a block together: the mean, and up to the largest of all."
    return Drawing(name.replace("_", "-"), title, about, tuple(panel(*each) for each in shown.values()))


def _by_block(arm: Arm, name: str) -> dict[str, dict[int, list[Record]]]:
    """The records of modules or parameters by block and step. What is in no numbered block is left out, if some are."""
    found: dict[str, dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for run in arm.runs:
        for record in run.file.records:
            if record.name == name and record.value is not None and record.step is not None:
                found[_block(str(record.tags["layer"]))][record.step].append(record)
    numbered = {block: records for block, records in found.items() if block[-1:].isdecimal()}
    return numbered or found


def _block(layer: str) -> str:
    """A name up to its first number, as blocks.3; without one its first part."""
    parts = layer.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[: number + 1])
