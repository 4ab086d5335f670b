"""dQ by itself, or dK, for head_dims whose three gradients no multiprocessor holds at once: three products.

The kernel is the same for both, with queries and keys exchanged, and deterministic. dV is the forward kernel, with them
exchanged: together eight products for five, at the speed of a forward.
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

from .partitions import first_row, following, key_blocks, load, locate, nothing, store, stream, streamed, weights

NOT_SPECIALIZED = ["sizes", "band"]


@gluon.jit
def _produce(
    x, y, u, w, memory, sizes, band,
    WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, OF_KEYS: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warp: X and Y of all warpgroups, then U into two places and W into one."""
    xs, ys, us, ws, x_full, u_full, u_empty, w_full, w_empty = memory
    rank, head, batch = locate(gl.program_id(0), sizes, sizes[2])
    m = first_row(rank, sizes, WARPGROUPS, OF_KEYS)
    mbarrier.expect(x_full, WARPGROUPS * (x.block_type.nbytes + y.block_type.nbytes))
    for i in gl.static_range(WARPGROUPS):
        load(x, [batch, head, m + i * 64, 0], x_full, xs.index(i))
        load(y, [batch, head, m + i * 64, 0], x_full, ys.index(i))
    lo, hi = key_blocks(m, sizes, band, 64 * WARPGROUPS, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    for it in range(streamed(hi - lo, sizes, OF_KEYS)):
        other, n = stream(it, head, lo, hi, sizes, BLOCK_N, OF_KEYS)
        stage = it & 1
        mbarrier.wait(u_empty.index(stage), ((it >> 1) & 1) ^ 1)
        mbarrier.expect(u_full.index(stage), u.block_type.nbytes)
        load(u, [batch, other, n, 0], u_full.index(stage), us.index(stage))
        mbarrier.wait(w_empty, (it & 1) ^ 1)
        mbarrier.expect(w_full, w.block_type.nbytes)
        load(w, [batch, other, n, 0], w_full, ws.index(0))


@gluon.jit
def _scores(memory, zero, it, WARPGROUP: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr):
    """S = X U^T and dP = Y W^T in flight."""
    xs, ys, us, ws, _, _, _, w_full, _ = memory
    same = nothing(it)
    x = xs.index(WARPGROUP + same).reshape([64, DIM])
    y = ys.index(WARPGROUP + same).reshape([64, DIM])
    u_block = us.index(it & 1).reshape([BLOCK_N, DIM])
    w_block = ws.index(same).reshape([BLOCK_N, DIM])
    s = warpgroup_mma(x, u_block.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(w_full, it & 1)
    da = warpgroup_mma(y, w_block.permute((1, 0)), zero, use_acc=False, is_async=True)
    return s, da


@gluon.jit
def _consume(
    out, memory, sizes, band, c, b, scale,
    WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, OF_KEYS: gl.constexpr,
    FORMULA: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warpgroup, 64 rows: the product of a block before is under way while the next one's scores are."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    xs, _, us, _, x_full, u_full, u_empty, _, w_empty = memory
    rank, head, batch = locate(gl.program_id(0), sizes, sizes[2])
    all_m = first_row(rank, sizes, WARPGROUPS, OF_KEYS)
    m = all_m + WARPGROUP * 64
    lo, hi = key_blocks(all_m, sizes, band, 64 * WARPGROUPS, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    zero = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    acc = gl.zeros([64, DIM], gl.float32, SUMS)
    mbarrier.wait(x_full, 0)
    count = streamed(hi - lo, sizes, OF_KEYS)
    if count > 0:
        n = (hi - 1) * BLOCK_N
        mbarrier.wait(u_full.index(0), 0)
        s, da = _scores(memory, zero, 0, WARPGROUP, DIM, BLOCK_N)
        s = warpgroup_mma_wait(1, deps=[s])
        a = weights(s, m, n, c, b, 0.0, band, BLOCK_N, FORMULA, False, HAS_LEFT, HAS_RIGHT, SCORES)
        da = warpgroup_mma_wait(0, deps=[da])
        mbarrier.arrive(w_empty, count=1)
        ds = gl.convert_layout(((a - a * a) * da).to(us.dtype), OPERAND)
        for it in range(1, count):
            n = following(n, lo, hi, BLOCK_N, OF_KEYS)
            stage = it & 1
            acc = warpgroup_mma(ds, us.index(stage ^ 1).reshape([BLOCK_N, DIM]), acc, is_async=True)
            mbarrier.wait(u_full.index(stage), (it >> 1) & 1)
            s, da = _scores(memory, zero, it, WARPGROUP, DIM, BLOCK_N)
            s, acc = warpgroup_mma_wait(1, deps=[s, acc])
            mbarrier.arrive(u_empty.index(stage ^ 1), count=1)
            a = weights(s, m, n, c, b, 0.0, band, BLOCK_N, FORMULA, False, HAS_LEFT, HAS_RIGHT, SCORES)
            da = warpgroup_mma_wait(0, deps=[da])
            mbarrier.arrive(w_empty, count=1)
            ds = gl.convert_layout(((a - a * a) * da).to(us.dtype), OPERAND)
        acc = warpgroup_mma(ds, us.index((count - 1) & 1).reshape([BLOCK_N, DIM]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    if m >= 0 and m < sizes[4]:
        # rows beyond the last are not written
        xs.index(WARPGROUP).reshape([64, DIM]).store((acc * scale).to(us.dtype))
        fence_async_shared()
        store(out, [batch, head, m, 0], xs.index(WARPGROUP))
        tma.store_wait(0)


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_rows_kernel(
    x, y, u, w, out, sizes, band, c, b, scale,
    WARPGROUPS: gl.constexpr, REGISTERS: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, OF_KEYS: gl.constexpr,
    FORMULA: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """128 rows of one head of dQ = scale dS K, or of dK = scale dS^T Q: dS = (Y W^T) * A * (1 - A), out = scale dS U.

    Grid: (blocks * heads * batch,). dQ: x, y, u, w are Q, dO, K, V; dK: K, V, Q, dO, with OF_KEYS and sizes and band
    turned over (`partitions.stream`), for all query heads of the group. Descriptors of (batch, nheads, seqlen,
    head_dim): x, y and out in blocks of 64 rows, u and w of BLOCK_N. sizes and band as the forward's. Accumulator:
    float32. Nothing of the forward is needed but its inputs.
    """
    gl.static_assert(WARPGROUPS == 2)
    xs = gl.allocate_shared_memory(x.dtype, [WARPGROUPS, 1, 1, 64, DIM], x.layout)
    ys = gl.allocate_shared_memory(y.dtype, [WARPGROUPS, 1, 1, 64, DIM], y.layout)
    us = gl.allocate_shared_memory(u.dtype, [2, 1, 1, BLOCK_N, DIM], u.layout)
    ws = gl.allocate_shared_memory(w.dtype, [1, 1, 1, BLOCK_N, DIM], w.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    u_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    u_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(x_full, count=1)
    mbarrier.init(w_full, count=1)
    mbarrier.init(w_empty, count=WARPGROUPS)
    for i in gl.static_range(2):
        mbarrier.init(u_full.index(i), count=1)
        mbarrier.init(u_empty.index(i), count=WARPGROUPS)
    fence_async_shared()
    memory = (xs, ys, us, ws, x_full, u_full, u_empty, w_full, w_empty)
    gl.warp_specialize([
        (_consume, (
            out, memory, sizes, band, c, b, scale, 0, WARPGROUPS, DIM, BLOCK_N, OF_KEYS, FORMULA, HAS_LEFT, HAS_RIGHT,
        )),
        (_consume, (
            out, memory, sizes, band, c, b, scale, 1, WARPGROUPS, DIM, BLOCK_N, OF_KEYS, FORMULA, HAS_LEFT, HAS_RIGHT,
        )),
        (_produce, (x, y, u, w, memory, sizes, band, WARPGROUPS, BLOCK_N, OF_KEYS, HAS_LEFT, HAS_RIGHT)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
