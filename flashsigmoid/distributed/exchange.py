"""Blocks of a sharded sequence that visit other ranks, and partial results that return: point-to-point, overlapped.

What is computed with a visitor is the business of context_parallel.py.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .layout import Order, Span, place

# (host, owner) -> the owner's rows that the host works on
Wanted = Callable[[int, int], tuple[Span, ...]]


@dataclass(frozen=True)
class Axis:
    """The processes along one axis of a mesh, this one among them."""

    group: dist.ProcessGroup
    size: int
    rank: int

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> list[Any]:
        """Start sends and receives; none blocks. Every rank posts its steps in one order, so none waits in a circle."""
        ops = [dist.P2POp(dist.isend, x, group=self.group, group_peer=peer) for peer, x in sends]
        ops += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=peer) for peer, x in receives]
        return dist.batch_isend_irecv(ops) if ops else []


def axis_of(mesh: DeviceMesh) -> Axis:
    """The one axis of a mesh.

    Raises:
        ValueError: the mesh has several axes, or this process is not in it.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one axis, as mesh['cp'] of a larger one, got {mesh.ndim}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh must contain this process, got rank {dist.get_rank()} outside of {mesh}")
    group = mesh.get_group()
    _connect(group, mesh.device_type)
    return Axis(group, mesh.size(), mesh.get_local_rank())


# weakly: a group that outlives destroy_process_group aborts the process at its end
_connected: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def _connect(group: dist.ProcessGroup, device_type: str) -> None:
    """NCCL wants the first call of a group from all of its ranks; some have none where no query sees a shard."""
    if device_type != "cpu" and group not in _connected:
        dist.all_reduce(torch.zeros(1, device=device_type), group=group)
        _connected.add(group)


@dataclass(frozen=True)
class Exchange:
    """How one kind of rows, queries or keys, travels over an axis.

    At step s rank r receives from r - s what it wants of it, and sends r + s what that wants: a ring whose stride
    grows. Each block goes straight to who needs it, no rank forwards anything, and what nobody wants is not sent.
    """

    axis: Axis
    wanted: Wanted
    rows: int  # of all ranks together
    order: Order

    def visitors(
        self, guests: Mapping[str, Tensor], ahead: int
    ) -> Iterator[tuple[int, tuple[Span, ...], dict[str, Tensor]]]:
        """(step, spans, tensors) of every other rank, as they arrive; no spans where it has nothing for this one.

        Results of each step are sent home before the next is taken: every rank posts in one order.

        Args:
            guests: this rank's rows, (batch, rows, ...) each.
            ahead: steps on their way while one is in use: 1 is a ring, size - 1 an all-gather.
        """
        rank, size = self.axis.rank, self.axis.size

        def post(step: int):
            to, source = (rank + step) % size, (rank - step) % size
            mine, theirs = self.wanted(to, rank), self.wanted(rank, source)
            rows = sum(span.size for span in theirs)
            sent = [self._select(x, mine) for x in guests.values()] if mine else []
            arrived = {name: x.new_empty(x.shape[0], rows, *x.shape[2:]) for name, x in guests.items()}
            works = self.axis.post([(to, x) for x in sent], [(source, x) for x in arrived.values()] if theirs else [])
            return step, theirs, arrived, works, sent

        # with the first ones posted the caller turns to its own rows
        return self._received([post(step) for step in range(1, min(size, ahead + 1))], post)

    def _received(self, posted: list, post: Callable[[int], tuple]) -> Iterator:
        for following in itertools.count(len(posted) + 1):
            if not posted:
                return
            step, spans, arrived, works, _ = posted.pop(0)
            _wait(works)
            if following < self.axis.size:
                posted.append(post(following))
            yield step, spans, arrived

    def _select(self, x: Tensor, spans: Sequence[Span]) -> Tensor:
        """Some of this rank's rows, contiguous."""
        starts = [place(self.rows, self.axis.size, self.axis.rank, self.order, span.start) for span in spans]
        parts = [x.narrow(1, start, span.size) for start, span in zip(starts, spans, strict=True)]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)

    def homecoming(self, homes: Mapping[str, Tensor]) -> Homecoming:
        """Where partial results for this rank's rows are added up."""
        return Homecoming(self, homes)


class Homecoming:
    """Partial results of visitors on their way to the rows' owner, who adds them by step, all in the dtype of `homes`.

    Each is sent once.
    """

    def __init__(self, exchange: Exchange, homes: Mapping[str, Tensor]) -> None:
        self.exchange, self.homes = exchange, homes
        self.posted: tuple | None = None

    def send(self, step: int, results: Mapping[str, Tensor]) -> None:
        """Send the results of a step's visitor, and take in those that were computed for this rank a step before."""
        exchange, axis = self.exchange, self.exchange.axis
        host, owner = (axis.rank + step) % axis.size, (axis.rank - step) % axis.size
        spans = exchange.wanted(host, axis.rank)
        rows = sum(span.size for span in spans)
        sent = [x.contiguous() for x in results.values()]
        arrived = {name: x.new_empty(x.shape[0], rows, *x.shape[2:]) for name, x in self.homes.items()}
        sends = [(owner, x) for x in sent if x.shape[1]]
        works = axis.post(sends, [(host, x) for x in arrived.values()] if spans else [])
        self.finish()
        self.posted = (spans, arrived, works, sent)

    def finish(self) -> None:
        """Take in what is still to come."""
        if self.posted is not None:
            self._take_in(*self.posted)
        self.posted = None

    def _take_in(self, spans: Sequence[Span], arrived: Mapping[str, Tensor], works: list[Any], sent: object) -> None:
        _wait(works)
        exchange, row = self.exchange, 0
        for span in spans:
            start = place(exchange.rows, exchange.axis.size, exchange.axis.rank, exchange.order, span.start)
            for name, home in self.homes.items():
                home.narrow(1, start, span.size).add_(arrived[name].narrow(1, row, span.size))
            row += span.size


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()
