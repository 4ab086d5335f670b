"""Sums and largest weights against the explicit A."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from backends.here import FUSED, IS_INTERPRETED, interpret_in_tiles
from rounding import assert_rounded

from flashsigmoid import sigmoid_attention_with_kvcache
from flashsigmoid.backends import BackendUnsupported
from flashsigmoid.backends.reference import attention_weights
from flashsigmoid.diagnostics import mass
from flashsigmoid.diagnostics.mass import mass_of_keys, mass_of_rows, top_weights
from flashsigmoid.diagnostics.weights import softmax_weights
from flashsigmoid.testing import assert_within_budget, make_qkv

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
@pytest.mark.parametrize("backend", FUSED)
def test_masses_come_out_of_the_fused_kernels(options, backend, monkeypatch):
    """Without a weight in memory: of the explicit A there is none."""
    interpret_in_tiles(monkeypatch, 16, 16)
    dtype = torch.float32
    options = {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    q, k, _, _ = make_qkv(2, 9, 40, 4, 2, 16, dtype=dtype)
    for bias in ({}, {"sigmoid_bias": torch.linspace(-5.0, -1.0, 72).reshape(2, 4, 9)}):
        given = {**options, **bias}
        a = attention_weights(q.double(), k.double(), **given)
        assert_rounded(mass_of_rows(q, k, backend=backend, **given), a.sum(-1).to(dtype))
        assert_rounded(mass_of_keys(q, k, backend=backend, **given), a.sum(-2).to(dtype))


@pytest.mark.parametrize("backend", FUSED)
def test_row_masses_of_a_cache(backend):
    """Values of one for every key, without memory of their own; pages, and a sequence without keys."""
    lengths, pages, table = torch.tensor([0, 5, 61]), torch.randn(12, 16, 2, 16), torch.randperm(12).reshape(3, 4)
    q, ones = torch.randn(3, 2, 4, 16), torch.ones(()).expand(*pages.shape[:3], 1)
    options = {"sigmoid_bias": -3.0, "window_size": (40, None), "alibi_slopes": torch.tensor([0.3, 0.2, 0.1, 0.0])}
    mass = sigmoid_attention_with_kvcache(
        q, pages, ones, cache_seqlens=lengths, page_table=table, backend=backend, **options
    )
    for s, length in enumerate(lengths.tolist()):
        k = pages[table[s]].flatten(0, 1)[None, :length]
        a = attention_weights(q[s : s + 1].double(), k.double(), causal=True, **options)
        assert_rounded(mass[s, ..., 0].mT, a[0].sum(-1).float())


BACKENDS = ["blocked", *["triton"] * IS_INTERPRETED]


def assert_largest(found, exact, witness):
    """Every row's largest weights in order, of the keys that have them, and no key twice; -1 for weights of 0."""
    values, keys = found
    count = keys.shape[-1]
    largest = exact.topk(count)
    assert_within_budget("weights", values, largest.values, torch.stack([x.topk(count).values for x in witness]))
    assert torch.equal(keys == -1, values == 0)
    assert (values.diff(dim=-1) <= 0).all()
    at = exact.gather(-1, keys.clamp(min=0)).where(keys >= 0, 0.0)
    assert_within_budget("keys", at, largest.values, torch.stack([x.topk(count).values for x in witness]))
    times = torch.zeros(exact.shape, dtype=torch.int64).scatter_add(-1, keys.clamp(min=0), (keys >= 0).long())
    assert times.max() <= 1


def weights_of(q, k, **options):
    """In float64, and in float32 four times, each with the sums of its scores in another order."""
    orders = [torch.randperm(q.shape[-1]) for _ in range(4)]
    return attention_weights(q.double(), k.double(), **options), [
        attention_weights(q[..., order].float(), k[..., order].float(), **options) for order in orders
    ]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("count", [1, 4, 9, 70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_weights_are_those_of_the_whole(options, count, backend, monkeypatch):
    """Also of more than a launch finds, and of fewer visible keys than were asked for."""
    monkeypatch.setattr(mass, "_BLOCK", 7)
    q, k, _, _ = make_qkv(2, 9, 80, 4, 2, 16, dtype=torch.float32)
    exact, witness = weights_of(q, k, **options)
    assert_largest(top_weights(q, k, count, backend=backend, **options), exact, witness)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "head_dim"), [(70, 70, 40), (40, 9, 16), (33, 130, 64), (1, 1, 8)])
def test_the_largest_weights_of_odd_sizes(backend, seqlen_q, seqlen_k, head_dim):
    """Rows that see nothing (40 queries, 9 keys), short last blocks, rows that do not lie in order."""
    q, k, _, _ = make_qkv(1, seqlen_q, seqlen_k, 2, 1, head_dim, dtype=torch.float16)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    exact, witness = weights_of(q, k, causal=True)
    found = top_weights(q, k, min(5, seqlen_k), causal=True, backend=backend)
    assert found[0].dtype == torch.float32
    assert_largest(found, exact, witness)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_weights_the_earlier_key_comes_first(backend, monkeypatch):
    monkeypatch.setattr(mass, "_BLOCK", 7)
    q, k = torch.randn(1, 3, 1, 16), torch.randn(1, 4, 1, 16).repeat(1, 30, 1, 1)
    values, keys = top_weights(q, k, 120, backend=backend)
    assert (values.diff(dim=-1) <= 0).all()
    for row, where in zip(values[0, 0], keys[0, 0], strict=True):
        for value in row.unique():
            same = where[row == value]
            assert torch.equal(same, same.sort().values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_zero_have_no_key_and_nan_comes_first(backend):
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 6, 1, 16)
    values, keys = top_weights(q, k, 6, sigmoid_bias=-math.inf, backend=backend)
    assert (values == 0).all()
    assert (keys == -1).all()
    k[0, 4] = math.nan
    values, keys = top_weights(q, k, 2, backend=backend)
    assert values[..., 0].isnan().all()
    assert not values[..., 1].isnan().any()
    assert (keys[..., 0] == 4).all()


def test_who_finds_the_largest_weights():
    q, k, _, _ = make_qkv(1, 2, 3, 1, 1, 16, dtype=torch.float64)
    with pytest.raises(BackendUnsupported, match="triton: dtype must be float16, bfloat16 or float32, got float64"):
        top_weights(q, k, 1, backend="triton")
    with pytest.raises(ValueError, match="backend must be 'auto', 'triton' or 'blocked', got 'hopper'"):
        top_weights(q, k, 1, backend="hopper")


def test_a_bias_of_rows(monkeypatch):
    monkeypatch.setattr(mass, "_BLOCK", 7)
    q, k, _, _ = make_qkv(2, 9, 40, 4, 2, 16, dtype=torch.float64)
    options = {"sigmoid_bias": torch.randn(2, 4, 9, dtype=torch.float64), **OPTIONS["alibi"], "causal": True}
    a = attention_weights(q, k, **options)
    assert_rounded(mass_of_rows(q, k, **options), a.sum(-1))
    with torch.no_grad():
        assert_rounded(mass_of_keys(q, k, **options), a.sum(-2))
    assert_rounded(top_weights(q, k, 3, **options)[0], a.topk(3).values)


def test_the_largest_weights_are_found_block_by_block(monkeypatch):
    """Also of many queries: A as a whole is what does not fit."""
    seen, weights = [], mass.weights
    monkeypatch.setattr(mass, "_BLOCK", 16)
    monkeypatch.setattr(mass, "weights", lambda *x, **y: seen.append(weights(*x, **y)) or seen[-1])
    q, k, _, _ = make_qkv(1, 70, 70, 2, 1, 16, dtype=torch.float64)
    values, _ = top_weights(q, k, 5, causal=True)
    assert max(a.shape[2] * a.shape[3] for a in seen) <= 16 * 16
    assert_rounded(values, attention_weights(q, k, causal=True).topk(5).values)


@pytest.mark.parametrize("count", [0, 41, True, 2.0])
def test_a_count_out_of_range(count):
    q, k, _, _ = make_qkv(1, 1, 40, 1, 1, 16)
    with pytest.raises(ValueError, match="count must be an integer from 1 to seqlen_k = 40"):
        top_weights(q, k, count)


def test_a_planted_sink_has_the_mass():
    q, k, _, _ = make_qkv(1, 50, 50, 2, 2, 16)
    q, k[:, 0] = q + 1.0, 3.0  # all queries have a direction in common, which the first key points to
    assert (mass_of_keys(q, k, causal=True).argmax(-1) == 0).all()


@pytest.mark.parametrize(
    "look", [attention_weights, softmax_weights, mass_of_rows, mass_of_keys, functools.partial(top_weights, count=1)]
)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": (-3, None)}, r"window_size must be non-negative integers, .*, got \(-3, None\)"),
        ({"scale": math.nan}, "scale must be finite, got nan"),
        ({"alibi_slopes": torch.ones(1)}, r"alibi_slopes must have shape .*, got \(1,\)"),
        ({"causal": 1}, "causal must be True or False, got 1"),
    ],
)
def test_what_looks_at_attention_takes_what_attention_takes(look, options, message) -> None:
    q, k, _, _ = make_qkv(2, 5, 7, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        look(q, k, **options)
