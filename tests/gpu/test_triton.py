"""The Triton kernels on a GPU: every option, shape and length inside the error budget, and no fault.

`python -m pytest tests/gpu/test_triton.py -n 14 --maxschedchunk 1`; gpu/cases.py says how long the random tests go on.
Packed sequences, exact properties, torch's machinery and launches have files of their own. Speed is not measured here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from backends.test_planted_faults import assert_every_fault_is_caught, table_of_largest
from gpu.cases import (
    BIASES,
    CASES,
    DEVICE,
    DTYPES,
    HALF,
    HEADS,
    LAYOUTS,
    PAIRED,
    SEQLENS,
    Case,
    all_pairs,
    check,
    drawn,
    random_class,
    time_is_left,
)
from gpu.machine import assert_faults_are_caught
from torch import Tensor

from flashsigmoid.backends.reference import attention_weights
from flashsigmoid.diagnostics.mass import top_weights
from flashsigmoid.testing import (
    Options,
    assert_within_budget,
    compute,
    errors_over_budget,
    make_qkv,
    oracle,
    witness,
)

HEAD_DIMS = (8, 16, 32, 40, 59, 64, 72, 80, 96, 111, 128, 160, 192, 224, 256)


@pytest.mark.parametrize("index", range(CASES))
def test_drawn_cases(index: int) -> None:
    drawn()[index].check(index)


def test_drawn_cases_cover_every_pair_of_option_values() -> None:
    covered = set().union(*(case.pairs(tuple(PAIRED)) for case in drawn()))
    assert covered == all_pairs()
    assert {case.seqlen_q for case in drawn()} == {case.seqlen_k for case in drawn()} == set(SEQLENS)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_dim(head_dim, causal, dtype) -> None:
    for heads in HEADS:
        Case(head_dims=(head_dim, head_dim), dtype=dtype, causal=causal, heads=heads).check(seed=head_dim)


# a class of kernels, then the next one: workers compile different ones, and find them in the cache at the next shape
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(None, None), (50, 20)])
@pytest.mark.parametrize("slopes", [None, "(b,h)"])
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"),
    [(113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1024), (1023, 1024), (1024, 1023),
     (2048, 2048)],
)  # fmt: skip
def test_shapes_of_the_authors_own_test(dtype, head_dim, causal, window_size, slopes, seqlen_q, seqlen_k) -> None:
    """Theirs compares to an absolute tolerance: MHA, GQA and MQA, full, causal and local, ALiBi (docs/numerics.md)."""
    for heads in ((4, 4), (4, 2), (4, 1)):
        case = Case(
            seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads=heads, head_dims=(head_dim, head_dim), dtype=dtype,
            causal=causal, window_size=window_size, slopes=slopes,
        )  # fmt: skip
        check(case, case.tensors(seed=seqlen_q), case.options(seed=seqlen_k), draws=2 if seqlen_q > 512 else 8)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("seqlen", [1000, 4096])
def test_float32_is_float32_unless_tf32_is_asked_for(seqlen) -> None:
    case = Case(seqlen_q=333, seqlen_k=seqlen, heads=(2, 1), dtype=torch.float32)
    tensors, options = case.tensors(0), case.options(0)
    expected, seen = oracle(*tensors, **options), witness(*tensors, **options)
    exact = compute(*tensors, backend="triton", **options)
    with matmul_precision("high"):
        coarse = compute(*tensors, backend="triton", **options)
    again = compute(*tensors, backend="triton", **options)
    for name, result in exact.items():
        assert_within_budget(name, result, expected[name], seen[name])
        assert torch.equal(again[name], result), name
        assert max(errors_over_budget(coarse[name], expected[name], seen[name])) > 10.0, f"{name} is no tf32"
        # tf32 has as many bits as float16, but may drop the others where float16 rounds
        half = oracle(*(x.half().float() for x in tensors), **options)[name]
        errors = [(x - expected[name]).square().mean().sqrt() for x in (coarse[name], half)]
        assert errors[0] <= 10.0 * errors[1], name


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_problems_until_the_time_is_up(dtype) -> None:
    """A class of kernels, then eight problems of it."""
    for rng in time_is_left():
        kernels = random_class(rng, dtype)
        bias = rng.choice(BIASES)
        for _ in range(8):
            seqlen_q, seqlen_k = rng.randint(33, 700), rng.randint(33, 700)
            nheads_k, group = rng.randint(1, 3), rng.randint(1, 4)
            case = Case(
                batch=rng.randint(1, 3), seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads=(nheads_k * group, nheads_k),
                bias=bias if isinstance(bias, str) else rng.choice((None, 0.0, rng.uniform(-7.0, 0.0))),
                q_offset=rng.choice((None, 0, rng.randint(-seqlen_q // 4, seqlen_k // 2))),
                layout=rng.choice(LAYOUTS), score_std=rng.choice((1.0, 3.0)),
                **kernels,
            )  # fmt: skip
            if case.is_legal:
                case.check(rng.getrandbits(20))


# (batch, seqlen, nheads, strides of batch, seqlen, nheads, channels): the last element is beyond 2^31 of each
FAR = {
    "rows 2^19 apart": (1, 4200, 1, (2**31, 2**19, 256, 1)),
    "rows 2^25 apart": (1, 65, 1, (2**31, 2**25 + 2**20, 256, 1)),
    "sequences 2^31 apart": (2, 100, 2, (2**31 + 2**20, 1024, 256, 1)),
    "heads 2^31 apart": (1, 100, 2, (2**31, 256, 2**31 + 2**20, 1)),
    "channels 2^25 apart": (1, 100, 1, (2**31, 256, 2**20, 2**25 + 2**20)),
}


@pytest.mark.large(6)
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("name", FAR)
def test_elements_beyond_2_to_the_31(name, start) -> None:
    """Views into more than 4 GiB; one whose first element is odd cannot be loaded by descriptors."""
    batch, seqlen, nheads, strides = FAR[name]
    shape = (batch, seqlen, nheads, 64)
    span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    assert span > 2**31
    step = 4 if strides[3] > 1 else 64
    memory = torch.empty(span + 4 * step + 1, dtype=torch.float16, device=DEVICE)
    tensors = make_qkv(batch, seqlen, seqlen, nheads, nheads, 64, dtype=torch.float16, device=DEVICE)
    far = tuple(memory.as_strided(shape, strides, i * step + start).copy_(x) for i, x in enumerate(tensors))
    check(name, far, Options(causal=True), draws=1 if seqlen > 1000 else 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_planted_fault_is_caught_in_every_tensor(dtype, monkeypatch, record_property) -> None:
    assert_faults_are_caught("triton", dtype, monkeypatch, record_property, label="triton")


def by_matrix_units(q: Tensor, k: Tensor, exact: Tensor) -> Tensor:
    """The weights `exact`, of scores that are summed 16 features at a time and cut off at a float32's last bit.

    So do matrix units with inputs in 16 bits. Here it shows, for the weights themselves are not rounded to 16 bits.
    """
    q, k = q.double().transpose(1, 2), k.double().repeat_interleave(q.shape[2] // k.shape[2], dim=2).transpose(1, 2)
    total = torch.zeros_like(exact)
    for x, y in zip(q.split(16, dim=-1), k.split(16, dim=-1), strict=True):
        total += x @ y.mT
        near = total.float()
        cut = torch.where(near.double().abs() > total.abs(), near.nextafter(torch.zeros_like(near)), near)
        total = cut.double()
    return ((total - q @ k.mT) / math.sqrt(q.shape[-1]) + exact.logit()).float().sigmoid()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("count", [1, 7, 64, 150])
def test_the_largest_weights(dtype, head_dim, count) -> None:
    """Against the whole of A: the weights in the budget, the keys those that have them, equal ones in order."""
    for seqlen_q, seqlen_k, options in (
        (300, 300, {"causal": True}),
        (65, 1000, {"window_size": (200, 3), "sigmoid_bias": torch.randn(2, 4, 65, device=DEVICE)}),
        (1, 4097, {"causal": True, "alibi_slopes": torch.linspace(0.0, 0.1, 4, device=DEVICE)}),
    ):
        q, k, _, _ = make_qkv(2, seqlen_q, seqlen_k, 4, 2, head_dim, dtype=dtype, device=DEVICE)
        orders = [torch.randperm(head_dim, device=DEVICE) for _ in range(16)]
        exact = attention_weights(q.double(), k.double(), **options)
        if dtype == torch.float32:
            seen = [attention_weights(q[..., x], k[..., x], **options) for x in orders]
        else:
            seen = [by_matrix_units(q[..., x], k[..., x], exact) for x in orders]
        seen = [weights.topk(count).values for weights in seen]
        values, keys = top_weights(q, k, count, backend="triton", **options)
        largest, seen = exact.topk(count).values, torch.stack(seen)
        assert_within_budget("weights", values, largest, seen)
        assert_within_budget("keys", exact.gather(-1, keys.clamp(min=0)).where(keys >= 0, 0.0), largest, seen)
        assert (values.diff(dim=-1) <= 0).all()
        assert (keys.diff(dim=-1) > 0).logical_or(values.diff(dim=-1) < 0).logical_or(values[..., 1:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_planted_fault_is_caught_in_the_largest_weights(dtype, monkeypatch) -> None:
    assert_every_fault_is_caught(table_of_largest(monkeypatch, dtype, device=DEVICE), ("weights",))


def test_every_case_is_a_class_of_its_own() -> None:
    """`replace` of one field changes what is checked: no option is ignored by `Case`."""
    case = Case(batch=2, seqlen_q=33, seqlen_k=40)
    base = compute(*case.tensors(0), backend="triton", **case.options(0))["out"]
    for change in (
        {"causal": True}, {"window_size": (3, 3)}, {"bias": "(h,)"}, {"slopes": "(h,)"}, {"drop_at": (0, 0, 0, 0)},
        {"q_offset": 3, "causal": True}, {"score_mean": -4.0}, {"score_std": 3.0}, {"layout": "broadcast"},
    ):  # fmt: skip
        other = replace(case, **change)
        assert not torch.equal(compute(*other.tensors(0), backend="triton", **other.options(0))["out"], base), change
