"""What needs no model: bigrams of a text, the best answer without listening. To be beaten by any that works."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_PIECE = 2**22  # tokens that are counted at once


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
    pairs, counts = _pairs(train_tokens, vocab_size)
    followed = np.bincount(pairs // vocab_size, counts, minlength=vocab_size)
    times = followed.copy()
    times[train_tokens[-1]] += 1  # the last token is followed by none
    unigrams = (times + 1.0) / (len(train_tokens) + vocab_size)

    previous, target = val_windows[:, :-1].ravel(), val_windows[:, 1:].ravel()
    wanted = previous * vocab_size + target
    at = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    seen = np.where(pairs[at] == wanted, counts[at], 0)
    nats = -np.log((seen + alpha * unigrams[target]) / (followed[previous] + alpha)).sum()
    _, pair, times = np.unique(wanted, return_inverse=True, return_counts=True)
    floor = -np.log(times[pair] / np.bincount(previous)[previous]).sum()
    size = max(1, byte_lengths[target].sum())
    return Bigram(*(float(total / count) for total in (nats, floor) for count in (len(target), size)))


def _pairs(tokens: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of neighbours a * vocab_size + b that there are, ascending, and how often each is there.

    Of bytes by a table and in pieces: what is sorted otherwise would be eight times the text, and more.
    """
    if vocab_size > 1024:
        wide = tokens.astype(np.int64)
        return np.unique(wide[:-1] * vocab_size + wide[1:], return_counts=True)
    table = np.zeros(vocab_size**2, np.int64)
    for start in range(0, len(tokens) - 1, _PIECE):
        wide = np.asarray(tokens[start : start + _PIECE + 1], np.int64)
        table += np.bincount(wide[:-1] * vocab_size + wide[1:], minlength=len(table))
    pairs = table.nonzero()[0]
    return pairs, table[pairs]


def best_constant(said: Sequence[str], candidates: Iterable[str], characters: str) -> str:
    """The answer, always the same, with the fewest character errors against these texts that a search finds.

        argmin over s of sum_i distance(s, said_i)

    It begins with the best of the candidates, of the texts themselves and of no answer at all, and changes, adds or
    removes one character while that helps. With many texts it looks at 200 of them, and at 1,000 candidates.

    Args:
        said: what is to be answered.
        candidates: answers to begin with, for instance the texts of the training.
        characters: of which answers consist.
    """
    judges = list(said)[:: max(1, len(said) // 200)]
    starts = list(dict.fromkeys(("", *judges, *list(dict.fromkeys(candidates))[:1000])))
    by_length: dict[int, list[str]] = {}
    for start in starts:
        by_length.setdefault(len(start), []).append(start)

    def best(answers: Iterable[list[str]]) -> tuple[int, str]:
        """(errors, answer); each list has answers of one length."""
        return min((errors, one) for same in answers for errors, one in zip(_errors(same, judges), same, strict=True))

    found = best(by_length.values())
    while True:
        s = found[1]
        changes = [[s[:i] + c + s[i + 1 :] for i in range(len(s)) for c in characters]]
        changes += [[s[:i] + c + s[i:] for i in range(len(s) + 1) for c in characters]]
        changes += [[s[:i] + s[i + 1 :] for i in range(len(s))]]
        better = best(same for same in changes if same)
        if better[0] >= found[0]:
            return s
        found = better


def _errors(answers: Sequence[str], said: Sequence[str]) -> list[int]:
    """Sum over `said` of the edit distance of each answer; the answers have one length."""
    longest = max(map(len, said))
    numbers = {c: i for i, c in enumerate(dict.fromkeys("".join(["\0", *said, *answers])))}
    # 16 bits: a distance is at most the longer length, and what a core works on stays in its cache
    texts = np.array([[numbers[c] for c in text.ljust(longest, "\0")] for text in said], np.int16)
    ends, place = np.array([len(text) for text in said]), np.arange(longest + 1, dtype=np.int16)
    total: list[int] = []
    size = max(1, 200_000 // (len(said) * (longest + 1)))
    for first in range(0, len(answers), size):
        codes = np.array([[numbers[c] for c in answer] for answer in answers[first : first + size]], np.int16)
        row = np.broadcast_to(place, (len(codes), len(said), longest + 1))
        for column in codes.reshape(len(codes), -1).T:
            kept = row[..., :-1] + (texts[None] != column[:, None, None])
            row = np.concatenate([row[..., :1] + np.int16(1), np.minimum(row[..., 1:] + np.int16(1), kept)], -1)
            # an insertion after each: the least of row[j] + (i - j) over j <= i
            row = np.minimum.accumulate(row - place, -1) + place
        total += (
            np.take_along_axis(row, np.broadcast_to(ends[None, :, None], (*row.shape[:2], 1)), -1).sum((1, 2)).tolist()
        )
    return total
