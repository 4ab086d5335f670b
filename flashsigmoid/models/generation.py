"""Sampling text from a language model, token by token. There is no cache yet: each token reads its whole context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .gpt import GPT

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def generate(
    model: GPT,
    tokens: Int[Tensor, "batch seqlen"],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Int[Tensor, "batch seqlen+max_new_tokens"]:
    """The prompt and its continuation; arguments and errors as `stream`."""
    new = stream(model, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return torch.cat([tokens, *(token[:, None] for token in new)], dim=1)


def stream(
    model: GPT,
    tokens: Int[Tensor, "batch seqlen"],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """Draw the next token from softmax(logits / temperature), append it, again: yields (batch,) tokens as they come.

    The model sees the last config.seqlen tokens. Its sigmoid bias stays the constant of its training, however short the
    prompt. It is put into eval mode for each step and back; the global random state is neither read nor advanced.

    Args:
        model: a GPT, on any device.
        tokens: the prompt, (batch, seqlen) int64, at least one token.
        max_new_tokens: how many to draw.
        temperature: divides the logits; 0 takes the most likely token. Default: 1.
        top_k: draw among the k most likely tokens only. Default: all.
        top_p: draw among the fewest tokens that have this much probability together. Default: all.
        seed: of the draws; None takes a fresh one. Default: None.

    Raises:
        ValueError: an empty prompt, or an argument outside its range; at the call, before the first token.
    """
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must be (batch, seqlen) with at least one token, got {tuple(tokens.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if not temperature >= 0.0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    generator = torch.Generator(tokens.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return _draw(model, tokens, max_new_tokens, temperature, top_k, top_p, generator)


def _draw(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    for _ in range(max_new_tokens):
        training = model.training
        model.eval()
        with torch.no_grad():
            # (batch, vocab_size)
            logits = model(tokens[:, -model.config.seqlen :])[:, -1].float()
        model.train(training)
        if temperature == 0.0:
            token = logits.argmax(-1)
        else:
            probabilities = kept(logits / temperature, top_k, top_p).softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        yield token
        tokens = torch.cat([tokens, token[:, None]], dim=1)


def kept(
    logits: Float[Tensor, "batch vocab_size"], top_k: int | None, top_p: float | None
) -> Float[Tensor, "batch vocab_size"]:
    """`logits` with everything outside the top k, then outside the top p, at -inf. The most likely token stays."""
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # a token goes when those before it already have top_p
        excess = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(excess.scatter(-1, order, excess), -torch.inf)
    return logits
