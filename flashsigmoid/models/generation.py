"""Sampling text from a language model, token by token, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
    lengths: Int[Tensor, " batch"] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    use_cache: bool | None = None,
    stop_token: int | None = None,
) -> Int[Tensor, "batch seqlen+new"]:
    """The prompts, each followed by its continuation and then by its padding; arguments and errors as `stream`.

    Continuations are max_new_tokens long, or as long as the longest text until its stop_token; behind the stop_token of
    a shorter one it is repeated.
    """
    drawn = stream(
        model, tokens, max_new_tokens, lengths=lengths, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        use_cache=use_cache, stop_token=stop_token,
    )  # fmt: skip
    both = torch.cat([tokens, *(token[:, None] for token in drawn)], dim=1)
    if lengths is None:
        return both
    new = both.shape[1] - tokens.shape[1]
    place, end = torch.arange(both.shape[1], device=tokens.device), lengths.to(tokens.device)[:, None]
    behind = torch.where(place < end + new, place - end + tokens.shape[1], place - new)
    return both.gather(1, torch.where(place < end, place, behind))


def stream(
    model: GPT,
    tokens: Int[Tensor, "batch seqlen"],
    max_new_tokens: int,
    *,
    lengths: Int[Tensor, " batch"] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    use_cache: bool | None = None,
    stop_token: int | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """Draw the next token from softmax(logits / temperature), append it, again: yields (batch,) tokens as they come.

    The model sees the last config.seqlen tokens. Its sigmoid bias stays the constant of its training, however short the
    prompt. It is put into eval mode for each step and back; the global random state is neither read nor advanced.

    The first step computes the prompts, each later one its new tokens only, from a cache of the keys and values before.
    From the step on at which the longest sequence is beyond the context, every window is computed anew: its first token
    moves, so that what a cache holds is of no use.

    Args:
        model: a GPT, on any device.
        tokens: the prompts, (batch, seqlen) int64, at least one token each, padded at their ends if `lengths` differ.
        max_new_tokens: how many to draw.
        lengths: (batch,) integers, the tokens of each prompt; what is behind them is not looked at. Default: seqlen.
        temperature: divides the logits; 0 takes the most likely token. Default: 1.
        top_k: draw among the k most likely tokens only. Default: all.
        top_p: draw among the fewest tokens that have this much probability together. Default: all.
        seed: of the draws; None takes a fresh one. Default: None.
        use_cache: False computes every window anew. Default: True, unless the model has another attention_fn injected.
        stop_token: ends a text, which goes on with it alone; where every text has drawn it nothing more is yielded.
            Looking for it waits for the device at every token. Default: none.

    Raises:
        ValueError: an empty prompt, an argument outside its range, or use_cache=True where the model takes none; at the
            call, before the first token.
    """
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must be (batch, seqlen) with at least one token, got {tuple(tokens.shape)}")
    batch, seqlen = tokens.shape
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be a non-negative integer, got {max_new_tokens}")
    if lengths is None:
        lengths = torch.full((batch,), seqlen)
    if not isinstance(lengths, Tensor):
        raise ValueError(f"lengths must be a tensor of integers (batch,) = ({batch},), got {lengths}")
    if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be integers (batch,) = ({batch},), got {lengths.dtype} {tuple(lengths.shape)}")
    if any(not 0 < length <= seqlen for length in lengths.tolist()):
        raise ValueError(f"lengths must be from 1 to seqlen={seqlen}, got {lengths.tolist()}")
    if not temperature >= 0.0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be a positive integer, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    vocab_size = model.config.vocab_size
    if stop_token is not None and (not isinstance(stop_token, int) or not 0 <= stop_token < vocab_size):
        raise ValueError(f"stop_token must be an integer from 0 to vocab_size - 1 = {vocab_size - 1}, got {stop_token}")
    if use_cache and not model.takes_cache:
        raise ValueError("use_cache must be False for a model with another attention_fn injected, got True")
    generator = torch.Generator(tokens.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    draw = _Draw(temperature, top_k, top_p, generator)
    use_cache = model.takes_cache if use_cache is None else use_cache
    return _continue(model, tokens, max_new_tokens, lengths, draw, use_cache, stop_token)


@dataclass(frozen=True)
class _Draw:
    """How a token is drawn from logits (batch, vocab_size)."""

    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0.0:
            return logits.argmax(-1)
        # the largest is 0, so that no temperature makes an infinity of it
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        probabilities = kept(logits, self.top_k, self.top_p).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]


def _continue(
    model: GPT, tokens: Tensor, max_new_tokens: int, lengths: Tensor, draw: _Draw, use_cache: bool,
    stop_token: int | None,
) -> Iterator[Tensor]:  # fmt: skip
    context, (batch, seqlen) = model.config.seqlen, tokens.shape
    longest = int(lengths.max()) if batch else seqlen
    lengths = lengths.to(tokens.device, torch.long)
    place = torch.arange(seqlen + max_new_tokens, device=tokens.device)
    # padding may be anything, but a token is looked up in the embedding
    text = torch.nn.functional.pad(tokens, (0, max_new_tokens)).masked_fill(place >= lengths[:, None], 0)
    cache, is_done = None, torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        training = model.training
        model.eval()
        with torch.no_grad():
            if use_cache and longest <= context:
                if cache is None:
                    cache = model.new_cache(batch, min(context, longest + max_new_tokens - 1))
                    logits, last = model(text[:, :longest], cache), lengths - 1
                else:
                    logits, last = model(text.gather(1, lengths[:, None] - 1), cache), torch.zeros_like(lengths)
                cache.seqlens = lengths
            else:
                start = (lengths - context).clamp(min=0)
                window = start[:, None] + place[: min(context, longest)]
                logits, last = model(text.gather(1, window)), lengths - 1 - start
        model.train(training)
        # (batch, vocab_size)
        logits = logits.take_along_dim(last[:, None, None], dim=1)[:, 0].float()
        token = draw(logits)
        if stop_token is not None:
            token = token.masked_fill(is_done, stop_token)
            is_done = token == stop_token
        yield token
        if stop_token is not None and is_done.all():
            return
        text = text.scatter(1, lengths[:, None], token[:, None])
        lengths, longest = lengths + 1, longest + 1


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
