"""Diagnosis, retrieval, neighbours and sinks: the tasks are what they say, the attentions are their equations."""

from __future__ import annotations

import importlib
import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from rounding import assert_rounded
from torch import Tensor, nn

from flashsigmoid import sigmoid_attention
from flashsigmoid.diagnostics import probe_attention, sink_mass
from flashsigmoid.models.gpt import GPT, GPTConfig
from flashsigmoid.nn import alibi_bias, alibi_slopes, softmax_attention
from flashsigmoid.record import read_records
from flashsigmoid.report.studies import study_note, study_rows, write_study
from flashsigmoid.studies import neighbours, retrieval, sinks
from flashsigmoid.studies.diagnosis import KINDS, MATCHED, POSITIONS, QUICK, SinCosEmbedding, build, model_config
from flashsigmoid.studies.trials import IGNORED, Trial, run_trials


def quiet(progress) -> None:
    pass


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_recall_asks_each_key_once_behind_the_pairs() -> None:
    each, pairs, length = 10, 4, 24
    tokens, targets = retrieval.recall(3, length, pairs, each, generator())
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        given = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(given) == pairs
        assert all(key < each <= value < 2 * each for key, value in given.items())
        asked = [i for i, target in enumerate(wanted) if target != IGNORED]
        assert sorted(row[i] for i in asked) == sorted(given)
        assert all(i >= 2 * pairs and wanted[i] == row[i + 1] == given[row[i]] for i in asked)
        others = {*range(2 * pairs, length)} - {*asked} - {i + 1 for i in asked}
        assert all(2 * each <= row[i] < 3 * each for i in others)


def test_a_needle_is_one_key_and_its_value() -> None:
    each = 10
    tokens, targets = retrieval.needle(400, 16, 1, each, generator())
    places = set()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        first, last = (i for i, token in enumerate(row) if token < each)
        assert last == 15
        assert row[first] == row[last]
        assert wanted == [IGNORED] * 15 + [row[first + 1]]
        assert each <= row[first + 1] < 2 * each
        places.add(first)
    assert {0, 12} <= places <= {*range(13)}  # everywhere


@pytest.mark.parametrize(("task", "pairs", "length"), [("recall", 0, 24), ("recall", 7, 24), ("recall", 2, 23)])
def test_what_does_not_fit_is_one_clear_error(task: str, pairs: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"pairs must be 1 to .* at an even length {length}, got {pairs}"):
        retrieval.TASKS[task](2, length, pairs, 10, generator())
    with pytest.raises(ValueError, match="a needle has one pair and at least 4 tokens, got 2 and 8"):
        retrieval.needle(2, 8, 2, 10, generator())


class Finder(nn.Module):
    """Says after each key the value that followed it when it came before, and another than any value if it has not."""

    def __init__(self, each: int, knows: bool = True) -> None:
        super().__init__()
        self.each, self.knows = each, knows

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 3 * self.each)
        for row, said in zip(tokens.tolist(), logits, strict=True):
            given: dict[int, int] = {}
            for i, token in enumerate(row):
                said[i, given.get(token, 0) if self.knows else self.each] = 1.0
                if i + 1 < len(row) and token < self.each <= row[i + 1] < 2 * self.each:
                    given.setdefault(token, row[i + 1])
        return logits


@pytest.mark.parametrize("knows", [True, False])
def test_accuracy_is_1_of_who_finds_and_by_chance_of_who_guesses(tmp_path, knows: bool) -> None:
    asked = retrieval.Difficulty(each=8, trained_pairs=2, pairs=(2, 4, 8), samples=96)
    model: Any = Finder(8, knows)
    trial = Trial(
        arm="finder", seed=0, settings={}, run=lambda bench: retrieval.accuracies(bench, model, 16, asked, batch=32)
    )
    records = read_records(run_trials("mine", [trial], tmp_path, device="cpu", show=quiet)).records
    found = {
        tuple(r.tags[key] for key in ("task", "length", "pairs", "questions")): r.value
        for r in records
        if r.tags.get("task")
    }
    assert {key[:3] for key in found} == {
        (task, length, pairs)
        for length in (16, 32, 64)
        for task, pairs in (("needle", 1), ("recall", 2), ("recall", 4), ("recall", 8))
        if 4 * pairs <= length
    }
    assert all(questions == 96 * pairs for _, _, pairs, questions in found)
    if knows:
        assert {*found.values()} == {1.0}
    else:
        assert all(0.0 < value < 0.3 for value in found.values() if value is not None)
        assert statistics.fmean(value for value in found.values() if value is not None) == pytest.approx(
            1 / 8, rel=0.25
        )


@pytest.mark.parametrize("position", POSITIONS)
def test_the_first_attention_norm_is_many_times_larger_without_the_bias(tmp_path, position: str) -> None:
    """Of the diagnosis itself: every weight near 1/2 and not near 1/n, for each position encoding."""
    tokens = torch.randint(0, 256, (4, QUICK.seqlen), generator=generator())
    norms = {}
    for kind in KINDS:
        torch.manual_seed(0)
        config = model_config(position, kind, qk_norm=True, layer_scale=False, budget=QUICK, dim=128)
        (probe,) = probe_attention(build(config, position), tokens)
        norms[kind] = probe.attention_norm
    assert 8 < norms["no-bias"] / norms["sigmoid"] < QUICK.seqlen
    assert norms["no-bias"] > 5 * norms["softmax"]


def test_balanced_slopes() -> None:
    assert retrieval.balanced_alibi_slopes(6).tolist() == [0.5, 0.25, 0.125, -0.5, -0.25, -0.125]
    with pytest.raises(ValueError, match="nheads must be even, got 3"):
        retrieval.balanced_alibi_slopes(3)
    q, k, v = torch.randn(3, 1, 5, 2, 8).double()
    out = retrieval.balanced_attention(q, k, v, sigmoid_bias=0.0, causal=True, alibi_slopes=None)
    i = torch.arange(5)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(8) + torch.tensor([-0.5, 0.5])[:, None, None] * (
        i[:, None] - i
    )
    weights = scores.sigmoid().tril()
    assert_rounded(out, torch.einsum("bhij,bjhd->bihd", weights, v))


def weights(attend: Any, q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """(batch, nheads, seqlen_q, seqlen_k), of what attention gives for the identity."""
    n = k.shape[1]
    eye = torch.eye(n, dtype=k.dtype)[None, :, None].expand(k.shape[0], n, k.shape[2], n)
    return attend(q, k, eye, **options).transpose(1, 2)


ATTENTIONS = {
    "softplus-reweighted": neighbours.softplus_reweighted(3),
    "self-adjust-softmax": neighbours.self_adjust_softmax(),
    "adaptive-temperature": neighbours.adaptive_temperature(),
    "normalised-sigmoid": neighbours.normalised_sigmoid(-2.0),
}


def row_by_hand(name: str, s: list[float], head_dim: int) -> list[float]:
    """The weights of the visible scores of one row."""

    def share(x: list[float]) -> list[float]:
        return [value / sum(x) for value in x]

    softmax = share([math.exp(x) for x in s])
    n = len(s)
    if name == "softplus-reweighted":
        factor = math.log(head_dim) * math.log(n)
        # torch leaves out log1p(exp(-x)) beyond 20, 2e-9
        a = share([factor * x if factor * x > 20.0 else math.log1p(math.exp(factor * x)) for x in s])
        return share([max(0.0, n * x - (n > 3)) ** 3 for x in a])
    if name == "self-adjust-softmax":
        low, high = min(*s, 0.0, 0.0), max(*s, 0.0, 0.0)
        return [(x - low) / (high - low) * p for x, p in zip(s, softmax, strict=True)]
    if name == "adaptive-temperature":
        h = -sum(p * math.log(p) for p in softmax)
        beta = max(1.0, -0.037 * h**4 + 0.481 * h**3 - 2.3 * h**2 + 4.917 * h - 1.791) if h > 0.5 else 1.0
        return share([math.exp(beta * x) for x in s])
    return share([1 / (1 + math.exp(2.0 - x)) for x in s])


@pytest.mark.parametrize("name", ATTENTIONS)
def test_neighbours_are_their_equations(name: str) -> None:
    q, k = torch.randn(2, 2, 9, 2, 8, generator=generator()).double() * 1.5
    a = weights(ATTENTIONS[name], q, k, causal=True)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(8)
    for i in range(9):
        expected = row_by_hand(name, scores[1, 0, i, : i + 1].tolist(), 8)
        assert_rounded(a[1, 0, i, : i + 1], torch.tensor(expected, dtype=torch.float64))
        assert a[1, 0, i, i + 1 :].count_nonzero() == 0


@pytest.mark.parametrize("name", ATTENTIONS)
def test_neighbours_take_every_option_and_have_finite_gradients(name: str) -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 7, 4, 8, generator=generator()))
    options: dict[str, Any] = {"scale": 0.5, "causal": True, "window_size": (2, None), "dropout_p": 0.2}
    # the first rows see nothing
    out = ATTENTIONS[name](q[:, :5], k[:, :3, :2], v[:, :3, :2], alibi_slopes=torch.full((4,), 0.3), **options)
    assert out.shape == (1, 5, 4, 8)
    assert out[:, :2].count_nonzero() == 0
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
    with pytest.raises(ValueError, match="alibi_slopes"):
        ATTENTIONS[name](q, k, v, alibi_slopes=torch.ones(3))


def test_an_even_row_is_not_sharpened_where_its_entropy_is_what_it_should_be() -> None:
    """Temperature: scores that nearly choose one key stay softmax's, to the last bits of two formulas."""
    q = torch.tensor([9.0, 0.0, 0.0]).reshape(1, 1, 1, 3).double()
    k = torch.eye(3).reshape(1, 3, 1, 3).double()
    ours, theirs = (weights(fn, q, k, scale=1.0) for fn in (neighbours.adaptive_temperature(), softmax_attention))
    assert_rounded(ours, theirs)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_pair_of_the_diagnosis_differs_in_its_attention_only(position: str) -> None:
    tokens = torch.randint(0, 256, (2, 16), generator=generator())
    losses = {}
    for kind in KINDS:
        config = model_config(position, kind, qk_norm=True, layer_scale=False, budget=QUICK, dim=32)
        assert config.bias == (0.0 if kind == "no-bias" else -math.log(QUICK.seqlen))
        torch.manual_seed(0)
        model = build(config, position)
        losses[kind] = (model.state_dict(), model(tokens))
        assert isinstance(model.embedding, SinCosEmbedding) == (position == "sincos")
    states = [state for state, _ in losses.values()]
    assert all(torch.equal(value, state[key]) for state in states for key, value in states[0].items())
    logits = [out for _, out in losses.values()]
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    # the order of the tokens before the last matters: a permutation would not without positions
    permuted = tokens[:, torch.tensor([*range(14, -1, -1), 15])]
    with torch.no_grad():
        assert not torch.allclose(model(tokens)[:, -1], model(permuted)[:, -1], atol=1e-3)


def test_only_alibi_can_match_its_bias_and_no_setting_of_another_arm_changes() -> None:
    options = {"qk_norm": True, "layer_scale": False, "budget": QUICK, "dim": 128}
    plain, matched = (GPT(model_config("alibi", kind, **options)).blocks[0] for kind in ("sigmoid", MATCHED))
    bias = matched.get_submodule("attention").bias(torch.device("cpu"))
    assert bias.tolist() == alibi_bias(alibi_slopes(4), QUICK.seqlen).tolist()
    assert plain.get_submodule("attention").bias(torch.device("cpu")) == -math.log(QUICK.seqlen)
    with pytest.raises(ValueError, match="position must be 'alibi' with alibi_bias=True, got 'rope'"):
        model_config("rope", MATCHED, **options)
    # files of trials from before there was the setting compare equal to it
    assert model_config("alibi", "sigmoid", **options).alibi_bias is None


def test_weights_of_a_model_are_those_of_its_attention() -> None:
    config = GPTConfig(vocab_size=9, seqlen=6, nlayers=2, dim=16, nheads=2, position="rope")
    seen: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append(v)
        return sigmoid_attention(q, k, v, **options)

    model = GPT(config, attention_fn=attend)
    functions = [block.attention.attention_fn for block in model.blocks]
    found = sinks.weights_of(model, torch.arange(6)[None])
    assert [a.shape for a in found] == [(1, 2, 6, 6)] * 2
    assert all(a.triu(1).count_nonzero() == 0 and (a.tril() >= 0).all() for a in found)
    assert [block.attention.attention_fn for block in model.blocks] == functions
    assert 0 < sink_mass(found[0]).item() < 1


@pytest.mark.parametrize("name", ["diagnosis", "retrieval", "neighbours", "sinks"])
def test_a_study_writes_what_its_table_and_figure_read(tmp_path, monkeypatch, name) -> None:
    module = importlib.import_module(f"flashsigmoid.studies.{name}")
    for field in ("QUICK", "QUICK_TEXT", "QUICK_RECALL"):
        if hasattr(module, field):
            monkeypatch.setattr(module, field, replace(getattr(module, field), steps=2, batch=4))
    if hasattr(module, "QUICK_ASKED"):
        monkeypatch.setattr(module, "QUICK_ASKED", replace(module.QUICK_ASKED, samples=32))
    only = {"diagnosis": ("rope-sigmoid", "rope-softmax-no-qk-norm"), "sinks": ("sigmoid", "softmax")}.get(name, ())
    only = only or (("sigmoid", "swat") if name == "retrieval" else ("softplus*", "adaptive*"))
    options: dict[str, Any] = {"quick": True, "only": only, "seeds": (0,), "device": "cpu", "show": quiet}
    path = getattr(module, name)(tmp_path, **options)
    file = read_records(path)
    assert file.settings["study"] == name
    assert file.settings["quick"] is True
    rows = study_rows(path)
    assert len({tuple(row) for row in rows}) == 1
    assert any(
        row.get("attention") in ("softplus-reweighted", "sigmoid") or "task" in row or "position" in row for row in rows
    )
    assert "2 trainings" in study_note(path)
    assert "one seed: hints, not findings" in study_note(path)
    write_study(path, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes()[:4] == b"\x89PNG"
