"""From a call against a cache to the kernels of decode.py: tiles, how many parts of the keys, launches."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from torch import Tensor

from ..formula import Formula, choose_formula, make_formula
from ..gpu import LONG, Launch, bias_strides, launch, slopes_strides
from ..problem import Problem
from . import decode as kernels
from .launch import _UNLIMITED, _precision
from .tiles import Tile

# to a type checker a kernel is its Python function
_decode_kernel: Any = kernels._decode_kernel
_sum_kernel: Any = kernels._sum_kernel
_append_kernel: Any = kernels._append_kernel

# up to head_dim, of which 128 is measured. K and V of a stage are 32 KB in the large ones, 16 KB in the small
_LARGE = {64: Tile(64, 128, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(64, 32, 4, 3)}  # sm_80, sm_90, sm_100
# where multiprocessors have several programs one after the other, of which one at a time has its memory
_LONG_QUEUE = {128: Tile(64, 128, 8, 3)}
_SMALL = {64: Tile(64, 64, 4, 3), 128: Tile(64, 32, 4, 3), 256: Tile(32, 16, 4, 3)}  # 64 or 99 KB of shared memory
_FLOAT32 = {64: Tile(32, 32, 4, 2), 128: Tile(16, 32, 4, 2), 256: Tile(16, 16, 4, 2)}
_INTERPRETED = Tile(16, 32, 4, 1)

FULL = 0.95  # of the multiprocessors' time: more parts than reach this share of the best are not worth their sum
_MOST_WAVES = 6  # of programs, looked at for a number of parts
LONGEST = 8192  # keys of a program where not all run at once, so that they end together
REDUCTION = "parts"  # or "atomic": how parts are added where nobody asks for the same bits at every call
_SLOTS = 32  # parts that a program of the sum loads at once
_HEADS = 8  # of a program that appends


def attend(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, pages: Tensor | None, bias: Tensor | None,
    slopes: Tensor | None, new: int, num_splits: int, is_shared: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """out (batch, seqlen_q, nheads, head_dim_v) in `out_dtype`, contiguous; problem.seqlen_k is the capacity."""
    page_size = 0 if pages is None else k.shape[1]
    units = _units(q.device)
    splits = num_splits or _choose_splits(problem, units, is_shared)
    is_fixed = REDUCTION == "parts" or torch.are_deterministic_algorithms_enabled()
    reduction = "parts" if is_fixed else "atomic"
    precision = _precision(problem)
    if precision == "bf16x6" and not is_shared:
        precision = "ieee"  # of few rows loads take the time, and sums of parts' products are off by some last places
    plan = _plan(problem, precision, page_size, splits, reduction, new, is_shared, units)
    shape = (*q.shape[:3], problem.head_dim_v)
    if plan.reduction == "whole":
        parts = q.new_empty(shape, dtype=out_dtype)
    elif plan.reduction == "parts":
        parts = torch.empty((plan.splits, *shape), dtype=torch.float32, device=q.device)
    else:
        parts = torch.zeros(shape, dtype=torch.float32, device=q.device)
    tensors = (parts, seqlens, pages, bias, slopes)
    others = [None if x is None else (x.stride(), x.dtype, x.data_ptr() % 16) for x in tensors]

    def describe(loaded, tensors):
        _, _, pages, bias, slopes = tensors
        strides = (*(x.stride() for x in loaded), (0, 0) if pages is None else pages.stride())
        sides = (*bias_strides(problem, bias), *slopes_strides(problem, slopes))
        return None, (*strides, *sides, *plan.sizes, *plan.numbers), plan.constants

    launch(triton, plan.launches, others, _decode_kernel, plan.programs, (q, k, v), tensors, describe)
    if plan.reduction == "whole" or (plan.reduction == "atomic" and out_dtype == torch.float32):
        return parts
    out = q.new_empty(shape, dtype=out_dtype)
    key = ("sum", out_dtype, seqlens.dtype, seqlens.data_ptr() % 16)
    rows = out.numel() // problem.head_dim_v
    launch(
        triton, plan.launches, key, _sum_kernel, rows, (parts,), (out, seqlens),
        lambda loaded, tensors: (None, plan.sum_sizes, plan.sum_constants),
    )  # fmt: skip
    return out


def append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, pages: Tensor | None, q: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, behind: int,
) -> Tensor:  # fmt: skip
    """Writes k and v behind each sequence, in place; with tables k is turned, and q, which is returned."""
    batch, seqlen_new, nheads_k, head_dim = k.shape
    head_dim_v = v.shape[3]
    result, seqlen_q, nheads, half = k.new_empty(0), 0, 0, 0
    if q is None or cos is None:
        q = k  # not read
    else:
        result, half = q.new_empty(q.shape), cos.shape[1]
        seqlen_q, nheads = q.shape[1:3]
    blocks = triton.cdiv(nheads_k, _HEADS) + (triton.cdiv(nheads, _HEADS) if half else 0)
    page_size = 0 if pages is None else k_cache.shape[1]
    capacity = k_cache.shape[1] * (1 if pages is None else pages.shape[1])
    tensors = (result, seqlens, pages, cos, sin)
    loaded = (k, v, q, k_cache, v_cache)
    sizes = (nheads, nheads_k, seqlen_new, seqlen_q, capacity, behind)
    key = (
        "append", *sizes, head_dim, head_dim_v, page_size, half, interleaved, k.dtype, result.data_ptr() % 16,
        *(None if x is None else (x.stride(), x.shape[-1], x.dtype, x.data_ptr() % 16) for x in tensors[1:]),
    )  # fmt: skip

    def describe(loaded, tensors):
        strides = (x.stride() for x in loaded)
        tables = ((0, 0) if x is None else x.stride() for x in tensors[2:])
        constants = {
            "HEAD_DIM": head_dim,
            "HEAD_DIM_V": head_dim_v,
            "BLOCK_D": triton.next_power_of_2(head_dim),
            "BLOCK_DV": triton.next_power_of_2(head_dim_v),
            "HALF": half,
            "INTERLEAVED": interleaved,
            "PAGE_SIZE": page_size,
            "HEADS": _HEADS,
            "num_warps": 4,
            "enable_fp_fusion": True,
        }
        return None, (*strides, *tables, *sizes), constants

    launch(triton, _appends, key, _append_kernel, batch * seqlen_new * blocks, loaded, tensors, describe)
    return result


_appends: dict[Any, Launch] = {}


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the kernels of a call need that the tensors do not decide, and the kernels once they are compiled."""

    splits: int
    reduction: str
    programs: int
    sizes: tuple[int, ...]
    numbers: tuple[float, float, float]
    constants: dict[str, Any]
    sum_sizes: tuple[int, ...]
    sum_constants: dict[str, Any]
    launches: dict[Any, Launch] = field(default_factory=dict)


@functools.lru_cache(maxsize=4096)
def _plan(
    problem: Problem, precision: str, page_size: int, splits: int, reduction: str, new: int, is_shared: bool, units: int
) -> _Plan:
    tile = _choose_tile(problem, units, is_shared)
    splits = max(1, min(splits, triton.cdiv(problem.seqlen_k, tile.block_n)))
    reduction = "whole" if splits == 1 else reduction
    left, right = problem.band
    if problem.seqlen_q == 1 and not is_shared:
        right = None  # the one query stands at the last key
    formula = _formula(problem, tile)
    b = problem.sigmoid_bias
    dim, dim_v = (max(16, triton.next_power_of_2(x)) for x in (problem.head_dim, problem.head_dim_v))
    shared = {
        "HEAD_DIM_V": problem.head_dim_v,
        "BLOCK_DV": dim_v,
        "BLOCK_N": tile.block_n,
        "HAS_LEFT": left is not None,
        "HAS_RIGHT": right is not None,
        "IS_SHARED": is_shared,
        "REDUCTION": reduction,
        "OVERLAPS": _overlaps(problem),
        "num_warps": tile.num_warps,
        "enable_fp_fusion": True,  # Triton's default is about to change
    }
    if _overlaps(problem):
        shared["launch_pdl"] = True  # programmatic dependent launch
    sides = (min(left or 0, _UNLIMITED), min(right or 0, _UNLIMITED))
    part_stride = problem.batch * problem.seqlen_q * problem.nheads * problem.head_dim_v
    lengths = (problem.seqlen_q, problem.seqlen_k, new, splits)
    return _Plan(
        splits=splits,
        reduction=reduction,
        programs=_programs(problem, tile, is_shared) * splits,
        sizes=(problem.batch, problem.nheads_k, *lengths, *sides, part_stride),
        numbers=(
            problem.scale * formula.unit,
            0.0 if b is None else b * formula.unit + formula.shift,
            1.0 / formula.gain,
        ),
        constants=shared
        | {
            "GROUP": problem.group,
            "HEAD_DIM": problem.head_dim,
            "BLOCK_D": dim,
            "BLOCK_M": tile.block_m,
            "FORMULA": formula,
            "PRECISION": precision,
            "HAS_BIAS": problem.bias_shape is not None,
            "HAS_SLOPES": problem.slopes_shape is not None,
            "PAGE_SIZE": page_size,
            "IS_LONG": triton.cdiv(problem.seqlen_k, splits) > LONG[problem.dtype],
            # the pages of a block are loaded before it: half of the stages are theirs
            "num_stages": 2 * tile.num_stages - 1 if page_size else tile.num_stages,
        },
        sum_sizes=(problem.nheads, *lengths, *sides, part_stride),
        sum_constants=shared | {"SLOTS": min(_SLOTS, triton.next_power_of_2(splits)), "num_warps": 4},
    )


def _overlaps(problem: Problem) -> bool:
    """Whether a kernel is launched while the one before it ends."""
    return (problem.arch or "").removeprefix("sm_") in ("90", "100", "103")


def _choose_tile(problem: Problem, units: int, is_shared: bool) -> Tile:
    """Keys by head_dim, rows by how many there are."""
    dim = max(64, triton.next_power_of_2(max(problem.head_dim, problem.head_dim_v)))
    if problem.arch == "cpu":
        tile = _INTERPRETED
    elif problem.dtype == torch.float32:
        tile = _FLOAT32[dim]
    else:
        tile = (_LARGE if problem.arch in ("sm_80", "sm_90", "sm_100", "sm_103") else _SMALL)[dim]
        if dim in _LONG_QUEUE and problem.arch in ("sm_90", "sm_100", "sm_103") and not is_shared:
            tile = _LONG_QUEUE[dim] if _programs(problem, tile, is_shared) > units else tile
    return replace(tile, block_m=min(tile.block_m, max(16, triton.next_power_of_2(_rows(problem, is_shared)))))


def _rows(problem: Problem, is_shared: bool) -> int:
    """Of one key head."""
    return problem.group * problem.seqlen_q * (problem.batch if is_shared else 1)


def _programs(problem: Problem, tile: Tile, is_shared: bool) -> int:
    """Of one part of the keys."""
    blocks = triton.cdiv(_rows(problem, is_shared), tile.block_m)
    return blocks * problem.nheads_k * (1 if is_shared else problem.batch)


def _choose_splits(problem: Problem, units: int, is_shared: bool) -> int:
    """The fewest parts that keep the GPU's multiprocessors as busy as any number would, nearly: a program each.

    Two where a prefix is shared, whose many rows keep one busy with products while the other loads.
    """
    tile = _choose_tile(problem, units, is_shared)
    programs, slots = _programs(problem, tile, is_shared), units * (2 if is_shared else 1)
    most = max(1, min(triton.cdiv(problem.seqlen_k, tile.block_n), triton.cdiv(_MOST_WAVES * slots, programs)))

    def busy(splits: int) -> float:
        return splits * programs / (triton.cdiv(splits * programs, slots) * slots)

    best = max(map(busy, range(1, most + 1)))
    splits = next(splits for splits in range(1, most + 1) if busy(splits) >= FULL * best)
    return max(splits, triton.cdiv(problem.seqlen_k, LONGEST)) if splits * programs > slots else splits


def _formula(problem: Problem, tile: Tile) -> Formula:
    pack = max(2, min(32, tile.block_m * tile.block_n // (32 * tile.num_warps)))
    has_asm = (problem.arch or "").startswith("sm_")
    return make_formula(choose_formula(problem, "fwd"), "fwd", problem.dtype == torch.float16, pack, has_asm)


@functools.cache
def _units(device: torch.device) -> int:
    """Multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
