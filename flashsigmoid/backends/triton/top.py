"""The kernel of the largest weights of every row, and its launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formula import make_formula
from ..gpu import bias_strides, on_device, slopes_strides
from ..problem import Problem
from .blocks import key_parts, load_bias, load_rows, weights
from .launch import _precision
from .tiles import Tile

_MOST = 64  # weights of a row that one launch finds: they are kept in registers
# not measured: they spill nothing, but float32 of head_dim 256
_TILES = {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 4, 2), 256: Tile(32, 64, 4, 1)}
_FLOAT32 = {64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)}
_LAST = 2**31 - 1
_NONE = tl.constexpr(-(2**62))  # less than any word, and than what stands for one not found


@triton.jit(do_not_specialize=["nheads", "group", "seqlen_q", "seqlen_k", "q_offset", "left", "right"])
def _top_kernel(
    q, k, bias, slopes, bound, out,
    q_strides, k_strides, bias_strides, slopes_strides,
    nheads, group, seqlen_q, seqlen_k, q_offset, left, right, c, b,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COUNT: tl.constexpr,
    FORMULA: tl.constexpr, PRECISION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROW_BIAS: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_BOUND: tl.constexpr,
):  # fmt: skip
    """The COUNT largest words of BLOCK_M rows of one head, in no order: a weight's bits above those of its key.

        word = 2^32 bits(A) + (2^31 - 1 - j) of every visible j with A > 0; where there are fewer, 0

    Positive floats and their bits are ordered alike, and of equal weights the earlier key's word is the larger. A
    block's largest word takes the place of the least so far, until it is less than that: of most blocks at once.

    Grid: (blocks of rows * nheads * batch,). Rows of `out` and `bound`, (batch, nheads, seqlen_q, COUNT) int64 and
    (batch, nheads, seqlen_q): with HAS_BOUND only words below the row's bound count. Scores and weights: float32.
    """
    blocks = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % blocks
    head = (pid // blocks) % nheads
    sequence = pid // (blocks * nheads)
    head_k = head // group
    m = block * BLOCK_M
    offs_m = m + tl.arange(0, BLOCK_M)
    row = (sequence.to(tl.int64) * nheads + head) * seqlen_q + offs_m  # (BLOCK_M,)

    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes + sequence * slopes_strides[0] + head * slopes_strides[1]).to(tl.float32) * FORMULA.unit
    if HAS_BIAS:
        b = load_bias(
            bias, bias_strides[0], bias_strides[1], bias_strides[2], sequence, head, m, seqlen_q, BLOCK_M, FORMULA,
            HAS_ROW_BIAS,
        )  # fmt: skip
    if HAS_ROW_BIAS:
        b = b[:, None]
    below = tl.full((BLOCK_M,), 2**63 - 1, tl.int64)
    if HAS_BOUND:
        below = tl.load(bound + row, mask=offs_m < seqlen_q, other=0)

    q_block = load_rows(q, q_strides, sequence, head, m, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    p = (offs_m + q_offset)[:, None]
    last = tl.minimum(m + BLOCK_M, seqlen_q) - 1 + q_offset
    lo, _whole, _rest, stop = key_parts(m + q_offset, last, seqlen_k, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    columns = tl.arange(0, COUNT)[None, :]
    best = (-1 - columns - 0 * offs_m[:, None]).to(tl.int64)  # (BLOCK_M, COUNT), no two alike
    for n in range(lo, stop, BLOCK_N):
        key = n  # assigned, which the interpreter makes a tensor of
        k_block = load_rows(k, k_strides, sequence, head_k, key, seqlen_k, BLOCK_N, HEAD_DIM, BLOCK_D, False)
        s = tl.dot(q_block, k_block.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        j = (key + tl.arange(0, BLOCK_N))[None, :]
        a = weights(s, p, j, c, b, slope, left, right, FORMULA, HAS_SLOPES, HAS_LEFT, HAS_RIGHT)
        bits = a.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # a NaN's sign says nothing
        word = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - j).to(tl.int64)
        word = tl.where((bits > 0) & (j < seqlen_k) & (word < below[:, None]), word, _NONE)
        largest = tl.max(word, 1)  # (BLOCK_M,)
        least = tl.min(best, 1)
        while tl.max((largest > least).to(tl.int32), 0) > 0:
            best = tl.where(best == least[:, None], tl.maximum(least, largest)[:, None], best)
            word = tl.where(word == largest[:, None], _NONE, word)
            largest = tl.max(word, 1)
            least = tl.min(best, 1)
    tl.store(out + row[:, None] * COUNT + columns, tl.maximum(best, 0), mask=(offs_m < seqlen_q)[:, None])


_kernel: Any = _top_kernel


def top_weights(
    problem: Problem, q: Tensor, k: Tensor, count: int, bias: Tensor | None, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights in float32 and keys in int64, (batch, nheads, seqlen_q, count): a launch for every 64 of them."""
    found: list[Tensor] = []
    for start in range(0, count, _MOST):
        bound = found[-1][..., -1].contiguous() if found else None
        found.append(_launch(problem, q, k, bias, slopes, bound, min(_MOST, count - start)))
    words = torch.cat(found, dim=-1)
    # the upper half of a word, in a machine's order of bytes either way, is a float's bits
    values = (words >> 32).to(torch.int32).view(torch.float32)
    return values, torch.where(words == 0, -1, _LAST - (words & _LAST))


def _launch(
    problem: Problem, q: Tensor, k: Tensor, bias: Tensor | None, slopes: Tensor | None, bound: Tensor | None, count: int
) -> Tensor:
    """Words of the next `count` weights of every row, falling."""
    dim = max(16, triton.next_power_of_2(problem.head_dim))
    tile = (_FLOAT32 if problem.dtype == torch.float32 else _TILES)[max(64, dim)]
    formula = make_formula("full", "fwd", False, 1, has_asm=False)
    left, right = problem.band
    b = problem.sigmoid_bias
    kept = triton.next_power_of_2(count)
    out = torch.empty(problem.batch, problem.nheads, problem.seqlen_q, kept, dtype=torch.int64, device=q.device)
    blocks = triton.cdiv(problem.seqlen_q, tile.block_m)
    if blocks * problem.nheads * problem.batch:
        with on_device(q):
            _kernel[(blocks * problem.nheads * problem.batch,)](
                q, k, bias, slopes, bound, out, q.stride(), k.stride(), bias_strides(problem, bias),
                slopes_strides(problem, slopes), problem.nheads, problem.group, problem.seqlen_q, problem.seqlen_k,
                problem.q_offset, min(left or 0, 2**30), min(right or 0, 2**30), problem.scale,
                0.0 if b is None else b,
                HEAD_DIM=problem.head_dim, BLOCK_D=dim, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, COUNT=kept,
                FORMULA=formula, PRECISION=_precision(problem), HAS_BIAS=bias is not None,
                HAS_ROW_BIAS=problem.has_row_bias, HAS_SLOPES=slopes is not None, HAS_LEFT=left is not None,
                HAS_RIGHT=right is not None, HAS_BOUND=bound is not None, num_warps=tile.num_warps,
                num_stages=tile.num_stages, enable_fp_fusion=True,
            )  # fmt: skip
    return out.sort(dim=-1, descending=True).values[..., :count]
