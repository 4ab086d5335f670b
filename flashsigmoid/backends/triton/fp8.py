"""The forward kernel for float8_e4m3fn inputs, and its launch: sm_90 and later."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..formula import Formula, choose_formula, make_formula
from ..gpu import on_device
from ..problem import Problem, bias_rows
from .blocks import key_parts, store_rows, weights
from .fwd import NOT_SPECIALIZED
from .tiles import Tile

# (block_m, block_n, num_warps, num_stages) by head_dim up to, H200; 256 by its registers, not measured
_TILES = {64: Tile(64, 128, 4, 2), 128: Tile(64, 128, 4, 2), 256: Tile(64, 128, 8, 2)}


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _fwd_fp8_kernel(
    q, k, v, out, bias, slopes, q_scale, k_scale, v_scale,
    out_strides, bias_strides, slopes_strides, q_scale_strides, k_scale_strides, v_scale_strides,
    batch, nheads, group, seqlen_q, seqlen_k, q_offset, left, right, c, b, out_scale,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, FORMULA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one head of out, as `_fwd_kernel`; the weights of a row of a block are scaled before rounding.

        O += (sum over the block of round(f A) V) / f,   f = 2^7 / 2^floor(log2(max A)) of the row

    e4m3 keeps 3 bits above 2^-6 and nothing below 2^-10: a weight near 1/n is scaled to near 2^7. q and k are
    descriptors of (batch, nheads, seqlen, head_dim), v of (batch, nheads, head_dim_v, seqlen): the matrix units read
    8-bit operands along the sum. Accumulators: float32, one sum for every block of keys.
    """
    blocks = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % blocks
    head = (pid // blocks) % nheads
    sequence = pid // (blocks * nheads)
    if HAS_RIGHT:
        block = blocks - 1 - block
    m = block * BLOCK_M
    head_k = head // group
    offs_m = m + tl.arange(0, BLOCK_M)
    first = m + q_offset
    last = tl.minimum(m + BLOCK_M, seqlen_q) - 1 + q_offset

    q_factor = tl.load(q_scale + sequence * q_scale_strides[0] + head * q_scale_strides[1])
    k_factor = tl.load(k_scale + sequence * k_scale_strides[0] + head_k * k_scale_strides[1])
    v_factor = tl.load(v_scale + sequence * v_scale_strides[0] + head_k * v_scale_strides[1])
    c *= q_factor * k_factor
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes + sequence * slopes_strides[0] + head * slopes_strides[1]).to(tl.float32) * FORMULA.unit
    if HAS_BIAS:
        bias_row = bias + sequence.to(tl.int64) * bias_strides[0] + head.to(tl.int64) * bias_strides[1]
        bias_row += offs_m.to(tl.int64) * bias_strides[2]
        bias_m = tl.load(bias_row, mask=offs_m < seqlen_q, other=0.0).to(tl.float32)  # (BLOCK_M,)
        b_m = (bias_m * FORMULA.unit + FORMULA.shift)[:, None]
    else:
        b_m = b

    q_block = q.load([sequence, head, m, 0]).reshape(BLOCK_M, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    p = (offs_m + q_offset)[:, None]
    lo, whole, rest, stop = key_parts(first, last, seqlen_k, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    for part in tl.static_range(0 if HAS_LEFT else 1, 3):
        start, end = (lo, tl.minimum(whole, stop)) if part == 0 else ((whole, rest) if part == 1 else (rest, stop))
        for n in range(start, end, BLOCK_N):
            k_block = k.load([sequence, head_k, n, 0]).reshape(BLOCK_N, BLOCK_D)
            s = tl.dot(q_block, k_block.T)  # (BLOCK_M, BLOCK_N)
            j = (n + tl.arange(0, BLOCK_N))[None, :]
            a = weights(
                s, p, j, c, b_m, slope, left, right, FORMULA, HAS_SLOPES, HAS_LEFT and part != 1,
                HAS_RIGHT and part != 1,
            )  # fmt: skip
            largest = tl.maximum(tl.max(a, 1), 1e-30)  # (BLOCK_M,)
            power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            factor = 128.0 / power
            v_block = v.load([sequence, head_k, 0, n]).reshape(BLOCK_DV, BLOCK_N)
            total = tl.dot((a * factor[:, None]).to(v_block.dtype), v_block.T)  # (BLOCK_M, BLOCK_DV)
            acc += total * (power * 0.0078125)[:, None]

    acc *= out_scale * v_factor
    store_rows(out, out_strides, sequence, head, m, seqlen_q, acc, BLOCK_M, HEAD_DIM_V, BLOCK_DV)


_kernel: Any = _fwd_fp8_kernel


@functools.lru_cache(maxsize=1024)
def _formula(name: str, pack: int, has_asm: bool) -> Formula:
    return make_formula(name, "fwd", False, pack, has_asm)


def forward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    slopes: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """out (batch, seqlen_q, nheads, head_dim_v) in `out_dtype`, contiguous; `scales` are float32, expanded to heads.

    v is copied once with its keys innermost, 1 byte a number.
    """
    dim, dim_v = (max(32, triton.next_power_of_2(x)) for x in (problem.head_dim, problem.head_dim_v))
    tile = _TILES[max(64, dim, dim_v)]
    pack = min(32, tile.block_m * tile.block_n // (32 * tile.num_warps))
    has_asm = (problem.arch or "").startswith("sm_")
    formula = _formula(choose_formula(replace(problem, dtype=torch.bfloat16), "fwd"), pack, has_asm)
    out = torch.empty(*q.shape[:-1], problem.head_dim_v, dtype=out_dtype, device=q.device)
    values = torch.zeros(
        problem.batch, problem.nheads_k, problem.head_dim_v, -(-problem.seqlen_k // 16) * 16, dtype=torch.uint8,
        device=q.device,
    ).view(v.dtype)  # fmt: skip
    values[..., : problem.seqlen_k] = v.permute(0, 2, 3, 1)

    def rows(x: Tensor, block: int) -> TensorDescriptor:
        x = x.transpose(1, 2)
        strides = [16 if n == 1 and i < 3 else s for i, (n, s) in enumerate(zip(x.shape, x.stride(), strict=True))]
        return TensorDescriptor(x, list(x.shape), strides, [1, 1, block, dim])

    left, right = problem.band
    b = problem.sigmoid_bias
    bias_strides: tuple[int, ...] = (0, 0, 0)
    if bias is not None:
        expanded = bias_rows(bias, problem.batch, problem.nheads)
        bias_strides = tuple(s if n > 1 else 0 for s, n in zip(expanded.stride(), expanded.shape, strict=True))
    slopes_strides = (0, 0) if slopes is None else slopes.expand(problem.batch, problem.nheads).stride()
    blocks = triton.cdiv(problem.seqlen_q, tile.block_m)
    with on_device(q):
        _kernel[(blocks * problem.nheads * problem.batch,)](
            rows(q, tile.block_m), rows(k, tile.block_n),
            TensorDescriptor(values, list(values.shape), list(values.stride()), [1, 1, dim_v, tile.block_n]),
            out, bias, slopes, *scales, out.stride(), bias_strides, slopes_strides, *(x.stride() for x in scales),
            problem.batch, problem.nheads, problem.group, problem.seqlen_q, problem.seqlen_k, problem.q_offset,
            min(left or 0, 2**30), min(right or 0, 2**30), problem.scale * formula.unit,
            0.0 if b is None else b * formula.unit + formula.shift, 1.0 / formula.gain,
            HEAD_DIM_V=problem.head_dim_v, BLOCK_D=dim, BLOCK_DV=dim_v, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            FORMULA=formula, HAS_BIAS=bias is not None, HAS_SLOPES=slopes is not None, HAS_LEFT=left is not None,
            HAS_RIGHT=right is not None, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out
