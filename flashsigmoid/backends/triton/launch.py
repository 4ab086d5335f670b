"""From a Problem and its tensors to the kernels: strides, descriptors, tiles, grids. No kernel code, no validation."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..philox import threshold
from ..problem import Problem, bias_rows
from . import bwd, fwd
from .sigmoid import Formula, make_formula
from .tiles import Tile, choose_formula, choose_tile

# to a type checker a kernel is its Python function
_fwd_kernel: Any = fwd._fwd_kernel
_bwd_dkdv_kernel: Any = bwd._bwd_dkdv_kernel
_bwd_dq_kernel: Any = bwd._bwd_dq_kernel

_UNLIMITED = 2**30  # a window this wide sees every key
CuSeqlens = tuple[Tensor, Tensor] | None


def forward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: CuSeqlens,
) -> Tensor:
    """out, contiguous (batch, seqlen_q, nheads, head_dim_v), or (total_q, nheads, head_dim_v)."""
    out = q.new_empty(*q.shape[:-1], problem.head_dim_v)
    call = _Call(problem, bias, slopes, seed, cu_seqlens)
    plan = _plan(problem, "fwd", _precision(problem))
    tensors, has_descriptors = plan.tensors(q, k, v)
    with _device(q):
        _fwd_kernel[(plan.blocks_q * problem.nheads * call.lead,)](
            *tensors, out, *call.sides, *call.cu_seqlens, *(_strides(x) for x in (q, k, v, out)), *call.side_strides,
            *plan.sizes, *plan.numbers, 1.0 / plan.formula.gain, *plan.dropout,
            **plan.constants, DESCRIPTORS=has_descriptors,
        )  # fmt: skip
    return out


def backward(
    problem: Problem,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: CuSeqlens,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, and the sums of dS and of -dS |p - j| of every row."""
    call = _Call(problem, bias, slopes, seed, cu_seqlens)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    shape = q.shape[:2] if problem.is_packed else (problem.batch, problem.nheads, problem.seqlen_q)
    row_sums = None if bias is None else q.new_empty(shape, dtype=torch.float32)
    slope_sums = None if slopes is None else q.new_empty(shape, dtype=torch.float32)
    nheads, rows = problem.nheads, problem.seqlen_q
    sums_strides = (0, 1, nheads) if problem.is_packed else (nheads * rows, rows, 1)
    strides = tuple(_strides(x) for x in (dout, q, k, v))
    bias_strides, slopes_strides, origin = call.side_strides

    dkdv, rows_plan = (_plan(problem, kernel, _precision(problem)) for kernel in ("dkdv", "dq"))
    with _device(q):
        tensors, has_descriptors = dkdv.tensors(dout, q, k, v)
        _bwd_dkdv_kernel[(dkdv.blocks_k * problem.nheads_k * call.lead,)](
            *tensors, dk, dv, *call.sides, *call.cu_seqlens, *strides, _strides(dk), _strides(dv), *call.side_strides,
            *dkdv.sizes, *dkdv.numbers, problem.scale, *dkdv.dropout,
            **dkdv.constants, DESCRIPTORS=has_descriptors,
        )  # fmt: skip
        tensors, has_descriptors = rows_plan.tensors(dout, q, k, v)
        _bwd_dq_kernel[(rows_plan.blocks_q * problem.nheads * call.lead,)](
            *tensors, dq, bias, slopes, row_sums, slope_sums, call.sides[2], *call.cu_seqlens, *strides, _strides(dq),
            bias_strides, slopes_strides, sums_strides, origin,
            *rows_plan.sizes, *rows_plan.numbers, problem.scale, *rows_plan.dropout,
            **rows_plan.constants, DESCRIPTORS=has_descriptors,
        )  # fmt: skip
    return dq, dk, dv, row_sums, slope_sums


@dataclass(frozen=True)
class _Plan:
    """What a kernel needs that the tensors do not decide."""

    tile: Tile
    formula: Formula
    dim: int
    dim_v: int
    blocks_q: int
    blocks_k: int
    sizes: tuple[int, ...]
    numbers: tuple[float, float]  # scale and b in the formula's units
    dropout: tuple[float, int]  # factor of a kept weight, and the least word that keeps it
    has_descriptors: bool
    constants: dict[str, Any]

    def tensors(self, *tensors: Tensor) -> tuple[tuple[Any, ...], bool]:
        """([dout,] q, k, v) as the kernel loads them, and whether by descriptors."""
        if not self.has_descriptors or not _are_aligned(*tensors):
            return tensors, False
        m, n, dim, dim_v = self.tile.block_m, self.tile.block_n, self.dim, self.dim_v
        blocks = ((m, dim_v), (m, dim), (n, dim), (n, dim_v))[-len(tensors) :]
        return tuple(_descriptor(x, *block) for x, block in zip(tensors, blocks, strict=True)), True


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, kernel: str, precision: str) -> _Plan:
    tile = choose_tile(problem, kernel)
    arch = problem.arch or ""
    pack = max(2, min(32, tile.block_m * tile.block_n // (32 * tile.num_warps)))
    formula = make_formula(
        choose_formula(problem),
        "fwd" if kernel == "fwd" else "bwd",
        problem.dtype == torch.float16,
        pack,
        has_asm=arch.startswith("sm_"),
    )
    total_q = problem.seqlen_q if problem.total_q is None else problem.total_q
    total_k = problem.seqlen_k if problem.total_k is None else problem.total_k
    spare = problem.batch if problem.is_packed else 0  # every sequence may end in a block that is not full
    left, right = problem.band
    dim, dim_v = (max(16, triton.next_power_of_2(x)) for x in (problem.head_dim, problem.head_dim_v))
    b = problem.sigmoid_bias
    sizes = (problem.batch, problem.nheads, problem.group)
    has_dropout = problem.dropout_p > 0
    constants = {
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": problem.head_dim_v,
        "BLOCK_D": dim,
        "BLOCK_DV": dim_v,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "FORMULA": formula,
        "PRECISION": precision,
        "HAS_BIAS": problem.bias_shape is not None,
        "HAS_SLOPES": problem.slopes_shape is not None,
        "HAS_DROPOUT": has_dropout,
        "HAS_QUADS": problem.origin[3] % 4 == 0,
        "HAS_LEFT": left is not None,
        "HAS_RIGHT": right is not None,
        "SEQUENCES": triton.next_power_of_2(problem.batch) if problem.is_packed else 0,
        "IN_REGISTERS": tile.in_registers,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,  # Triton's default is about to change
    }
    if tile.maxnreg is not None:
        constants["maxnreg"] = tile.maxnreg
    return _Plan(
        tile=tile,
        formula=formula,
        dim=dim,
        dim_v=dim_v,
        blocks_q=triton.cdiv(total_q, tile.block_m) + spare,
        blocks_k=triton.cdiv(total_k, tile.block_n) + spare,
        sizes=(*sizes, total_q, total_k, problem.q_offset, min(left or 0, _UNLIMITED), min(right or 0, _UNLIMITED)),
        numbers=(problem.scale * formula.unit, 0.0 if b is None else b * formula.unit + formula.shift),
        dropout=(1.0 / (1.0 - problem.dropout_p), threshold(problem.dropout_p)),
        has_descriptors=arch in ("sm_90", "sm_100", "sm_103", "sm_120") and not problem.is_packed,
        constants=constants,
    )


class _Call:
    """The tensors beside q, k and v, as the kernels take them."""

    def __init__(self, problem: Problem, bias, slopes, seed, cu_seqlens: CuSeqlens) -> None:
        has_dropout = problem.dropout_p > 0
        self.lead = 1 if problem.is_packed else problem.batch  # programs along the first dimension
        self.sides = (bias, slopes, seed if has_dropout else None)
        self.cu_seqlens = cu_seqlens or (None, None)
        bias_strides: tuple[int, ...] = (0, 0, 0)
        if bias is not None:
            is_packed_rows = problem.is_packed and problem.has_row_bias
            rows = bias.t()[None] if is_packed_rows else bias_rows(bias, problem.batch, problem.nheads)
            bias_strides = tuple(s if n > 1 else 0 for s, n in zip(rows.stride(), rows.shape, strict=True))
        slopes_strides = (0, 0) if slopes is None else slopes.expand(problem.batch, problem.nheads).stride()
        self.side_strides = (bias_strides, slopes_strides, problem.origin if has_dropout else (0, 0, 0, 0))


def _device(x: Tensor):
    """The interpreter has none."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of (batch, seqlen, nheads, head_dim); packed rows have no batch."""
    strides = x.stride()
    return strides if len(strides) == 4 else (0, *strides)


def _are_aligned(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can load them: 16-byte rows, dense channels, no broadcast dimension."""
    for x in tensors:
        size = x.element_size()
        if x.data_ptr() % 16 or x.stride(-1) != 1:
            return False
        for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if n > 1 and (s <= 0 or s * size % 16):
                return False
    return True


def _descriptor(x: Tensor, rows: int, dim: int) -> TensorDescriptor:
    """x as (batch, nheads, seqlen, head_dim), in blocks (1, 1, rows, dim).

    The ones must lead: Triton 3.6 transposes square blocks that are reshaped from (1, rows, 1, dim).
    """
    x = x.transpose(1, 2)
    # a dimension of one element may have any stride, which the hardware would still check
    strides = [16 if n == 1 and i < 3 else s for i, (n, s) in enumerate(zip(x.shape, x.stride(), strict=True))]
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, dim])


def _precision(problem: Problem) -> str:
    """Of float32 products: three products of tf32 parts make one of float32; torch's own switch allows one alone."""
    if problem.dtype != torch.float32 or not (problem.arch or "").startswith("sm_"):
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
