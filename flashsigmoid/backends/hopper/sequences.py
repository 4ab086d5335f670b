"""Packed sequences in the Hopper kernels: which one a block is of, its last rows in shared memory, rows to memory.

The tensor memory accelerator copies blocks of all rows, and so the last block of a sequence with rows of the next. They
become zeros in shared memory, which is what it gives beyond a tensor: who multiplies computes what it would of one
sequence alone.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .partitions import first_row, load, locate, uniform


@builtin
def view(block, dtype, shape, layout, _semantic=None):
    """The same shared memory of another type and shape; the method's name is not the same in all Tritons."""
    plain = _unwrap_if_constexpr
    return _semantic.memdesc_reinterpret(block, plain(dtype), [plain(n) for n in plain(shape)], plain(layout))


@gluon.jit
def find(block, cu, count, total, ROWS: gl.constexpr):
    """(sequence, its first row, its rows, number within it) of a block of ROWS, of `count` sequences.

    Sequence i has the numbers from cu[i] // ROWS + i to that of i + 1: enough for its blocks, at most one too many,
    which has no rows; so nobody need add up blocks. Rows behind the last sequence are one more, number `count`.
    """
    low = 0
    high = count
    while low < high:
        middle = (low + high + 1) // 2
        if gl.load(cu + middle) // ROWS + middle <= block:
            low = middle
        else:
            high = middle - 1
    start = gl.load(cu + low)
    stop = gl.load(cu + gl.minimum(low + 1, count))
    stop = gl.where(low < count, stop, total)
    return uniform(low), uniform(start), uniform(stop - start), uniform(block - start // ROWS - low)


@gluon.jit
def find_block(
    at, sizes, band, cu, cu_others, WARPGROUPS: gl.constexpr, OF_KEYS: gl.constexpr, IS_PACKED: gl.constexpr
):
    """Of block number `at`: (first row in its sequence, head, batch or sequence, batch of the descriptors, where the
    sequence begins in rows and in others, sizes, band).

    Packed, sizes are (numbers of blocks, together, heads, group, all rows, all others, numbers of all heads, whether
    the first block is the short one, sequences, eighths of head_dim_v); those returned have the sequence's own rows.
    """
    rank, head, batch = locate(at, sizes, sizes[2])
    start = 0
    start_others = 0
    lead = batch
    if IS_PACKED:
        ROWS: gl.constexpr = 64 * WARPGROUPS
        count = sizes[8]
        sequence, start, rows, block = find(rank, cu, count, sizes[4], ROWS)
        batch = gl.minimum(sequence, count - 1)
        start_others = uniform(gl.load(cu_others + batch))
        others = uniform(gl.where(sequence < count, gl.load(cu_others + batch + 1) - start_others, 0))
        lead = 0
        blocks = gl.cdiv(rows, ROWS)
        first = sizes[7] * (64 * gl.cdiv(rows, 64) - ROWS * blocks)
        band = (others - rows, band[1], band[2])
        sizes = (blocks, sizes[1], sizes[2], sizes[3], rows, others, sizes[6], first)
        rank = block
    m = first_row(rank, sizes, WARPGROUPS, OF_KEYS)
    return m, head, batch, lead, start, start_others, sizes, band


@gluon.jit
def find_keys(at, sizes, band, cu_q, cu_k, IS_PACKED: gl.constexpr):
    """Of block number `at` of 128 keys: (first key in its sequence, key head, batch or sequence, batch of the
    descriptors, where the sequence begins in queries and in keys, sizes, band), in the order of the backward's blocks.

    Packed, sizes are those of `find_block`, with queries before keys and at last eighths of head_dim.
    """
    rank, head, batch = locate(at, sizes, sizes[2] // sizes[3])
    row = 0
    key = 0
    lead = batch
    if IS_PACKED:
        count = sizes[8]
        sequence, key, keys, block = find(rank, cu_k, count, sizes[5], 128)
        batch = gl.minimum(sequence, count - 1)
        row = uniform(gl.load(cu_q + batch))
        rows = uniform(gl.where(sequence < count, gl.load(cu_q + batch + 1) - row, 0))
        rows = gl.where(block * 128 < keys, rows, 0)  # a number too many has nothing to do
        lead = 0
        band = (keys - rows, band[1], band[2])
        sizes = (sizes[0], sizes[1], sizes[2], sizes[3], rows, keys, sizes[6])
        rank = block
    return rank * 128, head, batch, lead, row, key, sizes, band


@gluon.jit
def blank(memory, place, rows, BLOCK: gl.constexpr, DIM: gl.constexpr, PLACES: gl.constexpr, BITS: gl.constexpr = 16):
    """Zeros from row `rows` on in one of PLACES blocks (BLOCK, DIM), by one warp: in pieces as the swizzle has them."""
    WIDTH: gl.constexpr = 1024 // BITS
    PIECE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=BITS, rank=2)
    LANES: gl.constexpr = gl.BlockedLayout([1, WIDTH // 8], [4, 8], [1, 1], [1, 0])
    SLABS: gl.constexpr = DIM // WIDTH
    HIGH: gl.constexpr = BLOCK // 8
    pieces = view(memory, memory.dtype, [PLACES * SLABS * HIGH, 8, WIDTH], PIECE)
    zeros = gl.zeros([8, WIDTH], memory.dtype, LANES)
    if rows % 8 > 0:
        keep = (gl.arange(0, 8, layout=gl.SliceLayout(1, LANES)) < rows % 8)[:, None]
        for slab in gl.static_range(SLABS):
            piece = pieces.index((place * SLABS + slab) * HIGH + rows // 8)
            piece.store(gl.where(keep, piece.load(LANES), zeros))
    for i in range(gl.cdiv(rows, 8), HIGH):
        for slab in gl.static_range(SLABS):
            pieces.index((place * SLABS + slab) * HIGH + i).store(zeros)


@gluon.jit
def blank_own(block, rows, DIM: gl.constexpr):
    """Zeros from row `rows` on in 64 that a warpgroup has for itself."""
    LANES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    keep = (gl.arange(0, 64, layout=gl.SliceLayout(1, LANES)) < rows)[:, None]
    block.store(gl.where(keep, block.load(LANES), gl.zeros([64, DIM], block.dtype, LANES)))
    fence_async_shared()


@gluon.jit
def settle(memory, others, place, rows, full, times, BLOCK: gl.constexpr, DIM: gl.constexpr, PLACES: gl.constexpr):
    """A block of `memory`, and of `others` if there are any, that came by the barrier behind those of all places, is
    ready by its own without what is not this sequence's; `times`: how many were before."""
    mbarrier.wait(full.index(PLACES), times & 1)
    blank(memory, place, rows, BLOCK, DIM, PLACES)
    if others is not None:
        blank(others, place, rows, BLOCK, DIM, PLACES)
    fence_async_shared()
    mbarrier.arrive(full.index(place), count=1)


@gluon.jit
def load_cut(
    x, y, xs, ys, x_full, y_full, late, times, place, batch, head, row, rows,
    BLOCK: gl.constexpr, DIM: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Blocks of two tensors, of whose rows only `rows` are this sequence's, ready when the others are zeros; `late` is
    a barrier for what is not ready when it comes, and has been that so many `times`."""
    mbarrier.expect(late, x.block_type.nbytes + y.block_type.nbytes)
    load(x, [batch, head, row, 0], late, xs.index(place))
    load(y, [batch, head, row, 0], late, ys.index(place))
    mbarrier.wait(late, times & 1)
    blank(xs, place, rows, BLOCK, DIM, PLACES)
    blank(ys, place, rows, BLOCK, DIM, PLACES)
    fence_async_shared()
    mbarrier.arrive(x_full, count=1)
    if y_full is not None:
        mbarrier.arrive(y_full, count=1)


@gluon.jit
def store_rows(out, x, row, count, head, nheads, dim, DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """The first `count` of 64 rows, and the first `dim` channels, to contiguous (rows, nheads, dim) from `row` on: a
    copy of the whole block would write to the next sequence."""
    i = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    j = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    start = out + (row.to(gl.int64) * nheads + head) * dim
    gl.store(start + i * (nheads * dim) + j, x, mask=(i < count) & (j < dim))
