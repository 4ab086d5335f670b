"""`flashsigmoid study` and `flashsigmoid theory`: records, figure, table."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from cli.outcome import assert_one_error


@pytest.mark.usefixtures("few_digits")
def test_a_study_trains_compares_and_takes_what_is_there(flashsigmoid, tmp_path):
    words = ("study", "vision-ablation", "--only", "base", "--only", "relu", "--device", "cpu", "--set", "steps=2")
    words += ("--set", "model.dim=16", "--set", "model.depth=1", "--set", "batch=8")
    first = flashsigmoid(*words)
    assert first.code == 0, first.err
    assert re.search(r"base +│ +\d+\.\d ± \d\.\d +│ +│", first.out)
    assert re.search(r"relu +│ +\d+\.\d ± \d\.\d +│ [+-]\d\.\d ± ", first.out)
    folder = Path("runs/vision-ablation/digits")
    assert first.out.splitlines()[-1] == f"records: {folder / 'ablation.jsonl'}"
    assert "hints, not findings" in first.out
    assert "\nrelu  2/2 " in first.err
    again = flashsigmoid(*words)
    assert (again.out, again.err) == (first.out, "")
    assert_one_error(flashsigmoid(*words, "--set", "seed=1"), 1, "seed must be that of the run in", "0, got 1")
    fresh = flashsigmoid(*words, "--set", "seed=1", "--fresh")
    assert fresh.code == 0, fresh.err
    assert {path.name for path in (tmp_path / folder).iterdir()} == {"base", "relu", "ablation.jsonl"}


def test_a_small_study_is_recorded_drawn_printed_and_taken_as_it_is(flashsigmoid, tmp_path, monkeypatch):
    from flashsigmoid.studies import sinks

    monkeypatch.setattr(sinks, "QUICK", dataclasses.replace(sinks.QUICK, steps=2, batch=2))
    words = ("study", "sinks", "--quick", "--only", "s*max", "--only", "sigmoid", "--device", "cpu")
    first = flashsigmoid(*words)
    assert first.code == 0, first.err
    folder = Path("runs/sinks-quick")
    last = first.out.splitlines()[-1]
    assert last == f"records: {folder / 'sinks.jsonl'}   figure: {folder / 'sinks.png'}"
    assert "hints, not findings" in first.out
    assert "\nsigmoid-seed-0  2/2 " in first.err
    assert {path.name for path in (tmp_path / folder).iterdir()} == {"sinks.jsonl", "sinks.png", "trials"}
    again = flashsigmoid(*words)
    assert (again.out, again.err) == (first.out, "")
    monkeypatch.setattr(sinks, "QUICK", dataclasses.replace(sinks.QUICK, lr=1.0))
    assert_one_error(flashsigmoid(*words), 1, "lr must be that of", "0.003, got 1.0")
    assert flashsigmoid(*words, "--fresh").code == 0


def test_a_theory_is_recorded_drawn_and_printed(flashsigmoid, tmp_path):
    outcome = flashsigmoid("theory", "universal", "--quick", "--out", tmp_path / "mine")
    assert outcome.code == 0, outcome.err
    assert "lopsided" in outcome.out
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["universal.jsonl", "universal.png"]
    outcome = flashsigmoid("report", tmp_path / "mine", "nowhere")
    assert_one_error(outcome, 1, "a run or a study must be at the path, got nowhere")
    assert_one_error(flashsigmoid("theory", "magic"), 2, "'magic' is not one of 'bias', 'regularity', 'tightness'")
