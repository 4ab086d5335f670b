"""What the partitions of the Hopper kernels share: rows and keys, copies, the ring of stages, scores to weights."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.9 renamed the copies
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def locate(sizes):
    """(block of rows, head, batch) of this program: of `together` heads the last blocks first, whose rows see most."""
    blocks, together, nheads = sizes[0], sizes[1], sizes[2]
    pid = gl.program_id(0)
    rest = pid % (together * blocks)
    head = pid // (together * blocks) * together + rest % together
    return blocks - 1 - rest // together, head % nheads, head // nheads


@gluon.jit
def key_blocks(
    m, sizes, band, BLOCK: gl.constexpr, BLOCK_N: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr
):
    """Blocks of keys that any of the rows [m, m + BLOCK) sees, (lo, whole, rest, hi): all of them see [whole, rest)."""
    rows, keys = sizes[4], sizes[5]
    q_offset, left, right = band
    first = m + q_offset
    last = gl.minimum(m + BLOCK, rows) - 1 + q_offset
    lo = 0
    whole = 0
    hi = gl.cdiv(keys, BLOCK_N)
    rest = hi  # a last block that is short is whole: the values beyond it are zeros
    if HAS_RIGHT:
        hi = gl.cdiv(gl.minimum(keys, gl.maximum(0, last + right + 1)), BLOCK_N)
        seen = gl.maximum(0, first + right + 1)
        rest = gl.where(seen < keys, seen // BLOCK_N, hi)
    if HAS_LEFT:
        lo = gl.maximum(0, first - left) // BLOCK_N
        whole = gl.cdiv(gl.maximum(0, last - left), BLOCK_N)
    hi = gl.where(m < rows, gl.maximum(lo, hi), lo)
    return lo, whole, rest, hi


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
    s, p, n, c, b, slope, band, BLOCK_N: gl.constexpr, FORMULA: gl.constexpr, HAS_SLOPES: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """As blocks.weights of the Triton backend: what is not seen is -inf before the formula."""
    y = s * c + b
    if HAS_SLOPES or HAS_LEFT or HAS_RIGHT:
        _, left, right = band
        j = (n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT)))[None, :]
        if HAS_SLOPES:
            y -= slope * gl.abs(p - j).to(gl.float32)
        if HAS_RIGHT:
            y = gl.where(j <= p + right, y, float("-inf"))
        if HAS_LEFT:
            y = gl.where(j >= p - left, y, float("-inf"))
    return sigmoid(y, FORMULA)


@gluon.jit
def pass_by(it, count, full, empty, STAGES: gl.constexpr):
    """Let `count` blocks go by that only other warpgroups see. Who has not waited must not arrive: it would count in
    the phase before."""
    for i in range(it, it + count):
        mbarrier.wait(full.index(i & (STAGES - 1)), (i // STAGES) & 1)
        mbarrier.arrive(empty.index(i & (STAGES - 1)), count=1)
    return it + gl.maximum(0, count)
