"""The Triton kernels on a GPU: zeros, bits of dropout, the same bits again, NaN in its place."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from gpu.cases import DEVICE, DTYPES, Case
from gpu.packed import LENGTHS, packed_tensors
from varlen import compute_packed, cumulated

from flashsigmoid import sigmoid_attention
from flashsigmoid.backends.philox import keep_mask
from flashsigmoid.functional import sigmoid_attention_shard
from flashsigmoid.testing import Options, assert_within_budget, compute, make_qkv, oracle, witness


@pytest.mark.parametrize("sigmoid_bias", [0.0, -5.0, -9.0])  # pairs, the wide and the narrow series
@pytest.mark.parametrize("sigmoid", ["auto", "exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_is_seen_by_those_who_see_it(dtype, sigmoid, sigmoid_bias) -> None:
    q, k, v, dout = make_qkv(1, 200, 200, 2, 2, 64, dtype=dtype, device=DEVICE)
    options = Options(causal=True, sigmoid_bias=sigmoid_bias)
    call: dict[str, Any] = {**options, "sigmoid": sigmoid, "backend": "triton"}
    q[:, 77] = math.nan
    out = sigmoid_attention(q, k, v, **call)
    assert out[:, 77].isnan().all()
    assert out.isnan().sum() == out[:, 77].numel()
    q[:, 77] = 0.0
    clean = sigmoid_attention(q, k, v, **call)
    exact, seen = (f(q, k, v, dout, **options)["out"][..., :101, :, :] for f in (oracle, witness))
    k[:, 101] = math.nan
    out = sigmoid_attention(q, k, v, **call)
    assert out[:, 101:].isnan().all()
    if sigmoid == "fast" or dtype == torch.float32:  # one formula, which knows no other score
        assert torch.equal(out[:, :101], clean[:, :101])
    else:  # rows beside those that see it may have taken another formula
        assert_within_budget("out", out[:, :101], exact, seen)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_are_zero_with_zero_gradient(dtype) -> None:
    q, k, v, dout = make_qkv(2, 300, 70, 4, 2, 64, dtype=dtype, device=DEVICE)
    options = Options(causal=True, sigmoid_bias=torch.zeros(2, 4, 300, device=DEVICE))
    results = compute(q, k, v, dout, backend="triton", **options)
    assert not results["out"][:, :230].any()
    assert not results["dq"][:, :230].any()
    assert not results["db"][..., :230].any()
    assert results["out"][:, 230:].all()
    nothing = compute(q, k, v, dout, backend="triton", q_offset=-300, **options)
    assert not any(x.any() for x in nothing.values())


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty_sizes_give_zeros_and_zero_gradients(shape) -> None:
    tensors = make_qkv(*shape, 2, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    options = Options(causal=True, sigmoid_bias=torch.zeros(2, device=DEVICE))
    results = compute(*tensors, backend="triton", **options)
    assert results["out"].shape == (*shape[:2], 2, 64)
    assert [results[name].shape for name in ("dq", "dk", "dv", "db")] == [*(x.shape for x in tensors[:3]), (2,)]
    assert not any(x.any() for x in results.values())
    assert not sigmoid_attention(*tensors[:3], backend="triton").any()  # the default bias, and no log of 0


@pytest.mark.parametrize("origin", [(0, 0, 0, 0), (3, 1, 5, 8), (2, 0, 7, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_bits_are_the_references(origin, dtype) -> None:
    """Values that are a unit matrix show which of the weights, all of them one half, are kept."""
    rows = 150
    q, k = (torch.zeros(2, n, 3, 16, dtype=dtype, device=DEVICE) for n in (rows, 256))
    v = torch.eye(256, dtype=dtype, device=DEVICE)[None, :, None].expand(2, 256, 3, 256)
    for seed in (0, -7, 2**62 + 3):
        call = {"sigmoid_bias": 0.0, "q_offset": 0, "dropout_p": 0.5, "origin": origin, "backend": "triton"}
        out = sigmoid_attention_shard(q, k, v, seed=torch.tensor([seed], device=DEVICE), **call)
        kept = keep_mask(torch.tensor([seed]), 0.5, origin, (2, 3, rows, 256))
        assert torch.equal(out.cpu().transpose(1, 2), kept.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_strict", [False, True])
def test_the_same_bits_at_every_call(dtype, is_strict) -> None:
    case = Case(batch=2, seqlen_q=700, seqlen_k=900, dtype=dtype, causal=True, bias="(h,)", slopes="(h,)")
    tensors, options = case.tensors(0), case.options(0)
    packed = packed_tensors(*LENGTHS, (4, 2), (64, 64), dtype)
    cu = {"cu_seqlens_q": cumulated(LENGTHS[0], DEVICE), "cu_seqlens_k": cumulated(LENGTHS[1], DEVICE)}
    sides = {"sigmoid_bias": torch.zeros(4, device=DEVICE), "alibi_slopes": torch.rand(4, device=DEVICE)}
    torch.use_deterministic_algorithms(is_strict)
    try:
        results = [compute(*tensors, backend="triton", **options) for _ in range(3)]
        packed_results = [compute_packed(*packed, backend="triton", **cu, **sides) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for first, *others in (results, packed_results):
        for other, name in itertools.product(others, first):
            assert torch.equal(other[name], first[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(dtype, causal) -> None:
    case = Case(batch=3, seqlen_q=300, seqlen_k=333, dtype=dtype, causal=causal, slopes="(h,)")
    tensors, options = case.tensors(0), case.options(0)
    whole = compute(*tensors, backend="triton", **options)
    alone = compute(*(x[1:2] for x in tensors), backend="triton", **options)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(alone[name], whole[name][1:2]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_causal_prefix_does_not_see_the_future(dtype) -> None:
    q, k, v, _ = make_qkv(2, 300, 300, 2, 2, 64, dtype=dtype, device=DEVICE)
    call = {"sigmoid_bias": -4.0, "causal": True, "backend": "triton"}
    before = sigmoid_attention(q, k, v, **call)
    k[:, 170:], v[:, 170:] = 1e4, -1e4
    assert torch.equal(sigmoid_attention(q, k, v, **call)[:, :170], before[:, :170])
