"""Studies and the watch on a GPU: batches are drawn there, no step waits for it, what is seen is what a CPU sees.

`python -m pytest tests/gpu/test_studies.py -n 0 --gpu-record gpu-tests-studies.jsonl`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from gpu.machine import nothing_waits
from rounding import assert_rounded
from torch import Tensor, nn

from flashsigmoid.diagnostics.watch import Watch
from flashsigmoid.models.gpt import GPT, GPTConfig
from flashsigmoid.record import read_records
from flashsigmoid.studies import k_summation, load, pair_repeat, retrieval
from flashsigmoid.studies.encoder import Encoder
from flashsigmoid.studies.text import text_bytes, text_draw
from flashsigmoid.studies.trials import Draw, token_loss
from flashsigmoid.training.optim import adamw

DEVICE = "cuda"
TEXT = replace(retrieval.QUICK, batch=4)


def gpt(arm: str) -> nn.Module:
    chosen = retrieval.arms(retrieval.QUICK.seqlen)[arm]
    config = retrieval.retrieval_config(chosen, retrieval.QUICK, retrieval.QUICK_ASKED, nlayers=2, dim=64, nheads=2)
    return GPT(config, attention_fn=chosen.attention_fn)


def sums() -> nn.Module:
    size, n = k_summation.QUICK_SIZE, k_summation.QUICK.seqlen
    return Encoder(k_summation.NumberEmbedding(size.dim), 1, size, "sigmoid", seqlen=n)


def repeats() -> nn.Module:
    size = replace(pair_repeat.QUICK_SIZE, nheads=2)
    return Encoder(nn.Embedding(6, size.dim), 2, size, "sigmoid", seqlen=pair_repeat.QUICK.seqlen)


def text_model() -> nn.Module:
    return GPT(GPTConfig(vocab_size=256, seqlen=TEXT.seqlen, nlayers=1, dim=64, nheads=2))


Case = tuple[Draw, Callable[[], nn.Module], Callable[[Tensor, Tensor], Tensor]]


def cases() -> dict[str, Case]:
    recall = retrieval.retrieval_draw(retrieval.QUICK, retrieval.QUICK_ASKED, 0, DEVICE)
    return {
        **{arm: (recall, lambda arm=arm: gpt(arm), token_loss) for arm in retrieval.arms(32)},
        "text": (text_draw(text_bytes()[0], TEXT, 0, DEVICE), text_model, token_loss),
        "sums": (
            k_summation.sums_draw(k_summation.QUICK, k_summation.QUICK_ASKED, 0, DEVICE), sums, k_summation.square_loss,
        ),
        "repeats": (
            pair_repeat.repeats_draw(pair_repeat.QUICK, pair_repeat.QUICK_ASKED, 0, DEVICE), repeats, token_loss,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["text", "sums", "repeats", *retrieval.arms(32)])
def test_a_step_waits_for_nothing(name: str) -> None:
    draw, make, loss = cases()[name]
    model = make().to(DEVICE)
    optimizer = adamw(model, retrieval.QUICK.optim)

    def step(number: int) -> None:
        inputs, targets = draw(number)
        assert inputs.is_cuda
        with torch.autocast(DEVICE, torch.bfloat16):
            out = model(inputs)
        optimizer.zero_grad()
        loss(out.float(), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    for number in range(3):  # kernels and tables are made
        step(number)
    with nothing_waits():
        for number in range(3, 6):
            step(number)


@pytest.mark.parametrize("name", ["retrieval", "k-summation", "pair-repeat", "diagnosis", "neighbours", "sinks"])
def test_a_study_runs_there(tmp_path, monkeypatch, name: str) -> None:
    module = importlib.import_module(f"flashsigmoid.studies.{name.replace('-', '_')}")
    for field in ("QUICK", "QUICK_TEXT", "QUICK_RECALL"):
        if hasattr(module, field):
            monkeypatch.setattr(module, field, replace(getattr(module, field), steps=2, batch=8))
    options: dict[str, Any] = {"quick": True, "seeds": (0,), "device": DEVICE, "show": lambda progress: None}
    records = read_records(load(name)(tmp_path, **options)).records
    assert all(r.value == r.value for r in records if r.value is not None)


def watched(attention: Literal["sigmoid", "softmax"], device: str, is_half: bool) -> dict[tuple[str, str], float]:
    """What the watch sees of one step, {(name, layer): number}."""
    config = GPTConfig(vocab_size=50, seqlen=64, nlayers=2, dim=64, nheads=2, attention=attention)
    tokens = torch.randint(0, 50, (4, 64), generator=torch.Generator().manual_seed(0)).to(device)
    torch.manual_seed(0)
    model = GPT(config).to(device)
    # rates of float32: a GPU's fused AdamW has 1 - 0.999 in float32, which is off by a hundred units of rounding
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.875, 0.96875), fused=True)
    seen: dict[tuple[str, str], float] = {}

    def write(name: str, value: float, *, step: int, layer: str, **spread: float) -> None:
        seen[name, layer] = value

    with Watch(model, optimizer, write=write):
        with torch.autocast(device, torch.bfloat16, enabled=is_half):
            logits = model(tokens)
        token_loss(logits.float(), tokens).backward()
        optimizer.step()
    return seen


@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
def test_the_watch_sees_there_what_it_sees_on_the_cpu(attention: Literal["sigmoid", "softmax"]) -> None:
    """In float32 up to rounding; under autocast within four times what bfloat16 does to any number on the CPU."""
    plain, there = (watched(attention, device, False) for device in ("cpu", DEVICE))
    assert plain.keys() == there.keys()
    for key, value in plain.items():
        assert_rounded(there[key], value, dtype=torch.float32, name=str(key))
    near, there = (watched(attention, device, True) for device in ("cpu", DEVICE))
    assert plain.keys() == there.keys()
    # of all numbers, since one may be lucky; bfloat16 moves them by less than a hundredth
    allowed = 4.0 * max(abs(near[key] - value) / abs(value) for key, value in plain.items() if value)
    for key, value in plain.items():
        assert abs(there[key] - value) <= allowed * abs(value), key
