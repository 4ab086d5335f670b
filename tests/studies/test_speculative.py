"""Speculative sampling: what it draws is distributed as the target draws, and the study writes what its table reads."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashsigmoid.record import read_records
from flashsigmoid.report.studies import study_note, study_rows, write_study
from flashsigmoid.studies import speculative
from flashsigmoid.studies.speculative import residual, speculate


def chain(seed: int, vocab: int = 3):
    """Probabilities of what follows that depend on the last two tokens."""
    table = torch.rand(vocab, vocab, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2
    table = table / table.sum(-1, keepdim=True)
    return lambda tokens: table[torch.cat([tokens[:, :1], tokens[:, :-1]], 1), tokens]


def test_what_is_kept_and_what_replaces_the_rest_is_the_target() -> None:
    torch.manual_seed(0)
    for _ in range(200):
        p, q = torch.rand(2, 7, dtype=torch.float64).pow(3).softmax(-1)
        kept = torch.minimum(p, q)
        # each of the five operations rounds by half an ulp of numbers up to 1
        torch.testing.assert_close(kept + (1 - kept.sum()) * residual(p, q), p, rtol=0.0, atol=5 * 2.0**-53)
    assert torch.equal(residual(p, p), p)


def chi_square(target, draft, ahead: int, draws: int = 4000) -> float:
    """Of texts of three tokens after a prompt of one, against the target's own probabilities: 26 degrees of freedom."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.tensor([1])
    seen = Counter(
        tuple(speculate(target, draft, prompt, 4, ahead=ahead, generator=generator).tokens[1:].tolist())
        for _ in range(draws)
    )
    total = 0.0
    for text in itertools.product(range(3), repeat=3):
        p = target(torch.tensor([[1, *text]]))[0]
        expected = draws * float(torch.stack([p[i, token] for i, token in enumerate(text)]).prod())
        total += (seen[text] - expected) ** 2 / expected
    return total


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_texts_are_distributed_as_the_target_draws_them(monkeypatch, ahead) -> None:
    target, draft = chain(1), chain(2)
    assert chi_square(target, draft, ahead) < 54.1  # exceeded once in a thousand
    # planted: in place of a rejected token one of p, which favours what the draft likes
    monkeypatch.setattr(speculative, "residual", lambda p, q: p)
    assert chi_square(target, draft, ahead) > 54.1


def test_a_draft_that_is_the_target_is_always_kept() -> None:
    same = chain(1)
    drawn = speculate(same, same, torch.tensor([0]), 16, ahead=4, generator=torch.Generator().manual_seed(0))
    # 15 new tokens in calls that each give one more than was drafted
    assert (len(drawn.tokens), drawn.calls, drawn.proposed, drawn.accepted) == (16, 3, 12, 12)


def test_a_draft_that_is_never_right_costs_a_call_a_token() -> None:
    never = lambda tokens: torch.tensor([0.0, 0.0, 1.0]).expand(*tokens.shape, 3)  # noqa: E731
    other = lambda tokens: torch.tensor([0.5, 0.5, 0.0]).expand(*tokens.shape, 3)  # noqa: E731
    drawn = speculate(other, never, torch.tensor([0]), 9, ahead=3, generator=torch.Generator().manual_seed(0))
    assert (drawn.calls, drawn.accepted) == (8, 0)
    assert 2 not in drawn.tokens.tolist()


@pytest.mark.long
def test_the_study_writes_what_its_table_reads(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(speculative, "QUICK", replace(speculative.QUICK, steps=2, batch=4, seqlen=16))
    options: dict[str, Any] = {"quick": True, "device": "cpu", "show": lambda progress: None}
    path = speculative.speculative(tmp_path, **options)
    rows = study_rows(path)
    assert [row["draft"] for row in rows] == list(speculative.DRAFTS)
    assert rows[0]["kept, %"] == "100"
    write_study(path, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes()[:4] == b"\x89PNG"
    assert "1 training," in study_note(path)
    kept = {(r.tags["draft"], r.tags["ahead"]): r.value for r in read_records(path).records if r.name == "kept"}
    assert all(kept["softmax", ahead] == 1.0 for ahead in speculative.AHEAD)
    overlaps = {r.tags["draft"]: r.value for r in read_records(path).records if r.name == "overlap"}
    # twins have the target's weights: an untrained model hardly minds its attention, counts know nothing of it
    assert all(overlaps[name] > overlaps["bigram"] for name in speculative.DRAFTS[1:4])
    assert all(0.0 < overlap <= 1.0 + 1e-9 for overlap in overlaps.values())
