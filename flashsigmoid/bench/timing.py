"""Times several functions against each other: interleaved, in another order every round, so that noise falls on all.

On CUDA a sample is many calls between two events, by one CUDA graph or one by one. L2 is not flushed in between.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

Sample = Callable[[], float]  # takes one sample: milliseconds of one call

SAMPLE_MS = 30.0  # a sample lasts at least this long, so that a GPU's power limit has its say
_CALLS_IN_A_GRAPH = 20


class CaptureError(RuntimeError):
    """A function cannot become a CUDA graph."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of every round, in the order of the rounds."""

    ms: list[float]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms)

    def quantile_ms(self, q: float) -> float:
        return sorted(self.ms)[round(q * (len(self.ms) - 1))]

    def speedup_over(self, other: Times) -> float:
        """Median over rounds of other's time divided by ours: above 1 is faster."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.ms, other.ms, strict=True))


def interleaved(samples: Mapping[str, Sample], *, rounds: int) -> dict[str, Times]:
    """Take every sample once a round, each round in another order, after one warm-up round.

    Shuffled, not rotated: a GPU at its power limit is faster after a frugal kernel, whom nobody may always follow.
    """
    ms: dict[str, list[float]] = {name: [] for name in samples}
    shuffled = random.Random(0)
    for round_ in range(-1, rounds):
        for name in shuffled.sample(list(samples), len(samples)):
            taken = samples[name]()
            if round_ >= 0:
                ms[name].append(taken)
    return {name: Times(values) for name, values in ms.items()}


def by_clock(function: Callable[[], object], device: str) -> Sample:
    """One call, from a quiet device to a quiet device, on the clock of the host."""

    def sample() -> float:
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    return sample


def by_events(function: Callable[[], object], stream: torch.cuda.Stream, *, graphs: bool) -> Sample:
    """At least `SAMPLE_MS` of calls on a stream of CUDA, between two events; `function` has run there before.

    Raises:
        CaptureError: with `graphs`, the function cannot be captured.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def elapsed(call: Callable[[], object], times: int) -> float:
        with torch.cuda.stream(stream):
            call()  # the device is busy while the first timed calls are on their way
            start.record()
            for _ in range(times):
                call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / times

    calls = max(1, math.ceil(SAMPLE_MS / elapsed(function, 3)))
    if not graphs:
        return lambda: elapsed(function, calls)
    inside = min(calls, _CALLS_IN_A_GRAPH)
    replay = _captured(function, inside, stream)
    # of small work the calls above measured the host
    times = max(1, math.ceil(SAMPLE_MS / elapsed(replay, 3)))
    return lambda: elapsed(replay, times) / inside


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes allocated on CUDA during a call, above what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def side_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on this stream after everything before it; None: where it is."""
    if stream is None:
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def _captured(function: Callable[[], object], calls: int, stream: torch.cuda.Stream) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                function()
    except RuntimeError as error:
        raise CaptureError(f"no CUDA graph: {error}") from error
    return partial(_replay, graph, function)


def _replay(graph: torch.cuda.CUDAGraph, function: Callable[[], object]) -> None:
    """The function is held, not called: the graph reads the memory of the tensors that only it may hold."""
    graph.replay()


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
