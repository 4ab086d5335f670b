"""Tables and the figure of a benchmark, from records made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsigmoid.record import Record, RecordWriter, read_records
from flashsigmoid.report.speed import speeds, write_plot
from flashsigmoid.report.tables import decode, rewrite


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of one problem, two works, a sigmoid and two kinds of softmax, one of which has no backward."""
    file = tmp_path / "bench.jsonl"
    with RecordWriter(file, settings={"dtype": "bfloat16"}) as writer:
        for peer, kind, ms in (("triton", "ours", 1.0), ("sdpa flash", "softmax", 2.0), ("fa3", "softmax", 1.2)):
            for tensor, rms in (("out", 0.002), ("dq", 0.003)):
                writer.write("error_rms", rms, problem="lm", peer=peer, tensor=tensor, kind=kind)
            for work in ("forward", "backward")[: 1 if peer == "fa3" else 2]:
                tags = {"problem": "lm", "work": work, "peer": peer}
                for name, value in (("time_ms", ms), ("time_p10_ms", 0.9 * ms), ("time_p90_ms", 1.1 * ms)):
                    writer.write(name, value, unit="ms", **tags)
                writer.write("speed_tflops", 600.0 / ms, unit="TFLOP/s", **tags)
                writer.write("peak_bytes", 2.0**20, unit="bytes", **tags)
        writer.write("error_over_budget", 0.5, unit="times", problem="lm", peer="triton")
        writer.write("unavailable", problem="lm", peer="fa3", reason="no backward", of="backward")
        writer.write("ceiling_tflops", 789.0, unit="TFLOP/s", peer="matmul 8192")
        writer.write("ceiling_tb", 4.25, unit="TB/s", peer="copy")
    return file


def test_speed_stands_beside_the_best_softmax(path: Path) -> None:
    cells = speeds(read_records(path).records)
    assert cells["lm", "forward"]["triton"].over_softmax == pytest.approx(1.2)
    assert cells["lm", "backward"]["triton"].over_softmax == pytest.approx(2.0)
    assert cells["lm", "forward"]["triton"].error_rms == 0.003
    assert "fa3" not in cells["lm", "backward"]


def test_tables(path: Path) -> None:
    page = rewrite(f"<!-- table gpu-speed {path} -->\n<!-- end -->\n<!-- table errors {path} -->\n<!-- end -->\n")
    assert "600\u00a0(1.20)" in page  # no line ends inside of a cell
    page = page.replace("\u00a0", " ")
    assert "| TFLOP/s (over the best softmax) | triton | sdpa flash | fa3 |\n" in page
    assert "| lm, forward | 600 (1.20) | 300 (0.60) | 500 (1.00) |\n" in page
    assert "| lm, backward | 600 (2.00) | 300 (1.00) |  |\n" in page
    assert "In the same run: matmul 8192 789 TFLOP/s; copy 4.25 TB/s" in page
    assert "| relative rms error | out | dq | times over the budget |\n" in page
    assert "| lm, triton | 2.00e-03 | 3.00e-03 | 0.5 |\n" in page
    assert "| lm, fa3 | 2.00e-03 | 3.00e-03 |  |\n" in page
    assert rewrite(page).replace("\u00a0", " ") == page


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_figure_is_drawn(path: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / "figures" / f"speed{suffix}"
    write_plot(read_records(path).records, out)
    assert out.stat().st_size > 10_000
    with pytest.raises(ValueError, match="records must hold at least one time to be drawn, got none"):
        write_plot([Record(name="error_rms", value=1.0, tags={"kind": "ours"})], out)


def test_a_table_of_decoding(tmp_path: Path) -> None:
    path = tmp_path / "decode.jsonl"
    with RecordWriter(path, settings={"dtype": "bfloat16"}) as writer:
        for peer, ms, over, fraction in (("triton", 0.008, 1.25, 0.9), ("fa3", 0.01, 1.0, 0.7)):
            tags = {"problem": "decode-b1-4k", "work": "decode", "peer": peer}
            writer.write("time_ms", ms, unit="ms", **tags)
            writer.write("speedup_over_softmax", over, **tags)
            writer.write("read_fraction", fraction, **tags)
        writer.write("time_ms", 1.0, problem="decode-b8-4k", work="decode", peer="fa3")
        writer.write("speedup_over_softmax", 1.0, problem="decode-b8-4k", work="decode", peer="fa3")
    assert decode(path).splitlines()[2:] == [
        "| decode-b1-4k | 8.0\u00a0(1.25) | 10.0\u00a0(1.00) | 0.90 |",
        "| decode-b8-4k |  | 1000.0\u00a0(1.00) | 0.00 |",
    ]
