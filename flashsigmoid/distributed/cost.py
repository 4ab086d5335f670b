"""What context parallel sends and keeps, by formula, and the scheme chosen by that. Nothing is communicated here."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .layout import Layout, Span

SCHEMES = ("all_gather", "ring", "reduce_scatter")


@dataclass(frozen=True)
class Sizes:
    """Of one rank's tensors: everything that decides bytes but the number of rows."""

    batch: int
    nheads: int
    nheads_k: int
    head_dim: int
    head_dim_v: int
    itemsize: int  # bytes of an element of q, k, v
    row_bias_itemsize: int = 0  # of a bias with a value for every row; 0: it has none

    @property
    def q_bytes(self) -> int:
        """Of a query row."""
        return self.batch * self.nheads * self.head_dim * self.itemsize

    @property
    def out_bytes(self) -> int:
        """Of a row of out, or of its gradient."""
        return self.batch * self.nheads * self.head_dim_v * self.itemsize

    @property
    def kv_bytes(self) -> int:
        """Of a key and its value."""
        return self.batch * self.nheads_k * (self.head_dim + self.head_dim_v) * self.itemsize

    def returned(self, row_bytes: int) -> int:
        """Bytes of a row of partial results, float32 at least, of a row of inputs of so many."""
        return row_bytes * max(4, self.itemsize) // self.itemsize

    @property
    def bias_bytes(self) -> int:
        """Of a row's bias."""
        return self.batch * self.nheads * self.row_bias_itemsize

    @property
    def dbias_bytes(self) -> int:
        """Of the gradient of a row's bias."""
        return self.batch * self.nheads * max(4, self.itemsize) if self.row_bias_itemsize else 0


@dataclass(frozen=True)
class Cost:
    """Bytes of one attention call on one rank."""

    forward_bytes: int  # sent
    backward_bytes: int  # sent
    buffer_bytes: int  # of visitors at once, in the forward: what a rank holds beyond its own rows

    @property
    def sent_bytes(self) -> int:
        """Forward and backward."""
        return self.forward_bytes + self.backward_bytes


def _rows(spans: tuple[Span, ...]) -> int:
    return sum(span.size for span in spans)


def cost(layout: Layout, sizes: Sizes, scheme: str, rank: int) -> Cost:
    """What one rank sends and holds.

        all_gather, ring:    forward  N kv                   backward  N kv + N' kv*
        reduce_scatter:      forward  M (q + b) + M' out*    backward  M (q + out + b) + M' (q* + b)

    with the rows N (keys) or M (queries) of this rank that others want, counted once for each of them, and the rows
    N' or M' of others that this rank works on; kv, q, out, b are bytes of a row. Without a mask N = N' = (W - 1) n / W.
    What returns, with a star, is float32, of float64 inputs float64.
    In the forward out returns, in the backward the gradients of what travelled. A bias counts where it has a value for
    each row, and b of the last term only if it requires a gradient, which is assumed.

    Raises:
        ValueError: an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    others = [other for other in range(layout.size) if other != rank]
    wanted = layout.queries_for if scheme == "reduce_scatter" else layout.keys_for
    lent = sum(_rows(wanted(host, rank)) for host in others)
    visits = [_rows(wanted(rank, owner)) for owner in others]
    largest = max(visits, default=0)
    if scheme == "reduce_scatter":
        there = sizes.q_bytes + sizes.bias_bytes
        return Cost(
            lent * there + sum(visits) * sizes.returned(sizes.out_bytes),
            lent * (there + sizes.out_bytes) + sum(visits) * (sizes.returned(sizes.q_bytes) + sizes.dbias_bytes),
            # one in use, one arriving
            min(2, len(others)) * largest * there,
        )
    held = sum(visits) if scheme == "all_gather" else min(2, len(others)) * largest
    back = sum(visits) * sizes.returned(sizes.kv_bytes)
    return Cost(lent * sizes.kv_bytes, lent * sizes.kv_bytes + back, held * sizes.kv_bytes)


GATHERED_BYTES = 2**28  # what all_gather may hold at once


@functools.lru_cache(maxsize=1024)
def choose_scheme(layout: Layout, sizes: Sizes, *, training: bool = True, gathered_bytes: int = GATHERED_BYTES) -> str:
    """The scheme whose busiest rank sends the fewest bytes; of all_gather and ring, which send the same, by memory.

    1. reduce_scatter where it sends less. In training it does so without grouped heads, of 16 bits 7 to 8: q goes there
       twice, dout once, and out and dq back, where K and V go there twice, and their gradients back, in float32.
    2. all_gather where what it holds is at most `gathered_bytes`: one call of the op for each chunk of queries.
    3. ring, which holds two ranks' blocks.

    Args:
        layout: who holds and sees what.
        sizes: of one rank's tensors.
        training: whether a backward follows. Default: True.
        gathered_bytes: of the keys and values of others that a rank may hold. Default: 256 MiB.
    """

    def busiest(scheme: str) -> int:
        costs = [cost(layout, sizes, scheme, rank) for rank in range(layout.size)]
        return max(x.sent_bytes if training else x.forward_bytes for x in costs)

    if busiest("reduce_scatter") < busiest("ring"):
        return "reduce_scatter"
    held = max(cost(layout, sizes, "all_gather", rank).buffer_bytes for rank in range(layout.size))
    return "all_gather" if held <= gathered_bytes else "ring"


def softmax_ring_cost(layout: Layout, sizes: Sizes) -> Cost:
    """What one rank of softmax ring attention sends, every rank the same.

        forward   (W - 1) n / W kv           K and V once around
        backward  (W - 1) n / W kv + W n / W kv 4 / itemsize      again, with dK and dV in float32, which end at home

    Blocks are forwarded from neighbour to neighbour, so none can be left out that a later rank needs. Each rank also
    keeps out and lse for its backward and rescales its output at every step.

    Source: arXiv:2310.01889, section 3; gradients in float32 as implementations accumulate them.
    """
    rows, size = layout.rows_k // layout.size, layout.size
    once = (size - 1) * rows * sizes.kv_bytes
    wide = size * rows * sizes.kv_bytes * max(4, sizes.itemsize) // sizes.itemsize if size > 1 else 0
    return Cost(once, once + wide, min(2, size - 1) * rows * sizes.kv_bytes)
