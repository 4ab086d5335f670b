"""Which tokens each rank holds, and which of them another rank needs: integers only, no tensor and no communication."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Order = Literal["zigzag", "contiguous"]
ORDERS: tuple[Order, ...] = ("zigzag", "contiguous")


class Span(NamedTuple):
    """Tokens start to stop - 1 of the whole, all of one sequence."""

    sequence: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Tokens."""
        return self.stop - self.start


def chunks(seqlen: int, size: int, rank: int, order: Order) -> list[tuple[int, int]]:
    """The (start, stop) of the tokens that one of `size` ranks holds, in the order in which it holds them.

        contiguous: rank r holds chunk r of W                    0 | 1 | 2 | 3
        zigzag:     rank r holds chunks r and 2 W - 1 - r of 2 W  0 7 | 1 6 | 2 5 | 3 4

    Under a causal mask token i sees i + 1 keys, so that ranks of zigzag have equal work. Neighbours become one.

    Raises:
        ValueError: seqlen does not divide into the chunks, or an unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    parts = size if order == "contiguous" else 2 * size
    if seqlen % parts:
        raise ValueError(f"seqlen must be a multiple of {parts} for {size} ranks in {order} order, got {seqlen}")
    length = seqlen // parts
    if order == "contiguous":
        return [(rank * length, (rank + 1) * length)]
    if rank == size - 1:
        return [(rank * length, (rank + 2) * length)]
    return [(part * length, (part + 1) * length) for part in (rank, parts - 1 - rank)]


@dataclass(frozen=True)
class Layout:
    """Queries and keys of one attention problem over the ranks of an axis, and who sees whom.

        p_i = i + cu_seqlens_k[s + 1] - cu_seqlens_q[s + 1]      position of query i of sequence s among all keys
        i sees j of the same sequence:   p_i - left <= j <= p_i + right

    Args:
        size: ranks.
        order: as `chunks`.
        rows_q: query rows of all ranks together.
        rows_k: key rows of all ranks together.
        cu_seqlens_q: 0, then where each sequence's queries end, at most rows_q; rows behind belong to no sequence.
        cu_seqlens_k: the same of the keys.
        band: (left, right), None is unlimited; causal is right = 0.
    """

    size: int
    order: Order
    rows_q: int
    rows_k: int
    cu_seqlens_q: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]
    band: tuple[int | None, int | None]

    def shift(self, sequence: int) -> int:
        """p_i - i of a sequence's queries."""
        return self.cu_seqlens_k[sequence + 1] - self.cu_seqlens_q[sequence + 1]

    def seen(self, queries: Span, keys: Span) -> Span:
        """The keys of a span that a query of the other sees; of size 0 if none."""
        left, right = self.band
        first, last = queries.start + self.shift(queries.sequence), queries.stop - 1 + self.shift(queries.sequence)
        return _cut(queries, keys, None if left is None else first - left, None if right is None else last + right)

    def seeing(self, keys: Span, queries: Span) -> Span:
        """The queries of a span that see a key of the other; of size 0 if none."""
        left, right = self.band
        first, last = keys.start - self.shift(queries.sequence), keys.stop - 1 - self.shift(queries.sequence)
        return _cut(keys, queries, None if right is None else first - right, None if left is None else last + left)

    def queries(self, rank: int) -> tuple[Span, ...]:
        """The queries of a rank."""
        return _spans(self.cu_seqlens_q, self.rows_q, self.size, rank, self.order)

    def keys(self, rank: int) -> tuple[Span, ...]:
        """The keys of a rank."""
        return _spans(self.cu_seqlens_k, self.rows_k, self.size, rank, self.order)

    @functools.lru_cache(maxsize=2**16)  # noqa: B019  a layout is a few integers
    def keys_for(self, host: int, owner: int) -> tuple[Span, ...]:
        """The owner's keys that queries of the host see: what key blocks travel for."""
        return _union(self.seen(q, k) for k in self.keys(owner) for q in self.queries(host))

    @functools.lru_cache(maxsize=2**16)  # noqa: B019
    def queries_for(self, host: int, owner: int) -> tuple[Span, ...]:
        """The owner's queries that see keys of the host: what query blocks travel for."""
        return _union(self.seeing(k, q) for q in self.queries(owner) for k in self.keys(host))


@functools.lru_cache(maxsize=4096)
def _spans(cu_seqlens: tuple[int, ...], rows: int, size: int, rank: int, order: Order) -> tuple[Span, ...]:
    """A rank's chunks, divided where a sequence ends; rows behind the last sequence are nobody's."""
    return tuple(
        Span(sequence, max(start, first), min(stop, last))
        for start, stop in chunks(rows, size, rank, order)
        for sequence, (first, last) in enumerate(itertools.pairwise(cu_seqlens))
        if max(start, first) < min(stop, last)
    )


def place(rows: int, size: int, rank: int, order: Order, start: int) -> int:
    """Where row `start` of the whole lies among the rows of its rank."""
    before = 0
    for first, last in chunks(rows, size, rank, order):
        if first <= start < last:
            return before + start - first
        before += last - first
    raise AssertionError(f"row {start} is not held by rank {rank}")


def _cut(one: Span, other: Span, start: int | None, stop: int | None) -> Span:
    """`other` from `start` up to and with `stop`, nothing of it in another sequence."""
    first = other.start if start is None else max(other.start, start)
    last = other.stop if stop is None else min(other.stop, stop + 1)
    if one.sequence != other.sequence or first >= last:
        return Span(other.sequence, other.start, other.start)
    return Span(other.sequence, first, last)


def _union(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The spans, sorted, those that touch made one."""
    found: list[Span] = []
    for span in sorted(span for span in spans if span.size):
        if found and found[-1].sequence == span.sequence and span.start <= found[-1].stop:
            span = Span(span.sequence, found[-1].start, max(found.pop().stop, span.stop))
        found.append(span)
    return tuple(found)
