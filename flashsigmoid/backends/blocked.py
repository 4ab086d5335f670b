"""Sigmoid attention in blocks of plain PyTorch: O(seqlen) memory, forward and backward, on any device torch has.

A tile of scores is two matrix products and a sigmoid, and tiles add: no row statistics, no rescaling, nothing saved.
Each operation takes the same tile of several heads at once, so that every core has a whole tile of its own to work on.
Scores and accumulators are float32 (float64 for float64 inputs): rounded to bfloat16 a score near -8 is off by several
percent of its weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .philox import keep_mask
from .problem import Problem, bias_rows

NAME = "blocked"
PACKED = False
ALIGNED = False

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input


def unsupported(problem: Problem, direction: str = "forward") -> str | None:
    """Every call, on every device."""
    return None


def formula(problem: Problem) -> str:
    """torch.sigmoid is the only formula, and as fast as any other in plain torch."""
    dtype = str(problem.compute_dtype).removeprefix("torch.")
    asked = "; sigmoid='fast' changes nothing here" if problem.sigmoid == "fast" else ""
    return f"exact: torch.sigmoid in {dtype}{asked}"


@dataclass(frozen=True)
class Slab:
    """The heads that one operation takes at once: some heads of one sequence, or all heads of some sequences."""

    batch: slice
    heads: slice

    def of(self, x: Tensor) -> Tensor:
        """(batch, seqlen, nheads, dim) -> (heads of the slab, seqlen, dim), a view of one sequence, else a copy."""
        return x[self.batch, :, self.heads].transpose(1, 2).flatten(0, 1)

    def rows(self, x: Tensor | None) -> Tensor | None:
        """(batch, nheads, ...) -> (heads of the slab, ...), a view where x is contiguous."""
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
    shape = (problem.batch, problem.seqlen_q, problem.nheads, problem.head_dim_v)
    out = q.new_empty(shape, dtype=problem.result_dtype)
    for slab in call.slabs:
        tiles = _Tiles(call, slab)
        for block in call.row_blocks:
            acc = call.scratch("acc", tiles.heads, block.stop - block.start, problem.head_dim_v).zero_()
            for rows, cols in (tile for key_block in call.key_blocks for tile in call.tiles(block, key_block)):
                a = tiles.weights(rows, cols)
                if seed is not None:
                    a *= tiles.keep(rows, cols)
                call.accumulate(acc, rows, block, a, _part(tiles.v, cols))
            slab.put(out, block, acc)
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
    # a key head's gradient is the sum over its query heads, each of which is computed on its own
    dq, dk, dv = (x.new_empty(*x.shape[:2], problem.nheads, x.shape[3]) for x in (call.q, call.k, call.v))
    if problem.group == 1:
        dk, dv = dk.to(problem.result_dtype), dv.to(problem.result_dtype)
    dq = dq.to(problem.result_dtype)
    heads = (problem.batch, problem.nheads)
    row_sums = None if bias is None else call.q.new_zeros(*heads, problem.seqlen_q)
    dslopes = None if slopes is None else call.q.new_zeros(heads)
    for slab in call.slabs:
        tiles = _Tiles(call, slab)
        dout_heads = slab.of(dout)
        row_sums_heads, dslopes_heads = slab.rows(row_sums), slab.rows(dslopes)
        dq_blocks = [tiles.q.new_zeros(tiles.heads, x.stop - x.start, problem.head_dim) for x in call.row_blocks]
        for key_block in call.key_blocks:
            size = key_block.stop - key_block.start
            dk_block = call.scratch("dk", tiles.heads, size, problem.head_dim).zero_()
            dv_block = call.scratch("dv", tiles.heads, size, problem.head_dim_v).zero_()
            for row_block, dq_block in zip(call.row_blocks, dq_blocks, strict=True):
                for rows, cols in call.tiles(row_block, key_block):
                    q_tile, dout_tile = _part(tiles.q, rows), _part(dout_heads, rows)
                    k_tile, v_tile = _part(tiles.k, cols), _part(tiles.v, cols)
                    a = tiles.weights(rows, cols)
                    da = torch.bmm(dout_tile, v_tile.mT, out=call.scratch("da", *a.shape))
                    if seed is None:
                        call.accumulate(dv_block, cols, key_block, a.mT, dout_tile)
                    else:
                        keep = tiles.keep(rows, cols)
                        call.accumulate(dv_block, cols, key_block, (a * keep).mT, dout_tile)
                        da *= keep
                    ds = _sigmoid_backward(da, a, grad_input=da)  # da * a * (1 - a)
                    call.accumulate(dq_block, rows, row_block, ds, k_tile, problem.scale)
                    call.accumulate(dk_block, cols, key_block, ds.mT, q_tile, problem.scale)
                    if row_sums_heads is not None:
                        row_sums_heads[:, rows] += ds.sum(-1)
                    if dslopes_heads is not None:
                        dslopes_heads -= torch.mul(ds, call.distance(rows, cols), out=a).sum((1, 2))
            slab.put(dk, key_block, dk_block)
            slab.put(dv, key_block, dv_block)
        for row_block, dq_block in zip(call.row_blocks, dq_blocks, strict=True):
            slab.put(dq, row_block, dq_block)
    if problem.group > 1:
        dk, dv = (x.unflatten(2, (problem.nheads_k, problem.group)).sum(3).to(problem.result_dtype) for x in (dk, dv))
    return dq, dk, dv, row_sums, None if dslopes is None else dslopes[..., None]


class _Call:
    """One call's inputs in the compute dtype, and how its (batch, head), rows and keys are divided."""

    def __init__(self, problem, q, k, v, bias, slopes, seed) -> None:
        dtype = problem.compute_dtype
        heads = (problem.batch, problem.nheads)
        self.problem: Problem = problem
        self.band = problem.band
        self.seed: Tensor | None = seed
        self.q, self.k, self.v = (x.to(dtype) for x in (q, k, v))
        if problem.group > 1:
            # a copy for every query head, O(seqlen): the tiles below know one kind of head
            index = torch.arange(problem.nheads, device=q.device) // problem.group
            self.k, self.v = (x.index_select(2, index) for x in (self.k, self.v))
        # (batch, nheads, seqlen_q or 1), (batch, nheads)
        self.bias = None if bias is None else bias_rows(bias.to(dtype), *heads)
        self.slopes = None if slopes is None else slopes.to(dtype).expand(heads)
        self.constant = self.q.new_full((1,), problem.sigmoid_bias or 0.0)  # b where it is a number
        self._memory: dict[str, Tensor] = {}

        rows, keys = _tile(problem)
        self.row_blocks = _ranges(0, problem.seqlen_q, rows)
        self.key_blocks = _ranges(0, problem.seqlen_k, keys)
        self.slabs = _slabs(problem, min(rows, problem.seqlen_q) * min(keys, problem.seqlen_k))

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory, the same at every call with this name: fresh pages cost time."""
        size = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size:
            memory = self._memory[name] = torch.empty(size, dtype=self.problem.compute_dtype, device=self.q.device)
        return memory[:size].view(shape)

    def accumulate(self, dest: Tensor, part: slice, whole: slice, x: Tensor, y: Tensor, alpha: float = 1.0) -> None:
        """dest += alpha * x y, where dest holds the rows `whole` and the product has its rows `part`."""
        if part == whole:
            dest.baddbmm_(x, y, alpha=alpha)
        else:
            # a slice of dest is not contiguous, which baddbmm_ would take head by head
            product = torch.bmm(x, y, out=self.scratch("product", x.shape[0], x.shape[1], y.shape[2]))
            _part(dest, _within(part, whole)).add_(product, alpha=alpha)

    def tiles(self, rows: slice, cols: slice) -> list[tuple[slice, slice]]:
        """The parts of a tile that are worth computing.

        All of it where every row sees every key; else strips of a few rows with the keys that any of them sees, so that
        half of a causal diagonal is not computed to be masked.
        """
        left, right = self.band
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
        problem = self.call.problem
        s = self.call.scratch("a", self.heads, rows.stop - rows.start, cols.stop - cols.start)
        if self.bias is None:
            bias = self.call.constant
        else:
            bias = (self.bias if self.bias.shape[1] == 1 else self.bias[:, rows])[..., None]
        torch.bmm(_part(self.q, rows), _part(self.k, cols).mT, out=s)
        # b after the product: a fused beta * C starts the sum at b and rounds each term at b's magnitude
        torch.add(bias, s, alpha=problem.scale, out=s)
        if self.slopes is not None:
            s.addcmul_(self.slopes[:, None, None], self.call.distance(rows, cols), value=-1.0)
        a = s.sigmoid_()
        left, right = self.call.band
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


def _tile(problem: Problem) -> tuple[int, int]:
    """(queries, keys) of a tile; on a CPU half a megabyte of scores, which stays in a core's cache (docs/log.md)."""
    return (512, 256) if problem.device == "cpu" else (2048, 2048)


def _strip(problem: Problem) -> int:
    """Rows of a strip where a tile is partly masked: fewer waste less work, more make better matrix products."""
    return 128 if problem.device == "cpu" else 512


def _scores(problem: Problem) -> int:
    """How many scores one operation takes: 2 MB of them for every core, elsewhere 256 MB in all.

    Fewer there with dropout, whose bits take some 50 bytes a score while they are made.
    """
    if problem.device == "cpu":
        return torch.get_num_threads() * 2**19
    return 2**23 if problem.dropout_p else 2**26


def _slabs(problem: Problem, tile: int) -> list[Slab]:
    """The heads divided so that a tile of `tile` scores of every head of a slab makes `_scores` of them, at most."""
    heads = max(1, _scores(problem) // tile)
    if heads < problem.nheads:
        parts = _ranges(0, problem.nheads, heads)
        return [Slab(slice(b, b + 1), part) for b in range(problem.batch) for part in parts]
    return [Slab(part, slice(0, problem.nheads)) for part in _ranges(0, problem.batch, heads // problem.nheads)]


def _part(x: Tensor, rows: slice) -> Tensor:
    """x[:, rows], in half the time."""
    return x.narrow(1, rows.start, rows.stop - rows.start)


def _within(part: slice, whole: slice) -> slice:
    """`part` counted from the start of `whole`."""
    return slice(part.start - whole.start, part.stop - whole.start)


def _ranges(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]
