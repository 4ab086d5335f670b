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

from .partitions import (
    following,
    hand_out,
    key_blocks,
    load,
    make_tickets,
    pass_by,
    store,
    stream,
    streamed,
    take,
    weights,
)
from .sequences import blank_own, find_block, settle, store_rows

# a kernel is compiled for dtypes, options and head_dim, not for a size
NOT_SPECIALIZED = [
    "bias_strides", "slopes_strides", "total_q", "total_k", "count", "together", "blocks", "numbers", "sizes", "band",
]  # fmt: skip


@gluon.jit
def _produce(
    load_call, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    IS_SPLIT: gl.constexpr, PLACES: gl.constexpr, IS_DYNAMIC: gl.constexpr, OF_KEYS: gl.constexpr,
    IS_PACKED: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warp: Q of all warpgroups, then K and V, the last block first, each pair behind one barrier, or two."""
    q, k, v, cu_q, cu_k, counter, memory, tickets, all_sizes, all_band = load_call
    qs, ks, vs, _, q_full, q_empty, full, empty, v_full, k_empty = memory
    at = gl.program_id(0)
    turn = 0
    it = 0
    cuts = 0  # blocks with rows of the next sequence
    while at < all_sizes[6]:
        m, head, _batch, lead, row, key, sizes, band = find_block(
            at, all_sizes, all_band, cu_q, cu_k, WARPGROUPS, OF_KEYS, IS_PACKED
        )
        at = hand_out(at, turn, counter, tickets, IS_DYNAMIC)
        place = turn % PLACES
        mbarrier.wait(q_empty.index(place), ((turn // PLACES) & 1) ^ 1)
        mbarrier.expect(q_full.index(place), WARPGROUPS * q.block_type.nbytes)
        for i in gl.static_range(WARPGROUPS):
            load(q, [lead, head, row + m + i * 64, 0], q_full.index(place), qs.index(place * WARPGROUPS + i))
        lo, hi = key_blocks(m, sizes, band, 64 * WARPGROUPS, BLOCK_N, HAS_LEFT, HAS_RIGHT)
        for i in range(streamed(hi - lo, sizes, OF_KEYS)):
            stage = it & (STAGES - 1)
            head_k, n = stream(i, head, lo, hi, sizes, BLOCK_N, OF_KEYS)
            behind = stage
            if IS_PACKED:
                behind = gl.where(n + BLOCK_N > sizes[5], STAGES, stage)
            mbarrier.wait((k_empty if IS_SPLIT else empty).index(stage), ((it // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(behind), (1 if IS_SPLIT else 2) * k.block_type.nbytes)
            load(k, [lead, head_k, key + n, 0], full.index(behind), ks.index(stage))
            if IS_SPLIT:
                if IS_PACKED and behind == STAGES:
                    settle(ks, None, stage, sizes[5] - n, full, cuts, BLOCK_N, DIM, STAGES)
                mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
                mbarrier.expect(v_full.index(behind), v.block_type.nbytes)
            load(v, [lead, head_k, key + n, 0], (v_full if IS_SPLIT else full).index(behind), vs.index(stage))
            if IS_PACKED and behind == STAGES:
                if IS_SPLIT:
                    settle(vs, None, stage, sizes[5] - n, v_full, cuts, BLOCK_N, DIM, STAGES)
                else:
                    settle(ks, vs, stage, sizes[5] - n, full, cuts, BLOCK_N, DIM, STAGES)
                cuts += 1
            it += 1
        turn += 1


@gluon.jit
def _step(
    acc, a, it, q, memory, zero, m, n, c, b, slope, band,
    STAGES: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, IS_SPLIT: gl.constexpr, FORMULA: gl.constexpr,
    HAS_SLOPES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SCORES: gl.constexpr,
    OPERAND: gl.constexpr,
):  # fmt: skip
    """S of this block, then O += A V of the one before; the weights of this one while that product runs."""
    _, ks, vs, _, _, _, full, empty, v_full, k_empty = memory
    stage = it & (STAGES - 1)
    before = (it - 1) & (STAGES - 1)
    mbarrier.wait(full.index(stage), (it // STAGES) & 1)
    s = warpgroup_mma(q, ks.index(stage).reshape([BLOCK_N, DIM]).permute((1, 0)), zero, use_acc=False, is_async=True)
    if IS_SPLIT:
        mbarrier.wait(v_full.index(before), ((it - 1) // STAGES) & 1)
    acc = warpgroup_mma(a, vs.index(before).reshape([BLOCK_N, DIM]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    if IS_SPLIT:
        mbarrier.arrive(k_empty.index(stage), count=1)
    a = weights(s, m, n, c, b, slope, band, BLOCK_N, FORMULA, HAS_SLOPES, HAS_LEFT, HAS_RIGHT, SCORES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(before), count=1)
    return acc, gl.convert_layout(a.to(vs.dtype), OPERAND)


@gluon.jit
def _release(turn, empty):
    """The place of the turn before may take another Q once out has left it; in the first turn there was none."""
    if turn > 0:
        tma.store_wait(0)
        mbarrier.arrive(empty, count=1)


@gluon.jit
def _consume(
    call, WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, IS_SPLIT: gl.constexpr, OWN_OUT: gl.constexpr, PLACES: gl.constexpr,
    IS_DYNAMIC: gl.constexpr, OF_KEYS: gl.constexpr, IS_PACKED: gl.constexpr, FORMULA: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_ROW_BIAS: gl.constexpr, HAS_SLOPES: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warpgroup, 64 rows a turn."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    (
        out, bias, slopes, out_rows, cu_q, cu_k, memory, tickets, bias_strides, slopes_strides, all_sizes, all_band,
        c, b, out_scale,
    ) = call  # fmt: skip
    qs, ks, vs, outs, q_full, q_empty, full, empty, v_full, k_empty = memory
    offs = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    zero = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    at = gl.program_id(0)
    turn = 0
    start = 0  # blocks of keys that went by in the turns before
    while at < all_sizes[6]:
        all_m, head, batch, lead, row, _key, sizes, band = find_block(
            at, all_sizes, all_band, cu_q, cu_k, WARPGROUPS, OF_KEYS, IS_PACKED
        )
        rows = sizes[4]
        m = all_m + WARPGROUP * 64
        place = turn % PLACES
        mine = place * WARPGROUPS + WARPGROUP
        q = qs.index(mine).reshape([64, DIM])
        at = take(at, turn, tickets, 4, IS_DYNAMIC)
        all_lo, all_hi = key_blocks(all_m, sizes, band, 64 * WARPGROUPS, BLOCK_N, HAS_LEFT, HAS_RIGHT)
        lo, hi = key_blocks(m, sizes, band, 64, BLOCK_N, HAS_LEFT, HAS_RIGHT)
        if OF_KEYS:  # of every head the same blocks, those of all
            lo = all_lo
            hi = all_hi
        slope = 0.0
        if HAS_SLOPES:
            slope = gl.load(slopes + batch * slopes_strides[0] + head * slopes_strides[1]).to(gl.float32) * FORMULA.unit
        b_rows = b
        if HAS_BIAS:
            values = bias + batch.to(gl.int64) * bias_strides[0] + head.to(gl.int64) * bias_strides[1]
            if HAS_ROW_BIAS:
                values += (row + m).to(gl.int64) * bias_strides[2]
                seen = (m + offs >= 0) & (m + offs < rows)
                b_rows = gl.load(values + offs * bias_strides[2], mask=seen, other=float("-inf"))[:, None]
            else:
                b_rows = gl.load(values)
            b_rows = b_rows.to(gl.float32) * FORMULA.unit + FORMULA.shift

        it = pass_by(start, all_hi - hi, full, empty, v_full, k_empty, STAGES, IS_SPLIT)
        acc = gl.zeros([64, DIM], gl.float32, SUMS)
        mbarrier.wait(q_full.index(place), (turn // PLACES) & 1)
        if IS_PACKED and lo < hi and m + 64 > rows:
            blank_own(q, rows - m, DIM)
        if lo < hi:
            stage = it & (STAGES - 1)
            mbarrier.wait(full.index(stage), (it // STAGES) & 1)
            k_block = ks.index(stage).reshape([BLOCK_N, DIM]).permute((1, 0))
            s = warpgroup_mma(q, k_block, zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            if IS_SPLIT:
                mbarrier.arrive(k_empty.index(stage), count=1)
            n = (hi - 1) * BLOCK_N
            a = weights(s, m, n, c, b_rows, slope, band, BLOCK_N, FORMULA, HAS_SLOPES, HAS_LEFT, HAS_RIGHT, SCORES)
            a = gl.convert_layout(a.to(vs.dtype), OPERAND)
            it += 1
            if PLACES == 2:
                _release(turn, q_empty.index(place ^ 1))
            for _ in range(streamed(hi - lo, sizes, OF_KEYS) - 1):
                n = following(n, lo, hi, BLOCK_N, OF_KEYS)
                acc, a = _step(
                    acc, a, it, q, memory, zero, m, n, c, b_rows, slope, band, STAGES, DIM, BLOCK_N, IS_SPLIT, FORMULA,
                    HAS_SLOPES, HAS_LEFT, HAS_RIGHT, SCORES, OPERAND,
                )  # fmt: skip
                it += 1
            if OWN_OUT:
                mbarrier.arrive(q_empty.index(0), count=1)
            before = (it - 1) & (STAGES - 1)
            if IS_SPLIT:
                mbarrier.wait(v_full.index(before), ((it - 1) // STAGES) & 1)
            acc = warpgroup_mma(a, vs.index(before).reshape([BLOCK_N, DIM]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(before), count=1)
        elif PLACES == 2:
            _release(turn, q_empty.index(place ^ 1))
        elif OWN_OUT:
            mbarrier.arrive(q_empty.index(0), count=1)
        start = pass_by(
            it, start + streamed(all_hi - all_lo, sizes, OF_KEYS) - it, full, empty, v_full, k_empty, STAGES, IS_SPLIT
        )
        if m >= 0 and m < rows:
            # rows beyond the last are not written
            if OWN_OUT:
                tma.store_wait(0)
            if IS_PACKED and m + 64 > rows:
                x = (acc * out_scale).to(qs.dtype)
                store_rows(out_rows, x, row + m, rows - m, head, sizes[2], all_sizes[9] * 8, DIM, SUMS)
            else:
                outs.index(mine).reshape([64, DIM]).store((acc * out_scale).to(qs.dtype))
                fence_async_shared()
                store(out, [lead, head, row + m, 0], outs.index(mine))
                if not OWN_OUT and PLACES == 1:
                    tma.store_wait(0)
        if not OWN_OUT and PLACES == 1:
            mbarrier.arrive(q_empty.index(0), count=1)
        turn += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def _fwd_kernel(
    q, k, v, out, bias, slopes, out_rows, cu_q, cu_k, counter, bias_strides, slopes_strides,
    total_q, total_k, count, together, blocks, numbers, sizes, band, c, b, out_scale,
    WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, IS_SPLIT: gl.constexpr, OWN_OUT: gl.constexpr, PLACES: gl.constexpr,
    IS_DYNAMIC: gl.constexpr, OF_KEYS: gl.constexpr, IS_PACKED: gl.constexpr, FORMULA: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_ROW_BIAS: gl.constexpr, HAS_SLOPES: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """64 * WARPGROUPS rows of one head of out: O = sum over key blocks of sigmoid(c Q K^T + b - slope |p - j|) V.

    Grid: at most (blocks * nheads * batch,). q, k, v and out are descriptors of (batch, nheads, seqlen, head_dim), in
    blocks of 64 rows, k and v of BLOCK_N. sizes: (blocks, together, nheads, group, seqlen_q, seqlen_k, blocks of all
    heads, first row of the first block), where `together` divides nheads * batch, and that row is 0 or less, a multiple
    of 64; band: (q_offset, left, right). STAGES is a power of two. Accumulator: float32.
    OF_KEYS: dV, with K as q, Q as k and dO as v, and with sizes and band turned over: see `partitions.stream`.
    IS_PACKED: q, k, v and out are of all rows, out_rows is out by its address, and sequences end as cu_q and cu_k say.
    What differs from call to call has arguments of its own, since a tuple is always specialized; sizes are (nheads,
    group, whether the first block is the short one, eighths of head_dim_v and of head_dim).
    """
    if IS_PACKED:
        sizes = (
            blocks, together, sizes[0], sizes[1], total_q, total_k, numbers, sizes[2], count, sizes[3], sizes[4],
        )  # fmt: skip
    BARRIERS: gl.constexpr = STAGES + 1 if IS_PACKED else STAGES  # one for what is not ready when it comes
    qs = gl.allocate_shared_memory(q.dtype, [PLACES * WARPGROUPS, 1, 1, 64, DIM], q.layout)
    ks = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, DIM], k.layout)
    vs = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, DIM], v.layout)
    outs = qs
    if OWN_OUT:
        outs = gl.allocate_shared_memory(q.dtype, [WARPGROUPS, 1, 1, 64, DIM], out.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = full
    k_empty = empty
    if IS_SPLIT:
        v_full = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
        k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLACES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=WARPGROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
        if IS_SPLIT:
            mbarrier.init(v_full.index(i), count=1)
            mbarrier.init(k_empty.index(i), count=WARPGROUPS)
    if IS_PACKED:
        mbarrier.init(full.index(STAGES), count=1)
        if IS_SPLIT:
            mbarrier.init(v_full.index(STAGES), count=1)
    memory = (qs, ks, vs, outs, q_full, q_empty, full, empty, v_full, k_empty)
    tickets = make_tickets(WARPGROUPS)
    fence_async_shared()
    call = (
        out, bias, slopes, out_rows, cu_q, cu_k, memory, tickets, bias_strides, slopes_strides, sizes, band, c, b,
        out_scale,
    )  # fmt: skip
    load_call = (q, k, v, cu_q, cu_k, counter, memory, tickets, sizes, band)
    if WARPGROUPS == 2:
        gl.warp_specialize([
            (_consume, (
                call, 0, WARPGROUPS, STAGES, DIM, BLOCK_N, IS_SPLIT, OWN_OUT, PLACES, IS_DYNAMIC, OF_KEYS,
                IS_PACKED, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_consume, (
                call, 1, WARPGROUPS, STAGES, DIM, BLOCK_N, IS_SPLIT, OWN_OUT, PLACES, IS_DYNAMIC, OF_KEYS,
                IS_PACKED, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_produce, (
                load_call, WARPGROUPS, STAGES, DIM, BLOCK_N, IS_SPLIT, PLACES, IS_DYNAMIC, OF_KEYS, IS_PACKED, HAS_LEFT,
                HAS_RIGHT,
            )),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    elif WARPGROUPS == 3:
        gl.warp_specialize([
            (_consume, (
                call, 0, WARPGROUPS, STAGES, DIM, BLOCK_N, IS_SPLIT, OWN_OUT, PLACES, IS_DYNAMIC, OF_KEYS,
                IS_PACKED, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_consume, (
                call, 1, WARPGROUPS, STAGES, DIM, BLOCK_N, IS_SPLIT, OWN_OUT, PLACES, IS_DYNAMIC, OF_KEYS,
                IS_PACKED, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_consume, (
                call, 2, WARPGROUPS, STAGES, DIM, BLOCK_N, IS_SPLIT, OWN_OUT, PLACES, IS_DYNAMIC, OF_KEYS,
                IS_PACKED, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_produce, (
                load_call, WARPGROUPS, STAGES, DIM, BLOCK_N, IS_SPLIT, PLACES, IS_DYNAMIC, OF_KEYS, IS_PACKED, HAS_LEFT,
                HAS_RIGHT,
            )),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                call, 0, WARPGROUPS, STAGES, DIM, BLOCK_N, IS_SPLIT, OWN_OUT, PLACES, IS_DYNAMIC, OF_KEYS,
                IS_PACKED, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_consume, (
                call, 1, WARPGROUPS, STAGES, DIM, BLOCK_N, IS_SPLIT, OWN_OUT, PLACES, IS_DYNAMIC, OF_KEYS,
                IS_PACKED, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_consume, (
                call, 2, WARPGROUPS, STAGES, DIM, BLOCK_N, IS_SPLIT, OWN_OUT, PLACES, IS_DYNAMIC, OF_KEYS,
                IS_PACKED, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_consume, (
                call, 3, WARPGROUPS, STAGES, DIM, BLOCK_N, IS_SPLIT, OWN_OUT, PLACES, IS_DYNAMIC, OF_KEYS,
                IS_PACKED, FORMULA, HAS_BIAS, HAS_ROW_BIAS, HAS_SLOPES, HAS_LEFT, HAS_RIGHT,
            )),
            (_produce, (
                load_call, WARPGROUPS, STAGES, DIM, BLOCK_N, IS_SPLIT, PLACES, IS_DYNAMIC, OF_KEYS, IS_PACKED, HAS_LEFT,
                HAS_RIGHT,
            )),
        ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24])  # fmt: skip
