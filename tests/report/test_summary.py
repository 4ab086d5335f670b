"""What is said of arms in words and rows: every claim comes from the records, no damage is hidden."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from report.reading import arms_of, told

from flashsigmoid.record import RecordWriter
from flashsigmoid.report import summary_rows
from flashsigmoid.report.summary import number_text, warnings

MakeRun = Callable[..., Path]


def test_the_statement_has_the_numbers(seeds: Path) -> None:
    text = told(seeds)
    for claim in (
        "Three arms of the recipe demo, sigmoid, softmax and “sigmoid, sigmoid_bias=0.0”, differ in two settings",
        "They were trained for 600 steps, with seeds 0, 1 and 2.",
        "(nats per byte, mean of 3 seeds) ended at 1.850 for sigmoid, 1.830 for softmax and 3.850 for",
        "Sigmoid ends 0.020 above softmax (seed by seed +0.010 to +0.030, standard deviation 0.010, standard "
        "error of the mean 0.006).",
        "Sigmoid and softmax are below the 2.480 of a bigram model of the same text, "
        "“sigmoid, sigmoid_bias=0.0” is not below.",
        "are below the 2.350 that the best function of the previous token alone could reach, “sigmoid,",
    ):
        assert claim in text
    assert warnings(arms_of(seeds)) == []


def test_a_planted_number_changes_the_text(run: MakeRun) -> None:
    folders = [run("a", final=1.85), run("b", attention="softmax", final=1.83)]
    assert "ended at 1.850 for sigmoid and 1.830 for softmax" in told(*folders)
    assert "Sigmoid ends 0.020 above softmax." in told(*folders)
    assert "Both arms are below the 2.480" in told(*folders)
    with RecordWriter(folders[0] / "records.jsonl", resume_step=599) as writer:
        writer.write("val/loss", 2.6, unit="nats_per_token", step=600)
        writer.write("val/loss_bytes", 2.6, unit="nats_per_byte", step=600)
    text = told(*folders)
    assert "ended at 2.600 for sigmoid (best on the way" in text
    assert "Sigmoid ends 0.770 above softmax." in text
    assert "Softmax is below the 2.480 of a bigram model of the same text, sigmoid is not below." in text


def test_equal_ends_are_called_equal(run: MakeRun) -> None:
    assert "Sigmoid and softmax end equal to three decimals." in told(
        run("a", final=1.85), run("b", attention="softmax", final=1.85)
    )


def test_a_run_that_breaks_is_said_in_words(run: MakeRun) -> None:
    folders = [run("a", broken_at=300), run("b", attention="softmax")]
    arms = arms_of(*folders)
    text = told(*folders)
    assert "Sigmoid ended without a finite validation loss (best on the way: " in text
    assert "Softmax is below the 2.480 of a bigram model of the same text, sigmoid is not below." in text
    assert "ends " not in text
    assert "sigmoid: train/loss became nan at step 300." in warnings(arms)
    assert "No difference between sigmoid and softmax is given: they cannot be compared yet." in warnings(arms)
    assert summary_rows(folders)[0]["minus softmax"] == "open"


def test_a_broken_seed_is_left_out_of_the_mean_and_told(run: MakeRun) -> None:
    folders = [
        run("a", seed=0, final=1.8),
        run("b", seed=1, broken_at=100),
        run("c", seed=0, attention="softmax"),
        run("d", seed=1, attention="softmax"),
    ]
    text = told(*folders)
    assert "for sigmoid (" in text
    assert "without one run, unfinished or not finite)" in text
    assert "the 2.480 of a bigram model of the same text, sigmoid is below in 1 of 2 runs." in text
    assert "sigmoid of seed 1: train/loss became nan at step 100." in warnings(arms_of(*folders))
    assert summary_rows(folders)[0]["below bigram"] == "1 of 2 seeds"


def test_an_unfinished_run_is_said_in_words(run: MakeRun) -> None:
    folders = [run("a", stop=250), run("b", attention="softmax")]
    assert "Sigmoid is unfinished and stands at a validation loss of" in told(*folders)
    assert "sigmoid is unfinished: 250 of 600 steps are recorded." in warnings(arms_of(*folders))
    assert summary_rows(folders)[0]["steps"] == "250 of 600"
    assert "above" not in told(*folders)


def test_missing_kinds_are_said(run: MakeRun) -> None:
    folder = run("a", without=("baseline", "val", "attn_norm"))
    assert "no validation loss on record" in told(folder)
    assert "sigmoid has no validation loss on record." in warnings(arms_of(folder))
    row = summary_rows([folder])[0]
    assert (row["below bigram"], row["first |A V|"]) == ("not recorded", "not recorded")
    without_baseline = run("b", without=("baseline",))
    assert "sigmoid has no bigram baseline on record." in warnings(arms_of(without_baseline))
    assert "bigram" not in told(without_baseline)


def test_a_baseline_of_another_unit_is_no_baseline(run: MakeRun) -> None:
    folder = run("a", without=("val/loss_bytes",))
    assert "bigram" not in told(folder)
    assert "sigmoid has no bigram baseline on record." in warnings(arms_of(folder))


def test_losses_of_two_units_are_not_subtracted(run: MakeRun) -> None:
    folders = [run("a", without=("val/loss_bytes",)), run("b", attention="softmax")]
    assert "Some losses are per byte and some per token." in warnings(arms_of(*folders))
    assert summary_rows(folders)[0]["minus softmax"] == "open"


def test_training_loss_is_drawn_in_the_unit_of_validation(run: MakeRun) -> None:
    plain, tokens = arms_of(run("a"), run("b", attention="softmax", bytes_per_token=3.0))
    assert plain.bytes_per_token == 1.0
    assert tokens.bytes_per_token == pytest.approx(3.0)
    assert tokens.train_losses[0].mean == pytest.approx(
        plain.train_losses[0].mean,
        abs=5 * math.sqrt(2) * 0.05,  # standard deviations of the difference
    )


def test_summary_rows_have_the_same_columns(seeds: Path) -> None:
    rows = summary_rows([seeds])
    assert len({tuple(row) for row in rows}) == 1
    assert [row["arm"] for row in rows] == ["sigmoid", "softmax", "sigmoid, sigmoid_bias=0.0"]
    assert rows[0]["final loss, nats per byte"] == "1.850 (1.840 to 1.860)"
    assert rows[0]["minus softmax"] == "+0.020 ± 0.006"
    assert [row["below bigram"] for row in rows] == ["yes", "yes", "no"]
    assert rows[0]["time"] == "2.0 min"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (84.4, "84.4"), (1234.0, "1234"), (0.0123, "0.0123"), (1e-9, "1.00e-09"), (math.nan, "nan")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number_text(value) == text
