"""Attention sinks: how much of a row lies on the first keys, with and without normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diagnostics.weights import sink_mass
from ..models.gpt import GPT, GPTConfig
from ..training.callbacks import Show, show_line
from ..training.snapshots import see
from .neighbours import normalised_sigmoid
from .text import BYTES, text_bytes, text_draw, text_windows
from .trials import Bench, Budget, Device, Trial, described, run_trials

QUICK = Budget(steps=400, batch=16, seqlen=64, lr=3e-3)
FULL = Budget(steps=3000, batch=16, seqlen=256, lr=2e-3)
ARMS = ("softmax", "normalised-sigmoid", "sigmoid", "sigmoid-no-bias")
FIRST = (1, 4)  # how many keys count as first
SINK = 0.3  # a head whose first key has a larger share has a sink: arXiv:2410.10781


def weights_of(model: GPT, tokens: Tensor) -> list[Tensor]:
    """The attention weights of every layer in eval mode, (batch, nheads, seqlen, seqlen) in float32."""
    layers: list[Any] = [block.attention for block in model.blocks]
    model.eval()
    seen = see(lambda: model(tokens), [(layer, layer.attention_fn) for layer in layers], range(model.config.nheads))
    return list(seen.weights.unbind(1))


def sinks(
    out_dir: str | Path,
    *,
    quick: bool = False,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    device: Device = "auto",
    jobs: int = 1,
    show: Show = show_line,
    command: str | None = None,
) -> Path:
    """The share of a row's mass on the first key and the first four, by layer, through training.

    Arms: softmax; sigmoid with b = -log n; the same divided by the sum of its row; sigmoid with b = 0. RoPE, QK-norm.
    Windows begin anywhere in the text: the first key is no special token.

    Command: flashsigmoid study sinks (--quick). Hardware: 1 GPU (2 CPU cores). Full: three seeds, n = 256, 3,000 steps
    of 16, 6 layers of 256. Quick: one seed, n = 64, 400 steps of 16, 3 layers of 64. Time: about a
    minute of an idle core for the quick one. Expected there: no sinks in any arm; full: not yet measured.

    Args:
        out_dir: folder of the study.
        quick: minutes on a CPU.
        only, seeds, device, jobs, show, command: as `run_trials`.

    Returns:
        out_dir/sinks.jsonl: sink_mass with tags layer and keys, the mean over rows and heads; sink_head, the largest
        share on the first key among a layer's heads; sink_heads, the part of all heads where it is above 0.3; even,
        the share that even weights would have, with tag keys; val/loss at the end; attn_norm, row_mass.

    Source: arXiv:2410.10781.
    """
    budget = QUICK if quick else FULL
    size: dict[str, Any] = {"nlayers": 3, "dim": 64, "nheads": 2} if quick else {"nlayers": 6, "dim": 256, "nheads": 8}
    trials = []
    for seed in (0,) if quick else (0, 1, 2):
        for arm in ARMS:
            config = GPTConfig(
                vocab_size=BYTES,
                seqlen=budget.seqlen,
                position="rope",
                attention="sigmoid" if arm.startswith("sigmoid") else "softmax",
                sigmoid_bias=0.0 if arm == "sigmoid-no-bias" else -math.log(budget.seqlen),
                **size,
            )
            run = partial(_run, config=config, budget=budget, normalised=arm == "normalised-sigmoid")
            trials.append(Trial(arm=arm, seed=seed, settings=described(config, budget, quick=quick), run=run))
    how: dict[str, Any] = {"device": device, "jobs": jobs, "show": show, "command": command}
    return run_trials("sinks", trials, out_dir, only=only, seeds=seeds, **how)


def _run(bench: Bench, *, config: GPTConfig, budget: Budget, normalised: bool) -> None:
    text, val = text_bytes()
    attend = normalised_sigmoid(-math.log(budget.seqlen)) if normalised else None
    model = GPT(config, attention_fn=attend).to(bench.device)
    tokens = text_windows(val, budget.seqlen, 16 * budget.seqlen)[:, :-1].to(bench.device)

    def look(step: int) -> None:
        bench.probe(model, tokens, step)
        shares: list[float] = []
        for layer, weights in enumerate(weights_of(model, tokens)):
            for keys in FIRST:
                bench.writer.write("sink_mass", sink_mass(weights, keys), step=step, layer=layer, keys=keys)
            heads = [sink_mass(weights[:, head : head + 1]).item() for head in range(weights.shape[1])]
            bench.writer.write("sink_head", max(heads), step=step, layer=layer)
            shares += heads
        bench.writer.write("sink_heads", sum(share > SINK for share in shares) / len(shares), step=step)

    n = budget.seqlen
    even = torch.ones(1, 1, n, n).tril()
    for keys in FIRST:
        bench.writer.write("even", sink_mass(even, keys), keys=keys)
    bench.train(model, text_draw(text, budget, bench.trial.seed, bench.device), budget, at=look)
    windows = text_windows(val, n, 2**13 if budget.steps < 1000 else 2**16)
    bench.writer.write("val/loss", bench.text_loss(model, windows), unit="nats_per_byte", length=1)
