"""The bigram baseline against its definition in a loop, and against what is known about it."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from rounding import assert_rounded

from flashsigmoid.training.baseline import bigram_loss
from flashsigmoid.training.data import DataConfig, load_text

ALPHA = 10.0


def test_it_is_its_definition():
    draw = np.random.default_rng(0)
    # token 6 is never trained on
    train, windows, lengths = draw.integers(0, 6, 200), draw.integers(0, 7, (5, 9)), np.array([1, 2, 3, 1, 1, 1, 0])
    ones, twos, after = (
        Counter(train.tolist()),
        Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True)),
        Counter(train[:-1].tolist()),
    )
    nats = 0.0
    for window in windows.tolist():
        for a, b in pairwise(window):
            unigram = (ones[b] + 1) / (200 + 7)
            nats -= math.log((twos[a, b] + ALPHA * unigram) / (after[a] + ALPHA))
    bigram = bigram_loss(train, windows, lengths)
    assert bigram.nats_per_token == pytest.approx(nats / 40, rel=1e-12)
    assert bigram.nats_per_byte == pytest.approx(nats / lengths[windows[:, 1:]].sum(), rel=1e-12)


def test_no_function_of_the_previous_token_is_below_the_floor():
    """A table of logits over (previous, next), fitted to the very windows, comes down to the floor and no further."""
    windows = np.random.default_rng(1).integers(0, 5, (20, 9))
    bigram = bigram_loss(windows.ravel(), windows, np.array([2] * 5))
    previous, target = (torch.from_numpy(x.ravel()) for x in (windows[:, :-1], windows[:, 1:]))
    logits = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    fit = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss():
        fit.zero_grad()
        value = torch.nn.functional.cross_entropy(logits[previous], target)
        value.backward()
        return value

    fit.step(loss)
    assert_rounded(loss().item(), bigram.floor_nats_per_token, 256)  # of second order in what the fit leaves
    assert loss().item() >= bigram.floor_nats_per_token - 1e-12
    assert bigram.floor_nats_per_byte == pytest.approx(bigram.floor_nats_per_token / 2)
    assert bigram.floor_nats_per_token < bigram.nats_per_token


def test_probabilities_sum_to_one():
    train = np.random.default_rng(0).integers(0, 5, 50)
    total = sum(math.exp(-bigram_loss(train, np.array([[3, b]]), np.ones(6, int)).nats_per_token) for b in range(6))
    assert total == pytest.approx(1.0, rel=1e-12)


def test_of_the_embedded_text():
    """About 2.45 nats per byte by bigrams, 3.3 without the previous byte, 2.35 by the best bigrams in hindsight."""
    data = load_text(DataConfig(), vocab_size=257, seqlen=128, seed=0)
    assert 2.3 < data.bigram.floor_nats_per_byte < 2.4 < data.bigram.nats_per_byte < 2.52
    assert data.bigram.nats_per_byte == data.bigram.nats_per_token
