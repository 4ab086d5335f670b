"""Steps that are recorded once and replayed train as steps that Python runs, by a stand-in for a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flashsigmoid.studies.steps import Replay, Steps
from flashsigmoid.training.optim import OptimConfig, lr_at

CPU = torch.device("cpu")
CONFIG = OptimConfig(lr=0.05, warmup=4, clip=0.5)
STEPS = 24


class Recorder:
    """Keeps a function as a graph does: where it reads and writes is fixed, and recording runs nothing."""

    def __init__(self) -> None:
        self.recorded: list[Callable[[], None]] = []

    def __call__(self, function: Callable[[], None]) -> Replay:
        self.recorded.append(function)
        return function


def batch(step: int, late: bool = False) -> tuple[Tensor, Tensor]:
    """Two shapes take turns; from half of the steps on a third."""
    count = 5 if late and step >= STEPS // 2 else 3 + step % 2
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(count, 4, generator=generator)
    return inputs, torch.randn(count, 2, generator=generator)


def train(capture=None, kept_rate: bool = False) -> tuple[list[float], list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    steps = Steps(model, lambda x, y: (model(x) - y).square().mean(), CONFIG, CPU, capture=capture)
    losses = []
    for step in range(STEPS):
        inputs, targets = batch(step, late=True)
        losses.append(float(steps(inputs, targets, CONFIG.lr if kept_rate else lr_at(step, STEPS, CONFIG))))
        inputs.fill_(math.nan)  # what a replay reads is its own
    return losses, [parameter.detach() for parameter in model.parameters()]


def test_replayed_steps_are_those_of_python() -> None:
    recorder = Recorder()
    losses, parameters = train(recorder)
    # eager, but with the rate in a tensor as a graph reads it
    plain, expected = train()
    assert len(recorder.recorded) == 3  # one for each shape
    assert losses == pytest.approx(plain, rel=STEPS * 8 * torch.finfo(torch.float32).eps)
    for one, other in zip(parameters, expected, strict=True):
        assert (one - other).norm() <= STEPS * 8 * torch.finfo(torch.float32).eps * other.norm()


def test_a_rate_that_a_graph_keeps_would_be_seen() -> None:
    plain, _ = train()
    kept, _ = train(kept_rate=True)
    assert max(abs(a / b - 1.0) for a, b in zip(kept, plain, strict=True)) > 1e-3


def test_the_first_steps_of_a_shape_are_not_recorded() -> None:
    recorder = Recorder()
    model = nn.Linear(4, 2)
    steps = Steps(model, lambda x, y: (model(x) - y).square().mean(), CONFIG, CPU, capture=recorder)
    recorded = []
    for step in range(10):
        steps(*batch(step), 0.1)
        recorded.append(len(recorder.recorded))
    assert recorded == [0, 0, 0, 0, 0, 0, 1, 2, 2, 2]
