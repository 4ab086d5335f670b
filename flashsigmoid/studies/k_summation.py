"""k-summation: add k of the numbers of a sequence, which ones the sequence itself says; the error against k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..training.callbacks import Show, show_line
from .encoder import KINDS, Encoder, Size, encoder_settings
from .trials import Bench, Budget, Device, Draw, Trial, generator_at, run_trials


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What is asked, the same for every arm; half of a sequence are numbers."""

    trained_k: int  # at most, in training
    k: tuple[int, ...]  # in the evaluation
    samples: int  # sequences of each k there


QUICK = Budget(steps=1500, batch=64, seqlen=16, lr=2e-3, weight_decay=0.0)
FULL = Budget(steps=4000, batch=256, seqlen=64, lr=1e-3, weight_decay=0.0)
QUICK_ASKED = Sums(trained_k=4, k=(1, 2, 3, 4, 6, 8), samples=1024)
FULL_ASKED = Sums(trained_k=16, k=(1, 2, 4, 8, 12, 16, 20, 24, 32), samples=8192)
QUICK_SIZE, FULL_SIZE = Size(nlayers=2, dim=64, nheads=2), Size(nlayers=2, dim=128, nheads=4)


class NumberEmbedding(nn.Module):
    """A number as a direction: x_i w, with w a parameter, N(0, 1) at the start.

    Args:
        dim: of w.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen) to (batch, seqlen, dim)."""
        return x[..., None] * self.weight


def k_sums(batch: int, length: int, k: Tensor | int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers, then which of them to add.

        x_1 ... x_m  s_1 ... s_m        x ~ N(0, 1), s of k ones and m - k zeros, m = length / 2
        target = sum_i s_i x_i          of variance k

    Args:
        batch, length: of the sequences; length is even.
        k: from 1 to m; or one for each sequence, (batch,).
        generator: of the draws, on the device of the sequences.

    Returns:
        Sequences (batch, length) and targets (batch, 1), float32.

    Raises:
        ValueError: the length is odd, or k, where it is an integer, is not from 1 to m.

    Source: arXiv:2409.04431, appendix, as we recall it: numbers in the first half, a k-hot vector in the second.
    """
    m = length // 2
    if length % 2 or (isinstance(k, int) and not 1 <= k <= m):
        raise ValueError(f"k must be 1 to {m}, half of an even length, got k={k} and length={length}")
    x = torch.randn(batch, m, generator=generator, device=generator.device)
    rank = torch.rand(batch, m, generator=generator, device=generator.device).argsort(-1)
    chosen = (rank < (k if isinstance(k, int) else k[:, None])).to(x.dtype)
    return torch.cat((x, chosen), 1), (chosen * x).sum(1, keepdim=True)


def sums_draw(budget: Budget, asked: Sums, seed: int, device: torch.device | str = "cpu") -> Draw:
    """Batches of training, a pure function of seed and step: k of each sequence is uniform from 1 to trained_k."""

    def draw(step: int) -> tuple[Tensor, Tensor]:
        generator = generator_at(seed, step, device)
        k = torch.randint(1, asked.trained_k + 1, (budget.batch,), generator=generator, device=device)
        return k_sums(budget.batch, budget.seqlen, k, generator)

    return draw


def square_loss(answers: Tensor, targets: Tensor) -> Tensor:
    """Mean of (answer - target)^2, of answers (batch, 1, 1) and targets (batch, 1)."""
    return F.mse_loss(answers[..., 0], targets)


def k_summation(
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
    """One model an arm and seed learns the sums of 1 to trained_k numbers; its error for each k, also for larger ones.

    Arms: sigmoid (b = -log n), no-bias (b = 0), softmax. Attention must find, for a number at one place, the 0 or 1 at
    another; places are learned.

    Command: flashsigmoid study k-summation (--quick). Hardware: 1 GPU (2 CPU cores). Full: three seeds, n = 64 (32
    numbers), up to 16 of them in training, 4,000 steps of 256, 2 layers of 128. Quick: three seeds, n = 16, up to 4,
    1,500 steps of 64, 2 layers of 64. Expected of the quick one: benchmarks/results/studies; full: not yet measured.

    Args:
        out_dir: folder of the study.
        quick: minutes on a CPU.
        only, seeds, device, jobs, show, command: as `run_trials`.

    Returns:
        out_dir/k-summation.jsonl: error, the mean of (answer - target)^2 over k, with tag k: 1 for a model that
        always says 0; attn_norm and row_mass before the first step; train/loss, not divided by k.

    Source: arXiv:2409.04431, appendix, as we recall it; one model for all k, its size and the steps are ours.
    """
    budget, asked, size = (QUICK, QUICK_ASKED, QUICK_SIZE) if quick else (FULL, FULL_ASKED, FULL_SIZE)
    trials = []
    for seed in (0, 1, 2):
        for kind in KINDS:
            settings = encoder_settings(kind, size, budget, quick=quick, trained_k=asked.trained_k, k=list(asked.k))
            run = partial(_run, kind=kind, size=size, budget=budget, asked=asked)
            trials.append(Trial(arm=kind, seed=seed, settings={**settings, "samples": asked.samples}, run=run))
    how: dict[str, Any] = {"device": device, "jobs": jobs, "show": show, "command": command}
    return run_trials("k-summation", trials, out_dir, only=only, seeds=seeds, **how)


def _run(bench: Bench, *, kind: str, size: Size, budget: Budget, asked: Sums) -> None:
    model = Encoder(NumberEmbedding(size.dim), 1, size, kind, seqlen=budget.seqlen).to(bench.device)
    draw = sums_draw(budget, asked, bench.trial.seed, bench.device)
    bench.probe(model, draw(0)[0][:8], 0)
    bench.train(model, draw, budget, loss=square_loss, unit="")
    model.eval()
    for k in asked.k:
        generator = torch.Generator().manual_seed(2**31 + k)
        x, targets = (t.to(bench.device) for t in k_sums(asked.samples, budget.seqlen, k, generator))
        with torch.no_grad():
            error = square_loss(bench.logits(model, x), targets) / k
        bench.writer.write("error", error, k=k)
