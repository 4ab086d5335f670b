"""Bigram baselines: what the previous token alone can tell, to be beaten by any model whose attention works."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bigram:
    """Mean cross-entropy on validation windows of a bigram model, and of the best there can be."""

    nats_per_token: float
    nats_per_byte: float
    floor_nats_per_token: float  # no function of the previous token alone is below it on these windows
    floor_nats_per_byte: float


def bigram_loss(train_tokens: np.ndarray, val_windows: np.ndarray, byte_lengths: np.ndarray) -> Bigram:
    """Cross-entropy of a smoothed bigram model, on the targets that the language model is measured on.

        p(b | a) = (count(a b) + alpha p(b)) / (count(a) + alpha),    p(b) = (count(b) + 1) / (ntokens + vocab_size)

    add-one smoothed unigrams, which the bigrams fall back to with the weight of alpha = 10 observations. Pairs are
    counted sparsely: memory is that of the training text, for any vocabulary.

        floor = H(b | a) = -sum over (a, b) of n(a b) log(n(a b) / n(a)),   n counted in the windows themselves

    A transformer whose attention gives nothing is a function of the previous token and may learn that text's bigrams
    better than they can be counted; below the floor it cannot come. With many tokens and few windows the floor is low,
    and then being above it tells nothing.

    Args:
        train_tokens: (ntokens,) of the training text.
        val_windows: (windows, seqlen + 1) tokens; every token but the first of a window is a target.
        byte_lengths: (vocab_size,) bytes of each token.

    Returns:
        both, in nats per target token and per byte of the targets' text.
    """
    vocab_size, alpha = len(byte_lengths), 10.0
    train = train_tokens.astype(np.int64)
    unigrams = (np.bincount(train, minlength=vocab_size) + 1.0) / (len(train) + vocab_size)
    followed = np.bincount(train[:-1], minlength=vocab_size)
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)

    previous, target = val_windows[:, :-1].ravel(), val_windows[:, 1:].ravel()
    wanted = previous * vocab_size + target
    at = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    seen = np.where(pairs[at] == wanted, counts[at], 0)
    nats = -np.log((seen + alpha * unigrams[target]) / (followed[previous] + alpha)).sum()
    _, pair, times = np.unique(wanted, return_inverse=True, return_counts=True)
    floor = -np.log(times[pair] / np.bincount(previous)[previous]).sum()
    size = max(1, byte_lengths[target].sum())
    return Bigram(*(float(total / count) for total in (nats, floor) for count in (len(target), size)))
