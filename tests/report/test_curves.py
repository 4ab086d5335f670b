"""Speed against the length: which problems make a curve, and what is drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashsigmoid.record import Record, Scalar
from flashsigmoid.report.curves import curves, error_curves, figure, write_curves

PEERS = {"hopper": "ours", "fa3": "softmax"}


def records() -> list[Record]:
    found = []
    for problem, n in (("lm-512-d64", 1.0), ("lm-4k-d64", 2.0), ("lm-4k-d64-causal", 3.0), ("gqa-32-8-d128", 9.0)):
        for factor, (peer, kind) in enumerate(PEERS.items(), 1):
            for tensor in ("out", "dq", "dk", "dv"):
                tags: dict[str, Scalar] = {"problem": problem, "peer": peer, "tensor": tensor, "kind": kind}
                found.append(Record(name="error_rms", value=n * (0.1 if tensor == "dk" else 0.01), tags=tags))
            for work in ("forward", "backward"):
                tags = {"problem": problem, "peer": peer, "work": work}
                for name in ("time_ms", "time_p10_ms", "time_p90_ms"):
                    found.append(Record(name=name, value=1.0, unit="ms", tags=tags))
                found.append(Record(name="speed_tflops", value=100.0 * n * factor, unit="TFLOP/s", tags=tags))
    return found


def test_a_curve_has_the_lengths_of_one_head_dim_and_mask() -> None:
    found = curves(records())
    kinds = ("head_dim 64", "head_dim 64, causal")
    assert set(found) == {(work, kind) for work in ("forward", "backward") for kind in kinds}
    assert found["forward", "head_dim 64"] == {"hopper": {512: 100.0, 4096: 200.0}, "fa3": {512: 200.0, 4096: 400.0}}
    assert found["backward", "head_dim 64, causal"]["fa3"] == {4096: 600.0}


def test_errors_are_those_of_the_worst_tensor_and_shape() -> None:
    found = error_curves(records())
    assert found["forward"]["hopper"] == pytest.approx({512: 0.01, 4096: 0.03})
    assert found["backward"]["hopper"] == pytest.approx({512: 0.1, 4096: 0.3})


def test_a_line_for_each_candidate_in_every_panel(tmp_path: Path) -> None:
    drawn = figure(records())
    assert len(drawn.axes) == 2 * 3
    assert all(len(axes.lines) == len(PEERS) for axes in drawn.axes)
    assert [float(y) for y in np.asarray(drawn.axes[0].lines[1].get_ydata())] == [200.0, 400.0]
    write_curves(records(), tmp_path / "folder" / "curves.png")
    assert (tmp_path / "folder" / "curves.png").stat().st_size > 10_000


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="records must hold times of lm-N-dD problems to be drawn, got none"):
        write_curves([], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())
