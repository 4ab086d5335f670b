"""Warpgroups, blocks and stages by head_dim and mask, and where these kernels are the faster ones: by measurement."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    is_from_end: bool = False  # of the forward's blocks of rows the first is short, not the last, which sees most
    places: int = (
        1  # for Q of the forward, in turns; with 2 out takes that of its Q, and the next Q comes a block early
    )
    adds_dq: bool = False  # of the backward beyond head_dim 128: dQ and dK in one kernel, and not in one each


_D64 = Tile(4, 64, 4, 112, own_out=True, is_persistent=True)
_D128 = Tile(3, 64, 4, 160, own_out=True, is_persistent=True)
_D256 = Tile(2, 64, 2, 240, is_split=True, is_persistent=True)
_BACK64 = Tile(2, 128, 2, 240, is_persistent=True)
_BACK128 = Tile(2, 64, 2, 240, is_persistent=True)
_BACK256 = Tile(2, 64, 2, 240, adds_dq=True)  # of dQ and dK; dV is the forward's
# direction -> head_dim -> (full, masked), by an H100. A program that takes block after block gains 1 to 6 %; of masked
# blocks, which a counter hands out, it needs more registers: at 128 and 256 it loses 1 to 30 %.
_TILES = {
    "forward": {
        64: (_D64, _D64),
        128: (_D128, Tile(3, 64, 4, 160, is_from_end=True)),
        256: (_D256, replace(_D256, is_persistent=False)),
    },
    "backward": {
        64: (_BACK64, _BACK64),
        128: (_BACK128, replace(_BACK128, is_persistent=False)),
        256: (_BACK256, _BACK256),
    },
}
# head_dim -> (keys at most, full, masked), the first that fits: of few keys, what a program does before and after them
# counts. Two places for Q gain 1 to 3 % at 64; at 128 they and blocks of 128 rows, which divide 512, 3 to 9 %,
# and block after block of masked ones 1 to 13 %.
_PLACES64 = replace(_D64, own_out=False, places=2)
_PLACES128 = Tile(2, 64, 4, 240, is_persistent=True, places=2)
_MASKED128 = Tile(3, 64, 4, 160, own_out=True, is_persistent=True, is_from_end=True)
_SHORT = {
    64: ((2048, _PLACES64, _PLACES64),),
    128: ((512, _PLACES128, _PLACES128), (1024, _PLACES128, _MASKED128), (4096, _D128, _MASKED128)),
    256: (),
}
LARGEST_HEAD_DIM = {direction: max(table) for direction, table in _TILES.items()}

# seqlen from which these kernels were measured to be faster than those of the Triton backend: direction -> head_dim ->
# (full, masked)
_FROM = {
    "forward": {64: (512, 1024), 128: (512, 512), 256: (1024, 1024)},
    "backward": {64: (512, 1024), 128: (512, 1024), 256: (1024, 1024)},
}
_MULTIPROCESSORS = 132


def padded_head_dim(problem: Problem) -> int:
    """What head_dim and head_dim_v are in the kernels: 64, 128 or 256, with zeros behind the last channel."""
    return max(64, 1 << (max(problem.head_dim, problem.head_dim_v) - 1).bit_length())


def choose_tile(problem: Problem, direction: str) -> Tile:
    """The tile for "forward" or "backward"."""
    # packed blocks differ in what they cost as masked ones do
    dim, is_masked = padded_head_dim(problem), problem.is_packed or problem.band != (None, None)
    if direction == "forward":
        for keys, full, masked in _SHORT[dim]:
            if problem.seqlen_k <= keys:
                return masked if is_masked else full
    return _TILES[direction][dim][is_masked]


def slower(problem: Problem, direction: str) -> str | None:
    """None where these kernels are the faster ones, else why not; they support the problem."""
    if problem.is_packed:
        return "packed sequences are not measured yet"
    is_masked = problem.band != (None, None)
    dim = padded_head_dim(problem)
    if not problem.head_dim == problem.head_dim_v == dim:
        return f"other head_dim than {dim} is not measured yet, got {problem.head_dim} and {problem.head_dim_v}"
    if direction == "forward" and problem.slopes_shape is not None:
        return "forward with alibi_slopes is faster in Triton"
    if direction == "backward" and (problem.bias_shape is not None or (problem.slopes_shape is not None and dim != 64)):
        return f"backward with a tensor b, or with alibi_slopes beyond head_dim 64, is not measured yet, got {dim}"
    least = _FROM[direction][dim][is_masked]
    if min(problem.seqlen_q, problem.seqlen_k) < least:
        kind = "masked " * is_masked + direction
        shorter = min(problem.seqlen_q, problem.seqlen_k)
        return f"{kind} at head_dim {dim} is faster from seqlen {least}, got {shorter}"
    rows, heads = problem.seqlen_q, problem.nheads
    if direction == "backward":
        rows, heads = problem.seqlen_k, problem.nheads_k
    blocks = -(-rows // (64 * choose_tile(problem, direction).warpgroups)) * heads * problem.batch
    if blocks < _MULTIPROCESSORS:
        return f"{direction} must have a block for each of {_MULTIPROCESSORS} multiprocessors, got {blocks}"
    return None
