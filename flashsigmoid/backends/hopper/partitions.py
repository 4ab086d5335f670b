"""What the partitions of the Hopper kernels share: rows and keys, copies, the ring of stages, scores to weights."""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.9 renamed the copies
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@builtin
def add(descriptor, at, block, _semantic=None):
    """Add a block of shared memory to what a descriptor describes; Triton has a name for it from 3.9 on only."""
    at = _semantic._convert_to_ir_values(at, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, at, block.handle)


@gluon.jit
def uniform(x):
    """x, which the compiler then knows to be the same for all threads of a warp: it goes to the uniform registers."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def nothing(it):
    """0 in block number `it`, below 2^30, which the compiler cannot know: an index of memory that has one place.

    It would compute the addresses of all products once, and keep them where 240 registers a thread are in use already.
    """
    return it >> 30


@gluon.jit
def locate(at, sizes, heads):
    """(rank of the block, head, batch) of the block number `at`: of `together` heads first all blocks of rank 0."""
    blocks, together = sizes[0], sizes[1]
    rest = at % (together * blocks)
    head = at // (together * blocks) * together + rest % together
    return uniform(rest // together), uniform(head % heads), uniform(head // heads)


@gluon.jit
def first_row(rank, sizes, WARPGROUPS: gl.constexpr, OF_KEYS: gl.constexpr):
    """Of the block of this rank: queries that see most, the last, come first, and so do the first keys."""
    if OF_KEYS:
        m = rank * (64 * WARPGROUPS)
    else:
        m = sizes[7] + (sizes[0] - 1 - rank) * (64 * WARPGROUPS)
    return m


@gluon.jit
def streamed(count, sizes, OF_KEYS: gl.constexpr):
    """Blocks that go by: `count`, where rows are keys for each query head of the group."""
    if OF_KEYS:
        count = count * sizes[3]
    return count


@gluon.jit
def stream(i, head, lo, hi, sizes, BLOCK_N: gl.constexpr, OF_KEYS: gl.constexpr):
    """(head, first column) of block i that goes by: of the last column first; where rows are keys, head by head.

    Rows that are keys see as `band` turned over says: -q_offset, and left and right exchanged.
    """
    if OF_KEYS:
        other = head * sizes[3] + i // (hi - lo)
        n = (hi - 1 - i % (hi - lo)) * BLOCK_N
    else:
        other = head // sizes[3]
        n = (hi - 1 - i) * BLOCK_N
    return other, n


@gluon.jit
def following(n, lo, hi, BLOCK_N: gl.constexpr, OF_KEYS: gl.constexpr):
    """The first column of the block after that of n."""
    if OF_KEYS:
        n = gl.where(n == lo * BLOCK_N, hi * BLOCK_N, n)
    return n - BLOCK_N


@gluon.jit
def make_tickets(takers: gl.constexpr):
    """Memory for `hand_out` and `take`: numbers of two turns, and who has written and read them."""
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=takers)
    return numbers, full, empty


@gluon.jit
def hand_out(at, turn, counter, tickets, IS_DYNAMIC: gl.constexpr):
    """The number of the block after `at`, for one warp that tells the others: the next that no program has taken."""
    after = at + gl.num_programs(0)
    if IS_DYNAMIC:
        numbers, full, empty = tickets
        after = gl.atomic_add(counter, 1) + gl.num_programs(0)
        mbarrier.wait(empty.index(turn & 1), ((turn >> 1) & 1) ^ 1)
        numbers.index(turn & 1).store(gl.full([1], after, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
        mbarrier.arrive(full.index(turn & 1), count=1)
    return after


@gluon.jit
def take(at, turn, tickets, WARPS: gl.constexpr, IS_DYNAMIC: gl.constexpr):
    """The same number for the others, each once a turn."""
    after = at + gl.num_programs(0)
    if IS_DYNAMIC:
        numbers, full, empty = tickets
        mbarrier.wait(full.index(turn & 1), (turn >> 1) & 1)
        after = gl.max(numbers.index(turn & 1).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
        mbarrier.arrive(empty.index(turn & 1), count=1)
    return after


@gluon.jit
def key_blocks(
    m, sizes, band, BLOCK: gl.constexpr, BLOCK_N: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr
):
    """Blocks of keys that any of the rows [m, m + BLOCK) sees, (lo, hi)."""
    rows, keys = sizes[4], sizes[5]
    q_offset, left, right = band
    lo = 0
    hi = gl.cdiv(keys, BLOCK_N)
    if HAS_RIGHT:
        last = gl.minimum(m + BLOCK, rows) - 1 + q_offset
        hi = gl.cdiv(gl.minimum(keys, gl.maximum(0, last + right + 1)), BLOCK_N)
    if HAS_LEFT:
        lo = gl.maximum(0, m + q_offset - left) // BLOCK_N
    hi = gl.where((m < rows) & (m + BLOCK > 0), gl.maximum(lo, hi), lo)
    return lo, hi


@gluon.jit
def row_blocks(n, sizes, band, BLOCK_M: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """Blocks of rows that see any of the keys [n, n + 128): (lo, hi)."""
    rows, keys = sizes[4], sizes[5]
    q_offset, left, right = band
    lo = 0
    hi = gl.cdiv(rows, BLOCK_M)
    if HAS_RIGHT:
        lo = gl.maximum(0, n - right - q_offset) // BLOCK_M
    if HAS_LEFT:
        last = gl.minimum(n + 128, keys) - 1
        hi = gl.cdiv(gl.minimum(rows, gl.maximum(0, last + left - q_offset + 1)), BLOCK_M)
    return lo, gl.maximum(lo, hi)


@gluon.jit
def sigmoid(y, FORMULA: gl.constexpr):
    """gain * sigmoid(x) of y = unit * x + shift, elementwise, float32."""
    a = gl.inline_asm_elementwise(
        FORMULA.asm, FORMULA.constraints, [y], dtype=gl.float32, is_pure=True, pack=FORMULA.pack
    )
    if FORMULA.name == "tanh":
        a = 0.5 * a + 0.5
    return a


@gluon.jit
def weights(
    s, m, n, c, b, slope, band, BLOCK_N: gl.constexpr, FORMULA: gl.constexpr, HAS_SLOPES: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Of 64 rows from m and BLOCK_N keys from n, as blocks.weights of the Triton backend: what is not seen is -inf
    before the formula. A last block that is short is whole: the values beyond it are zeros."""
    y = s * c + b
    if HAS_SLOPES or HAS_LEFT or HAS_RIGHT:
        q_offset, left, right = band
        p = (m + q_offset + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT)))[:, None]
        j = (n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT)))[None, :]
        if HAS_SLOPES:
            y -= slope * gl.abs(p - j).to(gl.float32)
        if HAS_RIGHT:  # noqa: SIM102  a constant, then numbers
            if n + BLOCK_N - 1 > m + q_offset + right:
                y = gl.where(j <= p + right, y, float("-inf"))
        if HAS_LEFT:  # noqa: SIM102
            if n < m + 63 + q_offset - left:
                y = gl.where(j >= p - left, y, float("-inf"))
    return sigmoid(y, FORMULA)


@gluon.jit
def pass_by(it, count, full, empty, v_full, k_empty, STAGES: gl.constexpr, IS_SPLIT: gl.constexpr):
    """Let `count` blocks go by that only other warpgroups see. Who has not waited must not arrive: it would count in
    the phase before."""
    for i in range(it, it + count):
        stage = i & (STAGES - 1)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        if IS_SPLIT:
            mbarrier.arrive(k_empty.index(stage), count=1)
            mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
        mbarrier.arrive(empty.index(stage), count=1)
    return it + gl.maximum(0, count)
