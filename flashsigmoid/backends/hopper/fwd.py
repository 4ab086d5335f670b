"""The forward kernel for Hopper: one warp loads by TMA, warpgroups of 64 rows multiply by wgmma and take sigmoids.

A sigmoid needs no maximum and no sum of its row, so a warpgroup's loop is two products in flight and one formula.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .partitions import key_blocks, load, locate, pass_by, store, weights

# a kernel is compiled for dtypes, options and head_dim, not for a size
NOT_SPECIALIZED = ["bias_strides", "slopes_strides", "sizes", "band"]


@gluon.jit
def _produce(
    q, k, v, memory, sizes, band,
    WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warp: Q of all warpgroups, then K and V, the last block first, each pair behind one barrier."""
    qs, ks, vs, q_full, full, empty = memory
    block, head, batch = locate(sizes)
    m = block * (64 * WARPGROUPS)
    mbarrier.expect(q_full, WARPGROUPS * q.block_type.nbytes)
    for i in gl.static_range(WARPGROUPS):
        load(q, [batch, head, m + i * 64, 0], q_full, qs.index(i))
    lo, _, _, hi = key_blocks(m, sizes, band, 64 * WARPGROUPS, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    head_k = head // sizes[3]
    for it in range(hi - lo):
        stage = it & (STAGES - 1)
        mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), 2 * k.block_type.nbytes)
        load(k, [batch, head_k, (hi - 1 - it) * BLOCK_N, 0], full.index(stage), ks.index(stage))
        load(v, [batch, head_k, (hi - 1 - it) * BLOCK_N, 0], full.index(stage), vs.index(stage))


@gluon.jit
def _step(
    acc, a, it, q, memory, zero, p, n, c, b, slope, band,
    STAGES: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, FORMULA: gl.constexpr, HAS_SLOPES: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SCORES: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """S of this block, then O += A V of the one before; the weights of this one while that product runs."""
    _, ks, vs, _, full, empty = memory
    stage = it & (STAGES - 1)
    before = (it - 1) & (STAGES - 1)
    mbarrier.wait(full.index(stage), (it // STAGES) & 1)
    s = warpgroup_mma(q, ks.index(stage).reshape([BLOCK_N, DIM]).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(a, vs.index(before).reshape([BLOCK_N, DIM]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    a = weights(s, p, n, c, b, slope, band, BLOCK_N, FORMULA, HAS_SLOPES, HAS_LEFT, HAS_RIGHT, SCORES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(before), count=1)
    return acc, gl.convert_layout(a.to(vs.dtype), OPERAND)


@gluon.jit
def _consume(
    out, bias, slopes, memory, bias_strides, slopes_strides, sizes, band, c, b, out_scale,
    WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, FORMULA: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_ROW_BIAS: gl.constexpr,
    HAS_SLOPES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warpgroup, 64 rows: blocks cut at the right, whole blocks, blocks cut at the left."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    qs, ks, vs, q_full, full, empty = memory
    rows = sizes[4]
    block, head, batch = locate(sizes)
    all_m = block * (64 * WARPGROUPS)
    m = all_m + WARPGROUP * 64
    all_lo, _, _, all_hi = key_blocks(all_m, sizes, band, 64 * WARPGROUPS, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    lo, whole, rest, hi = key_blocks(m, sizes, band, 64, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    offs = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    p = (m + offs + band[0])[:, None]
    slope = 0.0
    if HAS_SLOPES:
        slope = gl.load(slopes + batch * slopes_strides[0] + head * slopes_strides[1]).to(gl.float32) * FORMULA.unit
    if HAS_BIAS:
        bias += batch.to(gl.int64) * bias_strides[0] + head.to(gl.int64) * bias_strides[1]
        if HAS_ROW_BIAS:
            bias += m.to(gl.int64) * bias_strides[2]
            b = gl.load(bias + offs * bias_strides[2], mask=m + offs < rows, other=float("-inf"))[:, None]
        else:
            b = gl.load(bias)
        b = b.to(gl.float32) * FORMULA.unit + FORMULA.shift

    it = pass_by(0, all_hi - hi, full, empty, STAGES)
    acc = gl.zeros([64, DIM], gl.float32, SUMS)
    mbarrier.wait(q_full, 0)
    if lo < hi:
        q = qs.index(WARPGROUP).reshape([64, DIM])
        zero = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
        n = hi - 1
        stage = it & (STAGES - 1)
        mbarrier.wait(full.index(stage), (it // STAGES) & 1)
        k_block = ks.index(stage).reshape([BLOCK_N, DIM]).permute((1, 0))
        s = warpgroup_mma(q, k_block, zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        a = weights(s, p, n * BLOCK_N, c, b, slope, band, BLOCK_N, FORMULA, HAS_SLOPES, HAS_LEFT, HAS_RIGHT, SCORES)
        a = gl.convert_layout(a.to(vs.dtype), OPERAND)
        it += 1
        for part in gl.static_range(0 if HAS_RIGHT else 1, 3 if HAS_LEFT else 2):
            down_to = rest if part == 0 else (whole if part == 1 else lo)
            for _ in range(n - gl.maximum(lo, gl.minimum(down_to, n))):
                n -= 1
                acc, a = _step(
                    acc, a, it, q, memory, zero, p, n * BLOCK_N, c, b, slope, band, STAGES, DIM, BLOCK_N, FORMULA,
                    HAS_SLOPES, HAS_LEFT and part != 1, HAS_RIGHT and part != 1, SCORES, OPERAND,
                )  # fmt: skip
                it += 1
        before = (it - 1) & (STAGES - 1)
        acc = warpgroup_mma(a, vs.index(before).reshape([BLOCK_N, DIM]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(before), count=1)
    pass_by(it, all_hi - all_lo - it, full, empty, STAGES)
    if m < rows:
        # Q is no longer needed; rows beyond the last are not written
        qs.index(WARPGROUP).reshape([64, DIM]).store((acc * out_scale).to(qs.dtype))
        fence_async_shared()
        store(out, [batch, head, m, 0], qs.index(WARPGROUP))
        tma.store_wait(0)


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def _fwd_kernel(
    q, k, v, out, bias, slopes, bias_strides, slopes_strides, sizes, band, c, b, out_scale,
    WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, FORMULA: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_ROW_BIAS: gl.constexpr,
    HAS_SLOPES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """64 * WARPGROUPS rows of one head of out: O = sum over key blocks of sigmoid(c Q K^T + b - slope |p - j|) V.

    Grid: (blocks * nheads * batch,). q, k, v and out are descriptors of (batch, nheads, seqlen, head_dim), in blocks of
    64 rows, k and v of BLOCK_N. sizes: (blocks, together, nheads, group, seqlen_q, seqlen_k), where `together` divides
    nheads * batch; band: (q_offset, left, right). STAGES is a power of two. Accumulator: float32.
    """
    qs = gl.allocate_shared_memory(q.dtype, [WARPGROUPS, 1, 1, 64, DIM], q.layout)
    ks = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, DIM], k.layout)
    vs = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, DIM], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    fence_async_shared()
    memory = (qs, ks, vs, q_full, full, empty)
    if WARPGROUPS == 2:
        gl.warp_specialize([
            (_consume, (
                out, bias, slopes, memory, bias_strides, slopes_strides, sizes, band, c, b, out_scale, 0, WARPGROUPS,
                STAGES, DIM, BLOCK_N, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_consume, (
                out, bias, slopes, memory, bias_strides, slopes_strides, sizes, band, c, b, out_scale, 1, WARPGROUPS,
                STAGES, DIM, BLOCK_N, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_produce, (q, k, v, memory, sizes, band, WARPGROUPS, STAGES, BLOCK_N, HAS_LEFT, HAS_RIGHT)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    elif WARPGROUPS == 3:
        gl.warp_specialize([
            (_consume, (
                out, bias, slopes, memory, bias_strides, slopes_strides, sizes, band, c, b, out_scale, 0, WARPGROUPS,
                STAGES, DIM, BLOCK_N, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_consume, (
                out, bias, slopes, memory, bias_strides, slopes_strides, sizes, band, c, b, out_scale, 1, WARPGROUPS,
                STAGES, DIM, BLOCK_N, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_consume, (
                out, bias, slopes, memory, bias_strides, slopes_strides, sizes, band, c, b, out_scale, 2, WARPGROUPS,
                STAGES, DIM, BLOCK_N, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_produce, (q, k, v, memory, sizes, band, WARPGROUPS, STAGES, BLOCK_N, HAS_LEFT, HAS_RIGHT)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                out, bias, slopes, memory, bias_strides, slopes_strides, sizes, band, c, b, out_scale, 0, WARPGROUPS,
                STAGES, DIM, BLOCK_N, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_consume, (
                out, bias, slopes, memory, bias_strides, slopes_strides, sizes, band, c, b, out_scale, 1, WARPGROUPS,
                STAGES, DIM, BLOCK_N, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_consume, (
                out, bias, slopes, memory, bias_strides, slopes_strides, sizes, band, c, b, out_scale, 2, WARPGROUPS,
                STAGES, DIM, BLOCK_N, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_consume, (
                out, bias, slopes, memory, bias_strides, slopes_strides, sizes, band, c, b, out_scale, 3, WARPGROUPS,
                STAGES, DIM, BLOCK_N, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_produce, (q, k, v, memory, sizes, band, WARPGROUPS, STAGES, BLOCK_N, HAS_LEFT, HAS_RIGHT)),
        ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24])  # fmt: skip
