"""regularity.py: the equations are the modules', the bound holds, the power iteration is the SVD, softmax grows."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from rounding import assert_rounded
from torch import Tensor

from flashsigmoid import nn, sigmoid_attention
from flashsigmoid.diagnostics.theory.regularity import (
    Weights,
    attention,
    growth_exponent,
    jacobian_bound,
    jacobian_norms,
    operator_norm,
    random_weights,
    softmax_jacobian_bound,
    starts,
    weights_of,
    worst_norms,
    worst_point,
)
from flashsigmoid.studies.theory import BIASES, SHAPES


def random_cases(shape: tuple[int, int, int, int], bias: float | None, count: int, seed: int) -> tuple[Weights, Tensor]:
    """Weights, and inputs whose length runs from 0.1 to 30."""
    n, dim, nheads, head_dim = shape
    x = torch.randn(count, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    length = torch.logspace(-1, 1.5, count, dtype=torch.float64)[:, None, None]
    return random_weights(dim, nheads, head_dim, -math.log(n) if bias is None else bias, seed), length * x


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("bias", [None, -1.5])
def test_attention_is_our_module(kind, bias) -> None:
    make = nn.SigmoidAttention if kind == "sigmoid" else nn.SoftmaxAttention
    module = make(12, 4, nheads_k=2, head_dim=5, qk_norm=False, sigmoid_bias=bias).double()
    x = 3 * torch.randn(2, 7, 12, dtype=torch.float64)
    assert_rounded(attention(x, weights_of(module, 7), kind), module(x))


def test_weights_of_a_bias_per_head() -> None:
    module = nn.SigmoidAttention(8, 2, qk_norm=False, sigmoid_bias=-1.0, bias_mode="per_head").double()
    with torch.no_grad():
        module.sigmoid_bias.copy_(torch.tensor([-2.0, 1.0]))
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    assert_rounded(attention(x, weights_of(module, 4)), module(x))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bounds_hold_at_random_points(shape, bias) -> None:
    weights, x = random_cases(shape, bias, 25, 0)
    norms = jacobian_norms(x, weights)
    reals, scores = (jacobian_bound(x, weights, over) for over in ("reals", "scores"))
    assert (norms <= scores * (1 + 1e-12)).all()
    assert (scores <= reals * (1 + 1e-12)).all()
    assert (jacobian_norms(x, weights, "softmax") <= softmax_jacobian_bound(x, weights) * (1 + 1e-12)).all()


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_power_iteration_is_the_svd_of_the_full_jacobian(kind) -> None:
    for shape in SHAPES:
        weights, x = random_cases(shape, None, 3, 1)
        phi = functools.partial(attention, weights=weights, kind=kind)
        for one, exact in zip(x, jacobian_norms(x, weights, kind).tolist(), strict=True):
            found = operator_norm(phi, one)
            assert found.value == pytest.approx(exact, rel=1e-7)
            assert found.value <= exact * (1 + 1e-12)
            along = torch.func.jvp(phi, (one,), (found.direction,))[1]
            assert float(along.norm()) == pytest.approx(found.value, rel=1e-9)


def test_power_iteration_of_a_matrix_and_of_zero() -> None:
    matrix = torch.diag(torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64))
    found = operator_norm(lambda x: matrix @ x, torch.ones(3, dtype=torch.float64))
    assert found.value == pytest.approx(5.0, rel=1e-10)
    assert operator_norm(lambda x: 0.0 * x, torch.ones(3, dtype=torch.float64)).value == 0.0


def test_the_op_itself_has_the_norm_at_a_longer_n() -> None:
    """No Jacobian is formed: of 200 tokens of 8 channels it would have 2.6 million entries."""
    attend = functools.partial(sigmoid_attention, backend="reference")
    module = nn.SigmoidAttention(8, 2, qk_norm=False, attention_fn=attend).double()
    x = torch.randn(200, 8, dtype=torch.float64)
    weights = weights_of(module, 200)
    found = operator_norm(lambda one: module(one[None])[0], x, tol=1e-3)
    assert found.residual < 1e-3
    assert found.value == pytest.approx(operator_norm(lambda one: attention(one, weights), x, tol=1e-3).value, rel=1e-9)
    assert 0 < found.value < float(jacobian_bound(x, weights, "scores"))


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


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_the_worst_norm_grows_with_the_ball(kind) -> None:
    weights, radii = random_weights(3, 1, 3, -math.log(12)), [0.5, 1.0, 2.0, 4.0]
    norms = [norm.value for norm in worst_norms(weights, 12, radii, kind, restarts=6, steps=80)]
    assert all(b > a for a, b in itertools.pairwise(norms))
    assert norms[-1] > 8 * norms[0]


def test_the_bound_is_reached() -> None:
    """Equal short tokens under b = 0: every weight is 1/2, and so a bound that is 1 % lower does not hold."""
    weights, x = random_weights(1, 1, 1, 0.0), torch.full((1, 64, 1), 1e-3, dtype=torch.float64)
    norm, bound = float(jacobian_norms(x, weights)), float(jacobian_bound(x, weights, "scores"))
    assert 0.999 * bound < norm <= bound


@pytest.mark.parametrize("n", [5, 40, 200])
def test_equal_tokens_of_length_log_n_have_a_norm_of_n_log_n(n) -> None:
    """n (1 + log n) / 2 for one channel, all matrices 1 and b = -log n: exponential in R^2 = log n, unlike softmax."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    b = torch.full((1,), -math.log(n), dtype=torch.float64)
    weights = Weights(wq=one, wk=one, wv=one, wo=one, scale=1.0, sigmoid_bias=b)
    x = torch.full((n, 1), math.sqrt(math.log(n)), dtype=torch.float64)
    norms = {
        kind: operator_norm(functools.partial(attention, weights=weights, kind=kind), x).value
        for kind in ("sigmoid", "softmax")
    }
    assert norms["sigmoid"] == pytest.approx(n * (1 + math.log(n)) / 2, rel=1e-6)
    assert norms["softmax"] == pytest.approx(1.0, rel=1e-6)


def test_growth_exponent() -> None:
    assert growth_exponent([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: worst_point(w, 4, 0.0), "radius must be positive, got 0.0"),
        (lambda w: worst_point(w, 4, 1.0, steps=0), "steps must be positive, got 0"),
        (lambda w: worst_norms(w, 4, [2.0, 1.0]), r"radii must ascend, got \[2.0, 1.0\]"),
        (lambda w: jacobian_bound(torch.zeros(2, 2), w, "all"), "over must be 'reals' or 'scores', got 'all'"),
        (lambda w: operator_norm(torch.sin, torch.ones(1), max_steps=0), "max_steps must be at least 1, got 0"),
        (lambda w: operator_norm(torch.sin, torch.tensor([math.nan])), "x must be finite"),
        (lambda w: operator_norm(torch.sqrt, torch.zeros(1)), "the Jacobian must be finite"),
        (lambda w: growth_exponent([1.0], [1.0]), "radii and norms must be as many, at least 2, got 1 and 1"),
        (lambda w: weights_of(nn.SigmoidAttention(4, 2), 3), "module must be without qk_norm"),
        (lambda w: weights_of(nn.SigmoidAttention(4, 2, qk_norm=False, causal=True), 3), "without causal or window"),
        (
            lambda w: Weights(wq=w.wq, wk=w.wk, wv=w.wv, wo=w.wv[..., :1], scale=1.0, sigmoid_bias=w.sigmoid_bias),
            r"wo must be \(1, 2, 2\) beside wq",
        ),
    ],
)
def test_bad_arguments_are_one_clear_error(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(random_weights(2, 1, 2, 0.0))
