"""Permutation equivariance and sigma' <= 1/4, with what follows from it, of the op and of our modules."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import assert_rounded

from flashsigmoid import nn, sigmoid_attention
from flashsigmoid.testing import make_qkv

ARMS = {"sigmoid": nn.SigmoidAttention, "softmax": nn.SoftmaxAttention}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("arm", ARMS)
def test_attention_without_positions_is_permutation_equivariant(arm, seed) -> None:
    """phi(P X) = P phi(X)."""
    torch.manual_seed(seed)
    module = ARMS[arm](12, 4, nheads_k=2, gate=True).double()
    x, order = 2 * torch.randn(2, 9, 12, dtype=torch.float64), torch.randperm(9)
    assert_rounded(module(x[:, order]), module(x)[:, order])


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_positions_break_it(position) -> None:
    module = nn.SigmoidAttention(16, 2, position=position).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    assert not torch.allclose(module(x.roll(1, 1)), module(x).roll(1, 1), rtol=1e-3)


def test_the_slope_of_the_sigmoid_is_at_most_a_quarter_and_is_its_equation() -> None:
    s = torch.cat([torch.linspace(-40, 40, 8001, dtype=torch.float64), torch.zeros(1)]).requires_grad_()
    a = torch.sigmoid(s)
    (slope,) = torch.autograd.grad(a.sum(), s)
    assert_rounded(slope, a * (1 - a))
    assert slope.max() == slope[-1] == 0.25


@pytest.mark.parametrize("bias", [None, 0.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_gradients_of_the_op_are_bounded_by_it(bias, seed) -> None:
    """|dq_i| <= scale/4 sum_j |dO_i . v_j| |k_j|, and |db| <= 1/4 sum_ij |dO_i . v_j|."""
    q, k, v, dout = make_qkv(1, 7, 11, 1, 1, 8, dtype=torch.float64, seed=seed, score_std=3.0)
    b = torch.tensor(-math.log(11) if bias is None else bias, dtype=torch.float64, requires_grad=True)
    q.requires_grad_()
    out = sigmoid_attention(q, k, v, sigmoid_bias=b)
    dq, db = torch.autograd.grad(out, (q, b), dout)
    da = (dout[0, :, 0] @ v[0, :, 0].T).abs()
    assert (dq[0, :, 0].norm(dim=-1) <= 8**-0.5 / 4 * (da @ k[0, :, 0].norm(dim=-1))).all()
    assert db.abs() <= da.sum() / 4


@pytest.mark.parametrize("seed", range(5))
def test_outputs_move_by_at_most_a_quarter_of_what_scores_move(seed) -> None:
    """|out_i(s) - out_i(t)| <= 1/4 sum_j |s_ij - t_ij| |v_j|, at any distance."""
    q, k, v, _ = make_qkv(1, 5, 9, 1, 1, 8, dtype=torch.float64, seed=seed)
    other = q + 10.0 ** (seed - 3) * torch.randn_like(q)
    moved = (sigmoid_attention(q, k, v) - sigmoid_attention(other, k, v))[0, :, 0].norm(dim=-1)
    scores = ((q - other)[0, :, 0] @ k[0, :, 0].T).abs() * 8**-0.5
    assert (moved <= scores @ v[0, :, 0].norm(dim=-1) / 4 + 1e-14).all()
