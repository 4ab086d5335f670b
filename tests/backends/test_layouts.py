"""Options together on tensors of any strides: the same bits as on contiguous ones, forward and backward.

That contiguous ones are inside the budget is shown by test_agreement.py and test_varlen.py. Cases are drawn so that
every layout of every tensor meets every value of every option; `make test` has the first, in which every value comes
several times, and `make test-long` all. NaN lies between the values.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from typing import Any

import pytest
import torch
from backends.here import FUSED, interpret_in_tiles
from rounding import assert_rounded
from torch import Tensor
from varlen import cumulated

from flashsigmoid import sigmoid_attention_varlen
from flashsigmoid.functional import sigmoid_attention_shard
from flashsigmoid.testing import make_qkv

LAYOUTS = (
    "contiguous", "heads first", "packed", "off by one channel", "every other channel", "channels first", "reversed",
    "one sequence", "one head", "one row", "one value",
)  # fmt: skip
SIDES = (None, "()", "(h,)", "(b,h)", "rows")
LENGTHS = ((6, 0, 17, 1), (9, 4, 33, 0))  # of queries and keys: no queries, no keys
OPTIONS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("q", "k", "v", "dout"), LAYOUTS),
    "sides": ("contiguous", "strided", "one value"),  # bias and slopes
    "kind": ("dense", "shard", "nothing seen", "packed"),
    "causal": (False, True),
    "window_size": ((None, None), (7, 3), (20, None)),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "head_dims": ((16, 16), (24, 24), (8, 40), (20, 7)),
    "bias": SIDES,
    "slopes": (None, "(h,)", "(b,h)"),
    "dropout_p": (0.0, 0.3),
    "dtype": (torch.float32, torch.float16),
}
FIRST = 18
Case = dict[str, Any]


def pairs(case: Case) -> set[tuple[str, Any, str, Any]]:
    return {(*a, *b) for a, b in itertools.combinations(case.items(), 2)}


@functools.cache
def drawn() -> tuple[Case, ...]:
    """Of fifty random cases the one that has most new pairs, until all pairs are there."""
    rng = random.Random("layouts")
    missing = {(a, x, b, y) for (a, xs), (b, ys) in itertools.combinations(OPTIONS.items(), 2) for x in xs for y in ys}
    cases: list[Case] = []
    while missing:
        some = [{name: rng.choice(values) for name, values in OPTIONS.items()} for _ in range(50)]
        cases.append(max(some, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(cases[-1])
    return tuple(cases)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x of (batch, seqlen, heads, dim) in other strides; of the last four some values are repeated."""
    batch, seqlen, heads, dim = x.shape
    match layout:
        case "contiguous":
            return x
        case "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "packed":
            return x.new_full((batch, seqlen, 3, heads, dim), math.nan)[:, :, 1].copy_(x)
        case "off by one channel":
            return x.new_full((batch, seqlen, heads, dim + 8), math.nan)[..., 1 : dim + 1].copy_(x)
        case "every other channel":
            return x.new_full((batch, seqlen, heads, 2 * dim), math.nan)[..., ::2].copy_(x)
        case "channels first":
            return x.transpose(1, 3).contiguous().transpose(1, 3)
        case "reversed":
            return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        case "one sequence":
            return x[:1].expand_as(x)
        case "one head":
            return x[:, :, :1].expand_as(x)
        case "one row":
            return x[:, :1].expand_as(x)
    assert layout == "one value", layout
    return x[:1, :1, :1, :1].expand_as(x)


def lay_out_side(x: Tensor, layout: str) -> Tensor:
    if layout == "one value":
        return x.flatten()[0].expand_as(x)
    return torch.stack((x, x + math.nan), -1)[..., 0] if layout == "strided" else x


def sides(case: Case, batch: int, rows: int) -> dict[str, Any]:
    heads = case["heads"][0]
    last = (rows, heads) if case["kind"] == "packed" else (batch, heads, rows)
    shapes = {"()": (), "(h,)": (heads,), "(b,h)": (batch, heads), "rows": last}
    given: dict[str, Any] = {"sigmoid_bias": -2.0}
    if case["bias"] is not None:
        given["sigmoid_bias"] = lay_out_side(torch.randn(shapes[case["bias"]]) - 2.0, case["sides"])
    if case["slopes"] is not None:
        given["alibi_slopes"] = lay_out_side(torch.rand(shapes[case["slopes"]]), case["sides"])
    return given


def results(case: Case, backend: str, tensors: tuple[Tensor, ...], given: dict[str, Any]) -> list[Tensor]:
    """out and the gradient of every tensor."""
    *qkv, dout = tensors
    leaves = [x.detach().requires_grad_() for x in qkv]
    call = {"causal": case["causal"], "window_size": case["window_size"], "dropout_p": case["dropout_p"]} | given
    for name in ("sigmoid_bias", "alibi_slopes"):
        if isinstance(call.get(name), Tensor):
            call[name] = call[name].detach().requires_grad_()
            leaves.append(call[name])
    if case["kind"] == "packed":
        torch.manual_seed(5)
        cu = {name: cumulated(x) for name, x in zip(("cu_seqlens_q", "cu_seqlens_k"), LENGTHS, strict=True)}
        out = sigmoid_attention_varlen(*leaves[:3], **cu, **call, backend=backend)
    else:
        offset = {"dense": 9, "shard": -4, "nothing seen": -100}[case["kind"]]
        seed = torch.tensor([77]) if case["dropout_p"] else None
        out = sigmoid_attention_shard(*leaves[:3], **call, q_offset=offset, seed=seed, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize(
    "index", [*range(FIRST), *(pytest.param(i, marks=pytest.mark.long) for i in range(FIRST, len(drawn())))]
)
def test_the_same_as_of_contiguous_tensors(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = drawn()[index]
    interpret_in_tiles(monkeypatch, 16, 32, has_descriptors=index % 2 > 0)
    batch, seqlens = (1, (24, 46)) if case["kind"] == "packed" else (2, (18, 35))
    given = sides(case, len(LENGTHS[0]) if case["kind"] == "packed" else batch, seqlens[0])
    plain_given = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in given.items()}
    for backend in FUSED:
        dtype = case["dtype"] if backend == "triton" else torch.float64
        made = make_qkv(batch, *seqlens, *case["heads"], *case["head_dims"], dtype=dtype, seed=index)
        tensors = tuple(lay_out(x, case[name]) for x, name in zip(made, ("q", "k", "v", "dout"), strict=True))
        if case["kind"] == "packed":
            tensors = tuple(x[0] for x in tensors)
        expected = results(case, backend, tuple(x.contiguous() for x in tensors), plain_given)
        for _ in range(2 if index % 4 == 0 else 1):  # the second call of one kind takes the short way
            found = results(case, backend, tensors, given)
            assert len(found) == len(expected)
            for x, y in zip(found, expected, strict=True):
                if backend == "triton":
                    assert torch.equal(x, y), case
                else:  # torch's products round as strides have it
                    assert_rounded(x, y)


def test_cases_cover_every_pair_of_option_values() -> None:
    names = dict.fromkeys(OPTIONS)
    assert all(case.keys() == names.keys() for case in drawn())
    for (a, xs), (b, ys) in itertools.combinations(OPTIONS.items(), 2):
        assert {(case[a], case[b]) for case in drawn()} == set(itertools.product(xs, ys))
        assert {case[a] for case in drawn()[:FIRST]} == set(xs)
