"""Packed sequences: every backend against the dense oracle of each sequence, inside the one error budget.

The drawn cases let every value of every option meet every other. Tiles of the interpreter are small in half of them, so
that a short sequence has several.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from backends.here import NAMES, can, interpret_in_tiles
from rounding import assert_rounded
from torch import Tensor
from varlen import (
    Lengths,
    compute_packed,
    cumulated,
    draw_seed,
    oracle_and_witness,
    packed_problem,
    sample,
    sequences,
)

from flashsigmoid import BackendUnsupported, sigmoid_attention, sigmoid_attention_varlen
from flashsigmoid.functional import sigmoid_attention_shard
from flashsigmoid.testing import Options, assert_within_budget, make_qkv

# (queries, keys) of every sequence
LENGTHS: dict[str, tuple[Lengths, Lengths]] = {
    "one": ((37,), (37,)),
    "one token each": ((1,) * 5, (1,) * 5),
    "one query each": ((1, 1, 1), (40, 3, 17)),
    "some empty": ((0, 17, 5, 0, 9), (9, 0, 33, 0, 9)),
    "more keys": ((5, 16, 21), (20, 40, 23)),
    "more queries": ((33, 12, 18), (7, 12, 1)),
    "edges of tiles": ((16, 32, 17, 31), (32, 16, 15, 33)),
}
OPTIONS: dict[str, tuple[Any, ...]] = {
    "lengths": tuple(LENGTHS),
    "spare": ((0, 0), (5, 0), (0, 3), (40, 35)),  # rows and keys of no sequence; less and more than a tile
    "heads": ((2, 2), (4, 2), (3, 1)),
    "head_dims": ((16, 16), (8, 24), (24, 7), (32, 32)),
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "causal": (False, True),
    "window_size": ((None, None), (7, 3), (0, 0), (None, 5), (20, None)),
    "bias": (-2.5, 0.0, -math.inf, "()", "(h,)", "(b,h)", "(t,h)"),
    "slopes": (None, "(h,)", "(b,h)"),
    "dropout_p": (0.0, 0.2),
    "scale": (None, 0.3),
    "sigmoid": ("auto", "exact", "fast"),
    "max_seqlen": ("absent", "exact", "too small", "too large"),
    "has_small_tiles": (True, False),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    lengths: str
    spare: tuple[int, int]
    heads: tuple[int, int]
    head_dims: tuple[int, int]
    dtype: torch.dtype
    causal: bool
    window_size: tuple[int | None, int | None]
    bias: float | str
    slopes: str | None
    dropout_p: float
    scale: float | None
    sigmoid: str
    max_seqlen: str
    has_small_tiles: bool

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    def pairs(self) -> set[tuple[str, Any, str, Any]]:
        values = [(name, getattr(self, name)) for name in OPTIONS]
        return {(*a, *b) for a, b in itertools.combinations(values, 2)}

    def tensors(self, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout; rows of no sequence hold NaN, which nothing may read."""
        lengths_q, lengths_k = LENGTHS[self.lengths]
        total_q, total_k = sum(lengths_q) + self.spare[0], sum(lengths_k) + self.spare[1]
        made = make_qkv(1, total_q, total_k, *self.heads, *self.head_dims, dtype=self.dtype, seed=seed)
        q, k, v, dout = (x[0] for x in made)
        for x, used in ((q, sum(lengths_q)), (k, sum(lengths_k)), (v, sum(lengths_k)), (dout, sum(lengths_q))):
            x[used:] = math.nan
        return q, k, v, dout

    def options(self, seed: int) -> Options:
        generator = torch.Generator().manual_seed(seed)
        side = torch.float64 if self.dtype == torch.float64 else torch.float32
        lengths_q, nheads = LENGTHS[self.lengths][0], self.heads[0]
        shapes: dict[Any, tuple[int, ...]] = {
            "()": (),
            "(h,)": (nheads,),
            "(b,h)": (len(lengths_q), nheads),
            "(t,h)": (sum(lengths_q) + self.spare[0], nheads),
        }
        options = Options(causal=self.causal, window_size=self.window_size)
        if isinstance(self.bias, str):
            options["sigmoid_bias"] = torch.randn(shapes[self.bias], generator=generator, dtype=side) - 3.0
        else:
            options["sigmoid_bias"] = self.bias
        if self.slopes is not None:
            options["alibi_slopes"] = torch.rand(shapes[self.slopes], generator=generator, dtype=side) * 0.2
        if self.dropout_p:
            options["dropout_p"] = self.dropout_p
        if self.scale is not None:
            options["scale"] = self.scale
        return options

    def max_seqlens(self) -> dict[str, int]:
        if self.max_seqlen == "absent":
            return {}
        longest = {"max_seqlen_q": max(LENGTHS[self.lengths][0]), "max_seqlen_k": max(LENGTHS[self.lengths][1])}
        change = {"exact": lambda n: n, "too small": lambda n: n // 3, "too large": lambda n: 1000 * n}[self.max_seqlen]
        return {name: change(n) for name, n in longest.items()}


@functools.cache
def drawn() -> tuple[Case, ...]:
    """Of a hundred random cases the one that has most new pairs, until all pairs are there."""
    rng = random.Random("packed")
    missing = set()
    for (a, values), (b, others) in itertools.combinations(OPTIONS.items(), 2):
        missing |= {(a, x, b, y) for x in values for y in others}
    cases: list[Case] = []
    while missing:
        some = [Case(**{name: rng.choice(values) for name, values in OPTIONS.items()}) for _ in range(100)]
        cases.append(max(some, key=lambda case: len(case.pairs() & missing)))
        missing -= cases[-1].pairs()
    return tuple(cases)


@pytest.mark.parametrize("index", range(len(drawn())))
def test_drawn_cases_cover_every_pair_inside_the_budget(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = drawn()[index]
    if case.has_small_tiles:
        interpret_in_tiles(monkeypatch, 16, 32 if index % 2 else 16, has_descriptors=index % 3 > 0)
    lengths_q, lengths_k = LENGTHS[case.lengths]
    tensors, options = case.tensors(index), case.options(index)
    given: dict[str, Any] = {**options, "cu_seqlens_q": cumulated(lengths_q), "cu_seqlens_k": cumulated(lengths_k)}
    given |= {"seed": index, "sigmoid": case.sigmoid, **case.max_seqlens()}
    if case.dropout_p:
        options["seed"] = draw_seed(index)
    draws = 8 if case.dtype == torch.float32 else 2
    expected, seen = oracle_and_witness(*tensors, lengths_q, lengths_k, draws, options)
    for backend in NAMES:
        if not can(backend, packed_problem(*tensors[:3], given["cu_seqlens_q"])):
            continue
        actual = compute_packed(*tensors, backend=backend, **given)
        assert actual.keys() == expected.keys() == seen.keys()
        for name, result in actual.items():
            assert_within_budget(f"{backend} {name} of {case}", result, expected[name], seen[name])
        used_q, used_k = sum(lengths_q), sum(lengths_k)
        for name, used in (("out", used_q), ("dq", used_q), ("dk", used_k), ("dv", used_k)):
            assert not actual[name][used:].any(), f"{backend} {name} must be zero behind the last sequence: {case}"


@pytest.mark.parametrize("backend", NAMES)
def test_many_sequences_of_a_few_tokens(backend, monkeypatch) -> None:
    """33 is one more than a power of two; a third are empty of queries, of keys or of both."""
    interpret_in_tiles(monkeypatch, 16, 16)
    rng = random.Random(0)
    lengths_q, lengths_k = (tuple(rng.choice((0, 1, 2, 5)) for _ in range(33)) for _ in range(2))
    made = make_qkv(1, sum(lengths_q), sum(lengths_k), 1, 1, 8)
    q, k, v, dout = (x[0] for x in made)
    options = Options(sigmoid_bias=torch.randn(33, 1) - 1.0, causal=True)
    expected, seen = oracle_and_witness(q, k, v, dout, lengths_q, lengths_k, 8, options)
    cu = {"cu_seqlens_q": cumulated(lengths_q), "cu_seqlens_k": cumulated(lengths_k)}
    for name, result in compute_packed(q, k, v, dout, backend=backend, **cu, **options).items():
        assert_within_budget(name, result, expected[name], seen[name])


@pytest.mark.parametrize("backend", NAMES)
def test_dropout_keeps_what_dense_shards_keep(backend) -> None:
    """Values that are a unit matrix show the weights themselves."""
    lengths_q, lengths_k = (7, 3, 10), (16, 5, 13)
    q, k = torch.zeros(20, 2, 8), torch.zeros(34, 2, 8)
    v = torch.cat([torch.eye(16)[:n] for n in lengths_k])[:, None].expand(34, 2, 16)
    cu = {"cu_seqlens_q": cumulated(lengths_q), "cu_seqlens_k": cumulated(lengths_k)}
    call = {"sigmoid_bias": 0.0, "dropout_p": 0.5}
    seed = draw_seed(5)
    torch.manual_seed(5)
    out = sigmoid_attention_varlen(q, k, v, **cu, **call, backend=backend)
    assert set(out.unique().tolist()) == {0.0, 1.0}
    for index, rows, keys in sequences(lengths_q, lengths_k):
        dense = q[None, rows], k[None, keys], v[None, keys]
        alone = sigmoid_attention_shard(*dense, **call, q_offset=0, origin=(index, 0, 0, 0), seed=seed)
        assert torch.equal(out[rows], alone[0])


@pytest.mark.parametrize("backend", NAMES)
def test_sequences_of_one_length_are_a_dense_batch(backend) -> None:
    tensors = make_qkv(3, 10, 14, 4, 2, 8)
    call = {"sigmoid_bias": -2.0, "causal": True, "backend": backend}
    leaves = [x.requires_grad_() for x in tensors[:3]]
    dense = sigmoid_attention(*leaves, **call)
    cu = {"cu_seqlens_q": cumulated((10,) * 3), "cu_seqlens_k": cumulated((14,) * 3)}
    out = sigmoid_attention_varlen(*(x.flatten(0, 1) for x in leaves), **cu, **call).unflatten(0, (3, 10))
    assert out.is_contiguous()
    grads = [torch.autograd.grad(x, leaves, tensors[3]) for x in (out, dense)]
    for name, packed, alone in zip(("out", "dq", "dk", "dv"), (out, *grads[0]), (dense, *grads[1]), strict=True):
        assert_rounded(packed, alone, name=name)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("bias", ["-1.0", "(h,)", "(b,h)", "(t,h)"])
def test_rows_behind_the_last_sequence_are_zero_with_zero_gradient(backend, bias, monkeypatch) -> None:
    """More of them than a tile, and NaN in every input."""
    interpret_in_tiles(monkeypatch, 16, 16)
    lengths_q, lengths_k = (6, 0, 11), (9, 4, 5)
    tensors = [x[0] for x in make_qkv(1, 17 + 35, 18 + 40, 4, 2, 8, 6)]
    for x, used in zip(tensors, (17, 18, 18, 17), strict=True):
        x[used:] = math.nan
    options: dict[str, Any] = {"sigmoid_bias": -1.0, "alibi_slopes": torch.rand(3, 4)}
    if bias != "-1.0":
        options["sigmoid_bias"] = torch.randn({"(h,)": (4,), "(b,h)": (3, 4), "(t,h)": (52, 4)}[bias])
    if bias == "(t,h)":
        options["sigmoid_bias"][17:] = math.nan
    cu = {"cu_seqlens_q": cumulated(lengths_q), "cu_seqlens_k": cumulated(lengths_k)}
    results = compute_packed(*tensors, backend=backend, **cu, **options)
    for name, used in {"out": 17, "dq": 17, "dk": 18, "dv": 18, "db": 17 if bias == "(t,h)" else 1000}.items():
        if name in results and results[name].dim():
            assert not results[name][used:].any(), name
            assert results[name][:used].isfinite().all(), name
    assert results["dslopes"].isfinite().all()


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "spare"),
    [
        ((), (), (0, 0)),
        ((), (), (4, 3)),
        ((0,), (0,), (0, 0)),
        ((0, 0), (3, 2), (0, 0)),
        ((3, 2), (0, 0), (0, 0)),
        ((0, 2), (3, 0), (1, 1)),
    ],
)
def test_nothing_to_see_is_zero_with_zero_gradient(backend, lengths_q, lengths_k, spare) -> None:
    """No sequences, no rows, no keys, or a sequence that lacks what the other has."""
    q, k, v, dout = (x[0] for x in make_qkv(1, sum(lengths_q) + spare[0], sum(lengths_k) + spare[1], 2, 1, 8))
    options = {"sigmoid_bias": torch.zeros(2), "alibi_slopes": torch.ones(len(lengths_q), 2), "causal": True}
    cu = {"cu_seqlens_q": cumulated(lengths_q), "cu_seqlens_k": cumulated(lengths_k)}
    results = compute_packed(q, k, v, dout, backend=backend, **cu, **options)
    assert {name: x.shape for name, x in results.items()} == {
        "out": q.shape, "dq": q.shape, "dk": k.shape, "dv": v.shape, "db": (2,), "dslopes": (len(lengths_q), 2),
    }  # fmt: skip
    assert not any(x.any() for x in results.values())


@pytest.mark.parametrize("backend", NAMES)
def test_max_seqlen_never_changes_the_result(backend) -> None:
    lengths_q, lengths_k = (40, 3, 0, 21), (25, 50, 2, 21)
    q, k, v, dout = (x[0] for x in make_qkv(1, 64, 98, 2, 1, 8))
    options = Options(sigmoid_bias=torch.tensor(-1.0), causal=True)
    cu = {"cu_seqlens_q": cumulated(lengths_q), "cu_seqlens_k": cumulated(lengths_k)}
    expected, seen = oracle_and_witness(q, k, v, dout, lengths_q, lengths_k, 8, options)
    for longest in ({}, {"max_seqlen_q": 40, "max_seqlen_k": 50}, {"max_seqlen_q": 1, "max_seqlen_k": 1},
                    {"max_seqlen_q": 10**6}, {"max_seqlen_q": 0, "max_seqlen_k": 0}):  # fmt: skip
        for name, result in compute_packed(q, k, v, dout, backend=backend, **cu, **options, **longest).items():
            assert_within_budget(f"{name} with {longest}", result, expected[name], seen[name])


@pytest.mark.parametrize("has_descriptors", [False, True])
@pytest.mark.parametrize("backend", NAMES)
def test_nan_in_one_sequence_does_not_reach_another(backend, has_descriptors, monkeypatch) -> None:
    interpret_in_tiles(monkeypatch, 16, 16, has_descriptors=has_descriptors)
    lengths_q, lengths_k = (7, 5, 20), (20, 9, 12)
    tensors = [x[0] for x in make_qkv(1, 32, 41, 2, 1, 8)]
    options: dict[str, Any] = {"causal": True, "sigmoid_bias": torch.randn(32, 2), "alibi_slopes": torch.rand(3, 2)}
    options |= {"cu_seqlens_q": cumulated(lengths_q), "cu_seqlens_k": cumulated(lengths_k), "backend": backend}
    clean = compute_packed(*tensors, **options)
    _, rows, keys = list(sequences(lengths_q, lengths_k))[1]
    where = {"out": rows, "dq": rows, "dk": keys, "dv": keys, "db": rows, "dslopes": slice(1, 2)}
    for x, part in zip(tensors, (rows, keys, keys, rows), strict=True):
        x[part] = math.nan
    options["sigmoid_bias"][rows] = math.nan
    dirty = compute_packed(*tensors, **options)
    for name, result in dirty.items():
        assert result[where[name]].isnan().any(), name
        for x in (result, clean[name]):
            x[where[name]] = 0.0
        assert torch.equal(result, clean[name]), name


@pytest.mark.parametrize("backend", NAMES)
def test_where_batch_equals_total_q_a_bias_is_of_rows(backend) -> None:
    lengths_q, lengths_k = (2, 0, 1), (2, 2, 2)
    (q, k, v), dout, cu = sample(lengths_q, lengths_k)
    bias = torch.randn(3, 2)
    expected, seen = oracle_and_witness(q, k, v, dout, lengths_q, lengths_k, 8, Options(sigmoid_bias=bias))
    assert expected["db"][1].any()  # of the first sequence's second row; the second sequence has no queries
    for name, result in compute_packed(q, k, v, dout, backend=backend, sigmoid_bias=bias, **cu).items():
        assert_within_budget(name, result, expected[name], seen[name])


@pytest.mark.parametrize("backend", NAMES)
def test_one_packed_tensor_of_q_k_and_v(backend) -> None:
    """What a projection gives, (total, 3, nheads, head_dim): strided views in, one gradient out."""
    cu = {name: cumulated((6, 0, 11)) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    call = {"sigmoid_bias": -1.0, "causal": True, "backend": backend, **cu}
    qkv, dout = torch.randn(17, 3, 4, 8, requires_grad=True), torch.randn(17, 4, 8)
    views = qkv.unbind(1)
    assert not views[0].is_contiguous()
    out = sigmoid_attention_varlen(*views, **call)
    assert out.is_contiguous()
    copies = [x.detach().clone().requires_grad_() for x in views]
    expected = sigmoid_attention_varlen(*copies, **call)
    assert torch.equal(out, expected)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    assert torch.equal(dqkv, torch.stack(torch.autograd.grad(expected, copies, dout), 1))


@pytest.mark.parametrize("backend", NAMES)
def test_any_strides_of_the_other_tensors(backend) -> None:
    """Lengths that are a column, a bias that lies across, slopes and dout that are broadcast."""
    (q, k, v), dout, cu = sample()
    bias, slopes = torch.randn(17, 2), torch.rand(1, 2)
    plain = {"sigmoid_bias": bias, "alibi_slopes": slopes.repeat(3, 1), "backend": backend, **cu}
    ends = torch.stack([cu["cu_seqlens_q"], cu["cu_seqlens_k"]], 1)
    strided = plain | {"cu_seqlens_q": ends[:, 0], "cu_seqlens_k": ends[:, 1]}
    strided |= {"sigmoid_bias": bias.t().contiguous().t(), "alibi_slopes": slopes.expand(3, 2)}
    expected = compute_packed(q, k, v, dout[:1].repeat(17, 1, 1), **plain)
    for name, result in compute_packed(q, k, v, dout[:1].expand(17, 2, 6), **strided).items():
        assert_rounded(result, expected[name], name=name)


@pytest.mark.parametrize("backend", NAMES)
def test_gradients_have_the_dtype_of_their_tensors(backend) -> None:
    (q, k, v), dout, cu = sample(dtype=torch.float16)
    bias, slopes = torch.zeros(17, 2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float64)
    results = compute_packed(q, k, v, dout, sigmoid_bias=bias, alibi_slopes=slopes, backend=backend, **cu)
    assert {name: x.dtype for name, x in results.items()} == {
        "out": torch.float16, "dq": torch.float16, "dk": torch.float16, "dv": torch.float16, "db": torch.bfloat16,
        "dslopes": torch.float64,
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("bias_shape", [(2,), (5, 2)])
def test_gradcheck(backend, bias_shape) -> None:
    """Five rows, one of them of no sequence."""
    q, k, v, _ = (x[0] for x in make_qkv(1, 5, 5, 2, 1, 3, 2, dtype=torch.float64))
    cu = {"cu_seqlens_q": cumulated((2, 0, 2)), "cu_seqlens_k": cumulated((3, 1, 1))}
    bias, slopes = torch.randn(bias_shape, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)

    def call(q, k, v, bias, slopes):
        torch.manual_seed(1)
        return sigmoid_attention_varlen(
            q, k, v, sigmoid_bias=bias, alibi_slopes=slopes, causal=True, dropout_p=0.3, backend=backend, **cu
        )

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in (q, k, v, bias, slopes)])


def test_second_and_forward_derivatives_are_right_or_one_clear_error() -> None:
    tensors, _, cu = sample((2, 0, 3), (3, 1, 3), torch.float64)

    def call(q, k, v, backend="reference"):
        return sigmoid_attention_varlen(q, k, v, sigmoid_bias=-1.0, causal=True, backend=backend, **cu)

    leaves = [x.clone().requires_grad_() for x in tensors]
    assert torch.autograd.gradgradcheck(call, leaves)
    (dq,) = torch.autograd.grad(call(*leaves, backend="blocked").sum(), leaves[0], create_graph=True)
    with pytest.raises(BackendUnsupported, match="double backward needs backend='reference'"):
        dq.sum().backward()
    changes = tuple(x.sin() for x in tensors)
    with pytest.raises(BackendUnsupported, match="forward-mode derivatives need backend='reference'"):
        torch.func.jvp(functools.partial(call, backend="blocked"), tensors, changes)
    ahead, behind = (call(*(x + step * dx for x, dx in zip(tensors, changes, strict=True))) for step in (1e-6, -1e-6))
    # the roundings of both sides, divided by the step of 1e-6; what it leaves out is 1e-12 of a third derivative
    size = 1e6 * ahead.abs().max().item()
    assert_rounded(torch.func.jvp(call, tensors, changes)[1], (ahead - behind) / 2e-6, 4, of=size)
