"""Bits per byte of whole texts, in windows that overlap: what a language model is compared by. No training here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

NatsOf = Callable[[Tensor], Tensor]  # windows (batch, seqlen + 1) to nats (batch, seqlen) of their targets


def overlapping(tokens: np.ndarray, seqlen: int, stride: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows over the whole text, and how many of the last targets of each were in none before.

        window k = tokens[k stride : k stride + seqlen + 1],    the last one ends with the text

    Every token but the first is counted once; all but those of the first window are predicted from at least
    seqlen - stride tokens.

    Args:
        tokens: (ntokens,), more than seqlen.
        seqlen: tokens of input per window.
        stride: from a window to the next, from 1 to seqlen.
        batch: windows at once.

    Yields:
        (batch, seqlen + 1) int64 and (batch,) int64; the last of them may be fewer.

    Raises:
        ValueError: too few tokens, or a stride outside its range.
    """
    if not 1 <= stride <= seqlen:
        raise ValueError(f"stride must be from 1 to seqlen={seqlen}, got {stride}")
    last = len(tokens) - seqlen - 1
    if last < 0:
        raise ValueError(f"a text to evaluate must have more than seqlen = {seqlen} tokens, got {len(tokens)}")
    starts = np.append(np.arange(0, last, stride), last)
    fresh = np.diff(starts, prepend=starts[0] - seqlen)
    for first in range(0, len(starts), batch):
        part = slice(first, first + batch)
        windows = np.asarray(tokens[starts[part, None] + np.arange(seqlen + 1)], np.int64)
        yield torch.from_numpy(windows), torch.from_numpy(fresh[part])


def bits_per_byte(
    nats_of: NatsOf,
    tokens: np.ndarray,
    byte_lengths: np.ndarray,
    *,
    seqlen: int,
    stride: int,
    batch: int,
    device: torch.device | str = "cpu",
) -> float:
    """Bits that a model needs for a byte of a text, all of it but its first token.

        sum over targets of -log2 p(target | what is before it in its window) / bytes of the targets

    Args:
        nats_of: -log p of every target of a batch of windows; see `NatsOf`.
        tokens: (ntokens,) of the text.
        byte_lengths: (vocab_size,) bytes of each token.
        seqlen, stride, batch: as `overlapping`; a short stride gives every byte a long past, and costs more.
        device: of the windows given to nats_of.
    """
    lengths = torch.from_numpy(byte_lengths).to(device)
    place, nats, size = torch.arange(seqlen, device=device), 0.0, 0
    for windows, fresh in overlapping(tokens, seqlen, stride, batch):
        windows, fresh = windows.to(device), fresh.to(device)
        counts = place >= seqlen - fresh[:, None]
        nats += float(nats_of(windows).double().masked_fill(~counts, 0.0).sum())
        size += int(lengths[windows[:, 1:]].masked_fill(~counts, 0).sum())
    return nats / math.log(2.0) / size
