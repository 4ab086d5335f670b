"""The paper's diagnosis: how large the first attention outputs are, with and without b = -log n, and what follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..models.gpt import GPT, GPTConfig
from ..nn import sincos_positions
from ..training.callbacks import Show, show_line
from .text import BYTES, text_bytes, text_draw, text_windows
from .trials import Bench, Budget, Device, Trial, described, run_trials

POSITIONS = ("sincos", "rope", "alibi")
KINDS = ("sigmoid", "no-bias", "softmax")  # b = -log n; b = 0; the twin
MATCHED = "matched"  # b of each head by its slope, which ALiBi alone has
LENGTHS = (1, 2, 4, 8)  # evaluated at these multiples of the training length

QUICK = Budget(steps=200, batch=16, seqlen=64, lr=3e-3)
FULL = Budget(steps=1000, batch=16, seqlen=512, lr=2e-3)


class SinCosEmbedding(nn.Embedding):
    """An embedding with fixed sin-cos positions added, of the embedding's own standard deviation at the start.

    Args:
        vocab_size, dim: as `nn.Embedding`; dim is even.
        std: of the positions. Default: 0.02, that of a GPT's embedding.

    Source: arXiv:1706.03762, section 3.5.
    """

    def __init__(self, vocab_size: int, dim: int, std: float = 0.02) -> None:
        super().__init__(vocab_size, dim)
        self.std = std

    def forward(self, input: Tensor) -> Tensor:
        """Tokens (batch, seqlen) to (batch, seqlen, dim)."""
        # sin^2 + cos^2 = 1, so that a channel has the mean square 1 / 2
        table = sincos_positions(input.shape[1], self.embedding_dim, device=input.device, dtype=self.weight.dtype)
        return super().forward(input) + self.std * math.sqrt(2.0) * table


def model_config(position: str, kind: str, *, qk_norm: bool, layer_scale: bool, budget: Budget, dim: int) -> GPTConfig:
    """One wide layer over bytes; b is that of the training length at every length."""
    return GPTConfig(
        vocab_size=BYTES,
        seqlen=max(LENGTHS) * budget.seqlen,
        nlayers=1,
        dim=dim,
        nheads=dim // 32,
        position="alibi" if position == "alibi" else "rope",
        qk_norm=qk_norm,
        layer_scale=1e-4 if layer_scale else None,
        attention="softmax" if kind == "softmax" else "sigmoid",
        sigmoid_bias=0.0 if kind == "no-bias" else -math.log(budget.seqlen),
        alibi_bias=True if kind == MATCHED else None,
    )


def build(config: GPTConfig, position: Literal["sincos", "rope", "alibi"] | str) -> GPT:
    """The model; with sin-cos positions its attention has none of its own."""
    model = GPT(config)
    if position == "sincos":
        model.embedding = SinCosEmbedding(config.vocab_size, config.dim)
        nn.init.normal_(model.embedding.weight, std=model.embedding.std)
        for block in model.blocks:
            attention: Any = block.attention
            attention.position, attention.rope = None, nn.Identity()
    return model


def diagnosis(
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
    """One layer, by position encoding, bias, LayerScale and QK-norm: |A V| at the start, the loss at 1 to 8 times n.

    40 arms, `POSITION-KIND[-no-qk-norm][-layer-scale]`, with POSITION sincos, rope or alibi and KIND sigmoid (b = -log
    n), no-bias (b = 0), softmax or, with ALiBi, matched (`nn.alibi_bias`); they differ in nothing else. Bytes of the
    embedded Shakespeare.

    Command: flashsigmoid study diagnosis (--quick). Hardware: 1 GPU (2 CPU cores). Time: not yet measured for the full
    one (about 4 minutes of an idle core). Full: three seeds, n = 512, 1,000 steps of 16, 512 channels. Quick: one seed
    unless others are asked for, n = 64, 200 steps of 16, 128 channels. Expected: quick, |A V| is 16 to 20 times larger
    without b than with it, and the loss differs by less than 0.15 nats per byte; full not yet measured.

    Args:
        out_dir: folder of the study.
        quick: minutes on a CPU.
        only, seeds, device, jobs, show, command: as `run_trials`.

    Returns:
        out_dir/diagnosis.jsonl: attn_norm and row_mass before the first step, about ten times on the way and at the
        end; val/loss with the tag length, a multiple of the training length; train/loss. Tags position, kind, qk_norm,
        layer_scale.

    Source: arXiv:2409.04431 (its diagnosis in one layer; the model's size is ours).
    """
    budget, dim, tokens = (QUICK, 128, 2**13) if quick else (FULL, 512, 2**16)
    trials = []
    for position in POSITIONS:
        for qk_norm in (True, False):
            for layer_scale in (False, True):
                for kind in (*KINDS, MATCHED) if position == "alibi" else KINDS:
                    config = model_config(
                        position, kind, qk_norm=qk_norm, layer_scale=layer_scale, budget=budget, dim=dim
                    )
                    settings = described(config, budget, position=position, kind=kind, quick=quick, val_tokens=tokens)
                    arm = f"{position}-{kind}" + "-no-qk-norm" * (not qk_norm) + "-layer-scale" * layer_scale
                    for seed in (0,) if quick and not seeds else (0, 1, 2):
                        run = partial(_run, config=config, position=position, budget=budget, tokens=tokens)
                        tags = ("position", "kind", "qk_norm", "layer_scale")
                        trials.append(Trial(arm=arm, seed=seed, settings=settings, run=run, tags=tags))
    # a seed is complete before the next begins
    trials.sort(key=lambda trial: trial.seed)
    how: dict[str, Any] = {"device": device, "jobs": jobs, "show": show, "command": command}
    return run_trials("diagnosis", trials, out_dir, only=only, seeds=seeds, **how)


def _run(bench: Bench, *, config: GPTConfig, position: str, budget: Budget, tokens: int) -> None:
    text, val = text_bytes()
    model = build(config, position).to(bench.device)
    probed = text_windows(val, budget.seqlen, 8 * budget.seqlen)[:, :-1]
    draw = text_draw(text, budget, bench.trial.seed, bench.device)
    bench.train(model, draw, budget, at=lambda step: bench.probe(model, probed, step))
    for length in LENGTHS:
        windows = text_windows(val, length * budget.seqlen, tokens)
        bench.writer.write("val/loss", bench.text_loss(model, windows), unit="nats_per_byte", length=length)
