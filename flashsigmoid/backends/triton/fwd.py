"""The forward kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import add_product, keep_mask, key_parts, load_bias, load_rows, locate, store_rows, to_registers, weights

# a kernel is compiled for dtypes, options and the alignment of q, k, v and dout, not for a size
NOT_SPECIALIZED = [
    "bias_stride_b", "bias_stride_h", "bias_stride_m", "slopes_stride_b", "slopes_stride_h", "sums_stride_b",
    "sums_stride_h", "sums_stride_m", "origin_b", "origin_h", "origin_m", "origin_n", "batch", "nheads", "group",
    "seqlen_q", "seqlen_k", "q_offset", "left", "right", "threshold",
]  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _fwd_kernel(
    q, k, v, out, bias, slopes, seed, cu_q, cu_k,
    q_strides, k_strides, v_strides, out_strides,
    bias_stride_b, bias_stride_h, bias_stride_m, slopes_stride_b, slopes_stride_h,
    origin_b, origin_h, origin_m, origin_n,
    batch, nheads, group, seqlen_q, seqlen_k, q_offset, left, right, c, b, out_scale, keep_scale, threshold,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORMULA: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROW_BIAS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_QUADS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    SEQUENCES: tl.constexpr, IN_REGISTERS: tl.constexpr, IS_LONG: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one head of out: O = sum over key blocks of sigmoid(c Q K^T + b - slope |p - j|) V.

    Grid: (blocks of rows * nheads * batch,), or (blocks of all sequences * nheads,) where SEQUENCES > 0 says that rows
    are packed; of one head the rows that see most keys come first. Accumulator: float32. Nothing is saved for backward.
    q, k, v are pointers, or tensor descriptors of (batch, nheads, seqlen, head_dim), which read zeros out of bounds: a
    key beyond the last has a zero value row and adds nothing, so only the band of visible keys needs a mask.
    """
    if SEQUENCES:
        blocks = tl.cdiv(seqlen_q, BLOCK_M) + batch
    else:
        blocks = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % blocks
    head = (pid // blocks) % nheads
    sequence = pid // (blocks * nheads)
    lead = sequence  # index into the first dimension
    start_q = 0
    start_k = 0
    stop_q = seqlen_q
    stop_k = seqlen_k
    if SEQUENCES:
        sequence, block, start_q, stop_q = locate(block, cu_q, batch, BLOCK_M, SEQUENCES)
        if sequence >= batch:
            zeros = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
            stop = tl.minimum(stop_q, seqlen_q)
            store_rows(out, out_strides, lead, head, start_q, stop, zeros, BLOCK_M, HEAD_DIM_V, BLOCK_DV)
            return
        start_k = tl.load(cu_k + sequence)
        stop_k = tl.load(cu_k + sequence + 1)
        q_offset = (stop_k - start_k) - (stop_q - start_q)
    rows, keys = stop_q - start_q, stop_k - start_k
    if HAS_RIGHT:
        block = tl.cdiv(rows, BLOCK_M) - 1 - block
    m = block * BLOCK_M
    head_k = head // group
    offs_m = m + tl.arange(0, BLOCK_M)
    first = m + q_offset  # positions of the first and the last row
    last = tl.minimum(m + BLOCK_M, rows) - 1 + q_offset

    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes + sequence * slopes_stride_b + head * slopes_stride_h).to(tl.float32) * FORMULA.unit
    if HAS_BIAS:
        b = load_bias(
            bias, bias_stride_b, bias_stride_h, bias_stride_m, sequence, head, start_q + m, stop_q, BLOCK_M, FORMULA,
            HAS_ROW_BIAS,
        )  # fmt: skip
    if HAS_ROW_BIAS:
        b = b[:, None]
    if SEQUENCES and DESCRIPTORS and not IN_REGISTERS:
        # rows of the next sequence, never stored, have no say in which formula a warp takes
        b = tl.where((offs_m < rows)[:, None], b, float("-inf"))

    q_block = load_rows(q, q_strides, lead, head, start_q + m, stop_q, BLOCK_M, HEAD_DIM, BLOCK_D, DESCRIPTORS)
    if IN_REGISTERS:
        q_block = to_registers(q_block, offs_m < rows)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    p = (offs_m + q_offset)[:, None]
    lo, whole, rest, stop = key_parts(first, last, keys, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    for part in tl.static_range(0 if HAS_LEFT else 1, 3):
        start, end = (lo, tl.minimum(whole, stop)) if part == 0 else ((whole, rest) if part == 1 else (rest, stop))
        for n in range(start, end, BLOCK_N):
            row = start_k + n
            k_block = load_rows(
                k, k_strides, lead, head_k, row, stop_k, BLOCK_N, HEAD_DIM, BLOCK_D, DESCRIPTORS,
                SEQUENCES, part == 1,
            )  # fmt: skip
            s = tl.dot(q_block, k_block.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
            j = (n + tl.arange(0, BLOCK_N))[None, :]
            a = weights(
                s, p, j, c, b, slope, left, right, FORMULA, HAS_SLOPES, HAS_LEFT and part != 1, HAS_RIGHT and part != 1
            )
            if HAS_DROPOUT:
                kept = keep_mask(
                    seed, threshold, sequence + origin_b, head + origin_h, m + origin_m, n + origin_n,
                    BLOCK_M, BLOCK_N, HAS_QUADS,
                )  # fmt: skip
                a = tl.where(kept, a * keep_scale, 0.0)
            v_block = load_rows(
                v, v_strides, lead, head_k, row, stop_k, BLOCK_N, HEAD_DIM_V, BLOCK_DV, DESCRIPTORS,
                SEQUENCES, part == 1,
            )  # fmt: skip
            acc = add_product(acc, a.to(v_block.dtype), v_block, PRECISION, IS_LONG)

    acc *= out_scale
    store_rows(out, out_strides, lead, head, start_q + m, stop_q, acc, BLOCK_M, HEAD_DIM_V, BLOCK_DV)
