"""Samples are interleaved in shuffled order, and numbers are medians and quantiles over rounds."""

from __future__ import annotations

import itertools
import time

from flashsigmoid.bench.timing import Times, by_clock, interleaved


def test_rounds_are_interleaved_and_shuffled() -> None:
    """Everybody once a round, after a round that is not counted, and nobody always behind the same one."""
    order: list[str] = []

    def sample(name: str):
        return lambda: order.append(name) or float(len(order))

    times = interleaved({name: sample(name) for name in "abc"}, rounds=20)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 21
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert times["b"].ms == [3.0 * i + names.index("b") + 1 for i, names in enumerate(rounds) if i > 0]
    follows = {(before, after) for names in rounds for before, after in itertools.pairwise(names)}
    assert len(follows) == 6


def test_medians_quantiles_and_ratios() -> None:
    times = Times([float(ms) for ms in range(1, 12)])
    assert (times.median_ms, times.quantile_ms(0.1), times.quantile_ms(0.9)) == (6.0, 2.0, 10.0)
    assert times.speedup_over(Times([2.0 * ms for ms in times.ms])) == 2.0


def test_the_clock_measures_a_call() -> None:
    """In milliseconds, and once: a sleep of 20 takes as long at the least, and hardly ever 50 times that."""
    calls: list[None] = []
    assert 20.0 <= by_clock(lambda: (calls.append(None), time.sleep(0.02)), "cpu")() < 1000.0
    assert len(calls) == 1
