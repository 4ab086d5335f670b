"""Sums and largest weights against the explicit A."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_rounded

from flashsigmoid.backends.reference import attention_weights
from flashsigmoid.diagnostics import mass
from flashsigmoid.diagnostics.mass import mass_of_keys, mass_of_rows, top_weights
from flashsigmoid.testing import make_qkv

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (7, None)},
    "window of both sides": {"window_size": (5, 2)},
    "alibi": {"alibi_slopes": torch.linspace(0.01, 0.4, 8, dtype=torch.float64).reshape(2, 4), "scale": 0.7},
    "bias of heads": {"sigmoid_bias": torch.tensor([-5.0, -4.0, -3.0, -2.0], dtype=torch.float64)},
}
SIZES = [(30, 30), (9, 40), (40, 9)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SIZES)
def test_masses_are_the_sums_of_the_weights(options, seqlen_q, seqlen_k):
    q, k, _, _ = make_qkv(2, seqlen_q, seqlen_k, 4, 2, 16, dtype=torch.float64)
    a = attention_weights(q, k, **options)
    assert_rounded(mass_of_rows(q, k, **options), a.sum(-1))
    assert_rounded(mass_of_keys(q, k, **options), a.sum(-2))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("count", [1, 4, 9])
def test_the_largest_weights_are_those_of_the_whole(options, count, monkeypatch):
    monkeypatch.setattr(mass, "_BLOCK", 7)
    q, k, _, _ = make_qkv(2, 9, 40, 4, 2, 16, dtype=torch.float64)
    a = attention_weights(q, k, **options)
    values, keys = top_weights(q, k, count, **options)
    assert_rounded(values, a.topk(count).values)
    assert_rounded(a.gather(-1, keys), values)


def test_a_row_bias_has_row_masses_and_largest_weights_only():
    q, k, _, _ = make_qkv(2, 9, 40, 4, 2, 16, dtype=torch.float64)
    bias = torch.randn(2, 4, 9, dtype=torch.float64)
    a = attention_weights(q, k, sigmoid_bias=bias)
    assert_rounded(mass_of_rows(q, k, sigmoid_bias=bias), a.sum(-1))
    assert_rounded(top_weights(q, k, 3, sigmoid_bias=bias)[0], a.topk(3).values)
    with pytest.raises(ValueError, match="sigmoid_bias must have one value for all rows"):
        mass_of_keys(q, k, sigmoid_bias=bias)


@pytest.mark.parametrize("count", [0, 41, True, 2.0])
def test_a_count_out_of_range(count):
    q, k, _, _ = make_qkv(1, 1, 40, 1, 1, 16)
    with pytest.raises(ValueError, match="count must be an integer from 1 to seqlen_k = 40"):
        top_weights(q, k, count)


def test_a_planted_sink_has_the_mass():
    q, k, _, _ = make_qkv(1, 50, 50, 2, 2, 16)
    q, k[:, 0] = q + 1.0, 3.0  # all queries have a direction in common, which the first key points to
    assert (mass_of_keys(q, k, causal=True).argmax(-1) == 0).all()
