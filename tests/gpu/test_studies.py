"""Studies and the watch on a GPU: batches are drawn there, no step waits for it, what is seen is what a CPU sees.

`python -m pytest tests/gpu/test_studies.py -n 0 --gpu-record gpu-tests-studies.jsonl`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu.machine import nothing_waits
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


@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
def test_the_watch_sees_there_what_it_sees_on_the_cpu(attention: str) -> None:
    config = GPTConfig(vocab_size=50, seqlen=64, nlayers=2, dim=64, nheads=2, attention=attention)  # pyright: ignore[reportArgumentType]
    tokens = torch.randint(0, 50, (4, 64), generator=torch.Generator().manual_seed(0))
    found: list[dict[tuple[str, str], float]] = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model = GPT(config).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        seen: dict[tuple[str, str], float] = {}
        x = tokens.to(device)

        def write(name: str, value: float, *, step: int, layer: str, seen: Any = seen, **spread: float) -> None:
            seen[name, layer] = value

        with Watch(model, optimizer, write=write):
            with torch.autocast(device, torch.bfloat16, enabled=device == DEVICE):
                logits = model(x)
            token_loss(logits.float(), x).backward()
            optimizer.step()
        found.append(seen)
    plain, on_gpu = found
    assert plain.keys() == on_gpu.keys()
    for key, value in plain.items():
        assert on_gpu[key] == pytest.approx(value, rel=0.1, abs=1e-6), key  # bfloat16 beside float32
