"""The backward kernel for Hopper: dK, dV and dQ in one pass over blocks of 128 keys, five products.

Two warpgroups of 64 keys keep dK and dV in registers, one warp loads, one adds dQ to memory. A sigmoid has neither a
row's maximum nor its sum, so nothing of the forward is needed but its inputs. dQ is added by several programs, in no
order: the last bits differ from call to call.
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

from .partitions import add, hand_out, load, make_tickets, nothing, row_blocks, sigmoid, store, take
from .sequences import blank, find_keys, load_cut, store_rows, view

NOT_SPECIALIZED = [
    "bias_strides", "slopes_strides", "total_q", "total_k", "count", "together", "blocks", "numbers", "sizes", "band",
]  # fmt: skip


@gluon.jit
def _produce(
    dout, q, k, v, cu_q, cu_k, counter, memory, tickets, all_sizes, all_band,
    STAGES: gl.constexpr, DIM: gl.constexpr, BLOCK_M: gl.constexpr, IS_DYNAMIC: gl.constexpr, IS_PACKED: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warp: K and V once a turn, then Q and dO of every block of rows, each behind its own barrier."""
    qs, ks, vs, douts, _, _, kv_full, kv_empty, q_full, dout_full, empty, _, _, _, _, _, late = memory
    group = all_sizes[3]
    at = gl.program_id(0)
    turn = 0
    it = 0
    cuts = 0  # what came with the rows of the next sequence
    while at < all_sizes[6]:
        n, head_k, _batch, lead, row, key, sizes, band = find_keys(at, all_sizes, all_band, cu_q, cu_k, IS_PACKED)
        at = hand_out(at, turn, counter, tickets, IS_DYNAMIC)
        lo, hi = row_blocks(n, sizes, band, BLOCK_M, HAS_LEFT, HAS_RIGHT)
        mbarrier.wait(kv_empty, (turn & 1) ^ 1)
        if IS_PACKED and lo < hi and n + 128 > sizes[5]:
            load_cut(k, v, ks, vs, kv_full, None, late, cuts, 0, lead, head_k, key + n, sizes[5] - n, 128, DIM, 1)
            cuts += 1
        else:
            mbarrier.expect(kv_full, 2 * k.block_type.nbytes)
            load(k, [lead, head_k, key + n, 0], kv_full, ks.index(0))
            load(v, [lead, head_k, key + n, 0], kv_full, vs.index(0))
        for head in range(head_k * group, head_k * group + group):
            for block in range(lo, hi):
                stage = it & (STAGES - 1)
                m = block * BLOCK_M
                mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
                if IS_PACKED and m + BLOCK_M > sizes[4]:
                    load_cut(
                        q, dout, qs, douts, q_full.index(stage), dout_full.index(stage), late, cuts, stage, lead, head,
                        row + m, sizes[4] - m, BLOCK_M, DIM, STAGES,
                    )  # fmt: skip
                    cuts += 1
                else:
                    mbarrier.expect(q_full.index(stage), q.block_type.nbytes)
                    load(q, [lead, head, row + m, 0], q_full.index(stage), qs.index(stage))
                    mbarrier.expect(dout_full.index(stage), dout.block_type.nbytes)
                    load(dout, [lead, head, row + m, 0], dout_full.index(stage), douts.index(stage))
                it += 1
        turn += 1


@gluon.jit
def _reduce(
    dq, cu_q, cu_k, memory, tickets, all_sizes, all_band,
    DIM: gl.constexpr, BLOCK_M: gl.constexpr, IS_DYNAMIC: gl.constexpr, IS_PACKED: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warp adds the two 64 x 64 parts of every block of dQ to memory, in float32."""
    _, _, _, _, _, dqs, _, _, _, _, _, dq_full, dq_empty, _, _, _, _ = memory
    group = all_sizes[3]
    at = gl.program_id(0)
    turn = 0
    it = 0
    while at < all_sizes[6]:
        n, head_k, _batch, lead, row, _key, sizes, band = find_keys(at, all_sizes, all_band, cu_q, cu_k, IS_PACKED)
        at = take(at, turn, tickets, 1, IS_DYNAMIC)
        lo, hi = row_blocks(n, sizes, band, BLOCK_M, HAS_LEFT, HAS_RIGHT)
        for head in range(head_k * group, head_k * group + group):
            for block in range(lo, hi):
                m = row + block * BLOCK_M
                mbarrier.wait(dq_full, it & 1)
                if IS_PACKED and block * BLOCK_M + BLOCK_M > sizes[4]:
                    # what is added to the next sequence must be zeros, be this one's keys NaN
                    for part in gl.static_range(2):
                        own = sizes[4] - block * BLOCK_M - (64 * part if DIM == 64 else 0)
                        blank(dqs, part, gl.minimum(64, gl.maximum(0, own)), 64, 64, 2, 32)
                    fence_async_shared()
                for part in gl.static_range(2):
                    if DIM == 64:
                        add(dq, [lead, head, m + 64 * part, 0], dqs.index(part))
                    else:
                        add(dq, [lead, head, m, 64 * part], dqs.index(part))
                tma.store_wait(0)
                mbarrier.arrive(dq_empty, count=1)
                it += 1
        turn += 1


@gluon.jit
def _dq(ds_block, keys, zero, WARPGROUP: gl.constexpr, DIM: gl.constexpr):
    """dS K of all 128 keys, in flight: this warpgroup's 64 rows, or its 64 channels of 64 rows."""
    if DIM == 64:
        mine = ds_block.slice(64 * WARPGROUP, 64, dim=1).permute((1, 0))
        part = warpgroup_mma(mine, keys, zero, use_acc=False, is_async=True)
    else:
        mine = keys.slice(64 * WARPGROUP, 64, dim=1)
        part = warpgroup_mma(ds_block.permute((1, 0)), mine, zero, use_acc=False, is_async=True)
    return part


@gluon.jit
def _settle(turn, out_read, DIM: gl.constexpr):
    """The results of the turn before have been read: their memory is free for dS and dQ."""
    tma.store_wait(0)
    if DIM != 64:  # where dK of one warpgroup lay, both put dS
        mbarrier.arrive(out_read, count=1)
        mbarrier.wait(out_read, (turn & 1) ^ 1)


@gluon.jit
def _masked(y, edge, IS_RIGHT: gl.constexpr, BLOCK_M: gl.constexpr, SCORES: gl.constexpr):
    """-inf where key i (of 64) and row j are beyond an edge: i + edge > j at the right, < at the left."""
    i = (edge + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES)))[:, None]
    j = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SCORES))[None, :]
    if IS_RIGHT:
        y = gl.where(i <= j, y, float("-inf"))
    else:
        y = gl.where(i >= j, y, float("-inf"))
    return y


@gluon.jit
def _step(
    dk_acc, dv_acc, s, it, start, end, turn, p, first, memory, band, c, b, slope, zero, zero_part,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr, BLOCK_M: gl.constexpr, FORMULA: gl.constexpr,
    HAS_TURNS: gl.constexpr, HAS_SLOPES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    SCORES: gl.constexpr, OPERAND: gl.constexpr, IS_ANEW: gl.constexpr,
):  # fmt: skip
    """The block number `it` of rows, from position p on: dV, dK, and dQ of the block before; S of the next."""
    (
        qs, ks, vs, douts, dss, dqs, _, _, q_full, dout_full, empty, dq_full, dq_empty, ds_full, ds_empty, out_read,
        _late,
    ) = memory  # fmt: skip
    keys = ks.index(0).reshape([128, DIM])
    values = vs.index(nothing(it) if IS_ANEW else 0).reshape([128, DIM])
    k_block = keys.slice(64 * WARPGROUP, 64, dim=0)
    v_block = values.slice(64 * WARPGROUP, 64, dim=0)
    stage = it & (STAGES - 1)
    q_block = qs.index(stage).reshape([BLOCK_M, DIM])
    dout_block = douts.index(stage).reshape([BLOCK_M, DIM])
    mbarrier.wait(dout_full.index(stage), (it // STAGES) & 1)
    da = warpgroup_mma(v_block, dout_block.permute((1, 0)), zero, use_acc=False, is_async=True)
    y = s * c + b
    if HAS_SLOPES:
        i = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES)).to(gl.float32)[:, None] + (first - p).to(gl.float32)
        y -= slope * gl.abs(i - gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SCORES)).to(gl.float32)[None, :])
    if HAS_RIGHT:
        y = _masked(y, first - p - band[2], True, BLOCK_M, SCORES)
    if HAS_LEFT:
        y = _masked(y, first - p + band[1], False, BLOCK_M, SCORES)
    a = sigmoid(y, FORMULA)
    da = warpgroup_mma_wait(0, deps=[da])
    a_block = gl.convert_layout(a.to(qs.dtype), OPERAND)
    ds = ((a - a * a) * da).to(qs.dtype)
    dv_acc = warpgroup_mma(a_block, dout_block, dv_acc, is_async=True)
    if HAS_TURNS:  # noqa: SIM102  a constant, then numbers
        if it == start and turn > 0:
            _settle(turn, out_read, DIM)
    mbarrier.wait(ds_empty.index(it & 1), ((it // 2) & 1) ^ 1)
    dss.index(it & 1).slice(64 * WARPGROUP, 64, dim=0).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(it & 1), count=1)
    dk_acc = warpgroup_mma(gl.convert_layout(ds, OPERAND), q_block, dk_acc, is_async=True)
    dv_acc = warpgroup_mma_wait(1, deps=[dv_acc])
    # dQ of the block before: the other warpgroup has stored its dS by now
    if it > start:
        mbarrier.wait(ds_full.index((it - 1) & 1), ((it - 1) // 2) & 1)
    part = _dq(dss.index((it - 1) & 1), keys, zero_part, WARPGROUP, DIM)
    # S of the next block; the last trip repeats its own and drops it
    after = gl.minimum(it + 1, end - 1)
    next_stage = after & (STAGES - 1)
    mbarrier.wait(q_full.index(next_stage), (after // STAGES) & 1)
    next_q = qs.index(next_stage).reshape([BLOCK_M, DIM]).permute((1, 0))
    s = warpgroup_mma(k_block, next_q, zero, use_acc=False, is_async=True)
    part, dk_acc = warpgroup_mma_wait(1, deps=[part, dk_acc])
    mbarrier.arrive(empty.index(stage), count=1)
    if it > start:
        mbarrier.arrive(ds_empty.index((it - 1) & 1), count=1)
        mbarrier.wait(dq_empty, it & 1)
        dqs.index(WARPGROUP).reshape([64, 64]).store(part)
        fence_async_shared()
        mbarrier.arrive(dq_full, count=1)
    s = warpgroup_mma_wait(0, deps=[s])
    return dk_acc, dv_acc, s


@gluon.jit
def _turn(
    at, turn, start, dk, dv, packed, sides, memory, all_sizes, all_band, c, b, scale,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    FORMULA: gl.constexpr, HAS_TURNS: gl.constexpr, IS_PACKED: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_SLOPES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """64 keys: dV += A^T dO, dK += dS^T Q, dQ = dS K, with dS = (dO V^T) * A * (1 - A); scores are transposed.

    dQ needs the dS of both warpgroups, and is a block late: so the two need not keep step, and one multiplies while the
    other takes sigmoids.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    (
        qs, ks, _, _, dss, dqs, kv_full, kv_empty, q_full, _, _, dq_full, dq_empty, ds_full, ds_empty, out_read, _
    ) = memory  # fmt: skip
    group = all_sizes[3]
    n, head_k, batch, lead, _row, key, sizes, band = find_keys(
        at, all_sizes, all_band, packed[2], packed[3], IS_PACKED
    )  # fmt: skip
    first = n + 64 * WARPGROUP
    lo, hi = row_blocks(n, sizes, band, BLOCK_M, HAS_LEFT, HAS_RIGHT)
    end = start + group * (hi - lo)
    keys = ks.index(0).reshape([128, DIM])
    zero = gl.zeros([64, BLOCK_M], gl.float32, SCORES)
    zero_part = gl.zeros([64, 64], gl.float32, PART)
    dk_acc = gl.zeros([64, DIM], gl.float32, SUMS)
    dv_acc = gl.zeros([64, DIM], gl.float32, SUMS)
    mbarrier.wait(kv_full, turn & 1)
    if start < end:
        mbarrier.wait(q_full.index(start & (STAGES - 1)), (start // STAGES) & 1)
        first_q = qs.index(start & (STAGES - 1)).reshape([BLOCK_M, DIM]).permute((1, 0))
        k_block = keys.slice(64 * WARPGROUP, 64, dim=0)
        s = warpgroup_mma(k_block, first_q, zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        if HAS_LEFT or HAS_RIGHT or HAS_BIAS or HAS_SLOPES:
            # all keys are seen by all rows of the blocks [whole, rest)
            q_offset, left, right = band
            whole = lo
            rest = hi
            if HAS_RIGHT:
                whole = gl.minimum(hi, gl.maximum(lo, gl.cdiv(gl.maximum(0, n + 127 - right - q_offset), BLOCK_M)))
            if HAS_LEFT:
                rest = gl.maximum(whole, gl.minimum(hi, gl.maximum(0, n + left - q_offset + 1) // BLOCK_M))
            it = start
            bias, slopes, bias_strides, slopes_strides = sides
            slope = 0.0
            for i in range(group):
                head = head_k * group + i
                if HAS_BIAS:
                    b = gl.load(bias + batch * bias_strides[0] + head * bias_strides[1]).to(gl.float32)
                    b = b * FORMULA.unit + FORMULA.shift
                if HAS_SLOPES:
                    slope = gl.load(slopes + batch * slopes_strides[0] + head * slopes_strides[1]).to(gl.float32)
                    slope *= FORMULA.unit
                for part in gl.static_range(0 if HAS_RIGHT else 1, 3 if HAS_LEFT else 2):
                    begin = lo if part == 0 else (whole if part == 1 else rest)
                    stop = whole if part == 0 else (rest if part == 1 else hi)
                    for block in range(begin, stop):
                        dk_acc, dv_acc, s = _step(
                            dk_acc, dv_acc, s, it, start, end, turn, block * BLOCK_M + q_offset, first,
                            memory, band, c, b, slope, zero, zero_part, WARPGROUP, STAGES, DIM, BLOCK_M,
                            FORMULA, HAS_TURNS, HAS_SLOPES, HAS_LEFT and part != 1, HAS_RIGHT and part != 1, SCORES,
                            OPERAND, False,
                        )  # fmt: skip
                        it += 1
        else:
            for it in range(start, end):
                dk_acc, dv_acc, s = _step(
                    dk_acc, dv_acc, s, it, start, end, turn, 0, first, memory, band, c, b, 0.0,
                    zero, zero_part, WARPGROUP, STAGES, DIM, BLOCK_M, FORMULA, HAS_TURNS, False, False, False, SCORES,
                    OPERAND, DIM == 64,
                )  # fmt: skip
        last = end - 1
        mbarrier.wait(ds_full.index(last & 1), (last // 2) & 1)
        part = _dq(dss.index(last & 1), keys, zero_part, WARPGROUP, DIM)
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(kv_empty, count=1)
        mbarrier.arrive(ds_empty.index(last & 1), count=1)
        if DIM != 64:  # dK will lie where both warpgroups read dS
            mbarrier.wait(ds_empty.index(last & 1), (last // 2) & 1)
        mbarrier.wait(dq_empty, end & 1)
        dqs.index(WARPGROUP).reshape([64, 64]).store(part)
        fence_async_shared()
        mbarrier.arrive(dq_full, count=1)
    else:
        mbarrier.arrive(kv_empty, count=1)
        if HAS_TURNS:  # noqa: SIM102  a constant, then a number
            if turn > 0:
                _settle(turn, out_read, DIM)
    if IS_PACKED and first + 64 > sizes[5]:
        own, heads = sizes[5] - first, sizes[2] // group
        x = (dk_acc * scale).to(qs.dtype)
        store_rows(packed[0], x, key + first, own, head_k, heads, all_sizes[10] * 8, DIM, SUMS)
        x = dv_acc.to(qs.dtype)
        store_rows(packed[1], x, key + first, own, head_k, heads, all_sizes[9] * 8, DIM, SUMS)
    else:
        # dK and dV go out by where the dS of the last block but one was, each warpgroup's by its own part
        # of it; where that has no room, by both places of dS and by dQ's
        if DIM == 64:
            mbarrier.wait(ds_empty.index(end & 1), ((end // 2) & 1) ^ 1)
            outs = view(dss.index(end & 1), qs.dtype, [4, 1, 1, 64, 64], dk.layout)
            dk_out = outs.index(WARPGROUP)
            dv_out = outs.index(2 + WARPGROUP)
        else:
            mbarrier.wait(dq_empty, (end & 1) ^ 1)
            dk_out = view(dss, qs.dtype, [2, 1, 1, 64, 128], dk.layout).index(WARPGROUP)
            dv_out = view(dqs, qs.dtype, [2, 1, 1, 64, 128], dv.layout).index(WARPGROUP)
        dk_out.reshape([64, DIM]).store((dk_acc * scale).to(qs.dtype))
        dv_out.reshape([64, DIM]).store(dv_acc.to(qs.dtype))
        fence_async_shared()
        store(dk, [lead, head_k, key + first, 0], dk_out)
        store(dv, [lead, head_k, key + first, 0], dv_out)
    return end


@gluon.jit
def _consume(
    dk, dv, packed, sides, memory, tickets, sizes, band, c, b, scale,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    HAS_TURNS: gl.constexpr, IS_DYNAMIC: gl.constexpr, IS_PACKED: gl.constexpr, FORMULA: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_SLOPES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warpgroup, 64 keys a turn."""
    at = gl.program_id(0)
    if HAS_TURNS:
        turn = 0
        start = 0  # blocks of rows in the turns before
        while at < sizes[6]:
            after = take(at, turn, tickets, 4, IS_DYNAMIC)
            start = _turn(
                at, turn, start, dk, dv, packed, sides, memory, sizes, band, c, b, scale, WARPGROUP, STAGES, DIM,
                BLOCK_M, FORMULA, True, IS_PACKED, HAS_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            at = after
            turn += 1
    else:
        _turn(
            at, 0, 0, dk, dv, packed, sides, memory, sizes, band, c, b, scale, WARPGROUP, STAGES, DIM, BLOCK_M,
            FORMULA, False, IS_PACKED, HAS_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def _bwd_kernel(
    dout, q, k, v, dq, dk, dv, bias, slopes, dk_rows, dv_rows, cu_q, cu_k, counter, bias_strides, slopes_strides,
    total_q, total_k, count, together, blocks, numbers, sizes, band, c, b, scale,
    STAGES: gl.constexpr, DIM: gl.constexpr, BLOCK_M: gl.constexpr, REGISTERS: gl.constexpr,
    REST: gl.constexpr, HAS_TURNS: gl.constexpr, IS_DYNAMIC: gl.constexpr, IS_PACKED: gl.constexpr,
    FORMULA: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SLOPES: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """128 keys of one key head, over all rows and all query heads of the group; then the next 128.

    Grid: at most (blocks * nheads_k * batch,). Descriptors of (batch, nheads, seqlen, head_dim): q and dout in BLOCK_M
    rows, k and v in 128, dk and dv in 64, dq float32, zeros before, in (64, 64). sizes and band as the forward's,
    `blocks` of keys and `together` of key heads. IS_PACKED: descriptors of all rows, dk_rows and dv_rows are dk and dv
    by their addresses, and sequences end as cu_q and cu_k say; sizes as the forward's.
    """
    if IS_PACKED:
        sizes = (
            blocks, together, sizes[0], sizes[1], total_q, total_k, numbers, sizes[2], count, sizes[3], sizes[4],
        )  # fmt: skip
    DS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    qs = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_M, DIM], q.layout)
    douts = gl.allocate_shared_memory(dout.dtype, [STAGES, 1, 1, BLOCK_M, DIM], dout.layout)
    ks = gl.allocate_shared_memory(k.dtype, [1, 1, 1, 128, DIM], k.layout)
    vs = gl.allocate_shared_memory(v.dtype, [1, 1, 1, 128, DIM], v.layout)
    dss = gl.allocate_shared_memory(q.dtype, [2, 128, BLOCK_M], DS)
    dqs = gl.allocate_shared_memory(gl.float32, [2, 1, 1, 64, 64], dq.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    out_read = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    dq_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    dq_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    late = kv_full
    if IS_PACKED:
        late = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(late, count=1)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=2)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(kv_empty, count=2)
    mbarrier.init(out_read, count=2)
    mbarrier.init(dq_full, count=2)
    mbarrier.init(dq_empty, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(dout_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    sides = (bias, slopes, bias_strides, slopes_strides)  # b and a slope of every head
    tickets = make_tickets(3)
    fence_async_shared()
    memory = (
        qs, ks, vs, douts, dss, dqs, kv_full, kv_empty, q_full, dout_full, empty, dq_full, dq_empty, ds_full, ds_empty,
        out_read, late,
    )  # fmt: skip
    packed = (dk_rows, dv_rows, cu_q, cu_k)
    gl.warp_specialize([
        (_consume, (
            dk, dv, packed, sides, memory, tickets, sizes, band, c, b, scale, 0, STAGES, DIM, BLOCK_M, HAS_TURNS,
            IS_DYNAMIC, IS_PACKED, FORMULA, HAS_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
        )),
        (_consume, (
            dk, dv, packed, sides, memory, tickets, sizes, band, c, b, scale, 1, STAGES, DIM, BLOCK_M, HAS_TURNS,
            IS_DYNAMIC, IS_PACKED, FORMULA, HAS_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
        )),
        (_produce, (
            dout, q, k, v, cu_q, cu_k, counter, memory, tickets, sizes, band, STAGES, DIM, BLOCK_M, IS_DYNAMIC,
            IS_PACKED, HAS_LEFT, HAS_RIGHT,
        )),
        (_reduce, (
            dq, cu_q, cu_k, memory, tickets, sizes, band, DIM, BLOCK_M, IS_DYNAMIC, IS_PACKED, HAS_LEFT, HAS_RIGHT,
        )),
    ], [4, 1, 1], [REGISTERS, REST, REST])  # fmt: skip
