"""What the kernels share: which sequence a program works on, loading rows, scores to weights, dropout."""

from __future__ import annotations

import triton
import triton.language as tl

from .sigmoid import sigmoid


@triton.jit
def locate(tile, cu_ptr, batch, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr):
    """The sequence whose `tile`-th block (of all sequences' blocks, in order) this is: (sequence, block, start, stop).

    `cu_ptr` (batch + 1,) int32 are the cumulated lengths. After the last block, sequence >= batch and (start, stop)
    is a block of rows that belong to no sequence.
    """
    index = tl.arange(0, SEQUENCES)
    starts = tl.load(cu_ptr + index, mask=index < batch, other=0)
    stops = tl.load(cu_ptr + index + 1, mask=index < batch, other=0)
    blocks = (stops - starts + BLOCK - 1) // BLOCK
    ends = tl.cumsum(blocks, 0)  # (SEQUENCES,)
    sequence = tl.sum((ends <= tile).to(tl.int32), 0)
    is_it = index == sequence
    block = tile - tl.sum(tl.where(is_it, ends - blocks, 0), 0)
    start = tl.sum(tl.where(is_it, starts, 0), 0)
    stop = tl.sum(tl.where(is_it, stops, 0), 0)
    if sequence >= SEQUENCES:
        block = 0
        start = tl.max(stops, 0) + (tile - tl.max(ends, 0)) * BLOCK
        stop = start + BLOCK
    return sequence, block, start, stop


@triton.jit
def load_rows(
    x,
    strides,
    batch,
    head,
    row,
    stop,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    SEQUENCES: tl.constexpr = 0,
    IS_WHOLE: tl.constexpr = False,
):
    """Rows [row, row + BLOCK) of one head, (BLOCK, BLOCK_DIM); zeros beyond DIM, and from `stop` on unless IS_WHOLE.

    A descriptor gives zeros beyond the tensor, but the end of one of SEQUENCES packed ones is not the tensor's.
    """
    offs = tl.arange(0, BLOCK)
    if DESCRIPTOR:
        block = x.load([batch, head, row, 0]).reshape(BLOCK, BLOCK_DIM)
        if SEQUENCES > 0 and not IS_WHOLE:
            block = tl.where((row + offs < stop)[:, None], block, 0.0)
        return block
    else:
        cols = tl.arange(0, BLOCK_DIM)
        start = batch.to(tl.int64) * strides[0] + row.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]
        ptrs = x + start + offs.to(tl.int64)[:, None] * strides[1] + cols.to(tl.int64)[None, :] * strides[3]
        keep = tl.full((BLOCK, 1), True, tl.int1) if IS_WHOLE else (row + offs < stop)[:, None]
        if DIM != BLOCK_DIM:
            return tl.load(ptrs, mask=keep & (cols < DIM)[None, :], other=0.0)
        elif IS_WHOLE:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=keep, other=0.0)


@triton.jit
def store_rows(
    x,
    strides,
    batch,
    head,
    row,
    stop,
    value,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Write (BLOCK, BLOCK_DIM) to the rows [row, stop) of one head, in the dtype of x."""
    offs = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_DIM)
    start = batch.to(tl.int64) * strides[0] + row.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]
    ptrs = x + start + offs.to(tl.int64)[:, None] * strides[1] + cols.to(tl.int64)[None, :] * strides[3]
    keep = (row + offs < stop)[:, None] & (cols < DIM)[None, :]
    tl.store(ptrs, value.to(x.dtype.element_ty), mask=keep)


@triton.jit
def to_registers(x, keep):
    """x, with its rows that are not kept zero (which they are): a computed left operand is read from registers.

    Loaded ones stay in shared memory, whose bandwidth then bounds the products of narrow blocks.
    """
    return tl.where(keep[:, None], x, 0.0)


@triton.jit
def load_bias(
    bias, stride_b, stride_h, stride_m, batch, head, row, stop, BLOCK: tl.constexpr, FORMULA: tl.constexpr,
    IS_ROW: tl.constexpr,
):  # fmt: skip
    """b of one head in the formula's units: a number, or if IS_ROW (BLOCK,) of the rows [row, stop)."""
    start = bias + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    if IS_ROW:
        offs = tl.arange(0, BLOCK)
        b = tl.load(start + row.to(tl.int64) * stride_m + offs * stride_m, mask=row + offs < stop, other=float("-inf"))
    else:
        b = tl.load(start)
    return b.to(tl.float32) * FORMULA.unit + FORMULA.shift


@triton.jit
def add_product(acc, x, y, PRECISION: tl.constexpr, IS_LONG: tl.constexpr):
    """acc + x y. The matrix units truncate when they add: in a long sum each product is added on its own, rounded."""
    if IS_LONG:
        # not a plain sum, which the compiler would give back to the matrix units
        return tl.fma(tl.dot(x, y, input_precision=PRECISION), 1.0, acc)
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def weights(
    s, p, j, c, b, slope, left, right, FORMULA: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """gain * sigmoid(scale s + b - slope |p - j|), 0 where not p - left <= j <= p + right; p and j broadcast over s.

    c, b and slope are in the formula's units, b with its shift.
    """
    y = s * c + b
    if HAS_SLOPES:
        y -= slope * tl.abs(p - j).to(tl.float32)
    # before the formula: what is not seen, be it NaN, neither decides which one a warp takes nor shares a reciprocal
    if HAS_RIGHT:
        y = tl.where(j <= p + right, y, float("-inf"))
    if HAS_LEFT:
        y = tl.where(j >= p - left, y, float("-inf"))
    return sigmoid(y, FORMULA)


@triton.jit
def key_parts(first, last, keys, left, right, BLOCK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Keys that rows at positions first to last see: blocks cut at the left, whole blocks, blocks cut or short.

    Returns (lo, whole, rest, stop): whole blocks are those from `whole` to `rest`.
    """
    lo = 0
    whole = 0
    stop = keys
    if HAS_RIGHT:
        stop = tl.minimum(keys, last + right + 1)
    if HAS_LEFT:
        lo = tl.maximum(0, first - left) // BLOCK * BLOCK
        whole = tl.maximum(lo, tl.cdiv(tl.maximum(0, last - left), BLOCK) * BLOCK)
    rest = keys
    if HAS_RIGHT:
        rest = tl.minimum(keys, tl.maximum(0, first + right + 1))
    rest = tl.maximum(whole, rest // BLOCK * BLOCK)
    return lo, whole, rest, stop


@triton.jit
def row_parts(
    n, last, rows, q_offset, left, right, BLOCK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """Rows that see any of the keys n to last: blocks cut at the right, whole blocks, blocks cut or short.

    Returns (lo, whole, rest, stop) as `key_parts` does.
    """
    lo = 0
    whole = 0
    stop = rows
    if HAS_RIGHT:
        lo = tl.maximum(0, n - right - q_offset) // BLOCK * BLOCK
        whole = tl.maximum(lo, tl.cdiv(tl.maximum(0, last - right - q_offset), BLOCK) * BLOCK)
    if HAS_LEFT:
        stop = tl.minimum(rows, last + left - q_offset + 1)
    rest = rows
    if HAS_LEFT:
        rest = tl.minimum(rows, tl.maximum(0, n + left - q_offset + 1))
    rest = tl.maximum(whole, rest // BLOCK * BLOCK)
    return lo, whole, rest, stop


@triton.jit
def keep_mask(
    seed_ptr, threshold, batch, head, row, key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_QUADS: tl.constexpr
):
    """Which elements dropout keeps, (BLOCK_M, BLOCK_N) bool, from global indices of the block's first element.

    Element (batch, head, i, j) takes word j % 4 of Philox4x32-10 at the counter (j // 4, i, head, batch), as
    backends/philox.py has it. HAS_QUADS: key is a multiple of 4, so that each counter is computed once.
    """
    seed = tl.load(seed_ptr)
    i = (row + tl.arange(0, BLOCK_M)).to(tl.uint32)[:, None]
    if HAS_QUADS:
        quads = (key // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)[None, :]
        zero = quads * 0 + i * 0
        c2, c3 = zero + head.to(tl.uint32), zero + batch.to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, quads + zero, i + zero, c2, c3, 10)
        bits = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_N)
    else:
        j = (key + tl.arange(0, BLOCK_N))[None, :]
        quads = (j // 4).to(tl.uint32)
        zero = quads * 0 + i * 0
        c2, c3 = zero + head.to(tl.uint32), zero + batch.to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, quads + zero, i + zero, c2, c3, 10)
        word = j % 4
        bits = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return bits >= threshold.to(tl.uint32)
