"""k-summation and pair-repeat: tasks are what they say, counting does not solve them, arms differ in one thing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from rounding import assert_rounded
from torch import nn

from flashsigmoid.record import read_records
from flashsigmoid.report.studies import study_note, study_rows, write_study
from flashsigmoid.studies import k_summation, load, pair_repeat
from flashsigmoid.studies.encoder import KINDS, Encoder, Size
from flashsigmoid.studies.k_summation import NumberEmbedding, k_sums, square_loss, sums_draw
from flashsigmoid.studies.pair_repeat import pair_repeats, repeats_draw


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_sums_are_of_the_k_that_are_marked(k: int) -> None:
    x, targets = k_sums(400, 10, k, generator())
    assert x.shape == (400, 10)
    assert targets.shape == (400, 1)
    marked = set()
    for row, target in zip(x.tolist(), targets.tolist(), strict=True):
        numbers, chosen = row[:5], row[5:]
        assert sorted(chosen) == [0.0] * (5 - k) + [1.0] * k
        summed = [n for n, c in zip(numbers, chosen, strict=True) if c]
        assert_rounded(target[0], sum(summed), k, dtype=torch.float32, of=sum(map(abs, summed)))
        marked.add(tuple(chosen))
    assert len(marked) == math.comb(5, k)  # any of them
    assert square_loss(torch.zeros(400, 1, 1), targets).item() / k == pytest.approx(1.0, rel=0.25)


def test_k_of_each_sequence_is_even_in_training() -> None:
    asked = replace(k_summation.QUICK_ASKED, trained_k=3)
    draw = sums_draw(replace(k_summation.QUICK, batch=600, seqlen=10), asked, 1)
    counts = draw(5)[0][:, 5:].sum(1).long().bincount(minlength=6).tolist()
    assert counts[0] == counts[4] == counts[5] == 0
    assert all(150 < count < 250 for count in counts[1:4])
    assert torch.equal(draw(5)[0], draw(5)[0])
    assert not torch.equal(draw(5)[0], draw(6)[0])


@pytest.mark.parametrize(("k", "length"), [(0, 10), (6, 10), (2, 9)])
def test_sums_that_do_not_fit_are_one_clear_error(k: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"k must be 1 to {length // 2}, .* got k={k} and length={length}"):
        k_sums(2, length, k, generator())


@pytest.mark.parametrize(("symbols", "length"), [(3, 8), (9, 24)])
def test_a_pair_comes_again_where_it_is_said_to(symbols: int, length: int) -> None:
    tokens, targets = pair_repeats(3000, length, symbols, generator())
    ends = set()
    for row, (target,) in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert row[0] == symbols
        assert max(row[1:]) < symbols
        places = [i for i in range(3, length - 1) if row[i : i + 2] == row[1:3]]
        assert bool(places) == bool(target)
        ends |= {*places} if len(places) == 1 else set()
    assert ends == {*range(3, length - 1)}
    assert 0.45 < targets.double().mean() < 0.55


def test_counting_symbols_says_next_to_nothing() -> None:
    """The best threshold of how often both parts come again, against 50 % of guessing."""
    tokens, targets = pair_repeats(20_000, 24, 9, generator())
    first, second = ((tokens[:, 3:] == tokens[:, i : i + 1]).sum(1) for i in (1, 2))
    for count in (first, second, first + second, torch.minimum(first, second)):
        best = max(((count > most) == (targets[:, 0] == 1)).double().mean() for most in range(10))
        assert best < 0.57
    # with the two side by side it is the task itself
    pairs = (tokens[:, 3:-1] == tokens[:, 1:2]) & (tokens[:, 4:] == tokens[:, 2:3])
    assert torch.equal(pairs.any(1).long(), targets[:, 0])


def test_pairs_that_do_not_fit_are_one_clear_error() -> None:
    with pytest.raises(ValueError, match="symbols must be at least 3 and length at least 8, got 2 and 24"):
        pair_repeats(1, 24, 2, generator())
    draw = repeats_draw(replace(pair_repeat.QUICK, batch=4), pair_repeat.QUICK_ASKED, 3)
    assert torch.equal(draw(1)[0], draw(1)[0])
    assert [draw(step)[0].shape for step in range(4)] == [(4, 8), (4, 12), (4, 16), (4, 8)]


def test_the_arms_differ_in_their_attention_only() -> None:
    size, x = Size(nlayers=2, dim=16, nheads=2), torch.randn(3, 8, generator=generator())
    answers, states = {}, {}
    for kind in KINDS:
        torch.manual_seed(0)
        model = Encoder(NumberEmbedding(16), 1, size, kind, seqlen=8)
        answers[kind], states[kind] = model(x), model.state_dict()
        assert answers[kind].shape == (3, 1, 1)
    assert all(torch.equal(value, states["softmax"][key]) for key, value in states["sigmoid"].items())
    assert not torch.allclose(answers["sigmoid"], answers["softmax"])
    assert not torch.allclose(answers["sigmoid"], answers["no-bias"])
    with pytest.raises(ValueError, match="kind must be one of sigmoid, no-bias, softmax, got 'relu'"):
        Encoder(nn.Embedding(9, 16), 2, size, "relu", seqlen=8)


@pytest.mark.parametrize("name", ["k-summation", "pair-repeat"])
def test_a_study_writes_what_its_table_and_figure_read(tmp_path, monkeypatch, name: str) -> None:
    module = {"k-summation": k_summation, "pair-repeat": pair_repeat}[name]
    monkeypatch.setattr(module, "QUICK", replace(module.QUICK, steps=2, batch=4))
    monkeypatch.setattr(module, "QUICK_ASKED", replace(module.QUICK_ASKED, samples=32))
    path = load(name)(tmp_path, quick=True, seeds=(0, 1), device="cpu", show=lambda progress: None)
    file = read_records(path)
    assert (file.settings["study"], file.settings["quick"]) == (name, True)
    rows = study_rows(path)
    assert len({tuple(row) for row in rows}) == 1
    assert len(rows) == (6 if name == "k-summation" else 3)
    assert "6 trainings" in study_note(path)
    write_study(path, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes()[:4] == b"\x89PNG"
