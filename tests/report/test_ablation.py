"""The table of an ablation: differences in points with their errors, norms, and what is missing."""

from __future__ import annotations

import math

import pytest

from flashsigmoid.record import RecordWriter
from flashsigmoid.report.ablation import NOTE, ablation_rows
from flashsigmoid.report.tables import ablation


def write(path, variants) -> str:
    with RecordWriter(path, {}) as writer:
        for name, (accuracy, error, loss, norms, step_ms, change) in variants.items():
            writer.write("val/accuracy", accuracy, step=8, variant=name, change=change)
            writer.write("val/accuracy_se", error, step=8, variant=name)
            writer.write("val/loss", loss, step=8, variant=name)
            for i, norm in enumerate(norms):
                writer.write(f"attn_norm/layer_{i}", norm, step=0, variant=name)
            if step_ms is not None:
                writer.write("step_ms", step_ms, unit="ms", variant=name)
    return str(path)


BASE = (0.9, 0.003, 0.4, (0.25, 1.5), 12.0, "")
WORSE = (0.85, 0.004, math.nan, (30.0,), None, "sigmoid_bias=0")


def test_differences_in_points(tmp_path) -> None:
    base, worse = ablation_rows(write(tmp_path / "a.jsonl", {"base": BASE, "no-bias": WORSE}))
    assert base == {
        "variant": "base",
        "differs in": "",
        "accuracy, %": "90.0 ± 0.3",
        "minus base": "",
        "first |A V|": "0.250 to 1.50",
        "ms per step": "12.0",
    }
    assert worse == {
        "variant": "no-bias",
        "differs in": "sigmoid_bias=0",
        "accuracy, %": "85.0 ± 0.4, loss not finite",
        "minus base": "-5.0 ± 0.5",
        "first |A V|": "30.0",
        "ms per step": "not recorded",
    }


def test_without_a_base_there_is_no_difference(tmp_path) -> None:
    (row,) = ablation_rows(write(tmp_path / "a.jsonl", {"no-bias": (*WORSE[:3], (math.nan, 1.0), *WORSE[4:])}))
    assert (row["minus base"], row["first |A V|"]) == ("", "nan")


def test_a_page_has_the_table_and_the_note(tmp_path) -> None:
    text = ablation(write(tmp_path / "a.jsonl", {"base": BASE, "no-bias": WORSE}))
    assert text.startswith("| variant | differs in | accuracy, % | minus base |")
    assert text.endswith(f"\n\n{NOTE}\n")
    assert "hints, not findings" in text


def test_nothing_complete_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"must have at least one complete variant, got none in .*a.jsonl"):
        ablation_rows(write(tmp_path / "a.jsonl", {}))
