"""Log-probabilities of a CTC model to tokens: the best path, a beam of prefixes, an alignment. No language model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class _Prefix:
    """A prefix as its last token behind another prefix: to grow by a token costs the same however long it is."""

    __slots__ = ("before", "grown", "token")

    def __init__(self, before: _Prefix | None = None, token: int | None = None) -> None:
        self.before, self.token = before, token
        self.grown: dict[int, _Prefix] = {}  # those that a beam has held, so that each text is one object

    def tokens(self) -> list[int]:
        found, prefix = [], self
        while prefix.before is not None:
            found.append(prefix.token)
            prefix = prefix.before
        return found[::-1]

    def __lt__(self, other: _Prefix) -> bool:
        return self.tokens() < other.tokens()


_Prefixes = dict[_Prefix, tuple[float, float]]  # to (log b, log n)


def greedy(
    log_probs: Float[Tensor, "batch positions vocab_size"], lengths: Int[Tensor, " batch"], *, blank: int = 0
) -> list[list[int]]:
    """Tokens of the most likely path: the best at each position, repeats joined, blanks left out.

    Args:
        log_probs: (batch, positions, vocab_size), of any scale.
        lengths: (batch,) positions of each utterance.
        blank: token of the blank. Default: 0.

    Source: Graves et al., Connectionist temporal classification, ICML 2006, section 3.2 (best path decoding).
    """
    found = []
    for path, length in zip(log_probs.argmax(-1).cpu(), lengths.tolist(), strict=True):
        joined = torch.unique_consecutive(path[:length])
        found.append(joined[joined != blank].tolist())
    return found


def align(
    log_probs: Float[Tensor, "positions vocab_size"], tokens: Int[Tensor, " length"], *, blank: int = 0
) -> Int[Tensor, " positions"]:
    """The most likely path of a text: which of its tokens each position says, -1 for a blank.

        argmax over paths that say the text of sum_t log y_t(path_t)

    by dynamic programming over the states blank, s_1, blank, s_2, ..., blank; a state follows itself, the one before
    it, and the one before that where it is another token and no blank.

    Args:
        log_probs: (positions, vocab_size).
        tokens: (length,), without blanks.
        blank: token of the blank. Default: 0.

    Returns:
        (positions,) int64 indices into tokens, or -1.

    Raises:
        ValueError: there are too few positions for the text.

    Source: Graves et al., Connectionist temporal classification, ICML 2006, section 4.1, with max in place of sums.
    """
    tokens = tokens.cpu()
    repeats = int((tokens[1:] == tokens[:-1]).sum())
    if len(log_probs) < len(tokens) + repeats:
        raise ValueError(f"positions must be at least {len(tokens) + repeats} for this text, got {len(log_probs)}")
    states = torch.full((2 * len(tokens) + 1,), blank)
    states[1::2] = tokens
    # (positions, states)
    scores = log_probs.double().cpu()[:, states]
    skips = torch.zeros(len(states), dtype=torch.bool)
    skips[3::2] = tokens[1:] != tokens[:-1]
    best = torch.full((len(states),), -math.inf, dtype=torch.float64)
    best[:2] = scores[0, :2]
    came = []
    for row in scores[1:]:
        before = torch.stack([
            best,
            torch.nn.functional.pad(best, (1, 0), value=-math.inf)[:-1],
            torch.nn.functional.pad(best, (2, 0), value=-math.inf)[:-2].masked_fill(~skips, -math.inf),
        ])  # fmt: skip
        values, back = before.max(0)
        came.append(back)
        best = values + row
    state = len(states) - 1 - int(best[-2:].flip(0).argmax()) if len(tokens) else 0
    path = [state]
    for back in reversed(came):
        state -= int(back[state])
        path.append(state)
    found = torch.tensor(path[::-1])
    return torch.where(found % 2 == 1, found // 2, -1)


def prefix_beam(
    log_probs: Float[Tensor, "positions vocab_size"], *, beam: int = 16, blank: int = 0
) -> list[tuple[list[int], float]]:
    """The most likely texts of one utterance, best first, each with the log of the probability of all its paths.

        b_t(s)  = y_t(blank) (b_{t-1}(s) + n_{t-1}(s))
        n_t(s)  = y_t(s_end) (n_{t-1}(s) + b_{t-1}(s') + [s_end != s'_end] n_{t-1}(s'))      s' = s without its end

    where b and n are the probabilities of the paths up to position t for the prefix s that end in a blank, and in its
    last token. After each position the `beam` prefixes of largest b + n stay; with a beam that none falls out of, the
    probabilities are exact, else they are bounds from below.

    Args:
        log_probs: (positions, vocab_size), normalised.
        beam: prefixes that stay. Default: 16.
        blank: token of the blank. Default: 0.

    Returns:
        at most `beam` pairs of tokens and log-probability.

    Raises:
        ValueError: beam is not positive, or log_probs are not of two dimensions.

    Source: arXiv:1408.2873, algorithm 1, without its language model.
    """
    if beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    if log_probs.dim() != 2:
        raise ValueError(f"log_probs must be (positions, vocab_size), got {tuple(log_probs.shape)}")
    prefixes: _Prefixes = {_Prefix(): (0.0, -math.inf)}
    for scores in log_probs.double().tolist():
        grown: _Prefixes = {}
        for prefix, (b, n) in prefixes.items():
            both = _log_add(b, n)
            _add(grown, prefix, both + scores[blank], -math.inf if prefix.token is None else n + scores[prefix.token])
            for token, score in enumerate(scores):
                if token != blank:
                    longer = prefix.grown.get(token) or _Prefix(prefix, token)
                    _add(grown, longer, -math.inf, score + (b if token == prefix.token else both))
        ranked = {prefix: -_log_add(*ends) for prefix, ends in grown.items()}
        # a token twice in as many positions leaves no path: nobody gets it for an answer, however wide the beam
        ranked = {prefix: score for prefix, score in ranked.items() if score < math.inf} or ranked
        least = sorted(ranked.values())[:beam][-1]
        # of equal ones the smaller tokens, so that the result is a function of the numbers only
        kept = sorted((score, prefix) for prefix, score in ranked.items() if score <= least)[:beam]
        prefixes = {prefix: grown[prefix] for _, prefix in kept}
        for prefix in prefixes:
            if prefix.before is not None and prefix.token is not None:
                prefix.before.grown[prefix.token] = prefix
    return [(prefix.tokens(), _log_add(*ends)) for prefix, ends in prefixes.items()]


def _add(prefixes: _Prefixes, prefix: _Prefix, in_blank: float, in_token: float) -> None:
    b, n = prefixes.get(prefix, (-math.inf, -math.inf))
    prefixes[prefix] = _log_add(b, in_blank), _log_add(n, in_token)


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    low, high = (a, b) if a < b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
