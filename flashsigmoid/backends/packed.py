"""Packed calls: sequences of different lengths, one after the other in (total, nheads, head_dim), by cumulated lengths.

A backend that takes cu_seqlens itself gets them; for the others every sequence is a dense call, which reads the
lengths on the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .problem import Problem

if TYPE_CHECKING:
    from . import Backend

CuSeqlens = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sequence:
    """One sequence of a packed call as a dense problem."""

    index: int
    rows: slice
    keys: slice
    problem: Problem

    def dense(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, slopes: Tensor | None, whole: Problem):
        """The sequence's part of each tensor, with a batch of one."""
        if bias is not None and whole.has_row_bias:
            bias = bias[self.rows].t()[None]
        elif bias is not None and bias.dim() == 2:
            bias = bias[self.index : self.index + 1]
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[self.index : self.index + 1]
        return q[None, self.rows], k[None, self.keys], v[None, self.keys], bias, slopes


def bounds(problem: Problem, cu_seqlens: CuSeqlens) -> tuple[list[slice], list[slice]]:
    """Where the queries and the keys of each sequence are, read on the host.

    Raises:
        ValueError: cumulated lengths that do not start at 0, fall, or end beyond the rows.
    """
    found = []
    for name, cu, total in zip(("q", "k"), cu_seqlens, (problem.total_q, problem.total_k), strict=True):
        ends = cu.tolist()
        if ends[0] != 0 or any(b < a for a, b in itertools.pairwise(ends)) or ends[-1] > (total or 0):
            raise ValueError(f"cu_seqlens_{name} must rise from 0 to at most {total}, got {ends}")
        found.append([slice(a, b) for a, b in itertools.pairwise(ends)])
    return found[0], found[1]


def sequences(problem: Problem, cu_seqlens: CuSeqlens) -> Iterator[Sequence]:
    """The sequences that have queries and keys.

    Raises:
        ValueError: as `bounds`.
    """
    batch, *rest = problem.origin
    for index, (rows, keys) in enumerate(zip(*bounds(problem, cu_seqlens), strict=True)):
        seqlen_q, seqlen_k = rows.stop - rows.start, keys.stop - keys.start
        if seqlen_q and seqlen_k:
            shape = problem.bias_shape
            if shape is not None and len(shape) == 2:
                shape = (1, problem.nheads, seqlen_q) if problem.has_row_bias else (1, problem.nheads)
            yield Sequence(
                index,
                rows,
                keys,
                replace(
                    problem, batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, q_offset=seqlen_k - seqlen_q,
                    bias_shape=shape, origin=(batch + index, *rest), total_q=None, total_k=None,
                ),
            )  # fmt: skip


def forward(
    backend: Backend,
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: CuSeqlens,
) -> Tensor:
    """out (total_q, nheads, head_dim_v); rows of no sequence are zero. Differentiable where the backend is."""
    if backend.PACKED:
        if cu_seqlens[0].device.type == "cpu":
            bounds(problem, cu_seqlens)  # where looking costs nothing
        given: dict[str, Any] = {"cu_seqlens": cu_seqlens}
        return backend.forward(problem, q, k, v, bias, slopes, seed, **given)
    out = q.new_zeros(q.shape[0], problem.nheads, problem.head_dim_v)
    for x in (q, k, v, bias, slopes):
        if x is not None:  # zero, and differentiable where there is no sequence
            out = out + x.reshape(-1)[:0].sum().to(out.dtype)
    parts, end = [], 0
    for one in sequences(problem, cu_seqlens):
        parts += [out[end : one.rows.start]]
        parts += [backend.forward(one.problem, *one.dense(q, k, v, bias, slopes, problem), seed)[0]]
        end = one.rows.stop
    return torch.cat([*parts, out[end:]])


def backward(
    backend: Backend,
    problem: Problem,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: CuSeqlens,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, and sums of dS and of -dS |p - j| of every row, (total_q, nheads)."""
    if backend.PACKED:
        given: dict[str, Any] = {"cu_seqlens": cu_seqlens}
        return backend.backward(problem, dout, q, k, v, bias, slopes, seed, **given)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    sums = [None if x is None else q.new_zeros(q.shape[:2], dtype=problem.compute_dtype) for x in (bias, slopes)]
    for one in sequences(problem, cu_seqlens):
        tensors = one.dense(q, k, v, bias, slopes, problem)
        grads = backend.backward(one.problem, dout[None, one.rows], *tensors, seed)
        for whole, where, part in zip((dq, dk, dv), (one.rows, one.keys, one.keys), grads[:3], strict=True):
            whole[where] = part[0]
        for whole, part in zip(sums, grads[3:], strict=True):
            if whole is not None:
                assert part is not None
                parts = part[0].t()  # (rows or fewer, nheads)
                whole[one.rows.start : one.rows.start + parts.shape[0]] = parts
    row_sums, slope_sums = sums
    return dq, dk, dv, row_sums, slope_sums


def sum_heads(sums: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """(batch, nheads, parts), or (total_q, nheads) of packed rows, summed to (batch, nheads); always in one order."""
    if cu_seqlens_q is None:
        return sums.sum(-1)
    return torch.segment_reduce(sums, "sum", offsets=cu_seqlens_q.long(), axis=0, unsafe=True)
