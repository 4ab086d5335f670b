"""Rows and figures of `flashsigmoid study`, from records alone."""

from __future__ import annotations

import pytest

from flashsigmoid.record import RecordWriter
from flashsigmoid.report.studies import study_figure, study_note, study_rows


def retrieval(writer: RecordWriter, seeds: int) -> None:
    for arm, base in (("sigmoid", 0.4), ("softmax", 0.6)):
        for seed in range(seeds):
            own = {"arm": arm, "seed": seed}
            for length in (8, 16):
                writer.write("accuracy", base + 0.1 * seed, task="needle", length=length, pairs=1, **own)
                for pairs in (1, 2):
                    writer.write("accuracy", base / pairs, task="recall", length=length, pairs=pairs, **own)
            writer.write("train_s", 60.0, unit="s", hardware="a CPU", **own)


def diagnosis(writer: RecordWriter, seeds: int) -> None:
    for kind, norm in (("sigmoid", 2.0), ("no-bias", 40.0)):  # softmax has not run
        for seed in range(seeds):
            own = {"kind": kind, "position": "rope", "qk_norm": True, "layer_scale": None, "seed": seed}
            writer.write("attn_norm", norm + seed, step=0, layer=0, **own)
            writer.write("attn_norm", 99.0, step=5, layer=0, **own)
            for length in (1, 8):
                writer.write("val/loss", norm / 10 + length, length=length, **own)
            writer.write("train_s", 60.0, unit="s", hardware="a CPU", **own)


def sinks(writer: RecordWriter, seeds: int) -> None:
    for seed in range(seeds):
        own = {"arm": "softmax", "seed": seed}
        for keys in (1, 4):
            writer.write("even", 0.07 * keys, keys=keys, **own)
        for step in (0, 5):
            for layer in (0, 1):
                for keys in (1, 4):
                    writer.write("sink_mass", 0.1 * keys + 0.1 * layer, step=step, layer=layer, keys=keys, **own)
                writer.write("sink_head", 0.3 + 0.1 * layer, step=step, layer=layer, **own)
                writer.write("row_mass", 1.0, step=step, layer=layer, **own)
            writer.write("sink_heads", 0.5, step=step, **own)
        writer.write("val/loss", 2.0, length=1, **own)
        writer.write("train_s", 60.0, unit="s", hardware="a CPU", **own)


SETTINGS = {"steps": 5, "seqlen": 8, "trained_pairs": 2, "pairs": [1, 2], "each": 16, "quick": True}
MAKERS = {"retrieval": retrieval, "diagnosis": diagnosis, "sinks": sinks}


def written(folder, name: str, seeds: int):
    path = folder / f"{name}.jsonl"
    with RecordWriter(path, {"study": name, **SETTINGS}) as writer:
        MAKERS[name](writer, seeds)
    return path


def test_rows_of_retrieval_have_the_spread_of_seeds(tmp_path) -> None:
    rows = study_rows(written(tmp_path, "retrieval", 3))
    assert rows[0] == {
        "task": "needle",
        "length": "8",
        "pairs": "1",
        "sigmoid, %": "50 (40 to 60)",
        "softmax, %": "70 (60 to 80)",
    }
    assert [(row["task"], row["length"], row["pairs"]) for row in rows[2:]] == [
        ("recall", length, pairs) for length in ("8", "16") for pairs in ("1", "2")
    ]


def test_rows_of_diagnosis_stand_side_by_side_and_miss_what_has_not_run(tmp_path) -> None:
    (row,) = study_rows(written(tmp_path, "diagnosis", 2))
    assert row == {
        "position": "RoPE",
        "QK-norm": "yes",
        "LayerScale": "no",
        "first |A V|: b = -log n / b = 0 / softmax": "2.50 / 40.5 / –",
        "loss at n": "1.200 / 5.000 / –",
        "loss at 8 n": "8.200 / 12.000 / –",
    }


def test_rows_of_sinks_are_of_the_end(tmp_path) -> None:
    (row,) = study_rows(written(tmp_path, "sinks", 1))
    assert (row["first key, %"], row["first four, %"]) == ("15", "45")
    assert (row["first key of even weights, %"], row["greatest head, %"]) == ("7", "40")


def test_the_note_says_how_many_and_where(tmp_path) -> None:
    assert study_note(written(tmp_path, "sinks", 1)) == (
        "The quick study: 1 training, 1 min in all, on a CPU; one seed: hints, not findings."
    )
    assert study_note(written(tmp_path, "retrieval", 3)) == (
        "The quick study: 6 trainings, 6 min in all, on a CPU; 3 seeds, mean (least to largest)."
    )


@pytest.mark.parametrize("name", MAKERS)
def test_a_figure_has_its_arms(tmp_path, name: str) -> None:
    path = written(tmp_path, name, 2)
    labels = {label for axes in study_figure(path).axes for label in axes.get_legend_handles_labels()[1]}
    expected = {
        "retrieval": {"sigmoid", "softmax", "any value"},
        "diagnosis": {"b = -log n", "b = 0", "RoPE"},
        "sinks": {"softmax", "even weights"},
    }
    assert expected[name] <= labels


def test_other_records_are_one_clear_error(tmp_path) -> None:
    path = tmp_path / "other.jsonl"
    RecordWriter(path, {"study": "sleep"}).close()
    with pytest.raises(ValueError, match="neighbours, sinks, speculative, got sleep in"):
        study_rows(path)
    RecordWriter(path, {"study": "sinks"}).close()
    with pytest.raises(ValueError, match="records must have at least one complete trial, got none"):
        study_rows(path)
