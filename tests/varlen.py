"""Packed sequences for tests: their dense oracle and witness, sequence by sequence, and small problems of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flashsigmoid import sigmoid_attention_varlen
from flashsigmoid.backends.problem import make_problem
from flashsigmoid.testing import Options, make_qkv, oracle, witness

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


def packed_problem(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor):
    return make_problem(q, k, v, sigmoid_bias=0.0, cu_seqlens_q=cu_seqlens_q)


def sample(
    lengths_q: Lengths = (6, 0, 11), lengths_k: Lengths = (9, 4, 5), dtype: torch.dtype = torch.float32, **made: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, dict[str, Any]]:
    """((q, k, v), dout, cumulated lengths) of 2 heads over 1, head_dim 8 and 6 of the values."""
    tensors = make_qkv(1, sum(lengths_q), sum(lengths_k), 2, 1, 8, 6, dtype=dtype, **made)
    q, k, v, dout = (x[0] for x in tensors)
    return (q, k, v), dout, {"cu_seqlens_q": cumulated(lengths_q), "cu_seqlens_k": cumulated(lengths_k)}
