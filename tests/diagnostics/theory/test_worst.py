"""worst.py: the search finds more than chance, within the bounds, and what it finds grows with the ball."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from rounding import assert_rounded

from flashsigmoid.diagnostics.theory.regularity import (
    jacobian_bound,
    jacobian_norms,
    random_weights,
    softmax_jacobian_bound,
)
from flashsigmoid.diagnostics.theory.worst import growth_exponent, starts, worst_norms, worst_point


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_the_search_finds_more_than_chance_and_the_bound_holds_there(kind) -> None:
    weights = random_weights(3, 1, 3, -math.log(8))
    norm, x = worst_point(weights, 8, 3.0, kind, restarts=4, steps=60)
    assert x.norm(dim=-1).max() <= 3.0 * (1 + 1e-12)
    chance = jacobian_norms(starts(8, 3, 3.0, 240, seed=5), weights, kind)
    assert norm.value > 1.05 * float(chance.max())
    assert norm.value == pytest.approx(float(jacobian_norms(x[None], weights, kind)), rel=1e-7)
    if kind == "sigmoid":
        assert norm.value <= float(jacobian_bound(x, weights, "scores"))
    else:
        assert norm.value <= float(softmax_jacobian_bound(x, weights))


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_the_search_climbs_in_a_large_ball_too(kind) -> None:
    """Where weights saturate, and what matters is 1 / radius apart: a step of a share of the radius finds nothing."""
    weights, radii = random_weights(3, 1, 3, -math.log(8)), [4.0, 16.0, 32.0]
    norms = [norm.value for norm in worst_norms(weights, 8, radii, kind, restarts=6, steps=80)]
    chance = jacobian_norms(starts(8, 3, 32.0, 480, seed=5), weights, kind)
    assert norms[-1] > 1.5 * float(chance.max())
    assert min(growth_exponent(radii, norms)) > 1.5
    x = torch.full((8, 3), 32.0 / math.sqrt(3), dtype=torch.float64)
    bound = jacobian_bound(x, weights, "scores") if kind == "sigmoid" else softmax_jacobian_bound(x, weights)
    assert norms[-1] <= float(bound)


def test_starts_of_the_search_are_on_the_sphere_and_of_three_kinds() -> None:
    x = starts(6, 3, 5.0, 300)
    assert_rounded(x.norm(dim=-1), torch.full((300, 6), 5.0, dtype=torch.float64))
    apart = (x[:, :, None] - x[:, None]).norm(dim=-1).amax((1, 2))
    assert apart[0::3].min() > apart[2::3].min()
    assert apart[2::3].min() < 0.1  # six tokens that are nearly one
    assert torch.equal(starts(1, 3, 5.0, 4), starts(1, 3, 5.0, 4))


@pytest.mark.parametrize("kind", ["sigmoid", pytest.param("softmax", marks=pytest.mark.long)])
def test_the_worst_norm_grows_with_the_ball(kind) -> None:
    weights, radii = random_weights(3, 1, 3, -math.log(12)), [0.5, 1.0, 2.0, 4.0]
    norms = [norm.value for norm in worst_norms(weights, 12, radii, kind, restarts=6, steps=80)]
    assert all(b > a for a, b in itertools.pairwise(norms))
    assert norms[-1] > 8 * norms[0]


def test_growth_exponent() -> None:
    assert growth_exponent([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: worst_point(w, 4, 0.0), "radius must be positive, got 0.0"),
        (lambda w: worst_point(w, 4, 1.0, steps=0), "steps must be positive, got 0"),
        (lambda w: worst_norms(w, 4, [2.0, 1.0]), r"radii must ascend, got \[2.0, 1.0\]"),
        (lambda w: growth_exponent([1.0], [1.0]), "radii and norms must be as many, at least 2, got 1 and 1"),
    ],
)
def test_bad_arguments_are_one_clear_error(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(random_weights(2, 1, 2, 0.0))
