"""report/ of runs on speech: character errors against the constant answer, and between the arms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from flashsigmoid.record import RecordWriter
from flashsigmoid.report import accuracy_statement, summary_rows, write_report
from flashsigmoid.report.arms import group_arms, load_runs
from flashsigmoid.report.figures import _loss_limits
from flashsigmoid.report.hearing import spans
from flashsigmoid.report.long_audio import long_drawing
from flashsigmoid.report.recognisers import position_rows
from flashsigmoid.report.summary import warnings
from flashsigmoid.report.tables import positions


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
        (0.27, "sigmoid minus those of softmax are +2.0 points, within the standard error of the difference, 4.2 "),
        (0.20, "sigmoid minus those of softmax are -5.0 points, beyond the standard error of the difference, 4.2 "),
    ],
)
def test_errors_are_told_with_their_standard_error(tmp_path, cer, verdict) -> None:
    folders = [make(tmp_path / "a", cer), make(tmp_path / "b", 0.25, attention="softmax")]
    first, last = accuracy_statement(folders)
    assert first.startswith(
        f"The validation character errors ended at {cer:.1%} ± 3.0% for sigmoid and 25.0% ± 3.0% for "
    )
    assert "; the best constant answer has 68.0%;" in first
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


def hearing(folder: Path, said: str = "GO ON", **changes: Any) -> Path:
    """What training leaves beside the records, and the record of it."""
    random = np.random.default_rng(0)
    path = np.array([-1, 0, 0, 1, -1, 2, 3, 4, 4, -1])
    arrays = {
        "features": random.normal(size=(40, 8)), "path": path, "said": np.array(said), "heard": np.array("GO <N>"),
        "maps": random.random((3, 2, 10, 10)), "blocks": np.array([0, 4, 7]), "heads": np.array([0, 1]), **changes,
    }  # fmt: skip
    np.savez(folder / "hearing.npz", **arrays)
    with RecordWriter(folder / "records.jsonl", {}, None, 100) as writer:
        writer.write("hearing", step=100, artifact="hearing.npz")
    return folder


def test_pictures_of_what_is_heard(tmp_path) -> None:
    folders = [hearing(make(tmp_path / "a", 0.2)), hearing(make(tmp_path / "b", 0.25, attention="softmax"))]
    page = write_report(folders, tmp_path / "page.html").read_text("utf-8")
    assert "<h3>What is heard</h3>" in page
    assert page.count("layer 7, head 1") == 2
    assert "sigmoid hears “GO &lt;N&gt;”" in page
    assert "img-src data:" in page
    assert (tmp_path / "page-figures/hearing.png").is_file()
    assert spans(np.array([-1, 0, 0, 1, -1, 1, 2])) == [(0, 1, 2), (1, 3, 3), (1, 5, 5), (2, 6, 6)]


@pytest.mark.parametrize(
    "changes", [{"maps": np.zeros((3, 2, 10, 9))}, {"path": np.full(10, 7)}, {"features": np.zeros(3)}]
)
def test_a_damaged_picture_is_one_clear_error(tmp_path, changes) -> None:
    folder = hearing(make(tmp_path / "a", 0.2), **changes)
    with pytest.raises(ValueError, match=r"a picture of hearing must be whole arrays that fit, got .*hearing\.npz: "):
        write_report([folder], tmp_path / "page.html")


def test_errors_on_longer_audio(tmp_path) -> None:
    folders = [
        make(tmp_path / "a", 0.2),
        make(tmp_path / "b", 0.25, attention="softmax"),
        make(tmp_path / "c", 0.3, seed=1),
    ]
    assert long_drawing(group_arms(load_runs(folders))).panels == ()
    assert "longer audio" not in write_report(folders, tmp_path / "page.html").read_text("utf-8")
    assert not [name for name in summary_rows(folders)[0] if "joined" in name]
    for folder, cer in zip(folders, (0.2, 0.25, 0.3), strict=True):
        with RecordWriter(folder / "long-audio.jsonl", {}) as writer:
            for factor in (1, 2, 4):
                for name in ("cer", "cer_se", "wer", "wer_se", "seconds"):
                    writer.write(f"long/{name}", factor if name == "seconds" else cer * factor, factor=factor)
    row, base = summary_rows(folders)
    assert row["character errors, 2 joined"] == "50.0% (40.0% to 60.0%)"
    assert base["character errors, 4 joined"] == "100.0%"
    arms = group_arms(load_runs(folders))
    drawing = long_drawing(arms)
    assert [panel.title for panel in drawing.panels] == ["character errors", "word errors"]
    assert "Means over seeds" in drawing.caption
    axes = Figure().subplots()
    drawing.panels[0].draw(axes)
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.get_lines()}
    assert lines == {"sigmoid": pytest.approx([0.25, 0.5, 1.0]), "softmax": pytest.approx([0.25, 0.5, 1.0])}
    assert "<h3>Errors on longer audio</h3>" in write_report(folders, tmp_path / "page.html").read_text("utf-8")


def test_a_row_for_each_position_encoding(tmp_path) -> None:
    for name, cers in (("rope", (0.3, 0.2)), ("alibi", (0.1, 0.15))):
        for attention, cer in zip(("softmax", "sigmoid"), cers, strict=True):
            folder = make(tmp_path / name / attention / "seed-0", cer, attention=attention, position=name)
            with RecordWriter(folder / "long-audio.jsonl", {}) as writer:
                for factor in (1, 2):
                    writer.write("long/cer", cer * factor, factor=factor)
    # an arm of something else beside the pair
    make(tmp_path / "alibi" / "normed" / "seed-0", 0.05, attention="sigmoid", position="alibi", out_norm=True)
    assert [list(row.values()) for row in position_rows(tmp_path)] == [
        ["alibi", "1", "15.0% ± 3.0% / 10.0% ± 3.0%", "30.0% ± 6.0% / 20.0% ± 6.0%", "30.0% / 20.0%"],
        ["rope", "1", "20.0% ± 3.0% / 30.0% ± 3.0%", "40.0% ± 6.0% / 60.0% ± 6.0%", "40.0% / 60.0%"],
    ]
    assert "| rope | 1 | 20.0% ± 3.0% / 30.0% ± 3.0% |" in positions(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="must have one for each position encoding, got none"):
        position_rows(tmp_path / "none")


def test_the_page_is_of_speech_and_names_what_was_left_out(tmp_path) -> None:
    folders = [make(tmp_path / "a", 0.27, skipped=2), make(tmp_path / "b", 0.25, attention="softmax")]
    page = write_report(folders, tmp_path / "page.html").read_text("utf-8")
    assert "final validation character errors ± 3.0%" in page
    for word in ("bigram", "<h2>Text</h2>", "not recorded", "corrupt file"):
        assert word not in page
    assert "sigmoid: two unusable utterances left out." in warnings(group_arms(load_runs(folders)))
    assert "sigmoid: two unusable utterances left out." in page


def test_the_loss_is_shown_from_its_second_validation_on(tmp_path) -> None:
    """The first is far above; a range of what is between the arms' ends shows nothing of their way."""
    arms = group_arms(load_runs([make(tmp_path / "a", 0.27), make(tmp_path / "b", 0.269, attention="softmax")]))
    limits = _loss_limits(arms)
    assert limits is not None
    assert 7 * 0.5 < limits[1] < 7
