"""The figure of errors over the budget, from records made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsigmoid.record import RecordWriter, read_records
from flashsigmoid.report.accuracy import by_scores, by_tensor, draw


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tests.jsonl"
    with RecordWriter(file, settings={}) as writer:
        for dtype in ("bfloat16", "float16"):
            for n, value in ((4096, 0.7), (1024, 0.6), (1024, 0.5)):
                tags = {"dtype": dtype, "scores": "N(0,1)", "seqlen_k": n, "tensor": "out"}
                writer.write("error_over_budget", value, unit="times", **tags)
                tags = {"dtype": dtype, "seqlen": n, "tensor": "dq"}
                writer.write("error_over_budget", value / 2.0, unit="times", **tags)
        writer.write("error_over_budget", 9.0, unit="times", fault="zeros", tensor="out", dtype="bfloat16")
        writer.write("peak_bytes", 5.0, unit="bytes", seqlen=1024)
    return file


def test_the_largest_error_of_each_length_in_the_order_of_lengths(path) -> None:
    records = [r for r in read_records(path).records if r.name == "error_over_budget"]
    assert by_scores(records, "bfloat16") == {"N(0,1)": {1024: 0.6, 4096: 0.7}}
    assert by_tensor(records, "float16") == {"dq": {1024: 0.3, 4096: 0.35}}


def test_it_is_drawn(path, tmp_path) -> None:
    draw(path, tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="records must hold errors over the budget of bfloat16, got none"):
        draw(path, tmp_path / "none.png", ["dk"])
    assert not (tmp_path / "none.png").exists()
