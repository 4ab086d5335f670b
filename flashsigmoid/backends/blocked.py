"""Sigmoid attention in blocks of plain PyTorch: O(seqlen) memory, forward and backward, on any device torch has.

A tile of scores is two matrix products and a sigmoid, and tiles add: no row statistics, no rescaling, nothing saved.
Scores and accumulators are float32 (float64 for float64 inputs): rounded to bfloat16 a score near -8 is off by several
percent of its weight.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from .philox import keep_mask
from .problem import Problem, bias_rows
from .workers import parallel

NAME = "blocked"


def unsupported(problem: Problem) -> str | None:
    """Every call, on every device."""
    return None


def formula(problem: Problem) -> str:
    """torch.sigmoid is the only formula, and as fast as any other in plain torch."""
    dtype = str(problem.compute_dtype).removeprefix("torch.")
    asked = "; sigmoid='fast' changes nothing here" if problem.sigmoid == "fast" else ""
    return f"exact: torch.sigmoid in {dtype}{asked}"


@dataclass(frozen=True)
class Slab:
    """The (batch, head) range that one work item computes: one head on a CPU core, many at once elsewhere."""

    batch: slice
    heads: slice

    def of(self, x: Tensor) -> Tensor:
        """(batch, seqlen, nheads, dim) -> (heads of the slab, seqlen, dim)."""
        return x[self.batch, :, self.heads].transpose(1, 2).flatten(0, 1)

    def rows(self, x: Tensor | None) -> Tensor | None:
        """(batch, nheads, ...) -> (heads of the slab, ...)."""
        return None if x is None else x[self.batch, self.heads].flatten(0, 1)

    def put(self, dest: Tensor, rows: slice, x: Tensor) -> None:
        """Write (heads of the slab, rows, dim) into (batch, seqlen, nheads, dim)."""
        view = dest[self.batch, rows, self.heads]
        view.copy_(x.unflatten(0, (view.shape[0], view.shape[2])).transpose(1, 2))


def forward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """O = sum over key blocks of sigmoid(scale Q K^T + b) V."""
    call = _Call(problem, q, k, v, bias, slopes, seed)
    out = q.new_empty(problem.batch, problem.seqlen_q, problem.nheads, problem.head_dim_v)

    def item(work: tuple[Slab, slice]) -> None:
        slab, rows = work
        tiles = _Tiles(call, slab)
        acc = call.scratch("acc", tiles.heads, rows.stop - rows.start, problem.head_dim_v).zero_()
        for cols in call.key_blocks:
            for tile_rows, tile_cols in call.tiles(rows, cols):
                a = tiles.weights(tile_rows, tile_cols)
                if seed is not None:
                    a *= tiles.keep(tile_rows, tile_cols)
                acc[:, _within(tile_rows, rows)].baddbmm_(a, tiles.v[:, tile_cols])
        slab.put(out, rows, acc)

    # a causal row block costs more the later it stands: the longest first, so that no core waits at the end
    parallel(item, [(slab, rows) for rows in reversed(call.row_blocks) for slab in call.slabs])
    return out


def backward(
    problem: Problem,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dV = A^T dO, dS = (dO V^T) A (1 - A), dQ = scale dS K, dK = scale dS^T Q; row sums of dS; -sum(dS |p - j|)."""
    call = _Call(problem, q, k, v, bias, slopes, seed)
    dout = dout.to(problem.compute_dtype)
    # a key head's gradient is the sum over its query heads, each of which is one work item
    dq, dk, dv = (x.new_empty(*x.shape[:2], problem.nheads, x.shape[3]) for x in (call.q, call.k, call.v))
    if problem.group == 1:
        dk, dv = dk.to(q.dtype), dv.to(q.dtype)
    dq = dq.to(q.dtype)
    heads = (problem.batch, problem.nheads)
    row_sums = None if bias is None else call.q.new_zeros(*heads, problem.seqlen_q)
    dslopes = None if slopes is None else call.q.new_zeros(heads)

    def item(slab: Slab) -> None:
        tiles = _Tiles(call, slab)
        dout_heads = slab.of(dout)
        row_sums_heads, dslopes_heads = slab.rows(row_sums), slab.rows(dslopes)
        dq_heads = torch.zeros_like(tiles.q, memory_format=torch.contiguous_format)
        for block in call.key_blocks:
            size = block.stop - block.start
            dk_block = call.scratch("dk", tiles.heads, size, problem.head_dim).zero_()
            dv_block = call.scratch("dv", tiles.heads, size, problem.head_dim_v).zero_()
            for rows, cols in (tile for row_block in call.row_blocks for tile in call.tiles(row_block, block)):
                q_tile, dout_tile, k_tile, v_tile = (
                    tiles.q[:, rows],
                    dout_heads[:, rows],
                    tiles.k[:, cols],
                    tiles.v[:, cols],
                )
                at = _within(cols, block)
                a = tiles.weights(rows, cols)
                da = torch.bmm(dout_tile, v_tile.transpose(1, 2), out=call.scratch("da", *a.shape))
                if seed is None:
                    dv_block[:, at].baddbmm_(a.transpose(1, 2), dout_tile)
                else:
                    keep = tiles.keep(rows, cols)
                    dv_block[:, at].baddbmm_((a * keep).transpose(1, 2), dout_tile)
                    da *= keep
                ds = torch.ops.aten.sigmoid_backward.grad_input(da, a, grad_input=da)  # da * a * (1 - a)
                dq_heads[:, rows].baddbmm_(ds, k_tile, alpha=problem.scale)
                dk_block[:, at].baddbmm_(ds.transpose(1, 2), q_tile, alpha=problem.scale)
                if row_sums_heads is not None:
                    row_sums_heads[:, rows] += ds.sum(-1)
                if dslopes_heads is not None:
                    dslopes_heads -= torch.mul(ds, call.distance(rows, cols), out=a).sum((1, 2))
            slab.put(dk, block, dk_block)
            slab.put(dv, block, dv_block)
        slab.put(dq, slice(0, problem.seqlen_q), dq_heads)

    parallel(item, call.slabs)
    if problem.group > 1:
        dk, dv = (x.unflatten(2, (problem.nheads_k, problem.group)).sum(3).to(q.dtype) for x in (dk, dv))
    return dq, dk, dv, row_sums, dslopes


class _Call:
    """One call's inputs in the compute dtype, and how its (batch, head), rows and keys are divided."""

    def __init__(self, problem, q, k, v, bias, slopes, seed) -> None:
        dtype = problem.compute_dtype
        heads = (problem.batch, problem.nheads)
        self.problem: Problem = problem
        self.seed: Tensor | None = seed
        self.q, self.k, self.v = (x.to(dtype) for x in (q, k, v))
        if problem.group > 1:
            # a copy for every query head, O(seqlen): the tiles below know one kind of head
            index = torch.arange(problem.nheads, device=q.device) // problem.group
            self.k, self.v = (x.index_select(2, index) for x in (self.k, self.v))
        # (batch, nheads, seqlen_q or 1), (batch, nheads)
        self.bias = None if bias is None else bias_rows(bias.to(dtype), *heads)
        self.slopes = None if slopes is None else slopes.to(dtype).expand(heads)
        self.constant = self.q.new_tensor([problem.sigmoid_bias or 0.0])  # b where it is a number
        self._memory = threading.local()

        block = _block(problem)
        self.row_blocks = _ranges(0, problem.seqlen_q, block)
        self.key_blocks = _ranges(0, problem.seqlen_k, block)
        self.block = block
        per_slab = 1 if problem.device == "cpu" else problem.nheads
        self.slabs = [
            Slab(slice(b, b + 1), slice(h, h + per_slab))
            for b in range(problem.batch)
            for h in range(0, problem.nheads, per_slab)
        ]

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory of this thread, the same at every call with this name: fresh pages cost time."""
        size = math.prod(shape)
        memory = getattr(self._memory, name, None)
        if memory is None or memory.numel() < size:
            memory = torch.empty(size, dtype=self.problem.compute_dtype, device=self.q.device)
            setattr(self._memory, name, memory)
        return memory[:size].view(shape)

    def tiles(self, rows: slice, cols: slice) -> list[tuple[slice, slice]]:
        """The parts of a tile that are worth computing.

        All of it where every row sees every key; else strips of a few rows with the keys that any of them sees, so that
        half of a causal diagonal is not computed to be masked.
        """
        left, right = self.problem.band
        first, last = rows.start + self.problem.q_offset, rows.stop - 1 + self.problem.q_offset  # p_i
        if (left is None or cols.start >= last - left) and (right is None or cols.stop - 1 <= first + right):
            return [(rows, cols)]
        tiles = []
        for strip in _ranges(rows.start, rows.stop, _strip(self.problem)):
            first, last = strip.start + self.problem.q_offset, strip.stop - 1 + self.problem.q_offset
            start = cols.start if left is None else max(cols.start, first - left)
            stop = cols.stop if right is None else min(cols.stop, last + right + 1)
            if start < stop:
                tiles.append((strip, slice(start, stop)))
        return tiles

    def distance(self, rows: slice, cols: slice) -> Tensor:
        """|p_i - j| of a tile, (rows, cols)."""
        options = {"dtype": self.problem.compute_dtype, "device": self.q.device}
        p = torch.arange(rows.start + self.problem.q_offset, rows.stop + self.problem.q_offset, **options)
        return (p[:, None] - torch.arange(cols.start, cols.stop, **options)).abs_()


class _Tiles:
    """The tiles of one slab."""

    def __init__(self, call: _Call, slab: Slab) -> None:
        self.call, self.slab = call, slab
        self.q, self.k, self.v = (slab.of(x) for x in (call.q, call.k, call.v))
        self.bias, self.slopes = slab.rows(call.bias), slab.rows(call.slopes)
        self.heads = self.q.shape[0]

    def weights(self, rows: slice, cols: slice) -> Tensor:
        """A of a tile, before dropout: (heads, rows, cols)."""
        problem, q, k = self.call.problem, self.q[:, rows], self.k[:, cols]
        s = self.call.scratch("a", self.heads, q.shape[1], k.shape[1])
        if self.bias is None:
            bias = self.call.constant
        else:
            bias = (self.bias if self.bias.shape[1] == 1 else self.bias[:, rows])[..., None]
        torch.bmm(q, k.transpose(1, 2), out=s)
        # b after the product: a fused beta * C starts the sum at b and rounds each term at b's magnitude
        torch.add(bias, s, alpha=problem.scale, out=s)
        if self.slopes is not None:
            s.addcmul_(self.slopes[:, None, None], self.call.distance(rows, cols), value=-1.0)
        a = s.sigmoid_()
        left, right = problem.band
        p, j = rows.start + problem.q_offset, cols.start
        # row r and column c of the tile: j + c <= p + r + right, j + c >= p + r - left
        if right is not None and cols.stop - 1 > p + right:
            a.tril_(p + right - j)
        if left is not None and j < rows.stop - 1 + problem.q_offset - left:
            a.triu_(p - left - j)
        return a

    def keep(self, rows: slice, cols: slice) -> Tensor:
        """Dropout's factor of a tile, 0 or 1 / (1 - dropout_p): (heads, rows, cols)."""
        problem, seed = self.call.problem, self.call.seed
        assert seed is not None
        batch, head, i, j = problem.origin
        origin = (batch + self.slab.batch.start, head + self.slab.heads.start, i + rows.start, j + cols.start)
        heads = range(problem.nheads)[self.slab.heads]
        batches = range(problem.batch)[self.slab.batch]
        shape = (len(batches), len(heads), rows.stop - rows.start, cols.stop - cols.start)
        kept = keep_mask(seed, problem.dropout_p, origin, shape).flatten(0, 1)
        return kept.to(problem.compute_dtype).mul_(1.0 / (1.0 - problem.dropout_p))


def _block(problem: Problem) -> int:
    """Side of a tile: its scores, 1 MB in float32, stay in a core's cache."""
    return 512


def _strip(problem: Problem) -> int:
    """Rows of a strip where a tile is partly masked: fewer waste less work, more make better matrix products."""
    return 128


def _within(part: slice, whole: slice) -> slice:
    """`part` counted from the start of `whole`."""
    return slice(part.start - whole.start, part.stop - whole.start)


def _ranges(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]
