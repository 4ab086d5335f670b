"""The time of a step of any recipe's arms: what is cut, what is refused, and the records of a measurement."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashsigmoid.bench.steps import cut
from flashsigmoid.cli import app
from flashsigmoid.recipes.speech import an4_sample
from flashsigmoid.recipes.vision import digits
from flashsigmoid.record import read_records


@pytest.mark.parametrize("recipe", [digits, an4_sample])
def test_a_run_is_cut_to_what_is_timed(recipe) -> None:
    run = cut(recipe(), 5, 3)
    assert (run.steps, run.val_every, run.save_every, run.log_every) == (25, 25, 25, 5)
    assert run.optim.warmup < run.steps
    assert getattr(run, "attention_snapshots", 0) == 0
    assert run.model == recipe().model


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digit"], "did you mean digits"),
        (["digits", "--arm", "wide:dims=8"], "dims"),
        (["digits", "--set", "steps=3"], "steps must be (rounds + 2) log_every = 240, got 3"),
    ],
)
def test_bad_arms_and_fields_are_one_clear_error(tmp_path: Path, words, message) -> None:
    result = CliRunner().invoke(app, ["steps", *words, "--device", "cpu", "--out", str(tmp_path / "x.jsonl")])
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_an_arm_that_ends_with_an_error_ends_the_others(tmp_path: Path) -> None:
    """Which wait for their turn."""
    words = ["--device", "cpu", "--block", "2", "--rounds", "2", "--out", str(tmp_path / "x.jsonl")]
    arms = ["--arm", "good:attention=softmax", "--arm", "bad:nheads=5"]
    result = CliRunner().invoke(app, ["steps", "digits", *arms, *words])
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == "bad must train to the end, got an error"
    assert not multiprocessing.active_children()
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_arms_of_a_recipe_take_their_turns(tmp_path: Path) -> None:
    out = tmp_path / "steps.jsonl"
    small = [f"--set={field}" for field in ("model.dim=32", "model.depth=1", "model.nheads=2", "batch=8")]
    words = ["--device", "cpu", "--block", "2", "--rounds", "2", "--out", str(out)]
    result = CliRunner().invoke(app, ["steps", "digits", *small, *words], catch_exceptions=False)
    assert [line.split()[0] for line in result.output.splitlines()] == ["softmax", "sigmoid", "softmax"]
    records = read_records(out).records
    for arm in ("softmax", "sigmoid"):
        taken = [record.value or 0.0 for record in records if record.name == "step" and record.tags["arm"] == arm]
        assert len(taken) == 2
        assert min(taken) > 0.0
    assert {r.tags["arm"] for r in records if r.name == "over_softmax/median"} == {"sigmoid", "softmax again"}
