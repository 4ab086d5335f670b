"""Block sizes, warps and stages by architecture, head_dim, dtype and causal: a small table made by measurement.

Nothing is measured at run time; `flashsigmoid bench --tune` measures and prints a better table for another card.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..problem import Problem


@dataclass(frozen=True)
class Tile:
    """One program: forward and dQ, block_m query rows and block_n keys a step; dK dV, the other way round."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    in_registers: int = 0  # how many of the loop's fixed left operands are kept there: q, dout; k, v
    maxnreg: int | None = None  # sm_90 and q, k, v alone: more programs run at once
    by_pointers: bool = False  # even where there is a tensor memory accelerator


_ANY = 2**31
# 16-bit on sm_90, measured on an H200 and H100s; up to head_dim 128 they fit sm_80 and sm_100 too:
# kernel -> head_dim up to -> (full, causal), each by the longer seqlen up to
_Table = dict[int, tuple[tuple[tuple[int, Tile], ...], ...]]
_LARGE: dict[str, _Table] = {
    "fwd": {
        64: (
            (
                (512, Tile(64, 32, 4, 3, by_pointers=True)),
                (8192, Tile(64, 64, 4, 3, 1, 128)),
                (_ANY, Tile(128, 64, 4, 3, 1, 240)),
            ),
            ((_ANY, Tile(64, 64, 4, 3, 1, 128)),),
        ),
        128: 2 * (((512, Tile(64, 32, 4, 4, 1)), (1024, Tile(64, 32, 4, 3, 1)), (_ANY, Tile(64, 64, 4, 3, 1))),),
        256: (
            ((_ANY, Tile(64, 32, 4, 3, 1)),),
            ((8192, Tile(64, 32, 4, 3, 1)), (_ANY, Tile(128, 64, 8, 2))),
        ),
    },
    "dkdv": {
        64: (
            ((512, Tile(32, 64, 4, 3)), (_ANY, Tile(64, 64, 4, 3))),
            ((512, Tile(32, 64, 4, 3)), (1024, Tile(64, 64, 4, 2, 0, 168)), (_ANY, Tile(64, 64, 4, 3, 0, 168))),
        ),
        128: 2 * (((_ANY, Tile(64, 64, 4, 3, 1)),),),
        256: 2 * (((_ANY, Tile(64, 64, 8, 2)),),),
    },
    "dq": {
        64: (
            ((512, Tile(64, 32, 4, 3, by_pointers=True)), (_ANY, Tile(64, 64, 4, 2))),
            ((_ANY, Tile(64, 64, 4, 2)),),
        ),
        128: 2 * (((_ANY, Tile(64, 64, 4, 3, 1)),),),
        256: 2 * (((_ANY, Tile(128, 32, 8, 3)),),),
    },
}
# of packed rows, where the ends of sequences are cut in registers; measured on an H100
_PACKED = {
    ("dkdv", 128): Tile(64, 64, 4, 2),
    ("dkdv", 256): Tile(64, 64, 8, 1),
    ("dq", 64): Tile(64, 64, 4, 3),
}
# what is drawn takes shared memory and registers; by the machine code, not measured
_DROPOUT = {("dkdv", 128): Tile(32, 64, 4, 2), ("dq", 256): Tile(128, 32, 8, 2)}
# sm_80, where a thread holds more of a product than on sm_90; by the machine code, which spills nothing, not measured
_FEW_REGISTERS = {("dkdv", 64): Tile(32, 128, 8, 2), ("dkdv", 128): Tile(32, 64, 8, 2), ("dq", 64): Tile(64, 32, 4, 3)}
# 16-bit elsewhere, in 99 KB (sm_86, sm_89, sm_120) or AMD's 64 KB of shared memory, not measured: they fit
_SMALL = {
    "fwd": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
    "dkdv": {64: Tile(16, 128, 8, 2), 128: Tile(16, 64, 8, 2), 256: Tile(16, 64, 8, 1)},
    "dq": {64: Tile(128, 32, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(64, 16, 8, 2)},
}
# sm_100, where the sums of larger blocks want more tensor memory than there is, not measured
_TENSOR_MEMORY = {("dkdv", 256): Tile(16, 32, 8, 2)}
# float32 by six bfloat16 products, measured on an H200 and an H100: beyond 64 registers spill
_FLOAT32_LARGE = {
    "fwd": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(16, 16, 8, 1)},
    "dkdv": {64: Tile(32, 64, 4, 1), 128: Tile(16, 64, 4, 1), 256: Tile(16, 16, 8, 1)},
    "dq": {64: Tile(64, 64, 4, 1), 128: Tile(64, 16, 4, 1), 256: Tile(16, 16, 8, 1)},
}
# elsewhere, not measured: they fit in 99 KB, and in the tensor memory of sm_100
_FLOAT32 = {
    "fwd": {64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 8, 1)},
    "dkdv": {64: Tile(32, 32, 4, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    "dq": {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
}
# dK dV and dQ in one launch, measured on an H100: of short sequences, while all programs run at once
_ONE_LAUNCH = Tile(64, 64, 4, 2, by_pointers=True)
_INTERPRETED = Tile(128, 128, 4, 1)


def choose_tile(problem: Problem, kernel: str) -> Tile:
    """The tile of the kernel "fwd", "dkdv", "dq" or "all", the last two in one; fewer rows where there are fewer."""
    dim = max(64, _power_of_2(max(problem.head_dim, problem.head_dim_v)))
    if problem.arch == "cpu":
        tile = _INTERPRETED
    elif kernel == "all":
        tile = _ONE_LAUNCH
    elif problem.dtype == torch.float32:
        tile = (_FLOAT32_LARGE if problem.arch == "sm_90" else _FLOAT32)[kernel][dim]
    elif problem.arch == "sm_90" or (problem.arch in ("sm_80", "sm_100", "sm_103") and dim < 256):
        seqlen = max(problem.seqlen_q, problem.seqlen_k)
        tile = next(tile for longest, tile in _LARGE[kernel][dim][problem.causal] if seqlen <= longest)
        if problem.arch == "sm_80" and seqlen > 512:
            tile = _FEW_REGISTERS.get((kernel, dim), tile)
        if problem.is_packed:
            tile = _PACKED.get((kernel, dim), tile)
        if problem.dropout_p > 0:
            tile = _DROPOUT.get((kernel, dim), tile)
        has_more = problem.dropout_p > 0 or problem.has_row_bias or problem.slopes_shape is not None
        if has_more or problem.arch != "sm_90":
            tile = replace(tile, maxnreg=None)
    else:
        tile = _SMALL[kernel][dim]
        if problem.arch in ("sm_100", "sm_103"):
            tile = _TENSOR_MEMORY.get((kernel, dim), tile)
    rows = max(16, _power_of_2(problem.seqlen_q))
    return tile if tile.block_m <= rows else replace(tile, block_m=rows)


def is_one_launch(problem: Problem) -> bool:
    """Whether the backward is so small that a second launch would cost more than what the first leaves idle."""
    longest, widest = max(problem.seqlen_q, problem.seqlen_k), max(problem.head_dim, problem.head_dim_v)
    if longest > 512 or widest > 64 or problem.is_packed or problem.dtype == torch.float32:
        return False
    programs = problem.batch * problem.nheads * -(-longest // _ONE_LAUNCH.block_m)
    return programs <= 512 and problem.arch in ("sm_90", "cpu")


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
