"""Speculative sampling: a softmax model drafted by itself with sigmoid attention in its place, nothing trained anew.

What is measured is how often a draft is right. Nothing is made faster here: drafts are computed without a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models.gpt import GPT, GPTConfig
from ..nn.attention import sigmoid_attention
from ..training.callbacks import Show, show_line
from .neighbours import normalised_sigmoid
from .text import BYTES, text_bytes, text_draw, text_windows
from .trials import Bench, Budget, Device, Trial, described, run_trials

if TYPE_CHECKING:
    from jaxtyping import Float, Int

QUICK = Budget(steps=400, batch=16, seqlen=64, lr=3e-3)
FULL = Budget(steps=3000, batch=32, seqlen=256, lr=2e-3)
AHEAD = (1, 2, 4)  # tokens drafted before the target is asked
DRAFTS = ("softmax", "sigmoid", "sigmoid-rows", "normalised-sigmoid", "bigram")

# tokens (batch, seqlen) -> probabilities of the next token after each, (batch, seqlen, vocab_size)
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sampled:
    """A text drawn by `speculate`, and what it took."""

    tokens: Int[Tensor, " length"]
    calls: int  # of the target
    proposed: int  # tokens drafted
    accepted: int  # of these


def residual(p: Float[Tensor, " vocab_size"], q: Float[Tensor, " vocab_size"]) -> Float[Tensor, " vocab_size"]:
    """What is drawn from where a draft was rejected.

        r = max(p - q, 0) / sum max(p - q, 0)

    so that q min(1, p / q) + (1 - sum min(p, q)) r = p: what is kept and what replaces the rest is distributed as p.
    Equal p and q, which reject nothing, give p.

    Source: arXiv:2211.17192, section 2.3.
    """
    left = (p - q).clamp(min=0.0)
    total = left.sum()
    return left / total if total > 0 else p


def speculate(
    target: Predict,
    draft: Predict,
    tokens: Int[Tensor, " seqlen"],
    length: int,
    *,
    ahead: int,
    generator: torch.Generator,
) -> Sampled:
    """Continue a text to `length` tokens, distributed as the target's own, whatever the draft is.

    The draft proposes up to `ahead` tokens; the target sees them at once and keeps each, in order, with probability
    min(1, p / q); in place of the first that is not kept it draws from `residual`, and behind the last from p.

    Args:
        target, draft: probabilities of what follows each token; the draft's positive where it may draw.
        tokens: the prompt, at least one token, on the CPU.
        length: of the whole text.
        ahead: tokens that are drafted before the target is asked.
        generator: of the draws.

    Source: arXiv:2211.17192, algorithm 1.
    """
    calls = proposed = accepted = 0
    while len(tokens) < length:
        start, count, q = len(tokens), min(ahead, length - len(tokens) - 1), []
        for _ in range(count):
            q.append(draft(tokens[None])[0, -1])
            tokens = torch.cat([tokens, _drawn(q[-1], generator)])
        # (count + 1, vocab_size)
        p = target(tokens[None])[0, start - 1 :]
        calls, proposed = calls + 1, proposed + count
        kept = 0
        while kept < count:
            token = tokens[start + kept]
            if float(torch.rand((), generator=generator)) * float(q[kept][token]) >= float(p[kept][token]):
                break
            kept += 1
        accepted += kept
        then = p[kept] if kept == count else residual(p[kept], q[kept])
        tokens = torch.cat([tokens[: start + kept], _drawn(then, generator)])
    return Sampled(tokens, calls, proposed, accepted)


def _drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(probabilities, 1, generator=generator)


def sigmoid_rows(q: Tensor, k: Tensor, v: Tensor, *, sigmoid_bias: Any = None, **options: Any) -> Tensor:
    """Sigmoid attention with b_i = -log(i + 1), of the keys that query i sees under a causal mask."""
    batch, n, nheads, _ = q.shape
    bias = -torch.arange(1, n + 1, device=q.device, dtype=torch.float32).log().expand(batch, nheads, n)
    return sigmoid_attention(q, k, v, sigmoid_bias=bias, **options)


def speculative(
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
    """How well sigmoid attention with the weights of a softmax model drafts for it.

    One GPT with softmax is trained for each seed, and drafted by: itself, the ceiling; itself with sigmoid attention,
    b = -log n of the training length; the same with b = -log of the keys that each row sees; sigmoid divided by the
    sum of its row, which is no approximation that saves the sum; and counts of pairs of bytes, which cost nothing.

    Command: flashsigmoid study speculative (--quick). Hardware: 1 GPU (2 CPU cores). Full: three seeds, n = 256, 3,000
    steps of 32, 6 layers of 256. Quick: one seed, n = 64, 400 steps of 16, 3 layers of 64. Time and expected: not yet
    measured for the full one.

    Args:
        out_dir: folder of the study.
        quick: minutes on a CPU.
        only, seeds, device, jobs, show, command: as `run_trials`; the only arm is "softmax".

    Returns:
        out_dir/speculative.jsonl: overlap, mean over validation tokens of sum_x min(p, q), the probability that a token
        drafted there is kept, and val/loss of the draft, with tag draft; of texts drawn, kept, the share of drafted
        tokens that was, and tokens_per_call, new tokens for each call of the target, with tags draft and ahead.

    Source: arXiv:2211.17192.
    """
    budget = QUICK if quick else FULL
    size: dict[str, Any] = {"nlayers": 3, "dim": 64, "nheads": 2} if quick else {"nlayers": 6, "dim": 256, "nheads": 8}
    config = GPTConfig(vocab_size=BYTES, seqlen=budget.seqlen, attention="softmax", **size)
    run = partial(_run, config=config, budget=budget, texts=16 if quick else 64)
    settings = described(config, budget, quick=quick)
    trials = [Trial(arm="softmax", seed=seed, settings=settings, run=run) for seed in ((0,) if quick else (0, 1, 2))]
    how: dict[str, Any] = {"device": device, "jobs": jobs, "show": show, "command": command}
    return run_trials("speculative", trials, out_dir, only=only, seeds=seeds, **how)


def _run(bench: Bench, *, config: GPTConfig, budget: Budget, texts: int) -> None:
    text, val = text_bytes()
    model, n = GPT(config).to(bench.device), budget.seqlen
    bench.train(model, text_draw(text, budget, bench.trial.seed, bench.device), budget)
    target = _predict(bench, model)
    windows = text_windows(val, n, 2**13 if budget.steps < 1000 else 2**16)
    for name, draft in drafts(bench, model, text).items():
        overlap, nats = [], []
        for some in windows.split(8):
            p, q = target(some[:, :-1]), draft(some[:, :-1])
            overlap.append(torch.minimum(p, q).sum(-1).flatten())
            nats.append(-q.gather(-1, some[:, 1:, None]).log().flatten())
        bench.writer.write("overlap", torch.cat(overlap).mean(), draft=name)
        bench.writer.write("val/loss", torch.cat(nats).mean(), unit="nats_per_byte", draft=name)
        for ahead in AHEAD:
            generator = torch.Generator().manual_seed(bench.trial.seed)
            drawn = [
                speculate(target, draft, window[: n // 4], n, ahead=ahead, generator=generator)
                for window in windows[:: max(1, len(windows) // texts)][:texts]
            ]
            calls, proposed, accepted = (
                sum(getattr(x, key) for x in drawn) for key in ("calls", "proposed", "accepted")
            )
            tags = {"draft": name, "ahead": ahead}
            bench.writer.write("kept", accepted / proposed, **tags)
            bench.writer.write("tokens_per_call", len(drawn) * (n - n // 4) / calls, **tags)


def drafts(bench: Bench, model: GPT, text: Tensor) -> dict[str, Predict]:
    """Every draft of `DRAFTS` for a softmax model, by name; `text` is what the pairs are counted in."""
    config, bias = model.config, -math.log(model.config.seqlen)

    def twin(attention: Any, **injected: Any) -> Predict:
        other = GPT(replace(config, attention=attention), **injected).to(bench.device)
        other.load_state_dict(model.state_dict())
        return _predict(bench, other)

    pairs = torch.bincount(text[:-1].long() * BYTES + text[1:].long(), minlength=BYTES**2).view(BYTES, BYTES) + 0.01
    table = pairs.double() / pairs.double().sum(-1, keepdim=True)
    found = (
        _predict(bench, model),
        twin("sigmoid"),
        twin("sigmoid", attention_fn=sigmoid_rows),
        twin("softmax", attention_fn=normalised_sigmoid(bias)),
        lambda tokens: table[tokens],
    )
    return dict(zip(DRAFTS, found, strict=True))


def _predict(bench: Bench, model: GPT) -> Predict:
    model.eval()

    def predict(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return bench.logits(model, tokens.to(bench.device)).double().softmax(-1).cpu()

    return predict
