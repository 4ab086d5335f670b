"""The table of pretrainings: the right number in the right column, and what is missing."""

from __future__ import annotations

import pytest

from flashsigmoid.record import RecordWriter
from flashsigmoid.report import summary_rows, write_report
from flashsigmoid.report.pretrained import NOTE, pretrained_rows
from flashsigmoid.report.tables import pretrained


def write(stage, recipe, name, accuracies) -> None:
    """Runs of both arms, an accuracy for each seed."""
    for arm, values in accuracies.items():
        for seed, value in enumerate(values):
            folder = stage / arm / f"seed-{seed}"
            folder.mkdir(parents=True)
            settings = {"recipe": recipe, "attention": arm, "seed": seed, "steps": 8, "batch": 2, "accumulate": 1}
            with RecordWriter(folder / "records.jsonl", settings) as writer:
                writer.write(f"val/{name}", 0.1, step=0)
                writer.write(f"val/{name}", value, step=8)
                writer.write(f"val/{name}_se", 0.003, step=8)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "a", "mae_cifar10", "knn_accuracy", {"sigmoid": [0.5], "softmax": [0.51]})
    write(tmp_path / "a" / "then-probe_cifar10", "probe_cifar10", "accuracy", {"sigmoid": [0.6], "softmax": [0.62]})
    write(tmp_path / "b", "simclr_cifar10", "knn_accuracy", {"sigmoid": [0.4, 0.44], "softmax": [0.4, 0.4]})
    write(tmp_path / "b" / "then-finetune_x", "finetune_x", "accuracy", {"sigmoid": [0.8, 0.8], "softmax": [0.7, 0.72]})
    write(tmp_path / "z", "probe_cifar10", "accuracy", {"sigmoid": [0.3], "softmax": [0.2]})
    return tmp_path


def test_each_method_has_a_row(folder) -> None:
    rows = pretrained_rows(folder)
    assert [list(row.values()) for row in rows] == [
        ["random weights", "1", "not recorded", "30.0 / 20.0 (+10.00 ± 0.42)", "not recorded"],
        ["SimCLR", "2", "42.0 / 40.0 (+2.00 ± 2.00)", "not recorded", "80.0 / 71.0 (+9.00 ± 1.00)"],
        ["MAE", "1", "50.0 / 51.0 (-1.00 ± 0.42)", "60.0 / 62.0 (-2.00 ± 0.42)", "not recorded"],
    ]
    assert pretrained(folder).endswith(f"\n\n{NOTE}\n")


def test_what_is_missing_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="must have one that holds sigmoid, got none"):
        pretrained_rows(tmp_path)
    (tmp_path / "a" / "sigmoid").mkdir(parents=True)
    with pytest.raises(ValueError, match="an arm must have a run, got none"):
        pretrained_rows(tmp_path)
    write(tmp_path / "b", "byol_x", "knn_accuracy", {"sigmoid": [0.5]})
    (tmp_path / "a" / "sigmoid").rmdir()
    with pytest.raises(ValueError, match="a run must be a folder"):
        pretrained_rows(tmp_path)


def test_encoders_are_compared_by_the_accuracy_of_neighbours(tmp_path):
    for attention, accuracy in (("sigmoid", 0.75), ("softmax", 0.5)):
        settings = {"recipe": "simclr_digits", "attention": attention, "seed": 0, "steps": 2}
        with RecordWriter(tmp_path / attention / "records.jsonl", settings) as writer:
            for step in (0, 2):
                writer.write("val/knn_accuracy", accuracy * step / 2, step=step)
                writer.write("val/loss", 3.0 - step, unit="nats_per_view", step=step)
            writer.write("baseline/majority", 0.117, step=0)
    rows = {row["arm"]: row for row in summary_rows([tmp_path])}
    assert rows["sigmoid"]["kNN accuracy"] == "75.0%"
    text = write_report([tmp_path], tmp_path).read_text("utf-8")
    assert "The validation kNN accuracy ended at 75.0% for sigmoid and 50.0% for softmax; the most frequent" in text
    assert "final validation kNN accuracy" in text
    assert "bigram" not in text
