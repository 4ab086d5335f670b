"""The Triton kernels on a GPU: packed sequences inside the error budget, none reaching another."""

from __future__ import annotations

import math

import pytest
import torch
from gpu.cases import DEVICE, DTYPES, HALF, time_is_left
from gpu.packed import LENGTHS, check_packed, check_random_lengths, packed_tensors
from varlen import compute_packed, cumulated, oracle_and_witness

from flashsigmoid.testing import Options, assert_within_budget, make_qkv, oracle, witness


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_lengths_until_the_time_is_up(dtype) -> None:
    for rng in time_is_left():
        check_random_lengths(rng, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["causal", "rows", "dropout", "wide"])
def test_sequences_of_different_lengths(dtype, kind) -> None:
    heads, head_dims, rows = (4, 2), (64, 64), sum(LENGTHS[0]) + 150
    if kind == "causal":
        options = Options(causal=True, sigmoid_bias=-5.0)
    elif kind == "rows":
        options = Options(window_size=(70, 20), sigmoid_bias=torch.randn(rows, 4, device=DEVICE) - 4.0)
        options["alibi_slopes"] = torch.rand(8, 4, device=DEVICE) * 0.1
    elif kind == "dropout":
        options = Options(sigmoid_bias=torch.randn(8, 4, device=DEVICE) - 4.0, dropout_p=0.2)
    else:
        heads, head_dims = (3, 1), (59, 128)
        options = Options(causal=True, sigmoid_bias=torch.tensor(-4.0, device=DEVICE))
        options["alibi_slopes"] = torch.rand(3, device=DEVICE) * 0.1
    tensors = packed_tensors(*LENGTHS, heads, head_dims, dtype, spare=150)
    check_packed(f"{kind}, {dtype}", tensors, *LENGTHS, options)


def test_thousands_of_sequences() -> None:
    """3,000 sequences of four tokens are a dense batch."""
    tensors = make_qkv(3000, 4, 4, 2, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    cu = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), cumulated((4,) * 3000, DEVICE))
    options = Options(sigmoid_bias=torch.randn(3000, 2, device=DEVICE) - 1.0, causal=True)
    results = compute_packed(*(x.flatten(0, 1) for x in tensors), backend="triton", **cu, **options)
    expected, seen = oracle(*tensors, **options), witness(*tensors, draws=2, **options)
    for name, result in results.items():
        assert_within_budget(name, result.view(expected[name].shape), expected[name], seen[name])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("value", [100.0, math.nan])
def test_one_sequence_does_not_reach_another(value, head_dim, dtype) -> None:
    """Not a bit of it, or where it is NaN no NaN: that may change which formula a warp takes, inside the budget."""
    lengths_q, lengths_k = (70, 50, 200), (200, 90, 120)
    tensors = packed_tensors(lengths_q, lengths_k, (2, 1), (head_dim, head_dim), dtype)
    bias = torch.randn(320, 2, device=DEVICE) - 6.0
    options = Options(causal=True, alibi_slopes=torch.rand(3, 2, device=DEVICE))
    call = {"cu_seqlens_q": cumulated(lengths_q, DEVICE), "cu_seqlens_k": cumulated(lengths_k, DEVICE)}
    clean = compute_packed(*tensors, sigmoid_bias=bias.clone(), backend="triton", **call, **options)
    given = options | Options(sigmoid_bias=bias.clone())
    exact, seen = oracle_and_witness(*tensors, lengths_q, lengths_k, 16, given) if math.isnan(value) else ({}, {})
    rows, keys = slice(70, 120), slice(200, 290)
    for x, part in zip((*tensors, bias), (rows, keys, keys, rows, rows), strict=True):
        x[part] = value
    dirty = compute_packed(*tensors, sigmoid_bias=bias, backend="triton", **call, **options)
    where = {"out": rows, "dq": rows, "dk": keys, "dv": keys, "db": rows, "dslopes": slice(1, 2)}
    for name, result in dirty.items():
        assert (result[where[name]] != clean[name][where[name]]).any(), name
        for x in (result, clean[name]):
            x[where[name]] = 0.0
        if math.isnan(value):
            exact[name][where[name]] = seen[name][:, where[name]] = 0.0
            assert_within_budget(name, result, exact[name], seen[name])
        else:
            assert torch.equal(result, clean[name]), name


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [((), ()), ((0,), (0,)), ((0, 0), (3, 2)), ((3, 2), (0, 0)), ((0, 2), (3, 0))]
)
@pytest.mark.parametrize("spare", [0, 200])
def test_empty_sequences_give_zeros_and_zero_gradients(lengths_q, lengths_k, spare) -> None:
    tensors = packed_tensors(lengths_q, lengths_k, (2, 1), (64, 64), torch.bfloat16, spare)
    cu = {"cu_seqlens_q": cumulated(lengths_q, DEVICE), "cu_seqlens_k": cumulated(lengths_k, DEVICE)}
    options = {"sigmoid_bias": torch.zeros(sum(lengths_q) + spare, 2, device=DEVICE), "causal": True}
    options["alibi_slopes"] = torch.ones(len(lengths_q), 2, device=DEVICE)
    assert not any(x.any() for x in compute_packed(*tensors, backend="triton", **cu, **options).values())
