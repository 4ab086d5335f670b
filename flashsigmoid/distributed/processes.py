"""The processes of one run: how many along each axis, what they agree on by the CPU, and how they end together.

Starting them is launch.py's business, laying a model over them plans.py's.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store, distributed_c10d, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from .plans import AXES

T = TypeVar("T")
LOST = 76  # an exit code, EX_PROTOCOL of sysexits.h: other ranks are gone, and a restart may heal it
ROLL_CALL_S = 3.0  # how long a rank that ends waits to hear of the others
# what gloo, NCCL and the store say when a rank is gone or late
_CONTACT = re.compile(r"gloo|nccl|timed out|timeout|connection|broken pipe|recv|reset by peer", re.IGNORECASE)


@dataclass(frozen=True)
class MeshSizes:
    """Ranks along each axis.

    Raises:
        ValueError: a size below 1.
    """

    dp: int = 1  # sequences of a batch
    cp: int = 1  # tokens of a sequence
    tp: int = 1  # heads, hidden channels, vocabulary

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ValueError(f"mesh must have positive sizes, got {self}")

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES)

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.dp * self.cp * self.tp


def parse_mesh(text: str) -> MeshSizes:
    """`dp=2,cp=2,tp=1` in words; an axis left out has size 1.

    Raises:
        ValueError: another axis, one named twice, or no positive integer.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, number = part.strip().partition("=")
        if axis not in AXES or axis in sizes or not number.isdecimal():
            raise ValueError(f"mesh must be like dp=2,cp=2,tp=1, got {text!r}")
        sizes[axis] = int(number)
    return MeshSizes(**sizes)


def is_launched() -> bool:
    """Whether a launcher (torchrun, `launch`, one of training.cluster) started this process as one of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def is_first() -> bool:
    """Whether this process is the one that writes and prints: rank 0, or alone."""
    return os.environ.get("RANK", "0") == "0" or not is_launched()


def ranks() -> int:
    """How many processes the launcher started; 1: this one alone."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def restarts() -> int:
    """How often the launcher has started these processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if is_launched() else 0


class Processes:
    """This rank among all of them. Every method but `absent` is called by all ranks, in the same order.

    Args:
        rank, size: of the run.
        sizes: of the mesh.
        device: kind of the ranks' devices, "cpu" or "cuda".
        store: of the launcher.
        timeout_s: longest wait for another rank.
    """

    def __init__(self, rank: int, size: int, sizes: MeshSizes, device: str, store: Store, timeout_s: float) -> None:
        self.rank, self.size, self.sizes, self.device = rank, size, sizes, device
        self.timeout_s, self.step = timeout_s, 0  # step: for the message of who is lost
        self._store, self._hears = store, True
        # a thread writes checkpoints while others talk: a group of its own, and disks may be slow
        self.agreeing = cast(ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))
        self.saving = cast(ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(hours=1)))

    @property
    def is_first(self) -> bool:
        """Whether it is rank 0."""
        return self.rank == 0

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """Of each number the largest that a rank has."""
        if self.size == 1:
            return numbers
        x = torch.tensor(numbers)
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.agreeing)
        return tuple(x.tolist())

    def mean(self, x: torch.Tensor) -> float:
        """The mean over ranks of a number, in float64."""
        if self.size == 1:
            return float(x)
        total = x.detach().double().cpu()
        dist.all_reduce(total, group=self.agreeing)
        return total.item() / self.size

    def first(self, act: Callable[[], T]) -> T:
        """What rank 0 finds, on all ranks.

        Raises:
            Exception: what it raises there.
        """
        given: list[Any] = [None, None]
        if self.is_first:
            try:
                given[0] = act()
            except Exception as error:
                given[1] = error
        dist.broadcast_object_list(given, src=0, group=self.agreeing)
        if given[1] is not None:
            raise given[1]
        return given[0]

    def on_this_machine(self) -> int:
        """How many ranks this machine has.

        Raises:
            ValueError: others have another number.
        """
        given = self.gather(socket.gethostname())
        counts = {name: given.count(name) for name in given}
        if len({*counts.values()}) > 1:
            told = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"every machine must have the same number of ranks, got {told}")
        return counts[socket.gethostname()]

    def gather(self, x: T) -> list[T]:
        """What every rank has, in their order."""
        given: list[Any] = [None] * self.size
        dist.all_gather_object(given, x, group=self.agreeing)
        return given

    def same(self, what: str, x: Any) -> None:
        """Whether all ranks have the same.

        Raises:
            ValueError: they have not.
        """
        given = self.gather(x)
        if any(other != given[0] for other in given):
            odd = next(rank for rank, other in enumerate(given) if other != given[0])
            raise ValueError(f"{what} must be the same on every rank, got others on rank {odd}")

    def end(self, error: Exception) -> NoReturn:
        """Leave after an error: one rank says what happened, a lost rank by its number.

        Raises:
            Exception: the error, on the lowest of the ranks that had one of their own.
            SystemExit: on the others, with code 1.
        """
        own = not (isinstance(error, RuntimeError) and _CONTACT.search(str(error)))
        with _undisturbed():
            said = self._roll_call(own)
        if 0 not in said and not self._hears and not own:
            print(f"error: rank 0 did not answer after step {self.step}, says rank {self.rank}", file=sys.stderr)
            self._leave()
        guilty = [rank for rank, is_own in said.items() if is_own]
        if guilty:
            if self.rank == guilty[0]:
                raise error
            raise SystemExit(1)
        if self.rank == min(said):
            missing = [rank for rank in range(self.size) if rank not in said]
            who = f"rank {', '.join(map(str, missing))} did not answer" if missing else "a connection broke"
            late = f" within {self.timeout_s:g} s" if missing and re.search("tim", str(error), re.IGNORECASE) else ""
            print(f"error: {who}{late} after step {self.step}", file=sys.stderr)
            reason = " ".join(str(error).split())[:200]
            print(f"rank {self.rank}, which waited, heard: {reason}", file=sys.stderr)
        self._leave()

    def _leave(self) -> NoReturn:
        """At once: threads and groups of this process wait for those who are gone, an orderly end would never come."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(LOST)

    def bound(self, groups: Iterable[ProcessGroup]) -> None:
        """Have nobody wait longer in them than in the group of all: torch's own limit is 30 minutes, of NCCL 10."""
        # torch 2.11 has no public name for it
        set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
        for group in groups:
            set_timeout(collective_timeout(self.device, self.timeout_s), group)

    def _roll_call(self, own: bool) -> dict[int, bool]:
        """The ranks that are ending, too, and whether each has an error of its own."""
        deadline_s = time.monotonic() + ROLL_CALL_S
        said = {self.rank: own}
        try:
            self._store.set(f"ending/{self.rank}", json.dumps(own))
            while len(said) < self.size and time.monotonic() < deadline_s:
                for rank in set(range(self.size)) - set(said):
                    if self._store.check([f"ending/{rank}"]):
                        said[rank] = json.loads(self._store.get(f"ending/{rank}"))
                time.sleep(0.05)
        except dist.DistError:  # without torchrun the store ends with rank 0
            self._hears = False
        return dict(sorted(said.items()))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A moment without SIGTERM, by which a launcher that lost one rank ends the others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def processes(sizes: MeshSizes | None, device: str, timeout_s: float) -> Iterator[Processes]:
    """Join the other ranks that the launcher started, and leave together.

    Args:
        sizes: of the mesh; None: every rank along dp.
        device: "cpu" (gloo) or "cuda" (NCCL, a GPU each, and gloo).
        timeout_s: longest wait for another rank.

    Raises:
        ValueError: sizes that do not make up the number of ranks.
    """
    if not is_launched():
        raise ValueError(
            "a mesh needs processes: flashsigmoid train --mesh starts them, torchrun and srun too, got none"
        )
    size = int(os.environ["WORLD_SIZE"])
    sizes = MeshSizes(dp=size) if sizes is None else sizes
    if sizes.size != size:
        raise ValueError(f"mesh must have as many ranks as there are processes, {size}, got {sizes}")
    limit = timedelta(seconds=timeout_s)
    store, rank, size = next(rendezvous("env://", timeout=limit))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=PrefixStore("groups", store),
        rank=rank,
        world_size=size,
        timeout=collective_timeout(device, timeout_s),
    )
    here = Processes(rank, size, sizes, device, PrefixStore("roll call", store), timeout_s)
    try:
        if "LOCAL_WORLD_SIZE" not in os.environ:  # torchrun sets it, others do not
            os.environ["LOCAL_WORLD_SIZE"] = str(here.on_this_machine())
        yield here
    except Exception as error:
        here.end(error)
    finally:
        dist.destroy_process_group()


def collective_timeout(device: str, timeout_s: float) -> timedelta:
    """Longest wait in a step. NCCL's watchdog ends the process without a word: the groups on the CPU speak first."""
    return timedelta(seconds=2 * timeout_s if device == "cuda" else timeout_s)


def worker_environment(environment: Mapping[str, str], workers: int) -> dict[str, str]:
    """Threads of each of `workers` processes of one machine, where nobody has said how many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", str(max(1, cores // workers)))}
