"""CTC decoding against all paths, written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from rounding import assert_rounded

from flashsigmoid.models.ctc_decode import align, greedy, prefix_beam


def joined(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(token for token, _ in itertools.groupby(path) if token)


def every_text(log_probs: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Probability of every text: the sum over all paths that give it."""
    found: dict[tuple[int, ...], float] = {}
    positions, vocab_size = log_probs.shape
    for path in itertools.product(range(vocab_size), repeat=positions):
        probability = math.exp(sum(float(log_probs[t, token]) for t, token in enumerate(path)))
        found[joined(path)] = found.get(joined(path), 0.0) + probability
    return found


@pytest.mark.parametrize(("positions", "vocab_size"), [(1, 2), (2, 3), (5, 3), (4, 4), (6, 2)])
def test_a_wide_beam_finds_every_text_with_its_probability(positions, vocab_size) -> None:
    log_probs = torch.randn(positions, vocab_size, dtype=torch.float64).mul(2.0).log_softmax(-1)
    expected = every_text(log_probs)
    found = prefix_beam(log_probs, beam=10_000)
    texts = [tuple(tokens) for tokens, _ in found]  # and none that no path gives
    assert len(set(texts)) == len(texts)
    assert set(texts) == set(expected)
    for tokens, score in found:
        assert_rounded(math.exp(score), expected[tuple(tokens)], of=1.0)  # of all texts
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_agrees_with_torchs_ctc_loss() -> None:
    log_probs = torch.randn(7, 5, dtype=torch.float64).log_softmax(-1)
    for tokens, score in prefix_beam(log_probs, beam=5**7)[:20]:
        loss = torch.nn.functional.ctc_loss(
            log_probs[:, None], torch.tensor([tokens], dtype=torch.int64).reshape(1, -1), torch.tensor([7]),
            torch.tensor([len(tokens)]), reduction="sum",
        )  # fmt: skip
        assert_rounded(-float(loss), score)


def test_the_sum_over_paths_beats_the_best_path() -> None:
    """blank 0.6, a 0.4 twice: the best path is empty with 0.36, "a" has 0.64."""
    log_probs = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
    assert greedy(log_probs[None], torch.tensor([2])) == [[]]
    (best, score), *_ = prefix_beam(log_probs, beam=4)
    assert best == [1]
    assert math.exp(score) == pytest.approx(0.64)


def test_greedy_joins_repeats_drops_blanks_and_stops_at_the_length() -> None:
    paths = torch.tensor([[1, 1, 0, 1, 2, 2], [0, 3, 3, 0, 0, 1], [2, 2, 2, 2, 2, 2]])
    one_hot = torch.nn.functional.one_hot(paths, 4).float()
    assert greedy(one_hot, torch.tensor([6, 4, 0])) == [[1, 1, 2], [3], []]
    assert greedy(one_hot, torch.tensor([6, 6, 1]), blank=2) == [[1, 0, 1], [0, 3, 0, 1], []]


def test_a_narrow_beam_keeps_that_many_and_never_overstates() -> None:
    log_probs = torch.randn(6, 4, dtype=torch.float64).log_softmax(-1)
    expected = every_text(log_probs)
    found = prefix_beam(log_probs, beam=3)
    assert len(found) == 3
    for tokens, score in found:
        assert math.exp(score) <= expected[tuple(tokens)] * (1 + 1e-9)


def beam_of_tuples(log_probs: torch.Tensor, beam: int, blank: int) -> list[tuple[list[int], float]]:
    """The same search over whole prefixes, at a cost that grows with their length."""
    minus, add = -math.inf, np.logaddexp
    prefixes: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, minus)}
    for scores in log_probs.double().tolist():
        grown: dict[tuple[int, ...], tuple[float, float]] = {}
        for prefix, (b, n) in prefixes.items():
            for token, score in enumerate(scores):
                repeats = prefix[-1:] == (token,)
                parts = [(prefix, (add(b, n) + score, minus))] if token == blank else []
                parts += [(prefix, (minus, n + score))] if repeats else []
                parts += [((*prefix, token), (minus, score + (b if repeats else add(b, n))))] if token != blank else []
                for text, (in_blank, in_token) in parts:
                    ends = grown.get(text, (minus, minus))
                    grown[text] = float(add(ends[0], in_blank)), float(add(ends[1], in_token))
        possible = [pair for pair in grown.items() if add(*pair[1]) > minus] or grown.items()
        prefixes = dict(sorted(possible, key=lambda pair: (-add(*pair[1]), pair[0]))[:beam])
    return [(list(prefix), float(add(*ends))) for prefix, ends in prefixes.items()]


@pytest.mark.parametrize("seed", range(20))
def test_prefixes_that_fall_out_and_come_back_and_equal_ones_are_those_of_whole_tuples(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    positions, vocab_size, beam, blank = (
        int(torch.randint(1, most, (), generator=generator)) for most in (30, 6, 9, 6)
    )
    scores = 3 * torch.randn(positions, vocab_size + 1, generator=generator)
    log_probs = (scores.round() if seed % 2 else scores).log_softmax(-1)
    log_probs[:, -1] -= math.inf if seed % 3 else 0.0
    found = prefix_beam(log_probs, beam=beam, blank=blank % (vocab_size + 1))
    expected = beam_of_tuples(log_probs, beam, blank % (vocab_size + 1))
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-12)


def test_no_position_is_the_empty_text() -> None:
    assert prefix_beam(torch.zeros(0, 3)) == [([], 0.0)]


def test_errors() -> None:
    with pytest.raises(ValueError, match="beam must be at least 1, got 0"):
        prefix_beam(torch.zeros(2, 3), beam=0)
    with pytest.raises(ValueError, match=r"log_probs must be \(positions, vocab_size\), got \(1, 2, 3\)"):
        prefix_beam(torch.zeros(1, 2, 3))


@pytest.mark.parametrize("text", [(), (1,), (1, 2), (2, 2), (1, 2, 1), (2, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize("positions", [1, 3, 5, 6])
def test_an_alignment_is_the_most_likely_path(text, positions) -> None:
    """Against all paths."""
    log_probs = torch.randn(positions, 3, dtype=torch.float64).log_softmax(-1)
    needed = len(text) + sum(a == b for a, b in itertools.pairwise(text))
    tokens = torch.tensor(text, dtype=torch.int64)
    if positions < needed:
        with pytest.raises(ValueError, match=f"positions must be at least {needed} for this text, got {positions}"):
            align(log_probs, tokens)
        return

    def says(path: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(token for token, _ in itertools.groupby(path) if token)

    def score(path: tuple[int, ...]) -> float:
        return sum(float(log_probs[t, token]) for t, token in enumerate(path))

    best = max((p for p in itertools.product(range(3), repeat=positions) if says(p) == text), key=score)
    found = align(log_probs, tokens).tolist()
    assert tuple(text[i] if i >= 0 else 0 for i in found) == best
    assert sorted({i for i in found if i >= 0}) == list(range(len(text)))
    assert [i for i in found if i >= 0] == sorted(i for i in found if i >= 0)
