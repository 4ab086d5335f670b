"""Context parallel over 2 gloo processes against the whole problem; hundreds over 2 and 4 in `make test-long`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import cases
from distributed.cases import FAULTS, Case, layout_of, sizes_of
from distributed.crew import Crew
from distributed.expected import over_budget
from rounding import assert_rounded

from flashsigmoid.distributed.cost import SCHEMES, choose_scheme, cost, softmax_ring_cost
from flashsigmoid.distributed.layout import ORDERS
from flashsigmoid.record import RecordWriter
from flashsigmoid.testing import compute

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
DRAWN = 500
SHARDINGS = [(scheme, order) for scheme in SCHEMES for order in ORDERS]

# what each is for
CASES = {
    "full": Case(),
    "causal": Case(causal=True, nheads_k=4),
    "causal, one key head": Case(causal=True, nheads_k=1, head_dim_v=5, scale=0.7),
    "window within a chunk": Case(window_size=(5, 3)),
    "window over chunks": Case(causal=True, window_size=(20, None)),
    "window ahead": Case(window_size=(0, 17)),
    "ALiBi": Case(causal=True, slopes="heads"),
    "slopes of a batch": Case(slopes="batch", bias="scalar"),
    "b of heads": Case(causal=True, bias="heads"),
    "b of a batch": Case(bias="batch", window_size=(9, None)),
    "b of rows": Case(causal=True, bias="rows"),
    "dropout": Case(causal=True, dropout_p=0.3, window_size=(30, None)),
    "fewer queries": Case(n=16, n_k=48, causal=True),
    "fewer keys": Case(n=48, n_k=16, causal=True, bias="rows"),
    "packed": Case(batch=1, causal=True, cu_seqlens=(0, 5, 29, 29, 46)),
    "packed, sides": Case(batch=1, cu_seqlens=(0, 13, 40), bias="batch", slopes="batch", window_size=(9, 4)),
    "packed, b of rows": Case(batch=1, causal=True, cu_seqlens=(0, 13, 48), bias="rows", dropout_p=0.2),
    "reference": Case(causal=True, slopes="heads", bias="heads", dropout_p=0.2, backend="reference"),
    "bfloat16": Case(causal=True, dtype="bfloat16", nheads_k=1),
    "float64": Case(causal=True, dtype="float64", bias="rows", slopes="batch"),
}


def assert_bytes(case: Case, scheme: str, order: str, size: int, sent: list[tuple[int, int]]) -> None:
    """What every rank sent is what the formula says."""
    for rank, (forward, backward) in enumerate(sent):
        formula = cost(layout_of(case, order, size), sizes_of(case), scheme, rank)
        assert (forward, backward) == (formula.forward_bytes, formula.backward_bytes), rank


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one(crew: Crew, name: str) -> None:
    case = CASES[name]
    for scheme, order in SHARDINGS:
        results = crew.run(cases.compute, case, scheme, order, 2)
        ratios = over_budget(case, results[0])
        assert max(ratios.values()) <= 1.0, (scheme, order, ratios)
        assert_bytes(case, scheme, order, 2, [result["sent"] for result in results])


def assert_drawn(crew: Crew, number: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """A drawn case is within the budget, and sends what the formula says: what is to be recorded."""
    case, scheme, order, size = cases.drawn(number, sizes)
    results = crew.run(cases.compute, case, scheme, order, size)
    ratios = over_budget(case, results[0])
    assert max(ratios.values()) <= 1.0, (number, case, scheme, order, size, ratios)
    chosen = choose_scheme(layout_of(case, order, size), sizes_of(case)) if scheme == "auto" else scheme
    assert_bytes(case, chosen, order, size, [result["sent"] for result in results[:size]])
    return {"number": number, "ranks": size, "scheme": scheme, "order": order, "ratio": max(ratios.values())}


def test_every_option_beside_every_other(crew: Crew) -> None:
    for number in range(16):
        assert_drawn(crew, number, (2,))


def test_the_same_call_gives_the_same_bits(crew: Crew) -> None:
    """What arrives is added in the order of steps, not of arrival."""
    for scheme in SCHEMES:
        first, second = (crew.run(cases.compute, CASES["ALiBi"], scheme, "zigzag", 2)[0] for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first if name != "sent")


def test_where_the_order_is_fixed_two_ranks_have_the_bits_of_one(crew: Crew) -> None:
    """All keys in one call for each chunk of queries, as in the whole."""
    for name in ("full", "b of rows", "ALiBi"):
        case = replace(CASES[name], causal=False)
        q, k, v, dout, options = case.tensors()
        plain = compute(q, k, v, dout, backend="blocked", **options)
        for order in ORDERS:
            results = crew.run(cases.compute, case, "all_gather", order, 2)[0]
            assert torch.equal(results["out"], plain["out"]), (name, order)


def test_one_rank_is_the_plain_op_to_the_bit(crew: Crew) -> None:
    for name in ("causal", "b of rows", "dropout"):
        case = CASES[name]
        q, k, v, dout, options = case.tensors()
        plain = compute(q, k, v, dout, backend="blocked", **options, **({"seed": case.seed} if case.dropout_p else {}))
        for scheme in SCHEMES:
            results = crew.run(cases.compute, case, scheme, "zigzag", 1)[0]
            assert all(torch.equal(results[name], plain[name]) for name in plain), (name, scheme)
            assert results["sent"] == (0, 0)


def test_a_module_takes_it_as_attention_fn(crew: Crew) -> None:
    x, dx, module = cases.module_of()
    x.requires_grad_()
    out = module(x)
    whole = (out, *torch.autograd.grad(out, (x, module.q_proj.weight), dx))
    for scheme in SCHEMES:
        for found, expected in zip(crew.run(cases.attend_by_module, 2, scheme)[0], whole, strict=True):
            assert_rounded(found, expected)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_planted_wrong_shard_is_caught(crew: Crew, fault: str, scheme: str) -> None:
    case = Case(causal=True, slopes="heads", dropout_p=0.3 if "dropout" in fault else 0.0)
    if scheme == "all_gather" and "last wanted" in fault:
        case = replace(case, window_size=(20, None))
    results = crew.run(cases.compute, case, scheme, "zigzag", 2, fault)[0]
    caught = {name for name, ratio in over_budget(case, results).items() if ratio > 1.0}
    forward = scheme == "reduce_scatter" or "come home" not in fault
    print(fault, scheme, sorted(caught))
    assert caught >= ({"out"} if forward else {"dk", "dv"})


def test_bad_input_is_one_clear_error(crew: Crew) -> None:
    for case, scheme, order, message in (
        (Case(n=46), "ring", "zigzag", "must be a multiple of 4 for 2 ranks in zigzag order, got 46"),
        (Case(), "tree", "zigzag", "scheme must be one of auto, all_gather, ring, reduce_scatter, got 'tree'"),
        (Case(), "ring", "random", "order must be one of zigzag, contiguous, got 'random'"),
        (
            Case(batch=1, cu_seqlens=(0, 60)),
            "ring",
            "zigzag",
            r"cu_seqlens_q must rise from 0 to at most 48, got \[0, 60\]",
        ),
    ):
        with pytest.raises(AssertionError, match=message):
            crew.run(cases.compute, case, scheme, order, 2)
    assert crew.run(cases.compute, Case(), "auto", "zigzag", 2)[0]["out"].shape == (2, 48, 4, 8)


def long_cases() -> Iterator[tuple[str, Case]]:
    """Every case above in float32 and bfloat16, of 64 rows, and some that need longer ones."""
    for name, case in CASES.items():
        larger = replace(case, n=case.n * 2, n_k=None if case.n_k is None else case.n_k * 2)
        if case.dtype == "float32":
            yield f"{name}, bfloat16", replace(larger, dtype="bfloat16")
        yield name, larger


@pytest.mark.long
@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_give_parts_that_are_not_rounded(crew: Crew, scheme: str) -> None:
    """Interpreted, 16 bits: what adds up is as near as one call."""
    case = Case(causal=True, dtype="float16", backend="triton", bias="rows", slopes="heads")
    results = crew.run(cases.compute, case, scheme, "zigzag", 2)
    assert max(over_budget(case, results[0]).values()) <= 1.0
    assert_bytes(case, scheme, "zigzag", 2, [result["sent"] for result in results])


@pytest.mark.long
def test_a_rank_holds_what_the_formula_says() -> None:
    """Of others, at once: a ring has one block in use and one on its way, however many ranks there are."""
    crew = Crew(4)
    for case, (scheme, order) in itertools.product((Case(), Case(causal=True, nheads_k=4)), SHARDINGS):
        layout, sizes = layout_of(case, order, 4), sizes_of(case)
        formula = [cost(layout, sizes, scheme, rank).buffer_bytes for rank in range(4)]
        # of a query dout travels with it in the backward
        backward = 1 + (scheme == "reduce_scatter") * sizes.out_bytes // sizes.q_bytes
        found = crew.run(cases.held_of, case, scheme, order, 4)
        for (here, later), there in zip(found, formula, strict=True):
            assert here <= there, (scheme, order, found, formula)
            assert later <= backward * there, (scheme, order, found, formula)
        assert max(here for here, _ in found) == max(formula), (scheme, order, found, formula)
    crew.run(cases.release)
    crew.close()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_hundreds_of_cases_on_two_and_four_ranks() -> None:
    """Leaves benchmarks/results/context-parallel.jsonl: each case's largest error of the budget, and bytes."""
    crew = Crew(4)
    count, worst = 0, 0.0
    command = f"python -m pytest -m long {Path(__file__).relative_to(RESULTS.parents[1])}"
    settings = {"ranks": [2, 4], "schemes": list(SCHEMES), "orders": list(ORDERS), "threads": 1}
    with RecordWriter(RESULTS / "context-parallel.jsonl", settings, command) as writer:
        for name, case in long_cases():
            for size, (scheme, order) in itertools.product((2, 4), SHARDINGS):
                results = crew.run(cases.compute, case, scheme, order, size)
                ratios = over_budget(case, results[0])
                sent = [result["sent"] for result in results[:size]]
                layout, sizes = layout_of(case, order, size), sizes_of(case)
                assert_bytes(case, scheme, order, size, sent)
                tags = {"case": name, "ranks": size, "scheme": scheme, "order": order}
                tensor = max(ratios, key=lambda name: ratios[name])
                writer.write("over_budget", ratios[tensor], tensor=tensor, **tags)
                writer.write("sent", max(map(sum, sent)), unit="bytes", **tags)
                formula = max(cost(layout, sizes, scheme, rank).sent_bytes for rank in range(size))
                writer.write("formula", formula, unit="bytes", **tags)
                writer.write("softmax_ring_formula", softmax_ring_cost(layout, sizes).sent_bytes, unit="bytes", **tags)
                count, worst = count + 1, max(worst, ratios[tensor])
                assert worst <= 1.0, (name, size, scheme, order, ratios)
    crew.run(cases.release)
    crew.close()
    assert count >= 300


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_hundreds_of_drawn_cases_on_two_three_and_four_ranks() -> None:
    """Leaves benchmarks/results/context-parallel-drawn.jsonl: each case's largest error of the budget."""
    crew = Crew(4)
    command = f"python -m pytest -m long {Path(__file__).relative_to(RESULTS.parents[1])}"
    settings = {"ranks": [2, 3, 4], "cases": DRAWN, "threads": 1}
    with RecordWriter(RESULTS / "context-parallel-drawn.jsonl", settings, command) as writer:
        for number in range(DRAWN):
            found = assert_drawn(crew, number, (2, 3, 4))
            writer.write("over_budget", found.pop("ratio"), **found)
    crew.run(cases.release)
    crew.close()
