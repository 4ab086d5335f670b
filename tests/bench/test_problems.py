"""What the names mean: sizes, counts of operations, choosing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flashsigmoid.bench.candidate import make_inputs, visible
from flashsigmoid.bench.problems import PROBLEMS, Shape, choose, defaults, spread


def test_language_models_have_the_sizes_of_the_papers() -> None:
    shapes = [shape for name, shape in PROBLEMS.items() if name.startswith("lm-")]
    assert len(shapes) == 2 * (6 + 6 + 3) + 1
    for shape in shapes:
        assert (shape.batch * shape.seqlen_q, shape.nheads * shape.head_dim) == (16384, 2048)


def test_operations_are_counted_as_papers_do() -> None:
    full, causal = PROBLEMS["lm-4k-d128"], PROBLEMS["lm-4k-d128-causal"]
    assert full.flop("forward") == 4 * 4096**2 * 128 * 16 * 4
    assert causal.flop("forward") == full.flop("forward") / 2
    assert full.flop("backward") == 2.5 * full.flop("forward")
    assert full.flop("both") == full.flop("forward") + full.flop("backward")
    assert PROBLEMS["cross-1k-8k-d128"].flop("forward") == 4 * 1024 * 8192 * 128 * 16 * 4
    gqa = PROBLEMS["gqa-32-8-d128"]
    assert (gqa.group, gqa.flop("forward")) == (4, 4 * 4096**2 * 128 * 32 * 4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(3, 0), (None, 2), (5, 4), (0, 100)])
def test_a_window_counts_the_pairs_that_are_seen(causal: bool, window: tuple[int | None, int]) -> None:
    shape = Shape(
        name="w", batch=2, seqlen_q=9, seqlen_k=13, nheads=2, nheads_k=1, head_dim=8, causal=causal, window_size=window
    )
    inputs = make_inputs(shape, torch.float32, "cpu")
    assert shape.pairs == 2 * visible(shape, inputs.distance()).sum().item()


def test_other_scores_are_another_bias_or_wider() -> None:
    plain, zero, wide = (PROBLEMS[f"{kind}-4k-d64"] for kind in ("lm", "b0", "wide"))
    assert (zero.bias, plain.bias, wide.bias) == (0.0, -math.log(4096), -math.log(4096))
    assert [shape.row()["options"] for shape in (plain, zero, wide)] == ["", "b = 0", "scores x 3"]
    small = Shape(name="s", seqlen_q=64, seqlen_k=64, nheads=2, nheads_k=2, head_dim=16)
    usual, wider = (make_inputs(x, torch.float32, "cpu") for x in (small, replace(small, score_std=3.0)))
    assert torch.equal(3.0 * usual.q, wider.q)
    assert torch.equal(usual.k, wider.k)


def test_packed_lengths_differ_and_add_up() -> None:
    shape = PROBLEMS["varlen-16k-d128"]
    assert sum(shape.lengths) == 16384
    assert max(shape.lengths) > 20 * min(shape.lengths) > 0
    assert any(n % 2 for n in shape.lengths)
    assert shape.pairs == sum(n * n for n in shape.lengths) / 2
    assert [sum(spread(total, count)) for total, count in ((512, 8), (1000, 7), (5, 1))] == [512, 1000, 5]


def test_names_globs_and_beginnings_choose() -> None:
    assert choose(["lm-4k-d64"]) == ["lm-4k-d64"]
    assert choose(["lm-4k-d64*"]) == ["lm-4k-d64", "lm-4k-d64-causal", "lm-4k-d64-alibi-causal"]
    assert choose(["vit", "vit-197-d64-b4"]) == ["vit-197-d64-b4", "vit-197-d64-b64", "vit-197-d64-b256"]
    with pytest.raises(ValueError, match=r"problem must be one of cpu-512-d64, .*, got 'warp'"):
        choose(["warp"])
    assert all(name.startswith("cpu-") for name in defaults("cpu"))
    assert len(defaults("cpu")) + len(defaults("cuda")) == len(PROBLEMS)
