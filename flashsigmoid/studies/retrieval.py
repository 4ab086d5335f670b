"""Can it find what it has read? Associative recall and a needle in a haystack, by length and number of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..functional import sigmoid_attention
from ..models.gpt import GPT, GPTConfig
from ..nn.attention import AttentionFn
from ..training.callbacks import Show, show_line
from .trials import IGNORED, Bench, Budget, Device, Draw, Trial, described, generator_at, run_trials

LENGTHS = (1, 2, 4)  # evaluated at these multiples of the training length


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """What is asked, the same for every arm. The vocabulary is `each` keys, `each` values and `each` of noise."""

    each: int
    trained_pairs: int  # at most, in training
    pairs: tuple[int, ...]  # in the evaluation
    samples: int  # sequences of each task, length and number of pairs there


QUICK = Budget(steps=1200, batch=32, seqlen=32, lr=1e-3, weight_decay=0.0)
FULL = Budget(steps=8000, batch=64, seqlen=128, lr=1e-3, weight_decay=0.0)
QUICK_ASKED = Difficulty(each=16, trained_pairs=8, pairs=(4, 8, 16), samples=128)
FULL_ASKED = Difficulty(each=64, trained_pairs=16, pairs=(4, 8, 16, 32, 64), samples=1024)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What differs between the arms: fields of `GPTConfig`, and an attention other than the model's own."""

    fields: dict[str, Any] = field(default_factory=dict)
    attention_fn: AttentionFn | None = None


def balanced_alibi_slopes(nheads: int, device: torch.device | None = None) -> Tensor:
    """SWAT's slopes, (nheads,) float32: half of the heads favour near keys, by 2^-k, half far ones, by -2^-k.

        slope_h = 2^-(h + 1) for h < nheads / 2,   -2^-(h + 1 - nheads / 2) for the others

    Raises:
        ValueError: nheads is odd.

    Source: arXiv:2502.18845 (its sign is that of what is added to the scores, ours of what is subtracted).
    """
    if nheads < 2 or nheads % 2:
        raise ValueError(f"nheads must be even, got {nheads}")
    half = 0.5 ** torch.arange(1, nheads // 2 + 1, device=device, dtype=torch.float32)
    return torch.cat((half, -half))


def balanced_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`sigmoid_attention` with the slopes of `balanced_alibi_slopes`, as an `attention_fn` of our modules."""
    options["alibi_slopes"] = balanced_alibi_slopes(q.shape[2], q.device)
    return sigmoid_attention(q, k, v, **options)


# the arms of the question, and the recipe that was found, with what it consists of
ASKED = (
    "sigmoid", "softmax", "swat", "gated-softmax", "softmax-alibi", "sigmoid-alibi-matched", "sigmoid-normed",
    "softmax-normed",
)  # fmt: skip


def arms(seqlen: int) -> dict[str, Arm]:
    """All arms by name: those to compare, then what may help the sigmoid. All have RoPE and QK-norm unless it says so.

    SWAT's are b = 0, as published, in a window of half the training length, with balanced ALiBi and RoPE. The normed
    arms have ALiBi and an RMSNorm of what each head gives, and the sigmoid b = -log n - 3 besides: below any
    saturation, as a softmax's weights are, and with rows that are divided by something, if not by their sum.
    """
    swat: dict[str, Any] = {"window_size": (seqlen // 2, None)}
    normed: dict[str, Any] = {"position": "alibi", "out_norm": True}
    return {
        "sigmoid": Arm(),
        "softmax": Arm(fields={"attention": "softmax"}),
        "swat": Arm(fields={**swat, "sigmoid_bias": 0.0}, attention_fn=balanced_attention),
        "gated-softmax": Arm(fields={"attention": "softmax", "gate": True}),
        "gated-sigmoid": Arm(fields={"gate": True}),
        "sigmoid-hybrid": Arm(fields={"norm": "hybrid"}),
        "sigmoid-alibi": Arm(fields={"position": "alibi"}),
        "sigmoid-alibi-matched": Arm(fields={"position": "alibi", "alibi_bias": True}),
        "sigmoid-alibi-matched-hybrid": Arm(fields={"position": "alibi", "alibi_bias": True, "norm": "hybrid"}),
        "softmax-alibi": Arm(fields={"attention": "softmax", "position": "alibi"}),
        "sigmoid-no-bias": Arm(fields={"sigmoid_bias": 0.0}),
        "sigmoid-normed": Arm(fields={**normed, "sigmoid_bias": -math.log(seqlen) - 3.0}),
        "softmax-normed": Arm(fields={**normed, "attention": "softmax"}),
    }


def integers(below: int, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform from 0 to below - 1, int64, on the device of the generator."""
    return torch.randint(below, size, generator=generator, device=generator.device)


def recall(batch: int, length: int, pairs: int, each: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall: pairs of key and value, then the keys again, each followed by its value.

        k1 v1 k2 v2 ... kp vp  .. k2 v2 .... k1 v1 ..        . is noise; keys are distinct, values are not

    The p questions stand in p of the (length - 2 p) / 2 places of two tokens behind the pairs, drawn evenly.

    Args:
        batch, length: of the tokens; length is even and at least 4 pairs.
        pairs: p, at most `each`.
        each: keys, values and tokens of noise, numbered in this order.
        generator: of the draws, on the device of the tokens.

    Returns:
        tokens and targets, (batch, length) int64: a target is the value where the token is a key that is asked for,
        `IGNORED` elsewhere.

    Raises:
        ValueError: the pairs or the questions do not fit.

    Source: arXiv:2312.04927 (its places of questions follow a power law; ours are drawn evenly).
    """
    if length % 2 or not 1 <= pairs <= min(each, length // 4):
        raise ValueError(f"pairs must be 1 to {min(each, length // 4)} at an even length {length}, got {pairs}")

    def places(count: int, wanted: int) -> Tensor:
        """`wanted` of `count`, in random order: (batch, wanted)."""
        return torch.rand(batch, count, generator=generator, device=generator.device).argsort(-1)[:, :wanted]

    keys = places(each, pairs)
    values = each + integers(each, (batch, pairs), generator)
    tokens = 2 * each + integers(each, (batch, length), generator)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    asked = 2 * pairs + 2 * places((length - 2 * pairs) // 2, pairs)
    tokens.scatter_(1, asked, keys).scatter_(1, asked + 1, values)
    return tokens, torch.full_like(tokens, IGNORED).scatter_(1, asked, values)


def needle(batch: int, length: int, pairs: int, each: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A needle: one key and its value somewhere in noise and other values, and the key again as the last token.

        . v . . k v* v . . . . v . . k        the target of the last token is v*

    Args:
        batch, length, each, generator: as `recall`.
        pairs: 1.

    Returns:
        tokens and targets, as `recall`.

    Raises:
        ValueError: pairs is not 1, or the length below 4.
    """
    if pairs != 1 or length < 4:
        raise ValueError(f"a needle has one pair and at least 4 tokens, got {pairs} and {length}")
    tokens = each + integers(2 * each, (batch, length), generator)
    key = integers(each, (batch, 1), generator)
    value = each + integers(each, (batch, 1), generator)
    at = integers(length - 3, (batch, 1), generator)
    tokens.scatter_(1, at, key).scatter_(1, at + 1, value)
    tokens[:, -1:] = key
    targets = torch.full_like(tokens, IGNORED)
    targets[:, -1:] = value
    return tokens, targets


TASKS: dict[str, Callable[[int, int, int, int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "recall": recall,
    "needle": needle,
}


def retrieval_draw(budget: Budget, asked: Difficulty, seed: int, device: torch.device | str = "cpu") -> Draw:
    """Batches of training, a pure function of seed and step: a quarter needles, else recall of 2 pairs and more."""
    device = torch.device(device)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        # how many pairs is a shape: drawn on the CPU, so that nothing waits for the device
        host = generator_at(seed, step)
        needles = budget.batch // 4
        pairs = int(torch.randint(2, asked.trained_pairs + 1, (1,), generator=host))
        generator = host if device.type == "cpu" else generator_at(seed, step, device)
        parts = (
            recall(budget.batch - needles, budget.seqlen, pairs, asked.each, generator),
            needle(needles, budget.seqlen, 1, asked.each, generator),
        )
        tokens, targets = (torch.cat(both) for both in zip(*parts, strict=True))
        return tokens, targets

    return draw


def accuracies(bench: Bench, model: GPT, seqlen: int, asked: Difficulty, batch: int = 128) -> None:
    """Record accuracy of both tasks at every length and number of pairs that fits; the same tokens for every arm."""
    model.eval()
    for length in (multiple * seqlen for multiple in LENGTHS):
        grid = [("needle", 1)] + [("recall", pairs) for pairs in asked.pairs if 4 * pairs <= length]
        for task, pairs in grid:
            generator = torch.Generator().manual_seed(2**31 + length * 97 + pairs)
            tokens, targets = TASKS[task](asked.samples, length, pairs, asked.each, generator)
            right = torch.zeros((), dtype=torch.int64, device=bench.device)
            for some, wanted in zip(tokens.split(batch), targets.to(bench.device).split(batch), strict=True):
                with torch.no_grad():
                    right += (bench.logits(model, some.to(bench.device)).argmax(-1) == wanted).sum()
            count = int((targets != IGNORED).sum())
            bench.writer.write("accuracy", int(right) / count, task=task, length=length, pairs=pairs, questions=count)


def retrieval(
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
    """One model an arm and seed learns recall and needles at one length; accuracy there, and at 2 and 4 times it.

    Command: flashsigmoid study retrieval (--quick). Hardware: 1 GPU (2 CPU cores). Full: three seeds, n = 128, 8,000
    steps of 64, 2 layers of 128, 64 values to guess from, up to 16 pairs in training. Quick: three seeds, n = 32,
    1,200 steps of 32, 2 layers of 128, 16 values, up to 8 pairs. Time: about half an hour of an idle core for the
    quick one; the full one 12 minutes of an H100, twelve trainings at once. Expected: benchmarks/results/studies.

    Args:
        out_dir: folder of the study.
        quick: minutes on a CPU, the arms of the question only.
        only, seeds, device, jobs, show, command: as `run_trials`.

    Returns:
        out_dir/retrieval.jsonl: accuracy with tags task, length, pairs and questions, their number; attn_norm before
        the first step; train/loss. Guessing a value is right 1 time in `each`, of the settings.

    Source: arXiv:2312.04927 (recall), arXiv:2502.18845 (SWAT), arXiv:2505.06708 (the gate).
    """
    budget, asked = (QUICK, QUICK_ASKED) if quick else (FULL, FULL_ASKED)
    size = {"nlayers": 2, "dim": 128, "nheads": 4}
    trials = []
    for seed in (0, 1, 2):
        for name, arm in arms(budget.seqlen).items():
            if quick and name not in ASKED:
                continue
            config = retrieval_config(arm, budget, asked, **size)
            settings = described(config, budget, quick=quick, **asdict(asked))
            run = partial(_run, arm=arm, config=config, budget=budget, asked=asked)
            trials.append(Trial(arm=name, seed=seed, settings=settings, run=run))
    how: dict[str, Any] = {"device": device, "jobs": jobs, "show": show, "command": command}
    return run_trials("retrieval", trials, out_dir, only=only, seeds=seeds, **how)


def retrieval_config(arm: Arm, budget: Budget, asked: Difficulty, **size: int) -> GPTConfig:
    """The model of an arm; b is that of the training length at every length."""
    fields: dict[str, Any] = {"position": "rope", "sigmoid_bias": -math.log(budget.seqlen), **size, **arm.fields}
    return GPTConfig(vocab_size=3 * asked.each, seqlen=max(LENGTHS) * budget.seqlen, **fields)


def _run(bench: Bench, *, arm: Arm, config: GPTConfig, budget: Budget, asked: Difficulty) -> None:
    model = GPT(config, attention_fn=arm.attention_fn).to(bench.device)
    draw = retrieval_draw(budget, asked, bench.trial.seed, bench.device)
    bench.probe(model, draw(0)[0][:8], 0)
    bench.train(model, draw, budget)
    accuracies(bench, model, budget.seqlen, asked)
