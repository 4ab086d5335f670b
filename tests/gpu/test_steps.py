"""Steps of a study as CUDA graphs train as the same steps launched one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashsigmoid.models.gpt import GPT
from flashsigmoid.studies import pair_repeat, retrieval
from flashsigmoid.studies.encoder import Encoder
from flashsigmoid.studies.steps import CudaGraphs, Steps
from flashsigmoid.studies.trials import Draw, token_loss

DEVICE = torch.device("cuda")
STEPS = 24


def gpt(arm: str) -> tuple[torch.nn.Module, Draw]:
    chosen = retrieval.arms(retrieval.QUICK.seqlen)[arm]
    config = retrieval.retrieval_config(chosen, retrieval.QUICK, retrieval.QUICK_ASKED, nlayers=2, dim=64, nheads=2)
    draw = retrieval.retrieval_draw(retrieval.QUICK, retrieval.QUICK_ASKED, 0, DEVICE)
    return GPT(config, attention_fn=chosen.attention_fn), draw


def repeats() -> tuple[torch.nn.Module, Draw]:
    size = replace(pair_repeat.QUICK_SIZE, nheads=2)
    model = Encoder(torch.nn.Embedding(6, size.dim), 2, size, "sigmoid", seqlen=pair_repeat.QUICK.seqlen)
    return model, pair_repeat.repeats_draw(pair_repeat.QUICK, pair_repeat.QUICK_ASKED, 0, DEVICE)


def train(name: str, capture: Callable, swapped: bool = False) -> list[float]:
    """Losses; `swapped` adds up a batch in another order, which rounds otherwise."""
    torch.manual_seed(0)
    model, draw = repeats() if name == "repeats" else gpt(name)
    model.to(DEVICE)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(inputs)
        return token_loss(logits.float(), targets)

    steps = Steps(model, loss, retrieval.QUICK.optim, DEVICE, capture=capture)
    found = []
    for step in range(STEPS):
        inputs, targets = draw(step)
        found.append(steps(*(x.flip(0) for x in (inputs, targets)) if swapped else (inputs, targets), lr=1e-3))
    return [float(lost) for lost in found]


def apart(losses: list[float], others: list[float]) -> float:
    return max(abs(a / b - 1.0) for a, b in zip(losses, others, strict=True))


@pytest.mark.parametrize("name", ["repeats", "sigmoid", "softmax", "sigmoid-normed", "softmax-normed", "softmax-alibi"])
def test_graphs_train_as_python_does(name: str) -> None:
    by_graph = train(name, CudaGraphs(DEVICE))
    plain, swapped = (train(name, lambda function: function, swapped) for swapped in (False, True))
    assert apart(by_graph, plain) <= 4 * max(apart(swapped, plain), torch.finfo(torch.float32).eps)
    assert name == "repeats" or by_graph[-1] < by_graph[0]  # which takes longer to learn anything
