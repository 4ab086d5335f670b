"""The backward kernel: dK and dV by blocks of keys, dQ by blocks of rows. No atomics: the same bits at every call.

Nothing of the forward is needed but its inputs. One pass that adds dQ atomically needs five products instead of seven,
and was slower wherever it was measured (docs/log.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    add_product,
    keep_mask,
    key_parts,
    load_bias,
    load_rows,
    locate,
    row_parts,
    store_rows,
    to_registers,
    weights,
)
from .fwd import NOT_SPECIALIZED


@triton.jit
def _dkdv(
    pid, dout, q, k, v, dk, dv, bias, slopes, seed, cu_q, cu_k,
    dout_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides,
    bias_stride_b, bias_stride_h, bias_stride_m, slopes_stride_b, slopes_stride_h,
    origin_b, origin_h, origin_m, origin_n,
    batch, nheads, group, seqlen_q, seqlen_k, q_offset, left, right, c, b, scale, keep_scale, threshold,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORMULA: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROW_BIAS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_QUADS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    SEQUENCES: tl.constexpr, IN_REGISTERS: tl.constexpr, IS_LONG: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one key head: dV = A^T dO, dK = scale dS^T Q, over all rows and all query heads of the group.

        dS = (dO V^T) * A * (1 - A)        scores are transposed, (BLOCK_N, BLOCK_M)

    pid counts blocks of keys * nheads_k * batch, or blocks of all sequences * nheads_k where rows are packed.
    Accumulators: float32.
    """
    nheads_k = nheads // group
    if SEQUENCES:
        blocks = tl.cdiv(seqlen_k, BLOCK_N) + batch
    else:
        blocks = tl.cdiv(seqlen_k, BLOCK_N)
    block = pid % blocks
    head_k = (pid // blocks) % nheads_k
    sequence = pid // (blocks * nheads_k)
    lead = sequence
    start_q = 0
    start_k = 0
    stop_q = seqlen_q
    stop_k = seqlen_k
    if SEQUENCES:
        sequence, block, start_k, stop_k = locate(block, cu_k, batch, BLOCK_N, SEQUENCES)
        if sequence >= batch:
            stop = tl.minimum(stop_k, seqlen_k)
            zeros = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            store_rows(dk, dk_strides, lead, head_k, start_k, stop, zeros, BLOCK_N, HEAD_DIM, BLOCK_D)
            zeros = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
            store_rows(dv, dv_strides, lead, head_k, start_k, stop, zeros, BLOCK_N, HEAD_DIM_V, BLOCK_DV)
            return
        start_q = tl.load(cu_q + sequence)
        stop_q = tl.load(cu_q + sequence + 1)
        q_offset = (stop_k - start_k) - (stop_q - start_q)
    rows, keys = stop_q - start_q, stop_k - start_k
    n = block * BLOCK_N
    last = tl.minimum(n + BLOCK_N, keys) - 1
    offs_n = n + tl.arange(0, BLOCK_N)

    k_block = load_rows(k, k_strides, lead, head_k, start_k + n, stop_k, BLOCK_N, HEAD_DIM, BLOCK_D, DESCRIPTORS)
    v_block = load_rows(v, v_strides, lead, head_k, start_k + n, stop_k, BLOCK_N, HEAD_DIM_V, BLOCK_DV, DESCRIPTORS)
    if IN_REGISTERS >= 1:
        k_block = to_registers(k_block, offs_n < keys)
    if IN_REGISTERS >= 2:
        v_block = to_registers(v_block, offs_n < keys)
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    j = offs_n[:, None]
    lo, whole, rest, stop = row_parts(n, last, rows, q_offset, left, right, BLOCK_M, HAS_LEFT, HAS_RIGHT)
    for member in range(0, group):
        head = head_k * group + member
        slope = 0.0
        if HAS_SLOPES:
            slope = tl.load(slopes + sequence * slopes_stride_b + head * slopes_stride_h).to(tl.float32)
            slope *= FORMULA.unit
        if HAS_BIAS and not HAS_ROW_BIAS:
            b = load_bias(
                bias, bias_stride_b, bias_stride_h, bias_stride_m, sequence, head, start_q, stop_q, BLOCK_M, FORMULA,
                False,
            )  # fmt: skip
        for part in tl.static_range(0 if HAS_RIGHT else 1, 3):
            start, end = (lo, tl.minimum(whole, stop)) if part == 0 else ((whole, rest) if part == 1 else (rest, stop))
            for m in range(start, end, BLOCK_M):
                row = start_q + m
                q_block = load_rows(
                    q, q_strides, lead, head, row, stop_q, BLOCK_M, HEAD_DIM, BLOCK_D, DESCRIPTORS,
                    SEQUENCES, part == 1,
                )  # fmt: skip
                s = tl.dot(k_block, q_block.T, input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
                offs_m = m + tl.arange(0, BLOCK_M)
                p = (offs_m + q_offset)[None, :]
                b_m = b
                if HAS_ROW_BIAS:
                    b_m = load_bias(
                        bias, bias_stride_b, bias_stride_h, bias_stride_m, sequence, head, row, stop_q, BLOCK_M,
                        FORMULA, True,
                    )[None, :]  # fmt: skip
                if SEQUENCES and DESCRIPTORS and not IN_REGISTERS:
                    # keys of the next sequence, never stored, have no say in which formula a warp takes
                    b_m = tl.where((offs_n < keys)[:, None], b_m, float("-inf"))
                a = weights(
                    s, p, j, c, b_m, slope, left, right, FORMULA, HAS_SLOPES, HAS_LEFT and part != 1,
                    HAS_RIGHT and part != 1,
                )  # fmt: skip
                dout_block = load_rows(
                    dout, dout_strides, lead, head, row, stop_q, BLOCK_M, HEAD_DIM_V, BLOCK_DV, DESCRIPTORS,
                    SEQUENCES, part == 1,
                )  # fmt: skip
                dropped = a
                if HAS_DROPOUT:
                    kept = keep_mask(
                        seed, threshold, sequence + origin_b, head + origin_h, m + origin_m, n + origin_n,
                        BLOCK_M, BLOCK_N, HAS_QUADS,
                    )  # fmt: skip
                    keep = tl.where(kept, keep_scale, 0.0).T  # numbers: AMD's threads exchange no single bits
                    dropped = a * keep
                dv_acc = add_product(dv_acc, dropped.to(dout_block.dtype), dout_block, PRECISION, IS_LONG)
                da = tl.dot(v_block, dout_block.T, input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
                if HAS_DROPOUT:
                    da *= keep
                ds = (a - a * a) * da
                dk_acc = add_product(dk_acc, ds.to(q_block.dtype), q_block, PRECISION, IS_LONG)
    row = start_k + n
    store_rows(dk, dk_strides, lead, head_k, row, stop_k, dk_acc * scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(dv, dv_strides, lead, head_k, row, stop_k, dv_acc, BLOCK_N, HEAD_DIM_V, BLOCK_DV)


@triton.jit
def _dq(
    pid, dout, q, k, v, dq, bias, slopes, row_sums, slope_sums, seed, cu_q, cu_k,
    dout_strides, q_strides, k_strides, v_strides, dq_strides,
    bias_stride_b, bias_stride_h, bias_stride_m, slopes_stride_b, slopes_stride_h,
    sums_stride_b, sums_stride_h, sums_stride_m, origin_b, origin_h, origin_m, origin_n,
    batch, nheads, group, seqlen_q, seqlen_k, q_offset, left, right, c, b, scale, keep_scale, threshold,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORMULA: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROW_BIAS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_QUADS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    SEQUENCES: tl.constexpr, IN_REGISTERS: tl.constexpr, IS_LONG: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one head: dQ = scale dS K over all keys, and the sums of dS and of -dS |p - j| of every row.

    pid as the forward's. Accumulators: float32.
    """
    if SEQUENCES:
        blocks = tl.cdiv(seqlen_q, BLOCK_M) + batch
    else:
        blocks = tl.cdiv(seqlen_q, BLOCK_M)
    block = pid % blocks
    head = (pid // blocks) % nheads
    sequence = pid // (blocks * nheads)
    lead = sequence
    start_q = 0
    start_k = 0
    stop_q = seqlen_q
    stop_k = seqlen_k
    if SEQUENCES:
        sequence, block, start_q, stop_q = locate(block, cu_q, batch, BLOCK_M, SEQUENCES)
        if sequence >= batch:
            zeros = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            stop = tl.minimum(stop_q, seqlen_q)
            store_rows(dq, dq_strides, lead, head, start_q, stop, zeros, BLOCK_M, HEAD_DIM, BLOCK_D)
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
    first = m + q_offset
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
    dout_block = load_rows(
        dout, dout_strides, lead, head, start_q + m, stop_q, BLOCK_M, HEAD_DIM_V, BLOCK_DV, DESCRIPTORS
    )
    if IN_REGISTERS >= 1:
        q_block = to_registers(q_block, offs_m < rows)
    if IN_REGISTERS >= 2:
        dout_block = to_registers(dout_block, offs_m < rows)
    dq_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    sums_slope = tl.zeros((BLOCK_M,), tl.float32)
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
            v_block = load_rows(
                v, v_strides, lead, head_k, row, stop_k, BLOCK_N, HEAD_DIM_V, BLOCK_DV, DESCRIPTORS,
                SEQUENCES, part == 1,
            )  # fmt: skip
            da = tl.dot(dout_block, v_block.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
            if HAS_DROPOUT:
                kept = keep_mask(
                    seed, threshold, sequence + origin_b, head + origin_h, m + origin_m, n + origin_n,
                    BLOCK_M, BLOCK_N, HAS_QUADS,
                )  # fmt: skip
                da = tl.where(kept, da * keep_scale, 0.0)
            ds = (a - a * a) * da
            if HAS_BIAS:
                sums += tl.sum(ds, 1)
            if HAS_SLOPES:
                sums_slope -= tl.sum(ds * tl.abs(p - j).to(tl.float32), 1)
            dq_acc = add_product(dq_acc, ds.to(k_block.dtype), k_block, PRECISION, IS_LONG)

    dq_acc *= scale
    at = lead.to(tl.int64) * sums_stride_b + head.to(tl.int64) * sums_stride_h
    at += (start_q + offs_m).to(tl.int64) * sums_stride_m
    if HAS_BIAS:
        tl.store(row_sums + at, sums, mask=offs_m < rows)
    if HAS_SLOPES:
        tl.store(slope_sums + at, sums_slope, mask=offs_m < rows)
    store_rows(dq, dq_strides, lead, head, start_q + m, stop_q, dq_acc, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_kernel(
    dout, q, k, v, dq, dk, dv, bias, slopes, row_sums, slope_sums, seed, cu_q, cu_k,
    dout_strides, q_strides, k_strides, v_strides, dq_strides, dk_strides, dv_strides,
    bias_stride_b, bias_stride_h, bias_stride_m, slopes_stride_b, slopes_stride_h,
    sums_stride_b, sums_stride_h, sums_stride_m, origin_b, origin_h, origin_m, origin_n,
    batch, nheads, group, seqlen_q, seqlen_k, q_offset, left, right, c, b, scale, keep_scale, threshold,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORMULA: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROW_BIAS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_QUADS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    SEQUENCES: tl.constexpr, IN_REGISTERS: tl.constexpr, IS_LONG: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """PART "dkdv" or "dq"; or "all", short sequences in one launch: the programs of dK dV, then those of dQ.

    Grid: (programs,). A part's results are None in the other's launch.
    """
    pid = tl.program_id(0)
    split = 0
    if PART == "all":
        split = tl.cdiv(seqlen_k, BLOCK_N) * (nheads // group) * batch
    if PART == "dkdv" or (PART == "all" and pid < split):
        _dkdv(
            pid, dout, q, k, v, dk, dv, bias, slopes, seed, cu_q, cu_k,
            dout_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides,
            bias_stride_b, bias_stride_h, bias_stride_m, slopes_stride_b, slopes_stride_h,
            origin_b, origin_h, origin_m, origin_n,
            batch, nheads, group, seqlen_q, seqlen_k, q_offset, left, right, c, b, scale, keep_scale, threshold,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, FORMULA, PRECISION, HAS_BIAS, HAS_ROW_BIAS,
            HAS_SLOPES, HAS_DROPOUT, HAS_QUADS, HAS_LEFT, HAS_RIGHT, DESCRIPTORS, SEQUENCES, IN_REGISTERS, IS_LONG,
        )  # fmt: skip
    else:
        _dq(
            pid - split, dout, q, k, v, dq, bias, slopes, row_sums, slope_sums, seed, cu_q, cu_k,
            dout_strides, q_strides, k_strides, v_strides, dq_strides,
            bias_stride_b, bias_stride_h, bias_stride_m, slopes_stride_b, slopes_stride_h,
            sums_stride_b, sums_stride_h, sums_stride_m, origin_b, origin_h, origin_m, origin_n,
            batch, nheads, group, seqlen_q, seqlen_k, q_offset, left, right, c, b, scale, keep_scale, threshold,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, FORMULA, PRECISION, HAS_BIAS, HAS_ROW_BIAS,
            HAS_SLOPES, HAS_DROPOUT, HAS_QUADS, HAS_LEFT, HAS_RIGHT, DESCRIPTORS, SEQUENCES, IN_REGISTERS, IS_LONG,
        )  # fmt: skip
