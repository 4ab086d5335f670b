"""Meshes of 2 processes train as one process does; those of 4, for 100 steps, in `make test-long`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed import language
from distributed.crew import Crew
from distributed.language import losses_alone

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STEPS = 20


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    crew = Crew(2)
    yield crew
    crew.run(language.released)
    crew.close()


def largest_difference(losses: list[float], alone: list[float]) -> float:
    """Relative."""
    return max(abs(x - y) / abs(y) for x, y in zip(losses, alone, strict=True))


@pytest.mark.parametrize(
    ("name", "sizes", "layout"),
    [
        ("alibi", (2, 1, 1), {}),
        ("alibi", (1, 2, 1), {"scheme": "ring"}),
        ("alibi", (1, 1, 2), {}),
        ("rope", (1, 2, 1), {"scheme": "reduce_scatter", "recompute": True}),
        ("rope", (1, 1, 2), {}),
        ("gelu", (1, 2, 1), {"order": "contiguous"}),
        ("gelu", (1, 1, 2), {"recompute": True}),
        ("bias of heads", (1, 2, 1), {}),
        ("bias of heads", (1, 1, 2), {}),
        ("one bias", (1, 1, 2), {}),
    ],
)
def test_two_processes_train_as_one(crew: Crew, name: str, sizes: tuple[int, int, int], layout: dict) -> None:
    alone = losses_alone(name, STEPS, torch.float64)
    assert alone[-1] < 0.95 * alone[0]
    both = crew.run(language.losses_of, name, sizes, STEPS, torch.float64, **layout)
    assert both[0] == both[1]
    assert largest_difference(both[0], alone) <= 1e-9
