"""The Triton kernels on a GPU: every option, shape and length inside the error budget; the same bits again; in graphs.

`python -m pytest tests/gpu/test_triton.py -n 14 --maxschedchunk 1`. FLASHSIGMOID_FUZZ_S is how many seconds each random
test goes on, FLASHSIGMOID_FUZZ_SEED what it printed when it failed. Speed is not measured here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import random
import secrets
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backends.test_planted_faults import FAULTS, SEQLEN, WINDOW, assert_every_fault_is_caught, show
from test_varlen import compute_packed, cumulated, draw_seed, oracle_and_witness, sequences
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashsigmoid import explain, sigmoid_attention, sigmoid_attention_varlen
from flashsigmoid.backends import triton as backend
from flashsigmoid.backends.philox import keep_mask
from flashsigmoid.functional import sigmoid_attention_shard
from flashsigmoid.testing import (
    Options,
    assert_within_budget,
    compute,
    errors_over_budget,
    make_qkv,
    oracle,
    witness,
)

# tests/gpu/conftest.py skips all of this without a GPU; the CPU is for trying the tests themselves, interpreted
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32)
BIASES = (None, 0.0, -math.inf, "()", "(h,)", "(b,h)", "(b,h,i)")
SLOPES = (None, "(h,)", "(b,h)")
HEADS = ((8, 8), (8, 2), (8, 1))
LAYOUTS = ("contiguous", "heads first", "packed heads", "off by one channel", "every other channel", "broadcast")
HEAD_DIMS = (8, 16, 32, 40, 59, 64, 72, 80, 96, 111, 128, 160, 192, 224, 256)


def lay_out(layout: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """q, k, v, dout of the same shapes in other strides, with NaN between the values; "broadcast" repeats some."""

    def strided(x: Tensor) -> Tensor:
        batch, seqlen, nheads, dim = x.shape
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "packed heads":
            return x.new_full((batch, seqlen, 3 * nheads, dim), math.nan)[:, :, nheads : 2 * nheads].copy_(x)
        if layout == "off by one channel":
            return x.new_full((batch, seqlen, nheads, dim + 8), math.nan)[..., 1 : dim + 1].copy_(x)
        if layout == "every other channel":
            return x.new_full((batch, seqlen, nheads, 2 * dim), math.nan)[..., ::2].copy_(x)
        assert layout in ("contiguous", "broadcast"), layout
        return x

    q, k, v, dout = (strided(x) for x in tensors)
    if layout == "broadcast":  # a shared prefix, and the gradient of a sum
        return q, k[:1].expand_as(k), v[:1].expand_as(v), dout[:1, :1, :1, :1].expand_as(dout)
    return q, k, v, dout


def check(
    what: object, tensors: tuple[Tensor, ...], options: Options, sigmoid: str = "auto", draws: int | None = None
) -> None:
    """Everything that a forward and a backward give, inside the budget."""
    q, k, v, dout = tensors
    # the one largest score or result decides the maximum, and a few draws may be lucky, of few rows the more;
    # those of float32, which add one term after the other, take longest and are furthest from the budget
    small = min(q.shape[1], k.shape[1])
    draws = draws or (32 if small < 16 else 4 if q.dtype == torch.float32 else 16 if small < 128 else 8)
    expected, seen = oracle(q, k, v, dout, **options), witness(q, k, v, dout, draws=draws, **options)
    given: dict[str, Any] = {**options, "sigmoid": sigmoid}
    for name, result in compute(q, k, v, dout, backend="triton", **given).items():
        assert_within_budget(f"{name} of {what}", result, expected[name], seen[name])


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call as plain data; `drop_at` is the origin of a call with dropout."""

    batch: int = 1
    seqlen_q: int = 113
    seqlen_k: int = 203
    heads: tuple[int, int] = (8, 2)
    head_dims: tuple[int, int] = (64, 64)
    dtype: torch.dtype = torch.bfloat16
    causal: bool = False
    window_size: tuple[int | None, int | None] = (None, None)
    bias: float | str | None = None
    slopes: str | None = None
    drop_at: tuple[int, int, int, int] | None = None
    q_offset: int | None = None
    sigmoid: str = "auto"
    layout: str = "contiguous"
    score_mean: float = 0.0
    score_std: float = 1.0

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))

    @property
    def is_legal(self) -> bool:
        """Whether the formula that was asked for is accurate there: tanh is where the weights that matter are large."""
        is_wide = self.score_std >= 3.0 and self.window_size == (None, None) and min(self.seqlen_q, self.seqlen_k) > 60
        has_large = self.score_mean == 0.0 and self.seqlen_q > 1
        return self.sigmoid != "fast" or (self.slopes is None and (has_large or is_wide))

    def pairs(self, names: tuple[str, ...]) -> set[tuple[str, Any, str, Any]]:
        values = [(name, getattr(self, name)) for name in names]
        return {(*a, *b) for a, b in itertools.combinations(values, 2)}

    def tensors(self, seed: int) -> tuple[Tensor, ...]:
        made = make_qkv(
            self.batch, self.seqlen_q, self.seqlen_k, *self.heads, *self.head_dims, dtype=self.dtype, device=DEVICE,
            seed=seed, score_std=self.score_std,
        )  # fmt: skip
        return lay_out(self.layout, made)

    def options(self, seed: int) -> Options:
        generator = torch.Generator().manual_seed(seed)
        nheads = self.heads[0]
        shapes: dict[Any, tuple[int, ...]] = {
            "()": (),
            "(h,)": (nheads,),
            "(b,h)": (self.batch, nheads),
            "(b,h,i)": (self.batch, nheads, self.seqlen_q),
        }
        options = Options(causal=self.causal, window_size=self.window_size)
        if isinstance(self.bias, str):
            bias = torch.randn(shapes[self.bias], generator=generator) - 4.0
            options["sigmoid_bias"] = (bias + self.score_mean).to(DEVICE)
        else:
            options["sigmoid_bias"] = self.score_mean + (-math.log(self.seqlen_k) if self.bias is None else self.bias)
        if self.slopes is not None:
            options["alibi_slopes"] = (torch.rand(shapes[self.slopes], generator=generator) * 0.2).to(DEVICE)
        if self.drop_at is not None:
            seed_tensor = torch.tensor([seed * 2**33 - 11], device=DEVICE)
            options |= Options(dropout_p=0.2, seed=seed_tensor, origin=self.drop_at)
        if self.q_offset is not None:
            options["q_offset"] = self.q_offset
        return options

    def check(self, seed: int) -> None:
        check(self, self.tensors(seed), self.options(seed), self.sigmoid)


# one row; less than, exactly and more than a block; several blocks and a bit
SEQLENS = (1, 63, 64, 65, 113, 203, 256, 400)
PAIRED: dict[str, tuple[Any, ...]] = {
    "dtype": DTYPES,
    "causal": (False, True),
    "window_size": ((None, None), (70, 30), (0, 0), (None, 5), (100, None)),
    "bias": BIASES,
    "slopes": SLOPES,
    "drop_at": (None, (0, 0, 0, 0), (3, 1, 5, 6)),
    "q_offset": (None, 0, -37, 150),
    "heads": HEADS,
    "sigmoid": ("auto", "exact", "fast"),
    "layout": LAYOUTS,
    "score_mean": (0.0, -4.0),
    "score_std": (1.0, 3.0),
}
NEVER = {("slopes", slopes, "sigmoid", "fast") for slopes in SLOPES if slopes is not None}
CASES = 150


def all_pairs() -> set[tuple[str, Any, str, Any]]:
    pairs = set()
    for (a, values), (b, others) in itertools.combinations(PAIRED.items(), 2):
        pairs |= {(a, x, b, y) for x in values for y in others}
    return pairs - NEVER


@functools.cache
def drawn() -> tuple[Case, ...]:
    """Of fifty random cases the one that has most new pairs; when all pairs are there, any."""
    rng = random.Random("triton")
    missing = all_pairs()

    def candidate() -> Case:
        while True:
            case = Case(
                batch=rng.choice((1, 2, 3)),
                seqlen_q=rng.choice(SEQLENS),
                seqlen_k=rng.choice(SEQLENS),
                head_dims=rng.choice(((64, 64), (128, 128), (40, 40), (64, 128), (96, 32), (59, 64))),
                **{name: rng.choice(values) for name, values in PAIRED.items()},
            )
            if case.is_legal:
                return case

    cases: list[Case] = []
    for _ in range(CASES):
        some = [candidate() for _ in range(50 if missing else 1)]
        cases.append(max(some, key=lambda case: len(case.pairs(tuple(PAIRED)) & missing)))
        missing -= cases[-1].pairs(tuple(PAIRED))
    return tuple(cases)


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


def time_is_left() -> Iterator[random.Random]:
    """Random generators, each of its own printed seed, until FLASHSIGMOID_FUZZ_S seconds are over."""
    seed = int(os.environ.get("FLASHSIGMOID_FUZZ_SEED", secrets.randbits(32)))
    end = time.monotonic() + float(os.environ.get("FLASHSIGMOID_FUZZ_S", "60"))
    print(f"FLASHSIGMOID_FUZZ_SEED={seed}")
    for count in itertools.count():
        yield random.Random(f"{seed} {count}")
        if time.monotonic() > end:
            print(f"{count + 1} rounds")
            return


def random_class(rng: random.Random, dtype: torch.dtype) -> dict[str, Any]:
    """What kernels are compiled for."""
    head_dim = rng.randint(1, 256)
    return {
        "dtype": dtype,
        "head_dims": (head_dim, rng.choice((head_dim, head_dim, rng.randint(1, 256)))),
        "causal": rng.random() < 0.5,
        "window_size": rng.choice(((None, None), (None, None), (rng.randint(0, 300), rng.choice((None, 9))))),
        "slopes": rng.choice(SLOPES),
        "sigmoid": rng.choice(("auto", "exact", "fast")),
        "drop_at": rng.choice((None, None, (1, 2, 3, rng.randint(0, 9)))),
    }


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


def packed_tensors(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], heads: tuple[int, int], head_dims: tuple[int, int],
    dtype: torch.dtype, spare: int = 0, seed: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """q, k, v, dout and `spare` rows of no sequence, which are NaN."""
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    made = make_qkv(1, total_q + spare, total_k + spare, *heads, *head_dims, dtype=dtype, device=DEVICE, seed=seed)
    tensors = tuple(x[0] for x in made)
    for x, used in zip(tensors, (total_q, total_k, total_k, total_q), strict=True):
        x[used:] = math.nan
    return tensors


def check_packed(
    what: object, tensors: tuple[Tensor, ...], lengths_q: tuple[int, ...], lengths_k: tuple[int, ...],
    options: Options, sigmoid: str = "auto",
) -> None:  # fmt: skip
    """As `check`, of packed sequences; dropout's seed is drawn as the call draws it."""
    q, k, v, dout = tensors
    cu = {"cu_seqlens_q": cumulated(lengths_q, DEVICE), "cu_seqlens_k": cumulated(lengths_k, DEVICE)}
    results = compute_packed(q, k, v, dout, seed=5, backend="triton", sigmoid=sigmoid, **cu, **options)
    if options.get("dropout_p"):
        options = options | Options(seed=draw_seed(5, DEVICE))
    draws = 32 if min((*lengths_q, *lengths_k)) < 16 else 16
    expected, seen = oracle_and_witness(q, k, v, dout, lengths_q, lengths_k, draws, options)
    for name, result in results.items():
        assert_within_budget(f"{name} of {what}", result, expected[name], seen[name])


def packed_sides(rng: random.Random, lengths_q: tuple[int, ...], rows: int, nheads: int) -> Options:
    generator = torch.Generator().manual_seed(rng.getrandbits(20))
    batch = len(lengths_q)
    options = Options(sigmoid_bias=rng.uniform(-7.0, 0.0))
    shape = rng.choice((None, (), (nheads,), (batch, nheads), (rows, nheads)))
    if shape is not None:
        options["sigmoid_bias"] = (torch.randn(shape, generator=generator) - 4.0).to(DEVICE)
    shape = rng.choice((None, (nheads,), (batch, nheads)))
    if shape is not None:
        options["alibi_slopes"] = (torch.rand(shape, generator=generator) * 0.1).to(DEVICE)
    return options


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_lengths_until_the_time_is_up(dtype) -> None:
    """A class of kernels, then four batches of sequences: short and long ones, empty ones, rows of none."""
    for rng in time_is_left():
        kernels = random_class(rng, dtype)
        batch, nheads_k, group = rng.randint(1, 9), rng.randint(1, 2), rng.randint(1, 3)
        for _ in range(4):
            lengths_q, lengths_k = (
                tuple(rng.choice((0, 1, rng.randint(2, 70), rng.randint(64, 400))) for _ in range(batch))
                for _ in range(2)
            )
            spare = rng.choice((0, 1, 150))
            options = packed_sides(rng, lengths_q, sum(lengths_q) + spare, nheads_k * group)
            options |= Options(causal=kernels["causal"], window_size=kernels["window_size"])
            if kernels["drop_at"] is not None:
                options["dropout_p"] = 0.2
            heads = (nheads_k * group, nheads_k)
            tensors = packed_tensors(
                lengths_q, lengths_k, heads, kernels["head_dims"], dtype, spare, rng.getrandbits(9)
            )
            sigmoid = "exact" if "alibi_slopes" in options and kernels["sigmoid"] == "fast" else kernels["sigmoid"]
            if sum(rows.stop - rows.start for _, rows, _ in sequences(lengths_q, lengths_k)) > 60:
                what = f"{lengths_q} by {lengths_k} and {spare}, {kernels}, {options}"
                check_packed(what, tensors, lengths_q, lengths_k, options, sigmoid)


LENGTHS = ((0, 1, 64, 65, 200, 0, 333, 128), (5, 1, 64, 190, 200, 0, 128, 257))


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
    """Not a bit of it, or where it is NaN no NaN: that may change which formula a warp takes."""
    lengths_q, lengths_k = (70, 50, 200), (200, 90, 120)
    tensors = packed_tensors(lengths_q, lengths_k, (2, 1), (head_dim, head_dim), dtype)
    bias = torch.randn(320, 2, device=DEVICE) - 6.0
    options = {"causal": True, "alibi_slopes": torch.rand(3, 2, device=DEVICE), "backend": "triton"}
    options |= {"cu_seqlens_q": cumulated(lengths_q, DEVICE), "cu_seqlens_k": cumulated(lengths_k, DEVICE)}
    clean = compute_packed(*tensors, sigmoid_bias=bias.clone(), **options)
    rows, keys = slice(70, 120), slice(200, 290)
    for x, part in zip((*tensors, bias), (rows, keys, keys, rows, rows), strict=True):
        x[part] = value
    dirty = compute_packed(*tensors, sigmoid_bias=bias, **options)
    where = {"out": rows, "dq": rows, "dk": keys, "dv": keys, "db": rows, "dslopes": slice(1, 2)}
    for name, result in dirty.items():
        assert (result[where[name]] != clean[name][where[name]]).any(), name
        for x in (result, clean[name]):
            x[where[name]] = 0.0
        if math.isnan(value):
            assert (result - clean[name]).norm() <= 1e-2 * clean[name].norm(), name
        else:
            assert torch.equal(result, clean[name]), name


@pytest.mark.parametrize("sigmoid_bias", [0.0, -5.0, -9.0])  # pairs, the wide and the narrow series
@pytest.mark.parametrize("sigmoid", ["auto", "exact", "fast"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_is_seen_by_those_who_see_it(dtype, sigmoid, sigmoid_bias) -> None:
    q, k, v, _ = make_qkv(1, 200, 200, 2, 2, 64, dtype=dtype, device=DEVICE)
    call: dict[str, Any] = {"causal": True, "sigmoid": sigmoid, "sigmoid_bias": sigmoid_bias, "backend": "triton"}
    clean = sigmoid_attention(q, k, v, **call)
    q[:, 77] = math.nan
    out = sigmoid_attention(q, k, v, **call)
    assert out[:, 77].isnan().all()
    assert out.isnan().sum() == out[:, 77].numel()
    q[:, 77] = 0.0
    clean = sigmoid_attention(q, k, v, **call)
    k[:, 101] = math.nan
    out = sigmoid_attention(q, k, v, **call)
    assert out[:, 101:].isnan().all()
    # rows beside those that see it may have taken another formula
    assert (out[:, :101] - clean[:, :101]).norm() <= 1e-2 * clean[:, :101].norm()


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """torch raises where the host would wait for the GPU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this mode does not see everything yet
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bias", [-5.0, "()", "(h,)", "(b,h)", "(t,h)"])
def test_packed_calls_never_wait_for_the_gpu(bias) -> None:
    q, k, v, dout = packed_tensors(*LENGTHS, (4, 2), (64, 64), torch.bfloat16)
    shapes = {"()": (), "(h,)": (4,), "(b,h)": (8, 4), "(t,h)": (q.shape[0], 4)}
    call: dict[str, Any] = {"sigmoid_bias": bias, "causal": True, "dropout_p": 0.1, "backend": "auto"}
    call |= {"cu_seqlens_q": cumulated(LENGTHS[0], DEVICE), "cu_seqlens_k": cumulated(LENGTHS[1], DEVICE)}
    leaves = [x.requires_grad_() for x in (q, k, v, torch.rand(4, device=DEVICE))]
    if isinstance(bias, str):
        call["sigmoid_bias"] = torch.zeros(shapes[bias], device=DEVICE, requires_grad=True)
        leaves.append(call["sigmoid_bias"])

    def step() -> tuple[Tensor, ...]:
        out = sigmoid_attention_varlen(*leaves[:3], alibi_slopes=leaves[3], **call)
        return torch.autograd.grad(out, leaves, dout)

    step()
    with no_synchronisation():
        grads = step()
    assert all(x.isfinite().all() for x in grads)


def test_dense_calls_never_wait_for_the_gpu() -> None:
    tensors = make_qkv(2, 130, 70, 4, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    options = {"causal": True, "dropout_p": 0.1, "backend": "auto"}
    leaves = [x.requires_grad_() for x in (*tensors[:3], torch.zeros(4, device=DEVICE), torch.rand(4, device=DEVICE))]

    def step() -> tuple[Tensor, ...]:
        out = sigmoid_attention(*leaves[:3], sigmoid_bias=leaves[3], alibi_slopes=leaves[4], **options)
        return torch.autograd.grad(out, leaves, tensors[3])

    step()
    with no_synchronisation():
        grads = step()
    assert all(x.isfinite().all() for x in grads)


# (batch, seqlen, nheads, strides of batch, seqlen, nheads, channels): the last element is beyond 2^31 of each
FAR = {
    "rows 2^19 apart": (1, 4200, 1, (2**31, 2**19, 256, 1)),
    "rows 2^25 apart": (1, 65, 1, (2**31, 2**25 + 2**20, 256, 1)),
    "sequences 2^31 apart": (2, 100, 2, (2**31 + 2**20, 1024, 256, 1)),
    "heads 2^31 apart": (1, 100, 2, (2**31, 256, 2**31 + 2**20, 1)),
    "channels 2^25 apart": (1, 100, 1, (2**31, 256, 2**20, 2**25 + 2**20)),
}


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


def captured(call) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of `call`, and its results' memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_replay_in_a_graph(dtype) -> None:
    """On new data, and with another seed of dropout, which is an input like any other."""
    q, k, v, dout = make_qkv(2, 300, 270, 4, 2, 64, dtype=dtype, device=DEVICE)
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(4, device=DEVICE))]
    seed = torch.tensor([5], device=DEVICE)

    def call() -> tuple[Tensor, ...]:
        out = sigmoid_attention_shard(
            *leaves[:3], sigmoid_bias=leaves[3], q_offset=-30, causal=True, dropout_p=0.2, seed=seed, backend="triton"
        )
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    graph, results = captured(call)
    before = [x.clone() for x in call()]
    with torch.no_grad():
        for x in (*leaves, dout):
            x.copy_(torch.randn_like(x))
        seed.fill_(2**50 + 1)
    graph.replay()
    for replayed, eager, old in zip(results, call(), before, strict=True):
        assert torch.equal(replayed, eager)
        assert not torch.equal(replayed, old)


def test_a_graph_replays_with_other_lengths() -> None:
    q, k, v, dout = packed_tensors(*LENGTHS, (4, 2), (64, 64), torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(4, device=DEVICE))]
    cu_q, cu_k = (cumulated(lengths, DEVICE) for lengths in LENGTHS)

    def call() -> tuple[Tensor, ...]:
        out = sigmoid_attention_varlen(
            *leaves[:3], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, sigmoid_bias=leaves[3], causal=True, backend="triton"
        )
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    graph, results = captured(call)
    cu_q.copy_(cumulated((300, 0, 1, 77, 5, 200, 0, 100), DEVICE))
    cu_k.copy_(cumulated((1, 3, 250, 77, 0, 300, 0, 100), DEVICE))
    graph.replay()
    for replayed, eager in zip(results, call(), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_with_inductor(dynamic, autocast) -> None:
    def call(q, k, v, bias, slopes):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = sigmoid_attention(
                q * 2, k, v, sigmoid_bias=bias, alibi_slopes=slopes, causal=True, window_size=(90, None)
            )
        return out.float().sin()

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for seqlen in (70, 130):
        q, k, v, dout = make_qkv(2, 150, seqlen, 4, 2, 64, device=DEVICE)
        leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(4, device=DEVICE), torch.rand(4, device=DEVICE))]
        results = []
        for function in (call, compiled):
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out, leaves, dout)))
        # bfloat16: inductor may round q * 2 once where eager rounds twice
        close = {"rtol": 2e-2, "atol": 2e-2} if autocast else {}
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, **close)


@pytest.mark.parametrize("dynamic", [False, True])
def test_packed_calls_compile_with_inductor(dynamic) -> None:
    def call(q, k, v, cu_seqlens_q, cu_seqlens_k, bias):
        return sigmoid_attention_varlen(
            q * 2, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, sigmoid_bias=bias, causal=True
        ).sin()

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for lengths_q, lengths_k in (((60, 0, 110), (90, 40, 50)), ((30, 80), (60, 80))):
        q, k, v, dout = packed_tensors(lengths_q, lengths_k, (4, 2), (64, 64), torch.float32)
        leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(sum(lengths_q), 4, device=DEVICE))]
        results = []
        for function in (call, compiled):
            out = function(*leaves[:3], cumulated(lengths_q, DEVICE), cumulated(lengths_k, DEVICE), leaves[3])
            results.append((out, *torch.autograd.grad(out, leaves, dout)))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)


def test_autocast_runs_in_bfloat16() -> None:
    q, k, v, dout = make_qkv(2, 50, 70, 4, 2, 64, device=DEVICE)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = sigmoid_attention(*leaves)
        cu_q, cu_k = cumulated((50, 50), DEVICE), cumulated((70, 70), DEVICE)
        flat = [x.flatten(0, 1) for x in leaves]
        packed = sigmoid_attention_varlen(*flat, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, sigmoid_bias=-math.log(70))
    assert out.dtype == packed.dtype == torch.bfloat16
    assert torch.equal(out, sigmoid_attention(*(x.bfloat16() for x in leaves), backend="triton"))
    assert [x.dtype for x in torch.autograd.grad(out, leaves, dout.bfloat16())] == [torch.float32] * 3


def test_activation_checkpointing_replays_dropout() -> None:
    q, k, v, dout = make_qkv(2, 150, 170, 4, 2, 64, dtype=torch.bfloat16, device=DEVICE)

    def call(q, k, v):
        return sigmoid_attention(q, k, v, dropout_p=0.5, backend="triton")

    grads = []
    for recompute in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.manual_seed(4)
        out = checkpoint(call, *leaves, use_reentrant=False) if recompute else call(*leaves)
        grads.append(torch.autograd.grad(out, leaves, dout))
    for plain, replayed in zip(*grads, strict=True):
        assert torch.equal(plain, replayed)


def arguments() -> list[tuple[Any, ...]]:
    """Arguments of flashsigmoid::fwd, dense and packed, that reach each optional tensor."""
    q, k, v, _ = make_qkv(2, 50, 70, 4, 2, 32, 48, device=DEVICE)
    leaf = [x.requires_grad_() for x in (q, k, v)]
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    ends = cumulated((30, 0, 70), DEVICE), cumulated((60, 5, 70), DEVICE)
    slopes, seed = torch.rand(4, device=DEVICE, requires_grad=True), torch.tensor([7], device=DEVICE)
    biases = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((2, 4, 50), (100, 4))]
    tail, sums = (((0, 0, 0, 0), "auto", None, None, needed, "triton") for needed in (False, True))
    return [
        (*leaf, None, None, None, None, None, -2.0, None, False, None, None, None, 0.0, *tail),
        (*leaf, biases[0], slopes, seed, None, None, None, 0.3, True, 30, 1, 0, 0.5, *sums),
        (*flat, biases[1], slopes, seed, *ends, None, 0.3, True, 30, 1, None, 0.5, *sums),
    ]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("index", range(3))
def test_opcheck(index) -> None:
    args = arguments()[index]
    torch.library.opcheck(torch.ops.flashsigmoid.fwd.default, args)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    dout = torch.randn(*args[0].shape[:-1], 48, device=DEVICE)
    torch.library.opcheck(torch.ops.flashsigmoid.bwd.default, (dout, *detached))


@pytest.mark.parametrize("seqlen", [2**14, 2**16, 2**18, 2**20])
def test_memory_is_that_of_inputs_and_results(seqlen, record_property) -> None:
    """Forward and backward of one head of 64 channels; a matrix of 2^20 x 2^20 weights would be 2 TiB."""
    q, k, v, dout = (torch.randn(1, seqlen, 1, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = sigmoid_attention(*leaves, causal=True, backend="triton")
    grads = torch.autograd.grad(out, leaves, dout)
    results = sum(x.nbytes for x in (out, *grads))
    peak = torch.cuda.max_memory_allocated() - before
    record_property("peak_bytes", {"value": peak, "seqlen": seqlen, "inputs": 4 * q.nbytes, "results": results})
    assert peak <= results + 64 * 2**20


def kernels_compiled() -> int:
    from flashsigmoid.backends.triton import launch

    kernels = (launch._fwd_kernel, launch._bwd_kernel)
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


@pytest.mark.parametrize("bias", [-9.0, "(h,)", "(b,h)", "(b,h,i)"])
@pytest.mark.parametrize(("dtype", "head_dim", "causal"), [(torch.bfloat16, 128, True), (torch.float16, 48, False)])
def test_three_kernels_are_compiled_for_a_class_of_problems(bias, dtype, head_dim, causal) -> None:
    """None for another batch, another length in the range of a tile, or another number in the range of a formula."""
    slopes = None if bias == -9.0 else "(h,)"
    before = kernels_compiled()
    seen = {}
    for batch, seqlen_q, seqlen_k, number in (
        (2, 1536, 1536, -9.0), (1, 1536, 1536, -9.0), (3, 1536, 1024, -9.5), (2, 2048, 2048, -9.0),
        (2, 1100, 1100, -9.0), (5, 1333, 777, -9.2), (1, 2999, 2000, -10.0),
    ):  # fmt: skip
        case = Case(
            batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads=(4, 2), head_dims=(head_dim, head_dim),
            dtype=dtype, causal=causal, bias=bias if isinstance(bias, str) else number, slopes=slopes,
        )  # fmt: skip
        compute(*case.tensors(0), backend="triton", **case.options(0))
        seen[batch, seqlen_q, seqlen_k] = kernels_compiled() - before
    assert set(seen.values()) <= {0, 3}, seen  # another test may have compiled them


def test_three_kernels_are_compiled_for_packed_problems() -> None:
    """Of five to eight sequences, since `locate` works on a power of two of them, and a total that takes one tile."""
    before = kernels_compiled()
    seen = {}
    for lengths in (LENGTHS[0], (150,) * 5, (1, 2, 3, 4, 500, 333), (1000, 0, 0, 0, 0, 0, 1)):
        tensors = packed_tensors(lengths, lengths, (4, 2), (64, 64), torch.bfloat16)
        cu = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), cumulated(lengths, DEVICE))
        options = {"sigmoid_bias": torch.randn(4, device=DEVICE), "window_size": (333, 3), "dropout_p": 0.1}
        options |= {"max_seqlen_q": 2000, "max_seqlen_k": 2000}
        compute_packed(*tensors, backend="triton", **cu, **options)
        seen[lengths] = kernels_compiled() - before
    assert set(seen.values()) <= {0, 3}, seen


def test_launches_that_are_known_are_told_apart() -> None:
    """One problem in other strides, from other addresses and with other dtypes beside it, three times over."""
    case = Case(batch=2, bias="(h,)", slopes="(h,)", causal=True)
    made, options = case.tensors(0), case.options(0)
    sides: list[dict[str, Any]] = [
        {name: x.to(dtype) for name, x in options.items() if isinstance(x, Tensor)} for dtype in DTYPES
    ]
    sides.append({name: x.new_empty(*x.shape, 2)[..., 0].copy_(x) for name, x in sides[-1].items()})
    sides.append(dict.fromkeys(sides[-1]))  # none: the whole call is known
    expected = [oracle(*made, **(options | side)) for side in sides]
    seen = [witness(*made, **(options | side)) for side in sides]
    for _ in range(3):
        for layout in ("contiguous", "heads first", "off by one channel", "every other channel"):
            tensors = lay_out(layout, made)
            for side, exact, near in zip(sides, expected, seen, strict=True):
                for name, result in compute(*tensors, backend="triton", **(options | side)).items():
                    if name in ("out", "dq", "dk", "dv") or result.dtype == torch.float32:
                        assert_within_budget(f"{name} of {layout}", result, exact[name], near[name])


def test_threads_of_their_own() -> None:
    """Each thread's first launch, forward and backward, is one with descriptors."""
    q, k, v, dout = make_qkv(2, 113, 203, 4, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    options = Options(causal=True)
    expected = compute(q, k, v, dout, backend="triton", **options)
    for _ in range(2):  # the threads of the second pool may have the identifiers of the first
        with ThreadPoolExecutor(6) as pool:
            calls = [pool.submit(compute, q, k, v, dout, backend="triton", **options) for _ in range(24)]
        for call, name in itertools.product(calls, expected):
            assert torch.equal(call.result()[name], expected[name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, and torch finds fewer")
def test_two_gpus_in_one_process() -> None:
    expected: dict[str, Tensor] = {}
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        tensors = make_qkv(2, 113, 203, 4, 2, 64, dtype=torch.bfloat16, device=device)
        for name, result in compute(*tensors, backend="triton", causal=True).items():
            assert result.device == torch.device(device)
            assert torch.equal(result.cpu(), expected.setdefault(name, result.cpu())), name


@pytest.mark.parametrize(
    ("dtype", "options", "formula"),
    [
        (torch.bfloat16, {}, "adaptive"),  # b = -log 1024
        (torch.bfloat16, {"sigmoid_bias": 0.0}, "adaptive: tanh.approx where a warp's scores are all within 7 of 0"),
        (torch.float16, {"sigmoid_bias": 0.0}, "exact: two weights share one reciprocal"),
        (torch.bfloat16, {"sigmoid": "exact"}, "exact: two weights share one reciprocal"),
        (torch.float16, {"sigmoid": "fast"}, "fast: tanh.approx"),
        (torch.float32, {"sigmoid": "fast"}, "exact: 1 / (1 + exp(-x)) in float32"),
    ],
)
def test_explain_names_triton_and_the_formula(dtype, options, formula) -> None:
    q, k, v, _ = make_qkv(1, 5, 1024, 2, 1, 64, dtype=dtype, device=DEVICE)
    chosen = explain(q, k, v, **options)
    assert (chosen.backend, set(chosen.reasons)) == ("triton", {"hopper", "blocked", "reference"})
    assert chosen.formula.startswith(formula)
    assert str(chosen).startswith(f"backend: triton\nformula: {formula}")


def test_explain_says_why_not_triton() -> None:
    q, k, v, _ = make_qkv(1, 5, 7, 2, 1, 64, dtype=torch.float64, device=DEVICE)
    chosen = explain(q, k, v)
    assert chosen.backend == "blocked"
    assert chosen.reasons["triton"] == "dtype must be float16, bfloat16 or float32, got float64"
    q, k, v, _ = make_qkv(1, 5, 7, 2, 1, 320, dtype=torch.bfloat16, device=DEVICE)
    assert explain(q, k, v).reasons["triton"].startswith("head_dim must be at most 256, got 320")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_planted_fault_is_caught_in_every_tensor(dtype, monkeypatch, record_property) -> None:
    tensors = make_qkv(1, SEQLEN, SEQLEN, 1, 1, 64, dtype=dtype, device=DEVICE)
    rows: dict[str, dict[str, float]] = {}
    for causal in (False, True):
        options = Options(
            causal=causal,
            window_size=(WINDOW if causal else None, None),
            sigmoid_bias=torch.full((1,), -math.log(SEQLEN), device=DEVICE),
            alibi_slopes=torch.tensor([2e-3], device=DEVICE),
        )
        expected, seen = oracle(*tensors, **options), witness(*tensors, draws=2, **options)

        def over_budget(options=options, expected=expected, seen=seen) -> dict[str, float]:
            actual = compute(*tensors, backend="triton", **options)
            return {name: max(errors_over_budget(x, expected[name], seen[name])) for name, x in actual.items()}

        rows["none, masked" if causal else "none"] = over_budget()
        for name, fault in FAULTS.items():
            if causal != (name == "mask off by one"):
                continue
            with monkeypatch.context() as patch:
                for method in ("forward", "backward"):
                    call = getattr(backend, method)
                    planted = lambda problem, *args, fault=fault, call=call: fault(problem, call, *args)  # noqa: E731
                    patch.setattr(backend, method, planted)
                rows[name] = over_budget()
    show("triton", dtype, rows)
    for fault, row in rows.items():
        for tensor, value in row.items():
            tags = {"backend": "triton", "fault": fault, "tensor": tensor, "dtype": str(dtype).removeprefix("torch.")}
            record_property("error_over_budget", {"value": value, **tags})
    assert_every_fault_is_caught(rows)


def test_the_sanitizer_finds_nothing() -> None:
    """compute-sanitizer's memcheck on every kernel: no byte beyond an allocation is read or written."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("needs compute-sanitizer on PATH or in /usr/local/cuda/bin, and finds none")
    script = Path(__file__).with_name("sanitize.py")
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    command += [sys.executable, str(script)]
    path = os.pathsep.join(filter(None, (str(script.parents[2]), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path}  # of a clone that is not installed
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=env)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
    assert done.stdout.count("\nok ") >= 12, done.stdout


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
