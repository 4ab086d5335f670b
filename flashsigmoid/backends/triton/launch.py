"""From a Problem and its tensors to the kernels: strides, descriptors, tiles, grids. No kernel code, no validation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..formula import Formula, choose_formula, make_formula
from ..gpu import LONG, Launch, allows_tf32, are_aligned, bias_strides, find_launch, slopes_strides
from ..philox import threshold
from ..problem import Problem
from . import bwd, fwd
from .tiles import Tile, choose_tile, is_one_launch

# to a type checker a kernel is its Python function
_fwd_kernel: Any = fwd._fwd_kernel
_bwd_kernel: Any = bwd._bwd_kernel

_UNLIMITED = 2**30  # a window this wide sees every key
_HAVE_DESCRIPTORS = ("sm_90", "sm_100", "sm_103", "sm_120")
CuSeqlens = tuple[Tensor, Tensor] | None
Sides = tuple[Tensor | None, ...]  # bias, slopes, seed, cu_seqlens of q and of k
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # dq, dk, dv, sums of rows for b and slopes


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
    return Call(problem, q, k, v, bias, slopes, seed, cu_seqlens).fwd()


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
    return Call(problem, q, k, v, bias, slopes, seed, cu_seqlens).backward(dout)


def prepare(problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None = None) -> Callable[..., Any]:
    """What computes out, or with dout dq, dk and dv, of other tensors of these layouts in this thread."""
    call = Call(problem, q, k, v)
    if dout is None:
        return call.prepare_fwd()
    return call.prepare_backward(dout)


class Call:
    """One call's tensors as the kernels take them; a method launches its kernel, with the table's tile or another.

    What is prepared holds no tensor of the call: it launches the kernel on any of the same layouts.
    """

    def __init__(self, problem: Problem, q, k, v, bias=None, slopes=None, seed=None, cu_seqlens: CuSeqlens = None):
        has_dropout = problem.dropout_p > 0
        self.problem: Problem = problem
        self.qkv: tuple[Tensor, Tensor, Tensor] = (q, k, v)
        cu_q, cu_k = (None, None) if cu_seqlens is None else (x.contiguous() for x in cu_seqlens)
        self.sides: Sides = (bias, slopes, seed if has_dropout else None, cu_q, cu_k)
        self.programs = problem.nheads if problem.is_packed else problem.nheads * problem.batch
        self.strides = (*bias_strides(problem, bias), *slopes_strides(problem, slopes))
        self.origin = problem.origin if has_dropout else (0, 0, 0, 0)

    def fwd(self, tile: Tile | None = None) -> Tensor:
        return self.prepare_fwd(tile)(*self.qkv, *self.sides)

    def backward(self, dout: Tensor) -> Gradients:
        return self.prepare_backward(dout)(dout, *self.qkv, *self.sides)

    def dkdv(self, dout: Tensor, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
        return self._bwd("dkdv", dout, tile)[1:3]

    def dq(self, dout: Tensor, tile: Tile | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dq, _, _, *sums = self._bwd("dq", dout, tile)
        return dq, *sums

    def bwd(self, dout: Tensor, tile: Tile | None = None) -> Gradients:
        """dq, dk, dv and the sums by one launch."""
        return self._bwd("all", dout, tile)

    def _bwd(self, part: str, dout: Tensor, tile: Tile | None) -> Any:
        return self.prepare_bwd(part, dout, tile)(dout, *self.qkv, *self.sides)

    def prepare_fwd(self, tile: Tile | None = None) -> Callable[..., Tensor]:
        q, problem = self.qkv[0], self.problem
        plan = _plan(problem, "fwd", tile, _precision(problem), _have_dense_rows(*self.qkv))
        launch = plan.find(_fwd_kernel, self.qkv, self.sides, 1, (*self.strides, *self.origin), 1.0 / plan.formula.gain)
        programs, shape = plan.blocks_q * self.programs, (*q.shape[:-1], problem.head_dim_v)
        dtype = problem.result_dtype
        is_like_q = shape == q.shape and dtype == q.dtype

        def run(q, k, v, *sides):
            # of its two ways torch takes less time for the first
            if is_like_q:
                out = torch.empty_like(q, memory_format=torch.contiguous_format)
            else:
                out = q.new_empty(shape, dtype=dtype)
            launch.run(programs, (q, k, v), (out, *sides))
            return out

        return run

    def prepare_backward(self, dout: Tensor) -> Callable[..., Gradients]:
        if is_one_launch(self.problem):
            return self.prepare_bwd("all", dout)
        dkdv, of_q = self.prepare_bwd("dkdv", dout), self.prepare_bwd("dq", dout)

        def run(*tensors):
            _, dk, dv, _, _ = dkdv(*tensors)
            dq, _, _, row_sums, slope_sums = of_q(*tensors)
            return dq, dk, dv, row_sums, slope_sums

        return run

    def prepare_bwd(self, part: str, dout: Tensor, tile: Tile | None = None) -> Callable[..., Any]:
        """Of "all", or of "dkdv" or "dq", which leave the others' results out."""
        problem, loaded = self.problem, (dout, *self.qkv)
        plan = _plan(problem, part, tile, _precision(problem), _have_dense_rows(*loaded))
        nheads, rows, is_packed = problem.nheads, problem.seqlen_q, problem.is_packed
        sums_strides = (0, 1, nheads) if is_packed else (nheads * rows, rows, 1)
        sums_shape = self.qkv[0].shape[:2] if is_packed else (problem.batch, nheads, rows)
        # no program comes to packed rows behind the last sequence
        new_sums = torch.zeros if is_packed else torch.empty
        result: dict[str, Any] = {"memory_format": torch.contiguous_format, "dtype": problem.result_dtype}
        launch = plan.find(
            _bwd_kernel, loaded, self.sides, 3, (*self.strides, *sums_strides, *self.origin), problem.scale
        )
        programs = 0
        if part != "dq":
            programs += plan.blocks_k * self.programs // problem.group
        if part != "dkdv":
            programs += plan.blocks_q * self.programs

        def run(dout, q, k, v, bias, slopes, *others):
            dq = dk = dv = row_sums = slope_sums = None
            if part != "dq":
                dk = torch.empty_like(k, **result)
                dv = torch.empty_like(v, **result)
            if part != "dkdv":
                dq = torch.empty_like(q, **result)
                if bias is not None:
                    row_sums = new_sums(sums_shape, dtype=torch.float32, device=q.device)
                if slopes is not None:
                    slope_sums = new_sums(sums_shape, dtype=torch.float32, device=q.device)
            results = (dq, dk, dv, bias, slopes, row_sums, slope_sums, *others)
            launch.run(programs, (dout, q, k, v), results)
            return dq, dk, dv, row_sums, slope_sums

        return run


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a kernel needs that the tensors do not decide, and the kernel once it is compiled."""

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
    launches: dict[Any, Launch] = field(default_factory=dict)

    def find(
        self,
        kernel: Any,
        loaded: tuple[Tensor, ...],
        sides: Sides,
        outputs: int,
        numbers: tuple[int, ...],
        factor: float,
    ) -> Launch:
        """The launch on ([dout,] q, k, v), then `outputs` tensors with strides and others, `sides` among them."""
        # outputs are new: contiguous, aligned, of a dtype that the problem decides
        key = [None if x is None else (x.stride(), x.dtype, x.data_ptr() % 16) for x in sides]

        def describe(loaded, tensors):
            descriptors = self.descriptors(loaded)
            strides = tuple((0, 0, 0, 0) if x is None else _strides(x) for x in (*loaded, *tensors[:outputs]))
            rest = (*strides, *numbers, *self.sizes, *self.numbers, factor, *self.dropout)
            return descriptors, rest, self.constants | {"DESCRIPTORS": descriptors is not None}

        return find_launch(triton, self.launches, key, kernel, loaded, describe)

    def descriptors(self, loaded: tuple[Tensor, ...]) -> tuple[TensorDescriptor, ...] | None:
        """Of ([dout,] q, k, v), in blocks; None if they are loaded by pointers."""
        if not self.has_descriptors or not are_aligned(*loaded):
            return None
        m, n, dim, dim_v = self.tile.block_m, self.tile.block_n, self.dim, self.dim_v
        blocks = ((m, dim_v), (m, dim), (n, dim), (n, dim_v))[-len(loaded) :]
        return tuple(_descriptor(x, *block) for x, block in zip(loaded, blocks, strict=True))


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, kernel: str, tile: Tile | None, precision: str, has_dense_rows: bool) -> _Plan:
    tile = tile or choose_tile(problem, kernel)
    arch = problem.arch or ""
    total_q = problem.seqlen_q if problem.total_q is None else problem.total_q
    total_k = problem.seqlen_k if problem.total_k is None else problem.total_k
    spare = problem.batch if problem.is_packed else 0  # every sequence may end in a block that is not full
    left, right = problem.band
    dim, dim_v = (max(16, triton.next_power_of_2(x)) for x in (problem.head_dim, problem.head_dim_v))
    if arch == "sm_90":
        # One swizzle for all operands: the assembler of Triton 3.6 confuses the descriptors of two (docs/log.md). It is
        # decided by a block's inner side, up to 64, which without dense rows may be either.
        dim, dim_v = max(dim, min(dim_v, 64)), max(dim_v, min(dim, 64))
        if not has_dense_rows and max(tile.block_m, tile.block_n) >= 64:
            dim, dim_v, block_m, block_n = (max(64, x) for x in (dim, dim_v, tile.block_m, tile.block_n))
            tile = replace(tile, block_m=block_m, block_n=block_n, num_stages=1)
    pack = max(2, min(32, tile.block_m * tile.block_n // (32 * tile.num_warps)))
    formula = make_formula(
        choose_formula(problem, kernel),
        "fwd" if kernel == "fwd" else "bwd",
        problem.dtype == torch.float16,
        pack,
        has_asm=arch.startswith("sm_"),
        early=pack // 2 if kernel == "fwd" and max(dim, dim_v) <= 64 else pack,  # 2 % faster; at 128 slower
    )
    b = problem.sigmoid_bias
    sizes = (problem.batch, problem.nheads, problem.group)
    has_dropout = problem.dropout_p > 0
    terms = max(
        0 if kernel in ("fwd", "dq") else problem.seqlen_q * problem.group,
        0 if kernel == "dkdv" else problem.seqlen_k,
    )
    is_long = terms > LONG[problem.dtype]
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
        "HAS_ROW_BIAS": problem.has_row_bias,
        "HAS_SLOPES": problem.slopes_shape is not None,
        "HAS_DROPOUT": has_dropout,
        "HAS_QUADS": problem.origin[3] % 4 == 0,
        "HAS_LEFT": left is not None,
        "HAS_RIGHT": right is not None,
        "SEQUENCES": triton.next_power_of_2(problem.batch) if problem.is_packed else 0,
        "IN_REGISTERS": 0 if is_long else tile.in_registers,
        "IS_LONG": is_long,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,  # Triton's default is about to change
    }
    if kernel != "fwd":
        constants["PART"] = kernel
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
        has_descriptors=not tile.by_pointers and arch in _HAVE_DESCRIPTORS,
        constants=constants,
    )


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides of (batch, seqlen, nheads, head_dim); packed rows have no batch."""
    strides = x.stride()
    return strides if len(strides) == 4 else (0, *strides)


def _have_dense_rows(*tensors: Tensor) -> bool:
    """Whether the channels of a row lie side by side."""
    return all(x.stride(-1) == 1 for x in tensors)


def _descriptor(x: Tensor, rows: int, dim: int) -> TensorDescriptor:
    """x as (batch, nheads, seqlen, head_dim), packed rows as one batch of all, in blocks (1, 1, rows, dim).

    The ones must lead: Triton 3.6 transposes square blocks that are reshaped from (1, rows, 1, dim).
    """
    x = (x if x.dim() == 4 else x[None]).transpose(1, 2)
    # a dimension of one element may have any stride, which the hardware would still check
    strides = [16 if n == 1 and i < 3 else s for i, (n, s) in enumerate(zip(x.shape, x.stride(), strict=True))]
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, dim])


def _precision(problem: Problem) -> str:
    """Of float32 products: six of bfloat16 parts make one of float32; torch's own switches allow one of tf32."""
    if problem.dtype != torch.float32 or not (problem.arch or "").startswith("sm_"):
        return "ieee"
    return "tf32" if allows_tf32() else "bf16x6"
