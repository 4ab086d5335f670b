"""The bigram baseline: what is known from the previous token alone, to be beaten by any model whose attention works."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bigram:
    """Mean cross-entropy of a bigram model on validation windows."""

    nats_per_token: float
    nats_per_byte: float


def bigram_loss(train_tokens: np.ndarray, val_windows: np.ndarray, byte_lengths: np.ndarray) -> Bigram:
    """Cross-entropy of a smoothed bigram model, on the targets that the language model is measured on.

        p(b | a) = (count(a b) + alpha p(b)) / (count(a) + alpha),    p(b) = (count(b) + 1) / (ntokens + vocab_size)

    add-one smoothed unigrams, which the bigrams fall back to with the weight of alpha = 10 observations. Pairs are
    counted sparsely: memory is that of the training text, for any vocabulary.

    Args:
        train_tokens: (ntokens,) of the training text.
        val_windows: (windows, seqlen + 1) tokens; every token but the first of a window is a target.
        byte_lengths: (vocab_size,) bytes of each token.

    Returns:
        nats per target token, and per byte of the targets' text.
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
    return Bigram(float(nats / len(target)), float(nats / max(1, byte_lengths[target].sum())))
