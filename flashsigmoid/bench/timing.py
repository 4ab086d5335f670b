"""Times several functions against each other: interleaved, in rotated order, so that noise falls on all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


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


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: str = "cpu",
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Times]:
    """Call every function once a round, each round in another order, after one warm-up round."""
    names = list(functions)
    ms: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-1, rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            _synchronize(device)
            start = time.perf_counter()
            functions[name]()
            _synchronize(device)
            if round_ >= 0:
                ms[name].append(1e3 * (time.perf_counter() - start))
        progress()
    return {name: Times(values) for name, values in ms.items()}


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
