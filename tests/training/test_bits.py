"""Bits per byte: every target of a text is counted once, from as long a past as the stride promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flashsigmoid.training.bits import bits_per_byte, overlapping


@pytest.mark.parametrize("ntokens", [17, 18, 50, 97])
@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize("batch", [1, 4])
def test_every_target_is_counted_once(ntokens, stride, batch) -> None:
    counted = []
    for windows, fresh in overlapping(np.arange(ntokens), 16, stride, batch):
        assert windows.dtype == torch.int64
        assert len(windows) <= batch
        for window, count in zip(windows.tolist(), fresh.tolist(), strict=True):
            assert window == list(range(window[0], window[0] + 17))
            counted += window[17 - count :]
            if window[0]:
                assert count <= stride
    assert counted == list(range(1, ntokens))


def test_bits_are_nats_over_bytes() -> None:
    """Tokens that cost their number in nats and stand for as many bytes: 1 / log 2, whatever the windows."""
    tokens = np.random.default_rng(0).integers(1, 9, 200)
    lengths = np.arange(9)
    for stride in (3, 16):
        bits = bits_per_byte(lambda w: w[:, 1:].float(), tokens, lengths, seqlen=16, stride=stride, batch=7)
        assert bits == pytest.approx(1 / math.log(2), rel=1e-12)


def test_what_does_not_fit_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="stride must be from 1 to seqlen=16, got 17"):
        next(overlapping(np.arange(50), 16, 17, 1))
    with pytest.raises(ValueError, match="a text to evaluate must have more than seqlen = 16 tokens, got 16"):
        next(overlapping(np.arange(16), 16, 8, 1))
