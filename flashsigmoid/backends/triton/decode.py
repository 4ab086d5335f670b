"""The kernels of a call against a cache: attention to a part of the keys, the sum of the parts, appending and RoPE."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import add_product, weights

# of seqlen_q one is a class of its own: nothing is divided by it
NOT_SPECIALIZED = [
    "batch", "nheads", "nheads_k", "capacity", "new", "splits", "left", "right",
    "part_stride", "bias_stride_b", "bias_stride_h", "bias_stride_m", "slopes_stride_b", "slopes_stride_h",
]  # fmt: skip
APPEND_NOT_SPECIALIZED = ["nheads", "nheads_k", "seqlen_new", "seqlen_q", "capacity", "behind"]


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """Wait for all that the kernel before has written, and let the next one be launched, which waits in its turn."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def places(pages, pages_strides, sequence, n, stop, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The two leading indices of the keys [n, n + BLOCK) of a sequence, int64 (BLOCK,); BLOCK = 1 is any position.

    Contiguous (PAGE_SIZE 0) they are the sequence and the position, else page and row of the page.
    """
    offs = n + tl.arange(0, BLOCK)
    if PAGE_SIZE == 0:
        page = tl.full((BLOCK,), 0, tl.int64) + sequence
        row = offs.to(tl.int64)
    else:
        table = pages + sequence.to(tl.int64) * pages_strides[0]
        row = (offs % PAGE_SIZE).to(tl.int64)
        # of a block in one page too: a single number would be waited for in every turn of the loop
        page = tl.load(table + (offs // PAGE_SIZE) * pages_strides[1], mask=offs < stop, other=0).to(tl.int64)
    return page, row


@triton.jit
def load_keys(x, strides, page, row, head, keep, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """(BLOCK_N, BLOCK_DIM) of one head of a cache, zeros beyond DIM and where not kept."""
    cols = tl.arange(0, BLOCK_DIM)
    start = page * strides[0] + row * strides[1] + head.to(tl.int64) * strides[2]  # (BLOCK_N,)
    mask = keep[:, None]
    if DIM != BLOCK_DIM:
        mask = mask & (cols < DIM)[None, :]
    return tl.load(x + start[:, None] + cols[None, :] * strides[3], mask=mask, other=0.0)


@triton.jit
def divide(
    keys, first, last, left, right, splits, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """The keys that positions first to last see, in parts of whole blocks: (lo, stop, keys of a part, parts in use)."""
    lo = 0
    stop = keys
    if HAS_RIGHT:
        stop = tl.minimum(keys, last + right + 1)
    if HAS_LEFT:
        lo = tl.maximum(0, first - left) // BLOCK_N * BLOCK_N
    blocks = tl.cdiv(tl.maximum(0, stop - lo), BLOCK_N)
    each = tl.maximum(1, tl.cdiv(blocks, splits))
    return lo, stop, each * BLOCK_N, tl.cdiv(blocks, each)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _decode_kernel(
    q, k, v, out, seqlens, pages, bias, slopes,
    q_strides, k_strides, v_strides, pages_strides,
    bias_stride_b, bias_stride_h, bias_stride_m, slopes_stride_b, slopes_stride_h,
    batch, nheads_k, seqlen_q, capacity, new, splits, left, right, part_stride, c, b, out_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORMULA: tl.constexpr,
    PRECISION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, PAGE_SIZE: tl.constexpr, IS_SHARED: tl.constexpr, IS_LONG: tl.constexpr,
    REDUCTION: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one key head: O = sum over one part of the keys of sigmoid(c Q K^T + b - slope |p - j|) V.

    A row is a query and one of the GROUP heads that read the key head; a sequence has seqlens + new keys, at most
    `capacity`, and query i the position p = i + seqlens + new - seqlen_q. IS_SHARED: all sequences read the same
    `capacity` keys, which stand in front of their own, and their rows lie one after the other.

    Grid: (blocks of rows * nheads_k * splits * sequences,), heads of a key beside each other. Accumulator: float32.
    REDUCTION "whole" writes out, "parts" a float32 slot of `part_stride` numbers for every part that is in use,
    "atomic" adds to one that was zero.
    """
    begin(OVERLAPS)
    rows = GROUP * seqlen_q
    if IS_SHARED:
        rows *= batch
    blocks = tl.cdiv(rows, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % blocks
    head_k = (pid // blocks) % nheads_k
    part = (pid // (blocks * nheads_k)) % splits
    sequence = pid // (blocks * nheads_k * splits)  # of the keys
    nheads = nheads_k * GROUP

    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = offs_m < rows
    query = offs_m // GROUP
    head = head_k * GROUP + offs_m % GROUP
    if IS_SHARED:
        lead = query // seqlen_q  # (BLOCK_M,)
        query = query % seqlen_q
        seqlen = tl.load(seqlens + lead, mask=is_row, other=0).to(tl.int32)
        p = query + seqlen + (new + capacity - seqlen_q)  # of the keys after the shared ones
        keys = capacity
        first = tl.min(tl.where(is_row, p, 2147483647), 0)
        last = tl.max(tl.where(is_row, p, -2147483647), 0)
        # all parts, whatever the rows see: the sum need not ask
        lo, stop, each, used = divide(keys, 0, keys, 0, 0, splits, BLOCK_N, False, False)
    else:
        lead = sequence
        seqlen = tl.load(seqlens + sequence).to(tl.int32)
        keys = tl.minimum(seqlen + new, capacity)
        offset = seqlen + new - seqlen_q
        p = query + offset
        first = block * BLOCK_M // GROUP + offset
        last = (tl.minimum(block * BLOCK_M + BLOCK_M, rows) - 1) // GROUP + offset
        lo, stop, each, used = divide(
            keys, offset, offset + seqlen_q - 1, left, right, splits, BLOCK_N, HAS_LEFT, HAS_RIGHT
        )
    if REDUCTION != "whole":  # noqa: SIM102, the compiler wants what is constant by itself
        if part >= used:
            return
    start = lo + part * each
    end = tl.minimum(start + each, stop)
    if HAS_RIGHT:
        end = tl.minimum(end, last + right + 1)
    if HAS_LEFT:
        start = tl.maximum(start, tl.maximum(0, first - left) // BLOCK_N * BLOCK_N)

    row = (lead + tl.zeros((BLOCK_M,), tl.int32)).to(tl.int64)
    slope = 0.0
    if HAS_SLOPES:
        where = row * slopes_stride_b + head * slopes_stride_h
        slope = (tl.load(slopes + where, mask=is_row, other=0.0).to(tl.float32) * FORMULA.unit)[:, None]
    if HAS_BIAS:
        where = row * bias_stride_b + head.to(tl.int64) * bias_stride_h + query * bias_stride_m
        bias_m = tl.load(bias + where, mask=is_row, other=float("-inf")).to(tl.float32)
        b = (bias_m * FORMULA.unit + FORMULA.shift)[:, None]

    cols = tl.arange(0, BLOCK_D)
    where = row * q_strides[0] + query.to(tl.int64) * q_strides[1] + head.to(tl.int64) * q_strides[2]
    mask = is_row[:, None] & (cols < HEAD_DIM)[None, :]
    q_block = tl.load(q + where[:, None] + cols[None, :] * q_strides[3], mask=mask, other=0.0)  # (BLOCK_M, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for n in range(start, end, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        page, place = places(pages, pages_strides, sequence, n, keys, PAGE_SIZE, BLOCK_N)
        keep = offs_n < keys
        k_block = load_keys(k, k_strides, page, place, head_k, keep, HEAD_DIM, BLOCK_D)
        s = tl.dot(q_block, k_block.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        a = weights(s, p[:, None], offs_n[None, :], c, b, slope, left, right, FORMULA, HAS_SLOPES, HAS_LEFT, HAS_RIGHT)
        v_block = load_keys(v, v_strides, page, place, head_k, keep, HEAD_DIM_V, BLOCK_DV)
        acc = add_product(acc, a.to(v_block.dtype), v_block, PRECISION, IS_LONG)

    acc *= out_scale
    cols = tl.arange(0, BLOCK_DV)
    where = ((row * seqlen_q + query) * nheads + head) * HEAD_DIM_V
    if REDUCTION == "parts":
        where += part.to(tl.int64) * part_stride
    ptrs = out + where[:, None] + cols[None, :]
    mask = is_row[:, None] & (cols < HEAD_DIM_V)[None, :]
    if REDUCTION == "atomic":
        tl.atomic_add(ptrs, acc, mask=mask, sem="relaxed")
    else:
        tl.store(ptrs, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _sum_kernel(
    parts, out, seqlens, nheads, seqlen_q, capacity, new, splits, left, right, part_stride,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, IS_SHARED: tl.constexpr, REDUCTION: tl.constexpr, SLOTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One row of out, rounded: the sum of the parts in use, SLOTS at a time, always in one order. Grid: (rows,)."""
    begin(OVERLAPS)
    pid = tl.program_id(0)
    used = 1  # "atomic"
    if REDUCTION == "parts":
        if IS_SHARED:
            _, _, _, used = divide(capacity, 0, capacity, 0, 0, splits, BLOCK_N, False, False)
        else:
            seqlen = tl.load(seqlens + pid // (seqlen_q * nheads)).to(tl.int32)
            keys, offset = tl.minimum(seqlen + new, capacity), seqlen + new - seqlen_q
            _, _, _, used = divide(
                keys, offset, offset + seqlen_q - 1, left, right, splits, BLOCK_N, HAS_LEFT, HAS_RIGHT
            )
    cols = tl.arange(0, BLOCK_DV)
    slots = tl.arange(0, SLOTS)
    ptrs = parts + pid.to(tl.int64) * HEAD_DIM_V + slots.to(tl.int64)[:, None] * part_stride + cols[None, :]
    total = tl.zeros((BLOCK_DV,), tl.float32)
    for slot in range(0, used, SLOTS):
        mask = (slot + slots < used)[:, None] & (cols < HEAD_DIM_V)[None, :]
        total += tl.sum(tl.load(ptrs + tl.cast(slot, tl.int64) * part_stride, mask=mask, other=0.0), 0)
    tl.store(out + pid.to(tl.int64) * HEAD_DIM_V + cols, total.to(out.dtype.element_ty), mask=cols < HEAD_DIM_V)


@triton.jit
def turned(
    x, start, step, heads, is_head, angle, cos, sin, cos_step, sin_step,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """(heads, BLOCK_DIM) in float32, of pairs (x_i, x_{i + HALF}) or (x_{2i}, x_{2i+1}) turned by row `angle`."""
    cols = tl.arange(0, BLOCK_DIM)
    ptrs = x + start + heads[:, None]
    value = tl.load(ptrs + cols[None, :] * step, mask=is_head[:, None] & (cols < DIM)[None, :], other=0.0)
    value = value.to(tl.float32)
    if HALF > 0:
        if INTERLEAVED:
            other, index, is_left = cols ^ 1, cols // 2, cols % 2 == 0
        else:
            other, index, is_left = tl.where(cols < HALF, cols + HALF, cols - HALF), cols % HALF, cols < HALF
        inside = cols < 2 * HALF
        partner = tl.load(ptrs + other[None, :] * step, mask=is_head[:, None] & inside[None, :], other=0.0)
        cos_row = tl.load(cos + angle * cos_step[0] + index * cos_step[1], mask=inside, other=1.0).to(tl.float32)
        sin_row = tl.load(sin + angle * sin_step[0] + index * sin_step[1], mask=inside, other=0.0).to(tl.float32)
        value = value * cos_row[None, :] + partner.to(tl.float32) * tl.where(is_left, -sin_row, sin_row)[None, :]
    return value


@triton.jit(do_not_specialize=APPEND_NOT_SPECIALIZED)
def _append_kernel(
    k, v, q, k_cache, v_cache, q_turned, seqlens, pages, cos, sin,
    k_strides, v_strides, q_strides, k_cache_strides, v_cache_strides, pages_strides, cos_strides, sin_strides,
    nheads, nheads_k, seqlen_new, seqlen_q, capacity, behind,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, PAGE_SIZE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one new token: its key, turned, and its value into the cache; or of its query, turned.

    Token t of a sequence stands at seqlens + t in the cache and is turned by row seqlens + t + behind of the tables.
    The last seqlen_q tokens have a query. Grid: (blocks of key heads, then with HALF of query heads, * tokens,). What
    is beyond the capacity is not written.
    """
    blocks_k = tl.cdiv(nheads_k, HEADS)
    blocks = blocks_k
    if HALF > 0:
        blocks += tl.cdiv(nheads, HEADS)
    pid = tl.program_id(0)
    block = pid % blocks
    token = (pid // blocks) % seqlen_new
    sequence = pid // (blocks * seqlen_new)
    position = tl.load(seqlens + sequence).to(tl.int32) + token
    if position >= capacity:
        return
    angle = position.to(tl.int64) + behind
    lead, t = sequence.to(tl.int64), token.to(tl.int64)
    cols_d, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    if block < blocks_k:
        heads = (block * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        is_head = heads < nheads_k
        key = turned(
            k, lead * k_strides[0] + t * k_strides[1], k_strides[3], heads * k_strides[2], is_head, angle, cos, sin,
            cos_strides, sin_strides, HALF, INTERLEAVED, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        value = turned(
            v, lead * v_strides[0] + t * v_strides[1], v_strides[3], heads * v_strides[2], is_head, angle, cos, sin,
            cos_strides, sin_strides, 0, False, HEAD_DIM_V, BLOCK_DV,
        )  # fmt: skip
        page, row = places(pages, pages_strides, sequence, position, capacity, PAGE_SIZE, 1)
        k_start = page * k_cache_strides[0] + row * k_cache_strides[1] + heads * k_cache_strides[2]  # (HEADS,)
        v_start = page * v_cache_strides[0] + row * v_cache_strides[1] + heads * v_cache_strides[2]
        mask_d = is_head[:, None] & (cols_d < HEAD_DIM)[None, :]
        mask_v = is_head[:, None] & (cols_v < HEAD_DIM_V)[None, :]
        k_ptrs = k_cache + k_start[:, None] + cols_d[None, :] * k_cache_strides[3]
        v_ptrs = v_cache + v_start[:, None] + cols_v[None, :] * v_cache_strides[3]
        tl.store(k_ptrs, key.to(k_cache.dtype.element_ty), mask=mask_d)
        tl.store(v_ptrs, value.to(v_cache.dtype.element_ty), mask=mask_v)
    elif token >= seqlen_new - seqlen_q:
        heads = ((block - blocks_k) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        is_head = heads < nheads
        query = t - (seqlen_new - seqlen_q)
        if HALF > 0:
            value = turned(
                q, lead * q_strides[0] + query * q_strides[1], q_strides[3], heads * q_strides[2], is_head, angle,
                cos, sin, cos_strides, sin_strides, HALF, INTERLEAVED, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            start = ((lead * seqlen_q + query) * nheads + heads) * HEAD_DIM
            mask = is_head[:, None] & (cols_d < HEAD_DIM)[None, :]
            ptrs = q_turned + start[:, None] + cols_d[None, :]
            tl.store(ptrs, value.to(q_turned.dtype.element_ty), mask=mask)
