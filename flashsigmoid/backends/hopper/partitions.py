"""What the partitions of the Hopper kernels share: rows and keys, copies, the ring of stages, scores to weights."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.9 renamed the copies
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def locate(turn, sizes, BLOCK: gl.constexpr):
    """(first row, head, batch) of this program's block in its turn: of `together` heads the last blocks first, whose
    rows see most. Every other turn the programs change sides, so that who had the longest gets the shortest. Beyond the
    last block the rows are beyond the last row."""
    blocks, together, nheads = sizes[0], sizes[1], sizes[2]
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    at = turn * programs + gl.where(turn % 2 == 0, pid, programs - 1 - pid)
    rest = at % (together * blocks)
    head = at // (together * blocks) * together + rest % together
    m = gl.where(at < sizes[6], (blocks - 1 - rest // together) * BLOCK, blocks * BLOCK)
    return m, head % nheads, head // nheads


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
    hi = gl.where(m < rows, gl.maximum(lo, hi), lo)
    return lo, hi


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
