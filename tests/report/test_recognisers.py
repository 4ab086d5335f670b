"""report/ of runs on speech: character errors against the constant answer, and between the arms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashsigmoid.record import RecordWriter
from flashsigmoid.report import accuracy_statement, summary_rows, write_report
from flashsigmoid.report.arms import group_arms, load_runs
from flashsigmoid.report.summary import warnings


def make(
    folder: Path, cer: float, *, attention: str = "sigmoid", error: float = 0.03, skipped: int = 0, **settings: Any
):
    """A run directory as training a recogniser would leave it; `cer` is the last one."""
    fields = {"recipe": "an4_sample", "attention": attention, "seed": 0, "steps": 100, **settings}
    with RecordWriter(folder / "records.jsonl", fields) as writer:
        writer.write("baseline/constant_cer", 0.68, step=0)
        for step, value in ((0, 1.0), (50, 0.5), (100, cer)):
            when = {"step": step, "time_s": step / 10}
            if step:
                writer.write("train/loss", 2.0 - step / 100, unit="nats_per_character", **when)
            for name, number in (("cer", value), ("cer_se", error), ("wer", 2 * value), ("wer_se", 2 * error)):
                writer.write(f"val/{name}", number, **when)
            writer.write("val/loss", 7 * value, unit="nats_per_character", **when)
            writer.write("attn_norm/layer_0", 1.0, **when)
        writer.write("data/skipped", skipped, unit="utterances", step=100)
    return folder


@pytest.mark.parametrize(
    ("cer", "verdict"),
    [
        (0.27, "sigmoid minus those of softmax are +2.0 points, inside of the standard error of the difference, 4.2 "),
        (0.20, "sigmoid minus those of softmax are -5.0 points, outside of the standard error of the difference, 4.2 "),
    ],
)
def test_errors_are_told_with_their_standard_error(tmp_path, cer, verdict) -> None:
    folders = [make(tmp_path / "a", cer), make(tmp_path / "b", 0.25, attention="softmax")]
    first, last = accuracy_statement(folders)
    assert first.startswith(
        f"The validation character errors ended at {cer:.1%} ± 3.0% for sigmoid and 25.0% ± 3.0% for "
    )
    assert "; the best constant answer has 68.0%." in first
    assert verdict in last
    row, base = summary_rows(folders)
    assert row["character errors"] == f"{cer:.1%} ± 3.0%"
    assert row["word errors"] == f"{2 * cer:.1%} ± 6.0%"
    assert row["minus softmax, points"] == f"{100 * (cer - 0.25):+.1f} ± 4.2"
    assert base["minus softmax, points"] == ""
    assert row["standard errors below it"] == f"{(0.68 - cer) / 0.03:.1f}"
    assert "below bigram" not in row


def test_a_run_that_learned_nothing_is_named(tmp_path) -> None:
    folders = [make(tmp_path / "a", 0.60), make(tmp_path / "b", 0.25, attention="softmax")]
    said = accuracy_statement(folders)
    assert said[1] == "Fewer than 3 standard errors below the constant are no sign of learning: sigmoid."
    assert "no sign" not in " ".join(accuracy_statement(folders[1:]))


def test_the_page_is_of_speech_and_names_what_was_left_out(tmp_path) -> None:
    folders = [make(tmp_path / "a", 0.27, skipped=2), make(tmp_path / "b", 0.25, attention="softmax")]
    page = write_report(folders, tmp_path / "page.html").read_text("utf-8")
    assert "final validation character errors ± 3.0%" in page
    for word in ("bigram", "<h2>Text</h2>", "not recorded", "corrupt file"):
        assert word not in page
    assert "sigmoid: two unusable utterances left out." in warnings(group_arms(load_runs(folders)))
    assert "sigmoid: two unusable utterances left out." in page
