"""Attentions from the literature, eagerly, as `attention_fn`s of our modules; and one table of them, same budget each.

Each is O(seqlen_q * seqlen_k) memory and has no kernel, as those of elementwise.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import op, reference
from ..backends.problem import Problem
from ..functional import explain
from ..models.gpt import GPT, GPTConfig
from ..nn.attention import AttentionFn
from ..training.callbacks import Show, show_line
from .retrieval import Arm, Difficulty, accuracies, retrieval_config, retrieval_draw
from .text import BYTES, text_bytes, text_draw, text_windows
from .trials import Bench, Budget, Device, Trial, described, run_trials

# the polynomial of an entropy in nats that gives the inverse temperature, highest power first: arXiv:2410.01104
_INVERSE_TEMPERATURE = (-0.037, 0.481, -2.3, 4.917, -1.791)

Weigh = Callable[[Problem, Tensor, Tensor], Tensor]  # scores (batch, nheads, seqlen_q, seqlen_k), what is visible -> A


def row_attention(weigh: Weigh) -> AttentionFn:
    """Attention whose weights are a function of a row of scores, as an `attention_fn` of our modules.

        O = A V,   A = weigh(scale * Q K^T - alibi_slope * |p_i - j|),   0 where not visible

    b is not added: it would cancel where a row is normalised. Scores, weights and their product with V are float32,
    float64 for float64 inputs.

    Args:
        weigh: of the problem, the scores and a bool of the same shape, True where a key is visible; it returns A, and
            may return anything where that is False.

    Returns:
        A function of q, k, v and the keywords sigmoid_bias (ignored), scale, causal, window_size, alibi_slopes and
        dropout_p, each as in `sigmoid_attention`. It raises ValueError as `sigmoid_attention` does.
    """

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        sigmoid_bias: float | Tensor | None = None,
        scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        alibi_slopes: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        problem = explain(  # the op's rules for its arguments
            q, k, v, sigmoid_bias=0.0, scale=scale, causal=causal, window_size=window_size, alibi_slopes=alibi_slopes,
            dropout_p=dropout_p, backend="reference",
        ).problem  # fmt: skip
        q, k, v = (x.to(problem.dtype) for x in (q, k, v))  # autocast's, where it is on
        seed = torch.randint(0, 2**63 - 1, (1,), device=q.device) if dropout_p > 0 else None
        with op.full_precision(problem.device):
            scores = reference.scores(problem, q, k, None, alibi_slopes)
            keep = reference.visible(problem, q.device)
            keep = torch.ones_like(scores, dtype=torch.bool) if keep is None else keep.expand_as(scores)
            weights = torch.where(keep, weigh(problem, scores, keep), 0.0)
            return reference.product(problem, reference.dropped(problem, weights, seed), v)

    return attend


def _softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """Over the visible keys; a row that sees nothing is zero, also in backward."""
    return scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1) * keep


def _share(weights: Tensor) -> Tensor:
    """Divided by the sum of its row."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def softplus_reweighted(power: int = 15) -> AttentionFn:
    """Softplus instead of the exponential, scaled by the length, normalised, then sharpened.

        a_ij = softplus(log(head_dim) log(n_i) s_ij) / sum_j softplus(...)      s the scaled scores, n_i visible keys
        A_ij = r_ij / sum_j r_ij,   r_ij = max(0, n_i a_ij - o_i)^power         o_i = 1, but 0 where n_i <= 3

    Only weights above the mean of their row remain.

    Args:
        power: p. Default: 15.

    Source: arXiv:2501.13428 (LSSAR; the factor of the scores as we recall it, log n_i there the length of the input).
    """

    def weigh(problem: Problem, scores: Tensor, keep: Tensor) -> Tensor:
        n = keep.sum(-1, keepdim=True).to(scores.dtype)
        first = _share(F.softplus(math.log(problem.head_dim) * n.clamp(min=1).log() * scores) * keep)
        above = (n * first - (n > 3).to(n.dtype)).clamp(min=0)
        # its largest is 1 before the power, which would leave float32 otherwise; the sums are the same after division
        return _share((above / above.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)) ** power)

    return row_attention(weigh)


def self_adjust_softmax() -> AttentionFn:
    """Softmax times the scores themselves, moved into [0, 1], so that gradients do not vanish where it saturates.

        A_ij = (s_ij - min(m_i, 0)) / (max(M_i, 0) - min(m_i, 0)) softmax(s_i)_j       m_i, M_i least and largest of s_i

    Source: arXiv:2502.18277 (the normalised variant).
    """

    def weigh(problem: Problem, scores: Tensor, keep: Tensor) -> Tensor:
        low = scores.masked_fill(~keep, torch.inf).amin(-1, keepdim=True).clamp(max=0)
        high = scores.masked_fill(~keep, -torch.inf).amax(-1, keepdim=True).clamp(min=0)
        return (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny) * _softmax(scores, keep)

    return row_attention(weigh)


def adaptive_temperature() -> AttentionFn:
    """Softmax that is the sharper the more evenly it would spread, for a model trained by softmax.

        A = softmax(beta_i s_i),   beta_i = max(1, poly(H_i)) where H_i > 1/2, else 1

    with H_i the entropy of softmax(s_i) in nats and poly of degree 4. No gradient goes through beta.

    Source: arXiv:2410.01104 (the coefficients of its language models).
    """

    def weigh(problem: Problem, scores: Tensor, keep: Tensor) -> Tensor:
        entropy = torch.special.entr(_softmax(scores.detach(), keep)).sum(-1, keepdim=True)
        beta = torch.zeros_like(entropy)
        for coefficient in _INVERSE_TEMPERATURE:
            beta = beta * entropy + coefficient
        return _softmax(scores * torch.where(entropy > 0.5, beta.clamp(min=1), 1.0), keep)

    return row_attention(weigh)


def normalised_sigmoid(bias: float) -> AttentionFn:
    """Sigmoid divided by the sum of its row: what the normalisation alone does.

        A_ij = sigmoid(s_ij + b) / sum_j sigmoid(s_ij + b)

    Args:
        bias: b.

    Source: arXiv:2410.10781 (its normalised sigmoid).
    """
    return row_attention(lambda problem, scores, keep: _share(torch.sigmoid(scores + bias) * keep))


def arms(bias: float) -> dict[str, tuple[Arm, AttentionFn | None]]:
    """All arms by name, each with the attention that takes its place after training, or None; with RoPE and QK-norm."""
    softmax: dict[str, Any] = {"attention": "softmax"}
    return {
        "sigmoid": (Arm(), None),
        "softmax": (Arm(fields=softmax), None),
        "softplus-reweighted": (Arm(fields=softmax, attention_fn=softplus_reweighted()), None),
        "self-adjust-softmax": (Arm(fields=softmax, attention_fn=self_adjust_softmax()), None),
        "adaptive-temperature": (Arm(fields=softmax), adaptive_temperature()),
        "gated-softmax": (Arm(fields={**softmax, "gate": True}), None),
        "gated-sigmoid": (Arm(fields={"gate": True}), None),
        "normalised-sigmoid": (Arm(fields=softmax, attention_fn=normalised_sigmoid(bias)), None),
    }


QUICK_TEXT = Budget(steps=200, batch=16, seqlen=64, lr=3e-3)
FULL_TEXT = Budget(steps=1000, batch=16, seqlen=256, lr=2e-3)
QUICK_RECALL = Budget(steps=1000, batch=32, seqlen=32, lr=5e-3, weight_decay=0.0)
FULL_RECALL = Budget(steps=3000, batch=64, seqlen=64, lr=2e-3, weight_decay=0.0)
QUICK_ASKED = Difficulty(each=16, trained_pairs=4, pairs=(4,), samples=128)
FULL_ASKED = Difficulty(each=64, trained_pairs=8, pairs=(8,), samples=1024)


def neighbours(
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
    """Every arm learns the text and recall with the same budget: losses at 1 and 4 times the length, accuracies, time.

    Command: flashsigmoid study neighbours (--quick). Hardware: 1 GPU (2 CPU cores). Full: three seeds; bytes of the
    embedded Shakespeare, n = 256, 1,000 steps of 16, 4 layers of 256; recall n = 64, 3,000 steps of 64, 2 layers of
    128. Quick: one seed, n = 64 and 32, 200 and 1,000 steps, 2 layers of 64. Time: about 4 minutes for
    the quick one. Expected there: benchmarks/results/studies; full: not yet measured.

    Args:
        out_dir: folder of the study.
        quick: minutes on a CPU.
        only, seeds, device, jobs, show, command: as `run_trials`.

    Returns:
        out_dir/neighbours.jsonl: val/loss with the tag length; accuracy as `retrieval`; attn_norm before the first
        step and step_ms, both with the tag stage, text or recall.

    Source: arXiv:2501.13428, arXiv:2502.18277, arXiv:2410.01104, arXiv:2505.06708, arXiv:2410.10781.
    """
    text, asking, asked = (QUICK_TEXT, QUICK_RECALL, QUICK_ASKED) if quick else (FULL_TEXT, FULL_RECALL, FULL_ASKED)
    size: dict[str, Any] = {"nlayers": 2, "dim": 64, "nheads": 2} if quick else {"nlayers": 4, "dim": 256, "nheads": 8}
    recall_size = {"nlayers": 2, "dim": 64, "nheads": 2} if quick else {"nlayers": 2, "dim": 128, "nheads": 4}
    trials = []
    for seed in (0,) if quick else (0, 1, 2):
        for name in arms(0.0):
            arm, _ = arms(-math.log(text.seqlen))[name]
            b: dict[str, Any] = {"position": "rope", "sigmoid_bias": -math.log(text.seqlen), **size, **arm.fields}
            config = GPTConfig(vocab_size=BYTES, seqlen=4 * text.seqlen, **b)
            about = {f"recall.{key}": value for key, value in described(config, asking).items() if key in vars(asking)}
            settings = described(config, text, quick=quick, each=asked.each, pairs=list(asked.pairs), **about)
            run = partial(
                _run, name=name, config=config, text=text, asking=asking, asked=asked, recall_size=recall_size
            )
            trials.append(Trial(arm=name, seed=seed, settings=settings, run=run))
    how: dict[str, Any] = {"device": device, "jobs": jobs, "show": show, "command": command}
    return run_trials("neighbours", trials, out_dir, only=only, seeds=seeds, **how)


def _run(
    bench: Bench,
    *,
    name: str,
    config: GPTConfig,
    text: Budget,
    asking: Budget,
    asked: Difficulty,
    recall_size: dict[str, int],
) -> None:
    train, val = text_bytes()
    seed = bench.trial.seed
    arm, afterwards = arms(-math.log(text.seqlen))[name]
    model = GPT(config, attention_fn=arm.attention_fn).to(bench.device)
    _train(bench, "text", model, text_draw(train, text, seed, bench.device), text)
    _exchange(model, afterwards)
    for length in (1, 4):
        windows = text_windows(val, length * text.seqlen, 2**13 if text.steps < 1000 else 2**16)
        bench.writer.write("val/loss", bench.text_loss(model, windows), unit="nats_per_byte", length=length)

    arm, afterwards = arms(-math.log(asking.seqlen))[name]
    model = GPT(retrieval_config(arm, asking, asked, **recall_size), attention_fn=arm.attention_fn).to(bench.device)
    _train(bench, "recall", model, retrieval_draw(asking, asked, seed, bench.device), asking)
    _exchange(model, afterwards)
    accuracies(bench, model, asking.seqlen, asked)


def _train(bench: Bench, stage: str, model: GPT, draw: Callable[[int], tuple[Tensor, Tensor]], budget: Budget) -> None:
    bench.stage = stage
    bench.probe(model, draw(0)[0][:8], 0)
    before_s = bench.spent_s
    bench.train(model, draw, budget)
    bench.writer.write("step_ms", 1e3 * (bench.spent_s - before_s) / budget.steps, unit="ms", stage=stage)


def _exchange(model: GPT, attention_fn: AttentionFn | None) -> None:
    if attention_fn is not None:
        for block in model.blocks:
            attention: Any = block.attention
            attention.attention_fn = attention_fn
