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
    maxnreg: int | None = None


def choose_formula(problem: Problem) -> str:
    """ "full", "pair", "adaptive" or "tanh" (sigmoid.py).

    float32 is always "full". "auto" is "adaptive" where the scores are likely to be small: b is a tensor, or a number
    so far below zero that N(0, 1) scores seldom leave the series' range.
    """
    if problem.dtype == torch.float32:
        return "full"
    if problem.sigmoid == "fast":
        return "tanh"
    limit = -6.2 if problem.dtype == torch.bfloat16 else -7.5
    if problem.sigmoid == "exact" or (problem.sigmoid_bias is not None and problem.sigmoid_bias > limit):
        return "pair"
    return "adaptive"


# 16-bit, at least 160 KB of shared memory, measured on an H200: kernel -> head_dim up to -> (full, causal)
_LARGE = {
    "fwd": {
        64: (Tile(128, 64, 4, 4, 1), Tile(128, 64, 4, 3, 1)),
        128: (Tile(64, 64, 4, 3, 1), Tile(64, 64, 4, 3, 1)),
        256: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    },
    "dkdv": {
        64: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        128: (Tile(64, 64, 4, 3, 1), Tile(64, 64, 4, 3, 1)),
        256: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    },
    "dq": {
        64: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        128: (Tile(64, 64, 4, 3, 2), Tile(64, 64, 4, 3, 2)),
        256: (Tile(128, 32, 8, 3), Tile(128, 32, 8, 3)),
    },
}
# 16-bit in 99 KB (sm_86, sm_89, sm_120) or AMD's 64 KB of shared memory, not measured: they fit
_SMALL = {
    "fwd": {64: Tile(128, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(64, 32, 4, 1)},
    "dkdv": {64: Tile(64, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
    "dq": {64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
}
_FLOAT32 = {
    "fwd": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
    "dkdv": {64: Tile(32, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
    "dq": {64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 4, 1)},
}
_INTERPRETED = Tile(128, 128, 4, 1)


def choose_tile(problem: Problem, kernel: str) -> Tile:
    """The tile of the kernel "fwd", "dkdv" or "dq"; fewer rows where there are fewer."""
    dim = max(64, _power_of_2(max(problem.head_dim, problem.head_dim_v)))
    if problem.arch == "cpu":
        tile = _INTERPRETED
    elif problem.dtype == torch.float32:
        tile = _FLOAT32[kernel][dim]
    elif problem.arch in ("sm_80", "sm_90", "sm_100", "sm_103"):
        tile = _LARGE[kernel][dim][problem.causal]
    else:
        tile = _SMALL[kernel][dim]
    return replace(tile, block_m=min(tile.block_m, max(16, _power_of_2(problem.seqlen_q))))


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
