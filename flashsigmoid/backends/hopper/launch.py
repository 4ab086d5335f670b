"""From a Problem and its tensors to the Hopper kernels: descriptors, tiles, grids."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..formula import Formula, choose_formula, make_formula
from ..gpu import Launch, are_aligned, bias_strides, launch, slopes_strides
from ..problem import Problem
from . import bwd, dqdk, fwd, grad
from .tiles import Tile, choose_tile, padded_head_dim

_fwd_kernel: Any = fwd._fwd_kernel
_bwd_kernel: Any = bwd._bwd_kernel
_bwd_rows_kernel: Any = grad._bwd_rows_kernel
_bwd_dqdk_kernel: Any = dqdk._bwd_dqdk_kernel

_UNLIMITED = 2**30  # a window this wide sees every key
CuSeqlens = tuple[Tensor, Tensor] | None
_L2_BYTES = 32 * 2**20  # of K and V, or Q, dO and dQ, that stay in the cache while programs of a few heads run


def forward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    cu_seqlens: CuSeqlens = None,
    tile: Tile | None = None,
) -> Tensor:
    """out, contiguous (batch, seqlen_q, nheads, head_dim_v) or (total_q, nheads, head_dim_v); q, k and v must be as
    `are_aligned` has them."""
    assert are_aligned(q, k, v), "the tensor memory accelerator loads rows of 16 bytes"
    plan = _plan(problem, "fwd", tile or choose_tile(problem, "forward"), _multiprocessors(q))
    out = torch.empty(*q.shape[:-1], problem.head_dim_v, dtype=q.dtype, device=q.device)
    n = plan.tile.block
    blocks = ((q, 64), (k, n), (v, n), (out, 64))
    ends = (None, None, None) if cu_seqlens is None else (out, *(x.contiguous() for x in cu_seqlens))
    plan.launch(_fwd_kernel, blocks, (bias, slopes, *ends), *_sides(problem, bias, slopes, *ends[1:]))
    return out


def backward(
    problem: Problem,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    cu_seqlens: CuSeqlens = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous; all tensors must be as `are_aligned` has them."""
    assert are_aligned(dout, q, k, v), "the tensor memory accelerator loads rows of 16 bytes"
    tile = tile or choose_tile(problem, "backward")
    if padded_head_dim(problem) > 128:
        if tile.adds_dq and not torch.are_deterministic_algorithms_enabled():
            dq, dk = _added(problem, dout, q, k, v, tile)
        else:
            dq, dk = _by_rows(problem, dout, q, k, v, tile)
        return dq, dk, _dv(problem, dout, q, k, v)
    plan = _plan(problem, "all", tile, _multiprocessors(q))
    dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    m, keys = plan.tile.block, 64 * plan.tile.warpgroups
    blocks = ((dout, m), (q, m), (k, keys), (v, keys), (dq, 64), (dk, 64), (dv, 64))
    ends = (None, None) if cu_seqlens is None else tuple(x.contiguous() for x in cu_seqlens)
    rows = (None, None) if cu_seqlens is None else (dk, dv)
    plan.launch(_bwd_kernel, blocks, (bias, slopes, *rows, *ends), *_sides(problem, bias, slopes, *ends))
    return torch.mul(dq, problem.scale, out=torch.empty_like(q, memory_format=torch.contiguous_format)), dk, dv


def _sides(
    problem: Problem, bias: Tensor | None, slopes: Tensor | None, *others: Tensor | None
) -> tuple[tuple[Any, ...], list[Any]]:
    """The strides of a tensor bias and of slopes, and what of them and of others a launch is known by."""
    strides = bias_strides(problem, bias), slopes_strides(problem, slopes)
    given = (bias, slopes, *others)
    return strides, [None if x is None else (x.stride(), x.dtype, x.data_ptr() % 16) for x in given]


def _added(problem: Problem, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """dq and dk by one kernel, and one that rounds dq."""
    plan = _plan(problem, "dqdk", replace(tile, is_persistent=False), 1)
    dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    m = plan.tile.block
    plan.launch(_bwd_dqdk_kernel, ((dout, m), (q, m), (k, 128), (v, 64), (dq, 64), (dk, 64)))
    return dq.to(q.dtype), dk


def _by_rows(problem: Problem, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """dq and dk by a kernel each."""
    dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    n = tile.block
    for part, (x, y, u, w), out in (("dq", (q, dout, k, v), dq), ("dk", (k, v, q, dout), dk)):
        plan = _plan(problem, part, replace(tile, is_persistent=False), 1)
        plan.launch(_bwd_rows_kernel, ((x, 64), (y, 64), (u, n), (w, n), (out, 64)))
    return dq, dk


def _dv(problem: Problem, dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """dv by the forward kernel."""
    tile = choose_tile(problem, "forward")
    plan = _plan(problem, "dv", tile, _multiprocessors(q))
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    n = tile.block
    blocks = ((k, 64), (q, n), (dout, n), (dv, 64))
    plan.launch(_fwd_kernel, blocks, (None,) * 5, *_sides(problem, None, None))
    return dv


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a kernel needs that the tensors do not decide, and the kernel once it is compiled."""

    tile: Tile
    formula: Formula
    programs: int
    counts: tuple[int | None, ...]  # of packed rows what differs from call to call, for kernels that take them
    sizes: tuple[int, ...]
    band: tuple[int, int, int]
    numbers: tuple[float, float, float]  # scale and b in the formula's units, and a factor of the results
    constants: dict[str, Any]
    launches: dict[Any, Launch] = field(default_factory=dict)

    def launch(
        self,
        kernel: Any,
        blocks: tuple[tuple[Tensor, int], ...],
        tensors: tuple[Tensor | None, ...] = (),
        strides: tuple[Any, ...] = (),
        others: Sequence[Any] = (),
    ) -> None:
        """Run the kernel on descriptors of tensors in blocks of rows, then `tensors` and a counter of blocks taken."""
        loaded = tuple(x for x, _ in blocks)
        if "IS_DYNAMIC" in self.constants:
            counter = None
            if self.constants["IS_DYNAMIC"]:
                counter = torch.zeros(1, dtype=torch.int32, device=loaded[0].device)
            tensors = (*tensors, counter)

        rows = [rows for _, rows in blocks]

        def describe(loaded, tensors):
            rest = (*strides, *self.counts, self.sizes, self.band, *self.numbers)
            descriptors = tuple(_descriptor(x, n, self.constants["DIM"]) for x, n in zip(loaded, rows, strict=True))
            return descriptors, rest, self.constants

        launch(triton, self.launches, others, kernel, self.programs, loaded, tensors, describe)


def _early(problem: Problem, is_like_forward: bool) -> int:
    """A block's columns over a thread's exponentials before the vote, of which a quarter, half or all: measured."""
    is_narrow = padded_head_dim(problem) == 64
    if is_like_forward:
        return 8 if is_narrow else 4  # 4 %, and up to 7 % masked; beyond, 2 % faster than all
    return 4 if is_narrow and problem.band == (None, None) else 2  # 9 % faster than all; masked, and at 128, all are


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, part: str, tile: Tile, multiprocessors: int) -> _Plan:
    """Of "fwd", of "all" gradients, or of one: "dq", "dk", "dv" or "dqdk"."""
    is_like_forward, of_keys = part in ("fwd", "dv"), part in ("dk", "dv", "dqdk")
    formula = make_formula(
        choose_formula(problem, "fwd" if is_like_forward else "dkdv"),
        "fwd" if is_like_forward else "bwd",
        problem.dtype == torch.float16,
        tile.block // 2,
        has_asm=True,
        early=tile.block // _early(problem, is_like_forward),
    )
    (left, right), q_offset = problem.band, problem.q_offset
    heads, rows, others, sharing = problem.nheads, problem.seqlen_q, problem.seqlen_k, problem.group
    if part == "all" or of_keys:  # blocks of keys, and all queries of a group go by
        heads, rows, others, sharing = problem.nheads_k, problem.seqlen_k, problem.seqlen_q * problem.group, 1
    blocks = triton.cdiv(rows, 64 * tile.warpgroups)
    total_q, total_k = problem.total_q, problem.total_k
    if total_q is None or total_k is None:
        heads *= problem.batch
    else:  # as `sequences.find` counts them, those of no sequence among them
        total = total_k if part == "all" else total_q
        blocks = total // (64 * tile.warpgroups) + problem.batch + 1
    together = 1
    if left is not None or right is not None:
        # who sees most starts first, of as many heads as L2 holds the other side of, and a dQ that is added to
        row_bytes = (8 if part in ("all", "dqdk") else 4) * padded_head_dim(problem)
        fit = _L2_BYTES * sharing // (row_bytes * others)
        together = max(x for x in range(1, min(max(1, fit), heads) + 1) if heads % x == 0)
    first = 64 * (triton.cdiv(rows, 64) - tile.warpgroups * blocks) if tile.is_from_end else 0
    sizes = (problem.nheads, problem.group, problem.seqlen_q, problem.seqlen_k)
    if of_keys:
        sizes = (problem.nheads_k, problem.group, problem.seqlen_k, problem.seqlen_q)
        left, right, q_offset = right, left, -q_offset
    sizes, counts = (blocks, together, *sizes, blocks * heads, first), (None,) * 6
    if problem.is_packed:
        counts = (total_q, total_k, problem.batch, together, blocks, blocks * heads)
        sizes = (problem.nheads, problem.group, int(tile.is_from_end), problem.head_dim_v // 8, problem.head_dim // 8)
    b = problem.sigmoid_bias
    constants: dict[str, Any] = {
        "REGISTERS": tile.registers,
        "DIM": padded_head_dim(problem),
        "FORMULA": formula,
        "HAS_LEFT": left is not None,
        "HAS_RIGHT": right is not None,
        "num_warps": 4,
        "enable_fp_fusion": True,  # Triton's default is about to change
    }
    if part == "all":
        constants |= {
            "BLOCK_M": tile.block,
            "REST": 24,
            "HAS_TURNS": tile.is_persistent,
            "IS_PACKED": problem.is_packed,
        }
    elif part == "dqdk":
        constants |= {"BLOCK_M": tile.block}
    else:
        constants |= {"WARPGROUPS": tile.warpgroups, "BLOCK_N": tile.block, "OF_KEYS": of_keys}
    if is_like_forward:
        constants |= {
            "IS_SPLIT": tile.is_split,
            "OWN_OUT": tile.own_out,
            "PLACES": tile.places,
            "IS_PACKED": problem.is_packed,
            "HAS_ROW_BIAS": problem.has_row_bias,
        }
    if part not in ("dq", "dk", "dqdk"):
        constants |= {
            "HAS_BIAS": problem.bias_shape is not None,
            "HAS_SLOPES": problem.slopes_shape is not None,
            "STAGES": tile.stages,
            "IS_DYNAMIC": tile.is_persistent and (left is not None or right is not None or problem.is_packed),
        }
    return _Plan(
        tile=tile,
        formula=formula,
        programs=min(blocks * heads, multiprocessors) if tile.is_persistent else blocks * heads,
        counts=() if part in ("dq", "dk", "dqdk") else counts,
        sizes=sizes,
        band=(q_offset, min(left or 0, _UNLIMITED), min(right or 0, _UNLIMITED)),
        numbers=(
            problem.scale * formula.unit,
            0.0 if b is None else b * formula.unit + formula.shift,
            1.0 / formula.gain if is_like_forward else problem.scale,
        ),
        constants=constants,
    )


def _multiprocessors(x: Tensor) -> int:
    """Of the GPU where x is; compiling for one that is not there, an H100's."""
    return _count(x.device.index) if x.is_cuda and torch.cuda.is_available() else 132


@functools.cache
def _count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _descriptor(x: Tensor, rows: int, dim: int) -> TensorDescriptor:
    """x as (batch, nheads, seqlen, head_dim), packed rows as one batch of all, in blocks (1, 1, rows, dim); dQ,
    in float32, in 64 channels. Loads give zeros beyond the tensor, and stores write nothing there."""
    x = (x if x.dim() == 4 else x[None]).transpose(1, 2)
    block = [1, 1, rows, 64 if x.dtype == torch.float32 else dim]
    dtype = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}[x.dtype]
    layout: Any = gl.NVMMASharedLayout.get_default_for(block, dtype)  # pyright: ignore[reportCallIssue]
    # a dimension of one element may have any stride, which the hardware would still check
    strides = [16 if n == 1 and i < 3 else s for i, (n, s) in enumerate(zip(x.shape, x.stride(), strict=True))]
    return TensorDescriptor(x, list(x.shape), strides, block, layout)
