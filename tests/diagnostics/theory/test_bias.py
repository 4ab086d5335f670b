"""bias.py: quadrature against closed forms, the best b against a scan, and a + c = 1."""

from __future__ import annotations

import math

import pytest
import torch

from flashsigmoid.diagnostics.theory import bias


@pytest.mark.parametrize("std", [0.0, 0.3, 1.0, 2.0])
def test_normal_mean_is_the_closed_form(std) -> None:
    assert bias.normal_mean(torch.exp, std) == pytest.approx(math.exp(std**2 / 2), rel=1e-13)
    assert bias.normal_mean(torch.square, std) == pytest.approx(std**2, rel=1e-13)
    assert bias.normal_mean(torch.sigmoid, std) == pytest.approx(0.5, rel=1e-13)


def test_normal_mean_is_what_draws_give() -> None:
    drawn = torch.sigmoid(bias.normal_scores(1000, 1.5, 1000) - 3.0)
    error = float(drawn.std()) / 1000
    assert abs(bias.normal_mean(lambda z: torch.sigmoid(z - 3.0), 1.5) - float(drawn.mean())) < 4 * error


@pytest.mark.parametrize(("n", "std"), [(2, 0.5), (16, 3.0), (300, 1.0)])
def test_no_b_of_a_wide_scan_is_closer(n, std) -> None:
    scores = bias.normal_scores(n, std, 20)
    best = bias.distance_to_softmax(scores, bias.closest_bias(scores))
    others = [bias.distance_to_softmax(scores, -15 + 0.005 * i) for i in range(3300)]
    assert best <= min(others)
    assert min(others) < 1.001 * best


def test_equal_scores_have_an_exact_answer() -> None:
    """softmax is 1 / n, and sigmoid(b) = 1 / n for b = -log(n - 1), whatever the scores are."""
    scores = torch.full((3, 50), 4.0, dtype=torch.float64)
    assert bias.closest_bias(scores) == pytest.approx(-math.log(49) - 4.0, abs=1e-5)
    assert bias.unit_mass_bias(50, 0.0) == pytest.approx(-math.log(49), abs=1e-10)


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_the_best_b_tends_to_the_normal_one(std) -> None:
    """And so is another than -log n, by s^2 / 2."""
    gaps = []
    for n in (64, 512, 4096):
        scores = bias.normal_scores(n, std, 200_000 // n)
        gaps.append(abs(bias.closest_bias(scores) - bias.normal_bias(n, std)))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.01 < std**2 / 2 - gaps[2]


@pytest.mark.parametrize("std", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("n", [2, 100, 10_000])
def test_unit_mass(n, std) -> None:
    b = bias.unit_mass_bias(n, std)
    assert n * bias.normal_mean(lambda z: torch.sigmoid(z + b), std) == pytest.approx(1.0, rel=1e-9)
    assert b >= bias.normal_bias(n, std)


@pytest.mark.parametrize(("a", "c"), [(0.0, 1.0), (0.5, 0.5), (0.25, 0.75), (0.0, 0.5), (0.5, 1.0), (-0.5, 1.5)])
def test_row_mass_grows_as_the_power_that_a_and_c_leave(a, c) -> None:
    for n in (10, 10**3, 10**6):
        low, high = bias.row_mass_bounds(n, a, c)
        assert low <= bias.scaled_row_mass(n, a, c) <= high * (1 + 1e-12)
    power = math.log(bias.scaled_row_mass(10**13, a, c) / bias.scaled_row_mass(10**12, a, c), 10)
    assert power == pytest.approx(1 - a - c, abs=1e-4)


def test_without_c_or_below_it_the_scores_do_not_matter() -> None:
    assert bias.scaled_row_mass(1000, 1.0, 0.0, 0.1) == pytest.approx(0.5, rel=1e-12)
    assert bias.scaled_row_mass(1000, 1.0, 0.0, 3.0) == pytest.approx(0.5, rel=1e-12)
    assert bias.scaled_row_mass(10**9, 1.0, -1.0, 3.0) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bias.log_n_bias(0), "n must be at least 1, got 0"),
        (lambda: bias.unit_mass_bias(1, 1.0), "n must be at least 2, got 1"),
        (lambda: bias.normal_bias(3, -1.0), "std must be a non-negative number, got -1.0"),
        (lambda: bias.normal_mean(torch.exp, math.nan), "std must be a non-negative number, got nan"),
        (lambda: bias.normal_scores(3, 1.0, 0), "rows must be at least 1, got 0"),
        (lambda: bias.closest_bias(torch.zeros(3)), r"scores must be \(rows, n\)"),
        (lambda: bias.closest_bias(torch.zeros(3, 1)), "scores must have at least 2 keys, got 1"),
        (lambda: bias.closest_bias(torch.full((1, 2), math.inf)), "scores must be finite"),
        (lambda: bias.row_mass_bounds(3, 1.0, 0.0), "c must be positive, got 0.0"),
    ],
)
def test_bad_arguments_are_one_clear_error(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
