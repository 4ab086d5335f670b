"""dK and dQ in one pass over blocks of 128 keys, for head_dims whose three gradients no multiprocessor holds at once.

Four products, and two of the forward kernel for dV: six where a kernel for each gradient has eight, and five would do.
Two warpgroups of 64 keys keep dK in registers; dQ is added by several programs, in no order.
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

from .partitions import add, first_row, following, key_blocks, load, locate, nothing, store, streamed, weights
from .sequences import view

NOT_SPECIALIZED = ["sizes", "band"]


@gluon.jit
def _produce(
    dout, q, k, v, memory, sizes, band, BLOCK_M: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr
):
    """One warp: K and V, then dO and Q of every block of rows, each into the one place that it has."""
    qs, ks, vs, douts, _, _, kv_full, q_full, q_empty, dout_full, dout_empty, _, _, _, _, _ = memory
    rank, head, batch = locate(gl.program_id(0), sizes, sizes[2])
    n = first_row(rank, sizes, 2, True)
    mbarrier.expect(kv_full, k.block_type.nbytes + 2 * v.block_type.nbytes)
    load(k, [batch, head, n, 0], kv_full, ks.index(0))
    for i in gl.static_range(2):
        load(v, [batch, head, n + i * 64, 0], kv_full, vs.index(i))
    lo, hi = key_blocks(n, sizes, band, 128, BLOCK_M, HAS_LEFT, HAS_RIGHT)
    it = 0
    for other in range(head * sizes[3], (head + 1) * sizes[3]):
        for before in range(hi - lo):
            m = (hi - 1 - before) * BLOCK_M
            mbarrier.wait(dout_empty, (it & 1) ^ 1)
            mbarrier.expect(dout_full, dout.block_type.nbytes)
            load(dout, [batch, other, m, 0], dout_full, douts.index(0))
            mbarrier.wait(q_empty, (it & 1) ^ 1)
            mbarrier.expect(q_full, q.block_type.nbytes)
            load(q, [batch, other, m, 0], q_full, qs.index(0))
            it += 1


@gluon.jit
def _reduce(
    dq, memory, sizes, band,
    WARPGROUP: gl.constexpr, BLOCK_M: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warp adds what a warpgroup has of every block of dQ to memory in float32: 128 channels, 64 at a time."""
    _, _, _, _, dss, dqs, _, _, _, _, _, _, ds_empty, _, part_full, part_empty = memory
    place = dqs
    if WARPGROUP == 1:
        place = view(dss.index(0), gl.float32, [1, 1, 64, 64], dq.layout)
    rank, head, batch = locate(gl.program_id(0), sizes, sizes[2])
    lo, hi = key_blocks(first_row(rank, sizes, 2, True), sizes, band, 128, BLOCK_M, HAS_LEFT, HAS_RIGHT)
    for other in range(head * sizes[3], (head + 1) * sizes[3]):
        for before in range(hi - lo):
            for half in gl.static_range(2):
                mbarrier.wait(part_full.index(WARPGROUP), half)
                add(dq, [batch, other, (hi - 1 - before) * BLOCK_M, 128 * WARPGROUP + 64 * half], place)
                tma.store_wait(0)
                mbarrier.arrive(part_empty.index(WARPGROUP), count=1)
            if WARPGROUP == 1:
                mbarrier.arrive(ds_empty, count=1)


@gluon.jit
def _consume(
    dk, dq, memory, sizes, band, c, b, scale,
    WARPGROUP: gl.constexpr, DIM: gl.constexpr, BLOCK_M: gl.constexpr, FORMULA: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warpgroup, 64 keys: dK += dS^T Q, and of dQ = dS K, which needs the dS of all 128 keys, 128 channels.

    There is room for half of these to wait in: the other half waits in registers until the next block's scores are
    under way. The second warpgroup's wait where dS was.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    (
        qs, ks, vs, douts, dss, dqs, kv_full, q_full, q_empty, dout_full, dout_empty, ds_full, ds_empty, ds_read,
        part_full, part_empty,
    ) = memory  # fmt: skip
    place = dqs.reshape([64, 64])
    if WARPGROUP == 1:
        place = view(dss.index(0), gl.float32, [1, 1, 64, 64], dq.layout).reshape([64, 64])
    rank, head, batch = locate(gl.program_id(0), sizes, sizes[2])
    all_n = first_row(rank, sizes, 2, True)
    n = all_n + 64 * WARPGROUP
    lo, hi = key_blocks(all_n, sizes, band, 128, BLOCK_M, HAS_LEFT, HAS_RIGHT)
    full = part_full.index(WARPGROUP)
    empty = part_empty.index(WARPGROUP)
    zero = gl.zeros([64, BLOCK_M], gl.float32, SCORES)
    zero_part = gl.zeros([64, 64], gl.float32, PART)
    acc = gl.zeros([64, DIM], gl.float32, SUMS)
    rest = zero_part
    mbarrier.wait(kv_full, 0)
    count = streamed(hi - lo, sizes, True)
    m = hi * BLOCK_M
    for it in range(count):
        m = following(m, lo, hi, BLOCK_M, True)
        same = nothing(it)
        keys = ks.index(same).reshape([128, DIM])
        k_block = keys.slice(64 * WARPGROUP, 64, dim=0)
        v_block = vs.index(WARPGROUP + same).reshape([64, DIM])
        q_block = qs.index(same).reshape([BLOCK_M, DIM])
        dout_block = douts.index(same).reshape([BLOCK_M, DIM])
        ds_block = dss.index(same)
        mbarrier.wait(q_full, it & 1)
        s = warpgroup_mma(k_block, q_block.permute((1, 0)), zero, use_acc=False, is_async=True)
        if it > 0:
            mbarrier.wait(empty, 0)
            place.store(rest)
            fence_async_shared()
            mbarrier.arrive(full, count=1)
        mbarrier.wait(dout_full, it & 1)
        da = warpgroup_mma(v_block, dout_block.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        a = weights(s, n, m, c, b, 0.0, band, BLOCK_M, FORMULA, False, HAS_LEFT, HAS_RIGHT, SCORES)
        da = warpgroup_mma_wait(0, deps=[da])
        mbarrier.arrive(dout_empty, count=1)
        ds = ((a - a * a) * da).to(qs.dtype)
        mbarrier.wait(ds_empty, (it & 1) ^ 1)
        ds_block.slice(64 * WARPGROUP, 64, dim=0).store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_full, count=1)
        acc = warpgroup_mma(gl.convert_layout(ds, OPERAND), q_block, acc, is_async=True)
        mbarrier.wait(ds_full, it & 1)
        rows = ds_block.permute((1, 0))
        part = warpgroup_mma(rows, keys.slice(128 * WARPGROUP, 64, dim=1), zero_part, use_acc=False, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(q_empty, count=1)
        rest = warpgroup_mma(rows, keys.slice(128 * WARPGROUP + 64, 64, dim=1), zero_part, use_acc=False, is_async=True)
        part, rest = warpgroup_mma_wait(0, deps=[part, rest])
        mbarrier.arrive(ds_read, count=1)
        if WARPGROUP == 1:
            mbarrier.wait(ds_read, it & 1)
        mbarrier.wait(empty, 1)
        place.store(part * scale)
        fence_async_shared()
        mbarrier.arrive(full, count=1)
        rest = rest * scale
    if count > 0:
        mbarrier.wait(empty, 0)
        place.store(rest)
        fence_async_shared()
        mbarrier.arrive(full, count=1)
    if n < sizes[4]:
        # keys beyond the last are not written
        vs.index(WARPGROUP).reshape([64, DIM]).store((acc * scale).to(qs.dtype))
        fence_async_shared()
        store(dk, [batch, head, n, 0], vs.index(WARPGROUP))
        tma.store_wait(0)


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_dqdk_kernel(
    dout, q, k, v, dq, dk, sizes, band, c, b, scale,
    REGISTERS: gl.constexpr, DIM: gl.constexpr, BLOCK_M: gl.constexpr, FORMULA: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """128 keys of one key head, over all rows and all query heads of the group: dK = scale dS^T Q, dQ += dS K.

    Grid: (blocks * nheads_k * batch,). Descriptors of (batch, nheads, seqlen, head_dim): q and dout in BLOCK_M = 64
    rows, k in 128, v and dk in 64, dq float32, zeros before, in (64, 64). sizes and band as those of dK by itself
    (`grad._bwd_rows_kernel`), turned over. Nothing of the forward is needed but its inputs.
    """
    gl.static_assert(BLOCK_M == 64)
    gl.static_assert(DIM == 256)
    DS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    qs = gl.allocate_shared_memory(q.dtype, [1, 1, 1, BLOCK_M, DIM], q.layout)
    douts = gl.allocate_shared_memory(dout.dtype, [1, 1, 1, BLOCK_M, DIM], dout.layout)
    ks = gl.allocate_shared_memory(k.dtype, [1, 1, 1, 128, DIM], k.layout)
    vs = gl.allocate_shared_memory(v.dtype, [2, 1, 1, 64, DIM], v.layout)
    dss = gl.allocate_shared_memory(q.dtype, [1, 128, BLOCK_M], DS)
    dqs = gl.allocate_shared_memory(gl.float32, [1, 1, 64, 64], dq.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    dout_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    dout_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ds_read = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    part_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    part_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    mbarrier.init(dout_full, count=1)
    mbarrier.init(dout_empty, count=2)
    mbarrier.init(ds_full, count=2)
    mbarrier.init(ds_empty, count=1)
    mbarrier.init(ds_read, count=2)
    for i in gl.static_range(2):
        mbarrier.init(part_full.index(i), count=1)
        mbarrier.init(part_empty.index(i), count=1)
    fence_async_shared()
    memory = (
        qs, ks, vs, douts, dss, dqs, kv_full, q_full, q_empty, dout_full, dout_empty, ds_full, ds_empty, ds_read,
        part_full, part_empty,
    )  # fmt: skip
    gl.warp_specialize([
        (_consume, (dk, dq, memory, sizes, band, c, b, scale, 0, DIM, BLOCK_M, FORMULA, HAS_LEFT, HAS_RIGHT)),
        (_consume, (dk, dq, memory, sizes, band, c, b, scale, 1, DIM, BLOCK_M, FORMULA, HAS_LEFT, HAS_RIGHT)),
        (_produce, (dout, q, k, v, memory, sizes, band, BLOCK_M, HAS_LEFT, HAS_RIGHT)),
        (_reduce, (dq, memory, sizes, band, 0, BLOCK_M, HAS_LEFT, HAS_RIGHT)),
        (_reduce, (dq, memory, sizes, band, 1, BLOCK_M, HAS_LEFT, HAS_RIGHT)),
    ], [4, 1, 1, 1], [REGISTERS, 24, 24, 24])  # fmt: skip
