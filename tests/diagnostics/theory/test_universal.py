"""universal.py: the shift is its equation within its error, contexts get numbers of their own, the error falls."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from rounding import assert_rounded
from torch import Tensor

from flashsigmoid.diagnostics.theory import universal
from flashsigmoid.diagnostics.theory.universal import (
    Approximator,
    ContextualMap,
    SelectiveShift,
    Steps,
    collisions,
    token_sets,
)
from flashsigmoid.nn import SigmoidAttention
from flashsigmoid.studies.theory import TARGETS


def psi(x: Tensor, lower: float, upper: float, above: float) -> Tensor:
    """By loops."""
    out = torch.zeros_like(x)
    for i, own in enumerate(x.tolist()):
        if lower < own < upper:
            out[i] = sum(other for other in x.tolist() if other > above)
    return out


@pytest.mark.parametrize("above", [None, 1.5, 0.5])
@pytest.mark.parametrize("steepness", [2.0, 20.0, 400.0])
def test_the_selective_shift_is_within_its_error(above, steepness) -> None:
    shift = SelectiveShift(3, 1, 1.5, 2.5, above=above, factor=3.0, steepness=steepness)
    for seed in range(20):
        x = torch.randn(1, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x[..., 1] = torch.randint(0, 5, (6,), generator=torch.Generator().manual_seed(seed)).double()
        with torch.no_grad():
            added = shift(x) - x
        assert torch.equal(added[..., [0, 2]], torch.zeros(1, 6, 2, dtype=torch.float64))
        expected = 3.0 * psi(x[0, :, 1], 1.5, 2.5, 2.5 if above is None else above)
        allowed = 3.0 * x[0, :, 1].abs().sum() * (math.exp(-steepness / 4) + math.exp(-steepness / 2))
        assert (added[0, :, 1] - expected).abs().max() <= allowed + 1e-12


def test_the_error_of_the_shift_falls_with_steepness() -> None:
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]], dtype=torch.float64)
    errors = []
    for steepness in (2.0, 8.0, 32.0):
        with torch.no_grad():
            added = SelectiveShift(1, 0, 1.5, 2.5, steepness=steepness)(x) - x
        errors.append(float((added[0, :, 0] - torch.tensor([0.0, 7.0, 0.0, 0.0])).abs().max()))
    assert errors[0] > 10 * errors[1] > 1000 * errors[2]


def test_the_shift_is_our_attention_with_four_heads_of_dimension_one() -> None:
    attention = SelectiveShift(2, 1, 0.5, 1.5).attention
    assert type(attention) is SigmoidAttention
    assert (attention.nheads, attention.head_dim) == (4, 1)


@pytest.mark.parametrize(("n", "levels"), [(1, 5), (2, 16), (3, 9), (4, 4)])
def test_contexts_have_numbers_of_their_own_over_the_whole_grid(n, levels) -> None:
    """Every sequence, not every multiset only: the number is the same for two tokens iff level and multiset are."""
    tokens = torch.cartesian_prod(*[torch.arange(levels)] * n).reshape(-1, n)
    with torch.no_grad():
        ids = ContextualMap(n, levels)(tokens.double())
    contexts: dict[float, set[tuple[int, ...]]] = {}
    for row, numbers in zip(tokens.tolist(), ids.tolist(), strict=True):
        for token, number in zip(row, numbers, strict=True):
            contexts.setdefault(number, set()).add((token, *sorted(row)))
    assert all(len(found) == 1 for found in contexts.values())
    expected = {(token, *row) for row in map(tuple, token_sets(n, levels).tolist()) for token in row}
    assert set().union(*contexts.values()) == expected
    assert len(contexts) == len(expected)


def test_the_threshold_of_the_paper_confuses_equal_tokens_only() -> None:
    """Sets {1, 3, 3} and {2, 2, 3} of l + 1 have one number under t = upper; sets of different tokens never do."""
    tokens = token_sets(3, 4)
    with torch.no_grad():
        ids = ContextualMap(3, 4, repeats=False)(tokens.double())
    assert collisions(tokens, ids) > 0
    found = {tuple(row): number[-1] for row, number in zip(tokens.tolist(), ids.tolist(), strict=True)}
    assert found[0, 2, 2] == found[1, 1, 2]
    different = (tokens.diff(dim=1) > 0).all(1)
    assert collisions(tokens[different], ids[different]) == 0


def test_collisions_counts_what_is_shared_and_what_is_split() -> None:
    tokens = torch.tensor([[0, 1], [1, 1]])
    assert collisions(tokens, torch.tensor([[5.0, 6.0], [7.0, 7.0]])) == 0
    assert collisions(tokens, torch.tensor([[5.0, 6.0], [6.0, 6.0]])) == 1
    assert collisions(tokens, torch.tensor([[5.0, 6.0], [7.0, 8.0]])) == 1


def test_steps_is_a_staircase() -> None:
    steps = Steps(torch.tensor([1.0, 2.0]), torch.tensor([[2.0], [-5.0]]), torch.tensor([1.0]), 1e6)
    heights = steps(torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64))
    assert heights[:, 0].tolist() == pytest.approx([1.0, 3.0, -2.0])


@pytest.mark.parametrize("name", TARGETS)
def test_the_error_falls_and_is_below_the_modulus(name) -> None:
    target = TARGETS[name]
    errors = []
    x = torch.rand(500, 3, 2, dtype=torch.float64)
    for cells in (2, 3, 4):
        with torch.no_grad():
            errors.append(float((Approximator(target.fn, 3, 2, cells)(x) - target.fn(x)).abs().max()))
        assert errors[-1] <= target.modulus(0.5 / cells) + 1e-9
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", TARGETS)
def test_the_modulus_of_a_target_is_true_of_it_and_it_is_equivariant(name) -> None:
    fn, modulus = TARGETS[name].fn, TARGETS[name].modulus
    x = torch.rand(2000, 3, 2, dtype=torch.float64)
    for step in (1e-4, 1e-2, 0.2):
        y = (x + step * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        gaps = (fn(x) - fn(y)).abs().amax((1, 2))
        assert (gaps <= modulus(1.0) * (x - y).abs().amax((1, 2)) + 1e-12).all()
        assert modulus(step) == pytest.approx(step * modulus(1.0))
    for order in itertools.permutations(range(3)):
        assert_rounded(fn(x[:, list(order)]), fn(x)[:, list(order)])


def test_one_target_is_not_symmetric_in_the_coordinates() -> None:
    x = torch.rand(10, 3, 2, dtype=torch.float64)
    symmetric = {name: torch.allclose(t.fn(x.flip(-1)), t.fn(x).flip(-1)) for name, t in TARGETS.items()}
    assert symmetric == {"pool": True, "lopsided": False}


def test_the_approximator_is_equivariant_and_exact_at_the_centres() -> None:
    fn = TARGETS["lopsided"].fn
    model = Approximator(fn, 3, 2, 3)
    x = (torch.randint(0, 3, (50, 3, 2)).double() + 0.5) / 3
    with torch.no_grad():
        assert_rounded(model(x), fn(x))
        assert_rounded(model(x[:, [2, 0, 1]]), model(x)[:, [2, 0, 1]])


def test_contexts_that_share_a_number_are_an_error_of_the_whole_approximator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted over the whole grid: of 40 contexts on 2 cells the threshold of the paper confuses some."""
    threshold_of_the_paper = functools.partial(ContextualMap, repeats=False)
    monkeypatch.setattr(universal, "ContextualMap", threshold_of_the_paper)
    with pytest.raises(ValueError, match=r"must tell contexts apart, got [1-9]"):
        Approximator(TARGETS["pool"].fn, 3, 2, 2)


def test_the_only_table_of_the_approximator_is_its_value_map() -> None:
    """All else is the same for every function: what it holds is of one size with the grid, not with the contexts."""
    models = {name: Approximator(target.fn, 3, 2, 3) for name, target in TARGETS.items()}
    one, other = (model.state_dict() for model in models.values())
    assert one.keys() == other.keys()
    for name, numbers in one.items():
        if name.startswith("value_map."):
            continue
        assert torch.equal(numbers, other[name]), name
        assert numbers.numel() <= 16, name  # four heads, two channels; the grid has 405 contexts
    assert not torch.equal(one["value_map.jumps"], other["value_map.jumps"])
    attentions = [m for m in models["pool"].modules() if isinstance(m, SigmoidAttention)]
    assert len(attentions) == 3**2 + 1  # a shift for each cell of a token, and the sum


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SelectiveShift(1, 0, 2.0, 2.0), "lower must be below upper, got 2.0 and 2.0"),
        (lambda: SelectiveShift(1, 0, 1.0, 2.0, steepness=0.0), "steepness must be positive, got 0.0"),
        (lambda: ContextualMap(0, 3), "n must be at least 1, got 0"),
        (lambda: ContextualMap(7, 5), r"numbers of 7 tokens and 5 levels must be below 2\^53"),
        (lambda: Approximator(torch.sin, 2, 0, 2), "n, dim and cells must be at least 1, got 2, 0 and 2"),
        (lambda: Approximator(torch.sin, 3, 2, 12), "a grid must have at most 300000 tokens in their contexts"),
        (lambda: Approximator(lambda x: x.cumsum(1), 2, 1, 2), "fn must be permutation-equivariant"),
    ],
)
def test_bad_arguments_are_one_clear_error(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
