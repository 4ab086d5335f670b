"""pair-repeat: do the first two symbols of a sequence come again, one right after the other? Accuracy by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..training.callbacks import Show, show_line
from .encoder import KINDS, Encoder, Size, encoder_settings
from .retrieval import integers
from .trials import Bench, Budget, Device, Draw, Trial, generator_at, run_trials


@dataclass(frozen=True, kw_only=True)
class Symbols:
    """What is asked, the same for every arm."""

    symbols: int
    lengths: tuple[int, ...]  # in training, one a batch, and in the evaluation; the start included
    samples: int  # sequences of each length in the evaluation


QUICK = Budget(steps=2000, batch=64, seqlen=16, lr=3e-3, weight_decay=0.0)
FULL = Budget(steps=5000, batch=128, seqlen=64, lr=1e-3, weight_decay=0.0)
QUICK_ASKED = Symbols(symbols=5, lengths=(8, 12, 16), samples=1024)
FULL_ASKED = Symbols(symbols=9, lengths=(8, 16, 32, 48, 64), samples=8192)
QUICK_SIZE, FULL_SIZE = Size(nlayers=2, dim=64, nheads=8), Size(nlayers=2, dim=256, nheads=8)


def pair_repeats(batch: int, length: int, symbols: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of which half have their first pair again.

        ^ s0 s1 . . . s0 s1 . .    target 1
        ^ s0 s1 . s1 . . . s0 .    target 0: the pair is nowhere else, though both are there again        ^ the start

    Where the pair, or its two parts, come again is drawn evenly; the other symbols are uniform, but where they would
    make a pair that is not to be there. So how often a symbol comes says next to nothing.

    Args:
        batch, length: of the tokens, the start included; length is at least 8.
        symbols: at least 3; the start is one more.
        generator: of the draws, on the device of the sequences.

    Returns:
        Tokens (batch, length) and targets (batch, 1), int64.

    Raises:
        ValueError: there are fewer symbols, or tokens.

    Source: arXiv:2409.04431, appendix, as we recall it; the start and the parts among the others are ours.
    """
    if symbols < 3 or length < 8:
        raise ValueError(f"symbols must be at least 3 and length at least 8, got {symbols} and {length}")
    tokens = integers(symbols, (batch, length), generator)
    tokens[:, 0] = symbols
    first, second = tokens[:, 1:2].clone(), tokens[:, 2:3].clone()
    targets = integers(2, (batch, 1), generator)
    # the first part at i and the second at i + 1, or at another of the places 3 to length - 1 but i itself
    i = 3 + integers(length - 4, (batch, 1), generator)
    j = 3 + (i - 3 + 2 + integers(length - 5, (batch, 1), generator)) % (length - 3)
    j = torch.where(targets == 1, i + 1, j)
    tokens.scatter_(1, i, first).scatter_(1, j, second)
    # a second part that follows a first becomes another symbol than both, so that no new pair comes of it
    other = _other(first, second, integers(symbols, (batch, length - 3), generator), symbols)
    again = (tokens[:, 2:-1] == first) & (tokens[:, 3:] == second) & (targets == 0)
    tokens[:, 3:] = torch.where(again, other, tokens[:, 3:])
    return tokens, targets


def _other(first: Tensor, second: Tensor, drawn: Tensor, symbols: int) -> Tensor:
    """What was drawn, or the next symbol that is neither of the two."""
    for _ in range(2):
        drawn = torch.where((drawn == first) | (drawn == second), (drawn + 1) % symbols, drawn)
    return drawn


def repeats_draw(budget: Budget, asked: Symbols, seed: int, device: torch.device | str = "cpu") -> Draw:
    """Batches of training, a pure function of seed and step; the lengths take turns."""

    def draw(step: int) -> tuple[Tensor, Tensor]:
        length = asked.lengths[step % len(asked.lengths)]
        return pair_repeats(budget.batch, length, asked.symbols, generator_at(seed, step, device))

    return draw


def pair_repeat(
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
    """One model an arm and seed learns at several lengths whether the first pair repeats; its accuracy at each.

    Arms: sigmoid (b = -log n), no-bias (b = 0), softmax; n is the longest. Places are learned: no length is new.

    Command: flashsigmoid study pair-repeat (--quick). Hardware: 1 GPU (2 CPU cores). Full: three seeds, n up to 64,
    5,000 steps of 128, 2 layers of 256, 9 symbols. Quick: three seeds, n up to 16, 2,000 steps of 64, 2 layers of 64,
    5 symbols. Expected of the quick one: benchmarks/results/studies; full: not yet measured.

    Args:
        out_dir: folder of the study.
        quick: minutes on a CPU.
        only, seeds, device, jobs, show, command: as `run_trials`.

    Returns:
        out_dir/pair-repeat.jsonl: accuracy with the tag length, guessing is right in half of the cases; attn_norm and
        row_mass before the first step; train/loss.

    Source: arXiv:2409.04431, appendix, as we recall it; the lengths, the model's size and its steps are ours.
    """
    budget, asked, size = (QUICK, QUICK_ASKED, QUICK_SIZE) if quick else (FULL, FULL_ASKED, FULL_SIZE)
    trials = []
    for seed in (0, 1, 2):
        for kind in KINDS:
            about = {"symbols": asked.symbols, "lengths": list(asked.lengths), "samples": asked.samples}
            settings = encoder_settings(kind, size, budget, quick=quick, **about)
            run = partial(_run, kind=kind, size=size, budget=budget, asked=asked)
            trials.append(Trial(arm=kind, seed=seed, settings=settings, run=run))
    how: dict[str, Any] = {"device": device, "jobs": jobs, "show": show, "command": command}
    return run_trials("pair-repeat", trials, out_dir, only=only, seeds=seeds, **how)


def _run(bench: Bench, *, kind: str, size: Size, budget: Budget, asked: Symbols) -> None:
    embed = nn.Embedding(asked.symbols + 1, size.dim)
    model = Encoder(embed, 2, size, kind, seqlen=budget.seqlen).to(bench.device)
    draw = repeats_draw(budget, asked, bench.trial.seed, bench.device)
    bench.probe(model, draw(len(asked.lengths) - 1)[0][:8], 0)
    bench.train(model, draw, budget)
    model.eval()
    for length in asked.lengths:
        generator = torch.Generator().manual_seed(2**31 + length)
        right = torch.zeros((), dtype=torch.int64, device=bench.device)
        tokens, targets = pair_repeats(asked.samples, length, asked.symbols, generator)
        for some, wanted in zip(tokens.split(512), targets.to(bench.device).split(512), strict=True):
            with torch.no_grad():
                right += (bench.logits(model, some.to(bench.device)).argmax(-1) == wanted).sum()
        bench.writer.write("accuracy", int(right) / asked.samples, length=length, questions=asked.samples)
