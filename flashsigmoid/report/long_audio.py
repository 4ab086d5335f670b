"""Errors on utterances joined, against their length: the records that `flashsigmoid long-audio` leaves in a run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from .arms import Arm
from .figures import Drawing, Panel, colour
from .recognisers import read_lengths


def long_drawing(arms: Sequence[Arm]) -> Drawing:
    """Character and word errors against the length of the audio, a line for each arm, means over seeds."""
    known = [(arm, [lengths for run in arm.runs if (lengths := read_lengths(run))]) for arm in arms]
    known = [(arm, runs) for arm, runs in known if runs]
    caption = (
        "Errors on validation utterances of one speaker joined, 1, 2, 4 ... at a time; the same audio at every length, "
        "b as in training."
    )
    caption += (
        " Means over seeds, bands from the least to the largest."
        if any(len(r) > 1 for _, r in known)
        else (" Bands: one standard error over groups, up and down.")
    )

    def panel(name: str, title: str) -> Panel:
        def draw(axes: Axes) -> None:
            for arm, runs in known:
                factors = sorted(set.intersection(*({*lengths} for lengths in runs)))
                x = [statistics.mean(lengths[f]["seconds"] for lengths in runs) for f in factors]
                every = [[lengths[f][name] for lengths in runs] for f in factors]
                mean, low, high = (list(map(of, every)) for of in (statistics.mean, min, max))
                if len(runs) == 1:
                    errors = [runs[0][f][f"{name}_se"] for f in factors]
                    low = [m - e for m, e in zip(mean, errors, strict=True)]
                    high = [m + e for m, e in zip(mean, errors, strict=True)]
                axes.fill_between(x, low, high, color=colour(arm), alpha=0.18, linewidth=0)
                axes.plot(x, mean, color=colour(arm), linewidth=2.2, marker="o", label=arm.label)
            axes.set_xlabel("median length, s")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            if name == "wer":  # once: a third arm's label would lie on a line
                axes.legend(loc="lower right", handlelength=1.4)

        return Panel(title, draw)

    panels = (panel("cer", "character errors"), panel("wer", "word errors")) if known else ()
    return Drawing("long-audio", "Errors on longer audio", caption, panels)
