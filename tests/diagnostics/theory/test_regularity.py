"""regularity.py: the equations are the modules', the bound holds, the power iteration is the SVD."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from rounding import assert_rounded
from torch import Tensor

from flashsigmoid import nn, sigmoid_attention
from flashsigmoid.diagnostics.theory.regularity import (
    Weights,
    attention,
    jacobian_bound,
    jacobian_norms,
    operator_norm,
    random_weights,
    softmax_jacobian_bound,
    weights_of,
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: jacobian_bound(torch.zeros(2, 2), w, "all"), "over must be 'reals' or 'scores', got 'all'"),
        (lambda w: operator_norm(torch.sin, torch.ones(1), max_steps=0), "max_steps must be at least 1, got 0"),
        (lambda w: operator_norm(torch.sin, torch.tensor([math.nan])), "x must be finite"),
        (lambda w: operator_norm(torch.sqrt, torch.zeros(1)), "the Jacobian must be finite"),
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
