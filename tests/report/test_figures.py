"""Figures: no arm takes the place of the others, no number is smoothed away."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from flashsigmoid.record import RecordWriter
from flashsigmoid.report.arms import Point, group_arms, load_runs
from flashsigmoid.report.figures import layer_drawing, smooth

MakeRun = Callable[..., Path]


def test_an_arm_of_zeros_leaves_the_others_their_decades(tmp_path: Path) -> None:
    for bias, norm in ((None, 1.0), (0.0, 100.0), (-math.inf, 0.0)):
        with RecordWriter(
            tmp_path / str(bias) / "records.jsonl", {"attention": "sigmoid", "sigmoid_bias": bias}
        ) as writer:
            for step in (0, 10):
                writer.write("attn_norm/layer_0", norm, step=step)
    drawing = layer_drawing(group_arms(load_runs([tmp_path])), "attn_norm", "Norm", "")
    found = {}
    for panel in drawing.panels:
        axes = Figure().subplots()
        panel.draw(axes)
        value = np.asarray(axes.lines[0].get_ydata())[0]
        found[panel.title] = (axes.transData.transform((0.0, value))[1] - axes.bbox.y0) / axes.bbox.height
    low, middle, high = sorted(found.values())
    assert low == pytest.approx(0.0, abs=0.01)
    assert middle > 0.1  # on a linear axis: 0.01
    assert high > 0.9


def test_smoothing_keeps_a_straight_line_and_nan() -> None:
    line = [Point(step, None, float(step), step, step) for step in range(1000)]
    smoothed = smooth(line)
    assert len(smoothed) <= 300
    assert all(point.mean == pytest.approx(point.step) for point in smoothed[10:-10])
    broken = smooth([*line, *(Point(1000 + i, None, math.nan, math.nan, math.nan) for i in range(1000))])
    assert math.isnan(broken[-1].mean)
