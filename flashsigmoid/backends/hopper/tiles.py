"""Warpgroups, blocks and stages by head_dim and mask, and where these kernels are the faster ones: by measurement."""

from __future__ import annotations

from dataclasses import dataclass

from ..problem import Problem


@dataclass(frozen=True)
class Tile:
    """One program: `warpgroups` of 64 query rows, or of 64 keys in the backward, `block` keys, or rows, a step."""

    warpgroups: int
    block: int
    stages: int  # of a ring, a power of two
    registers: int  # of a thread that multiplies
    is_split: bool = False  # K and V of the forward each behind their own barriers: half the memory for two stages
    own_out: bool = False  # memory of its own for out, so that Q of the next block comes early
    is_persistent: bool = False  # a program for every multiprocessor, and not for every block


_FWD = {64: Tile(4, 64, 4, 112), 128: Tile(3, 64, 4, 160), 256: Tile(2, 64, 2, 240, is_split=True)}
# blocks that all see as many keys: one program after the other, 1 to 3 % faster; masked ones are then unbalanced
_FWD_FULL = {
    64: Tile(4, 64, 4, 112, own_out=True, is_persistent=True),
    128: Tile(3, 64, 4, 160, own_out=True, is_persistent=True),
    256: Tile(2, 64, 2, 240, is_split=True, is_persistent=True),
}
_BWD = {64: Tile(2, 128, 2, 240), 128: Tile(2, 64, 2, 240)}
HEAD_DIMS = {"forward": tuple(_FWD), "backward": tuple(_BWD)}

# keys from which these kernels are faster than those of the Triton backend: direction -> head_dim -> (full, masked)
_FROM = {
    "forward": {64: (4096, 4096), 128: (1024, 2048), 256: (1024, 2048)},
    "backward": {64: (2048, 4096), 128: (1024, 2048)},
}
_MULTIPROCESSORS = 132


def choose_tile(problem: Problem, direction: str) -> Tile:
    """The tile for "forward" or "backward"."""
    if direction == "backward":
        return _BWD[problem.head_dim]
    return (_FWD_FULL if problem.band == (None, None) else _FWD)[problem.head_dim]


def slower(problem: Problem, direction: str) -> str | None:
    """None where these kernels are the faster ones, else why not; they support the problem."""
    is_masked = problem.band != (None, None)
    least = _FROM[direction][problem.head_dim][is_masked]
    if min(problem.seqlen_q, problem.seqlen_k) < least:
        kind = "masked " * is_masked + direction
        return f"{kind} at head_dim {problem.head_dim} is faster from seqlen {least}, got {problem.seqlen_k}"
    rows, heads = problem.seqlen_q, problem.nheads
    if direction == "backward":
        rows, heads = problem.seqlen_k, problem.nheads_k
    blocks = -(-rows // (64 * choose_tile(problem, direction).warpgroups)) * heads * problem.batch
    if blocks < _MULTIPROCESSORS:
        return f"{direction} must have a block for each of {_MULTIPROCESSORS} multiprocessors, got {blocks}"
    return None
