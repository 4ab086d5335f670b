"""Packed sequences: every backend against the dense oracle of each sequence, inside the one error budget; torch.

The drawn cases let every value of every option meet every other. Tiles of the interpreter are small in half of them, so
that a short sequence has several.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from backends.here import FUSED, NAMES, can, interpret_in_tiles
from rounding import assert_rounded
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashsigmoid import BackendUnsupported, sigmoid_attention, sigmoid_attention_varlen
from flashsigmoid.backends.problem import make_problem
from flashsigmoid.functional import sigmoid_attention_shard
from flashsigmoid.testing import Options, assert_within_budget, make_qkv, oracle, witness

Lengths = tuple[int, ...]
SIDES = (("db", "sigmoid_bias"), ("dslopes", "alibi_slopes"))


def cumulated(lengths: Lengths, device: str = "cpu") -> Tensor:
    """0, then where each sequence ends: int32 (batch + 1,)."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def side_part(x: Tensor, index: int, rows: slice, has_rows: bool) -> Tensor:
    """What a sequence sees of a packed bias or of slopes: a view in the shape of a dense call's with a batch of one."""
    if x.dim() < 2:
        return x
    return x[rows].t()[None] if has_rows else x[index : index + 1]


def sequences(lengths_q: Lengths, lengths_k: Lengths) -> Iterator[tuple[int, slice, slice]]:
    """(index, rows, keys) of the sequences that have both."""
    starts = zip(itertools.accumulate(lengths_q, initial=0), itertools.accumulate(lengths_k, initial=0), strict=True)
    for index, ((row, key), rows, keys) in enumerate(zip(starts, lengths_q, lengths_k, strict=False)):
        if rows and keys:
            yield index, slice(row, row + rows), slice(key, key + keys)


def dense_options(options: Options, index: int, rows: slice, total_q: int, nheads: int) -> Options:
    """The options of one sequence as a dense shard: dropout counts its batch from the sequence's index."""
    given: dict[str, Any] = dict(options)
    for name in ("sigmoid_bias", "alibi_slopes"):
        if isinstance(given.get(name), Tensor):
            has_rows = name == "sigmoid_bias" and given[name].shape == (total_q, nheads)
            given[name] = side_part(given[name], index, rows, has_rows)
    return Options(**given, origin=(index, 0, 0, 0))


def oracle_and_witness(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lengths_q: Lengths, lengths_k: Lengths, draws: int, options: Options
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The dense oracle and witness of every sequence, put where its rows and keys are; the rest is zero.

    Gradients of what sequences share are sums, whose witness is off by the root of the summed squares.
    """
    total_q, nheads = q.shape[:2]
    leaves: dict[str, Any] = {"out": dout, "dq": q, "dk": k, "dv": v}
    leaves |= {name: options.get(option) for name, option in SIDES}
    expected = {name: x.new_zeros(x.shape).double() for name, x in leaves.items() if isinstance(x, Tensor)}
    seen = {name: expected[name].repeat(draws, 1, 1, 1) for name in ("out", "dq", "dk", "dv")}
    squares = {name: torch.zeros_like(expected[name]) for name, _ in SIDES if name in expected}
    has_rows = "db" in expected and expected["db"].shape == (total_q, nheads)
    for index, rows, keys in sequences(lengths_q, lengths_k):
        dense = q[None, rows], k[None, keys], v[None, keys], dout[None, rows]
        given = dense_options(options, index, rows, total_q, nheads)
        exact, near = oracle(*dense, **given), witness(*dense, draws=draws, **given)
        for name, where in (("out", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
            expected[name][where] = exact[name][0]
            seen[name][:, where] = near[name][:, 0].double()
        for name in squares:
            part = functools.partial(side_part, index=index, rows=rows, has_rows=has_rows and name == "db")
            part(expected[name]).add_(exact[name])
            part(squares[name]).add_((near[name][0] - exact[name]).square())
    return expected, seen | {name: (expected[name] + squares[name].sqrt())[None] for name in squares}


def compute_packed(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *, seed: int | None = None, **options: Any
) -> dict[str, Tensor]:
    """out, dq, dk, dv, and db, dslopes where those are tensors; `seed` is of torch's generator."""
    leaves = {"dq": q, "dk": k, "dv": v}
    leaves |= {name: options[option] for name, option in SIDES if isinstance(options.get(option), Tensor)}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    options |= {option: leaves[name] for name, option in SIDES if name in leaves}
    if seed is not None:
        torch.manual_seed(seed)
    out = sigmoid_attention_varlen(leaves["dq"], leaves["dk"], leaves["dv"], **options)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def draw_seed(seed: int, device: str = "cpu") -> Tensor:
    """The dropout seed that a call draws from torch's generator after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


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


def packed_problem(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor):
    return make_problem(
        q, k, v, bias=None, slopes=None, sigmoid_bias=0.0, scale=None, causal=False, window_left=None,
        window_right=None, q_offset=None, dropout_p=0.0, origin=(0, 0, 0, 0), sigmoid="auto", cu_seqlens_q=cu_seqlens_q,
    )  # fmt: skip


def sample(
    lengths_q: Lengths = (6, 0, 11), lengths_k: Lengths = (9, 4, 5), dtype: torch.dtype = torch.float32, **made: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, dict[str, Any]]:
    """((q, k, v), dout, cumulated lengths) of 2 heads over 1, head_dim 8 and 6 of the values."""
    tensors = make_qkv(1, sum(lengths_q), sum(lengths_k), 2, 1, 8, 6, dtype=dtype, **made)
    q, k, v, dout = (x[0] for x in tensors)
    return (q, k, v), dout, {"cu_seqlens_q": cumulated(lengths_q), "cu_seqlens_k": cumulated(lengths_k)}


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


(Q, K, V), DOUT, CU = sample()
BAD = [
    ({"q": Q[None]}, r"q must be a dense tensor \(total, nheads, head_dim\), got \(1, 17, 2, 8\)"),
    ({"k": 3}, r"k must be a dense tensor \(total, nheads, head_dim\), got int"),
    ({"v": V.half()}, r"q, k, v must share one dtype .*, got torch.float32, torch.float32, torch.float16"),
    ({"k": K.to("meta")}, r"q, k, v must be on one device, got cpu, meta, cpu"),
    ({"k": K[..., :4]}, r"k must share head_dim of q, got q \(17, 2, 8\) and k \(18, 1, 4\)"),
    ({"v": V[:9]}, r"v must share total and nheads of k, got k \(18, 1, 8\) and v \(9, 1, 6\)"),
    ({"k": Q}, r"v must share total and nheads of k, got k \(17, 2, 8\) and v \(18, 1, 6\)"),
    ({"q": K, "k": Q, "v": Q}, r"nheads must be a positive multiple of nheads_k, got nheads=1, nheads_k=2"),
    ({"v": V[..., :0]}, r"head_dim and head_dim_v must be at least 1, got 8 and 0"),
    ({"sigmoid_bias": None}, r"sigmoid_bias is required where sequences have different lengths, got None"),
    ({"sigmoid_bias": math.nan}, r"sigmoid_bias must be a number below \+inf, got nan"),
    (
        {"sigmoid_bias": torch.zeros(3, 2, 6)},
        r"sigmoid_bias must have shape \(\), \(nheads,\), \(batch, nheads\) or \(total_q, nheads\), got \(3, 2, 6\) "
        r"for q \(17, 2, 8\)",
    ),
    ({"sigmoid_bias": torch.zeros(2, 17)}, r"sigmoid_bias must have shape .*, got \(2, 17\)"),
    ({"alibi_slopes": torch.zeros(17, 2)}, r"alibi_slopes must have shape \(nheads,\) or .*, got \(17, 2\)"),
    ({"cu_seqlens_q": [0, 6, 6, 17]}, r"cu_seqlens_q must be an int32 tensor \(batch \+ 1,\), got \[0, 6, 6, 17\]"),
    (
        {"cu_seqlens_k": CU["cu_seqlens_k"].long()},
        r"cu_seqlens_k must be an int32 tensor \(batch \+ 1,\), got \(4,\) torch.int64",
    ),
    ({"cu_seqlens_q": CU["cu_seqlens_q"][:0]}, r"cu_seqlens_q must be an int32 tensor .*, got \(0,\) torch.int32"),
    ({"cu_seqlens_q": CU["cu_seqlens_q"][None]}, r"cu_seqlens_q must be an int32 tensor .*, got \(1, 4\) torch.int32"),
    ({"cu_seqlens_k": CU["cu_seqlens_k"].to("meta")}, r"cu_seqlens_k must be on the device of q, cpu, got meta"),
    ({"cu_seqlens_q": CU["cu_seqlens_q"][:3]}, r"cu_seqlens_q and cu_seqlens_k must have one length, got 3 and 4"),
    ({"max_seqlen_q": -1}, r"max_seqlen_q must be a non-negative integer, got -1"),
    ({"max_seqlen_q": 6.0}, r"max_seqlen_q must be a non-negative integer, got 6.0"),
    ({"max_seqlen_k": True}, r"max_seqlen_k must be a non-negative integer, got True"),
    ({"max_seqlen_k": torch.tensor(9)}, r"max_seqlen_k must be a non-negative integer, got tensor\(9\)"),
    ({"window_size": (-1, -1)}, r"window_size must be non-negative integers, .*, got \(-1, -1\)"),
    ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
    ({"backend": "cuda"}, r"backend must be one of auto, .*, got 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_one_clear_error(change, message) -> None:
    call = {"q": Q, "k": K, "v": V, "sigmoid_bias": -1.0, **CU} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        sigmoid_attention_varlen(call.pop("q"), call.pop("k"), call.pop("v"), **call)


@pytest.mark.parametrize("backend", ["auto", *NAMES])
@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([1, 6, 6, 17], r"cu_seqlens_q must rise from 0 to at most 17, got \[1, 6, 6, 17\]"),
        ([0, 6, 5, 17], r"cu_seqlens_q must rise from 0 to at most 17, got \[0, 6, 5, 17\]"),
        ([0, 6, 6, 18], r"cu_seqlens_q must rise from 0 to at most 17, got \[0, 6, 6, 18\]"),
    ],
)
def test_lengths_that_the_host_reads_are_checked(backend, ends, message) -> None:
    cu = CU | {"cu_seqlens_q": torch.tensor(ends, dtype=torch.int32)}
    with pytest.raises(ValueError, match=f"^{message}"):
        sigmoid_attention_varlen(Q, K, V, sigmoid_bias=-1.0, backend=backend, **cu)


def arguments(backend: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of flashsigmoid::fwd that reach each optional tensor and each scalar of a packed call."""
    (q, k, v), _, cu = sample()
    leaf = [x.requires_grad_() for x in (q, k, v)]
    bias, slopes, seed = torch.randn(17, 2, requires_grad=True), torch.rand(3, 2, requires_grad=True), torch.tensor([7])
    ends = tuple(cu.values())
    tail = ((0, 0, 0, 0), "auto")
    yield *leaf, None, None, None, *ends, -2.0, None, False, None, None, None, 0.0, *tail, None, None, False, backend
    yield *leaf, bias, slopes, None, *ends, None, 0.3, True, 3, 1, None, 0.0, *tail, 11, 9, True, backend
    yield (
        *leaf,
        torch.zeros(3, 2),
        slopes,
        seed,
        *ends,
        None,
        None,
        False,
        None,
        2,
        None,
        0.5,
        *tail,
        99,
        1,
        True,
        backend,
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize(("backend", "index"), [("blocked", 0), ("blocked", 2), *((name, 1) for name in FUSED)])
def test_opcheck(backend, index) -> None:
    args = list(arguments(backend))[index]
    torch.library.opcheck(torch.ops.flashsigmoid.fwd.default, args)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    torch.library.opcheck(torch.ops.flashsigmoid.bwd.default, (torch.randn(17, 2, 6), *detached))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_forward_and_backward(backend, dynamic) -> None:
    torch.compiler.reset()  # the variants before this one count towards dynamo's limit of recompilations

    def call(q, k, v, cu_seqlens_q, cu_seqlens_k, bias, slopes):
        return sigmoid_attention_varlen(
            q * 2, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, sigmoid_bias=bias, alibi_slopes=slopes,
            max_seqlen_q=11, causal=True, window_size=(3, None), dropout_p=0.25, backend=backend,
        ).sin()  # fmt: skip

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths_q, lengths_k in (((6, 0, 5), (9, 4, 5)), ((3, 8, 1, 1), (6, 8, 0, 1))):
        tensors, dout, cu = sample(lengths_q, lengths_k)
        sides = torch.randn(sum(lengths_q), 2), torch.rand(2)
        leaves = [x.requires_grad_() for x in (*tensors, *sides)]
        results = []
        for function in (call, compiled):
            torch.manual_seed(1)
            out = function(*leaves[:3], *cu.values(), *leaves[3:])
            results.append((out, *torch.autograd.grad(out, leaves, dout)))
        for eager, traced in zip(*results, strict=True):
            assert_rounded(traced, eager)


@pytest.mark.parametrize("backend", NAMES)
def test_autocast_runs_in_its_dtype(backend) -> None:
    (q, k, v), dout, cu = sample()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    call = {"sigmoid_bias": -1.0, "backend": backend, **cu}
    with torch.autocast("cpu", torch.float16):
        out = sigmoid_attention_varlen(leaves[0], leaves[1].half(), leaves[2], **call)
    assert out.dtype == torch.float16
    assert torch.equal(out, sigmoid_attention_varlen(*(x.half() for x in leaves), **call))
    grads = torch.autograd.grad(out, leaves, dout.half())
    assert [x.dtype for x in grads] == [torch.float32] * 3
    if backend != "triton":
        with torch.autocast("cpu", torch.float16):
            assert sigmoid_attention_varlen(*(x.double() for x in leaves), **call).dtype == torch.float64


@pytest.mark.parametrize("backend", NAMES)
def test_activation_checkpointing_replays_dropout(backend) -> None:
    (q, k, v), dout, cu = sample()
    call = functools.partial(sigmoid_attention_varlen, sigmoid_bias=-1.0, dropout_p=0.5, backend=backend, **cu)
    grads = []
    for recompute in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.manual_seed(4)
        out = checkpoint(call, *leaves, use_reentrant=False) if recompute else call(*leaves)
        grads.append(torch.autograd.grad(out, leaves, dout))
    for plain, replayed in zip(*grads, strict=True):
        assert torch.equal(plain, replayed)


@pytest.mark.parametrize("backend", NAMES)
def test_only_wanted_gradients(backend) -> None:
    leaf = V.clone().requires_grad_()
    call = {"sigmoid_bias": -1.0, "backend": backend, **CU}
    (dv,) = torch.autograd.grad(sigmoid_attention_varlen(Q, K, leaf, **call), leaf, DOUT)
    assert dv.isfinite().all()
    assert not sigmoid_attention_varlen(Q, K, V, **call).requires_grad


def test_meta_tensors_give_the_shape() -> None:
    q, k, v = (x.to("meta") for x in (Q, K, V))
    out = sigmoid_attention_varlen(q, k, v, sigmoid_bias=-1.0, **{name: x.to("meta") for name, x in CU.items()})
    assert (out.device.type, out.shape) == ("meta", (17, 2, 6))
