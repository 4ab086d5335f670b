"""Every backend against the float64 oracle, inside the one error budget: out, dq, dk, dv, db, dslopes.

The cases are drawn once, from a fixed seed, so that every value of every option meets every other; shapes are odd on
purpose. Tiles are small in half of the cases, so that a small problem has many, and as shipped in the rest.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from backends.here import NAMES, can, interpret_in_tiles

from flashsigmoid.backends import blocked
from flashsigmoid.backends.problem import make_problem
from flashsigmoid.testing import Options, assert_within_budget, compute, make_qkv, oracle, witness

# one key; less than, exactly and one more than a small tile; a full tile and a bit; two odd multiples
SEQLENS = (1, 2, 47, 48, 49, 63, 64, 65, 127, 200)
HEAD_DIMS = (8, 32, 40, 64, 80, 96, 128, 192, 256)
HEADS = ((2, 2), (8, 2), (4, 1), (1, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WINDOWS = ((None, None), (7, 3), (0, 0), (None, 5), (60, None))
BIASES = (None, "zero", "-inf", "()", "(h,)", "(b,h)", "(b,h,i)")
SCORE_STDS = (1.0, 3.0)
# small enough for many tiles and for strips that do not divide them; one head, some heads, several sequences at once
TILE, STRIP, SLABS = (48, 40), 20, (1, 3, 100)
CASES = 320


@dataclass(frozen=True)
class Case:
    batch: int
    seqlen_q: int
    seqlen_k: int
    nheads: int
    nheads_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    causal: bool
    window_size: tuple[int | None, int | None]
    bias: str | None
    slopes: str | None
    dropout_p: float
    q_offset: int | None
    score_std: float
    slab: int | None  # heads per operation with tiles of TILE; None: tiles and heads as shipped

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{dtype}-b{self.batch}-q{self.seqlen_q}-k{self.seqlen_k}-h{self.nheads}:{self.nheads_k}-d{self.head_dim}"
            f":{self.head_dim_v}-{'causal' if self.causal else 'full'}-w{self.window_size}-bias{self.bias}"
            f"-alibi{self.slopes}-p{self.dropout_p}-off{self.q_offset}-s{self.score_std:g}-slab{self.slab}"
        )

    def options(self, seed: int) -> Options:
        generator = torch.Generator().manual_seed(seed)
        side = torch.float64 if self.dtype == torch.float64 else torch.float32
        shapes = {
            "()": (),
            "(h,)": (self.nheads,),
            "(b,h)": (self.batch, self.nheads),
            "(b,h,i)": (self.batch, self.nheads, self.seqlen_q),
        }
        options = Options(causal=self.causal, window_size=self.window_size)
        if self.bias in shapes:
            options["sigmoid_bias"] = torch.randn(shapes[self.bias], generator=generator, dtype=side) - 4.0
        elif self.bias is not None:
            options["sigmoid_bias"] = {"zero": 0.0, "-inf": float("-inf")}[self.bias]
        if self.slopes is not None:
            options["alibi_slopes"] = torch.rand(shapes[self.slopes], generator=generator, dtype=side) * 0.2
        if self.dropout_p:
            options["dropout_p"] = self.dropout_p
            options["seed"] = torch.tensor([seed * 2**33 + 11])
            options["origin"] = (3, 1, 5, 6)
        if self.q_offset is not None:
            options["q_offset"] = self.q_offset
        return options


def draw(index: int) -> Case:
    rng = random.Random(f"agreement {index}")
    nheads, nheads_k = rng.choice(HEADS)
    head_dim = rng.choice(HEAD_DIMS)
    return Case(
        batch=rng.choice((1, 2, 3)),
        seqlen_q=rng.choice(SEQLENS),
        seqlen_k=rng.choice(SEQLENS),
        nheads=nheads,
        nheads_k=nheads_k,
        head_dim=head_dim,
        head_dim_v=rng.choice((head_dim, head_dim, rng.choice(HEAD_DIMS))),
        dtype=DTYPES[index % len(DTYPES)],
        causal=rng.random() < 0.5,
        window_size=rng.choice((WINDOWS[0], *WINDOWS)),
        bias=rng.choice(BIASES),
        slopes=rng.choice((None, "(h,)", "(b,h)")),
        dropout_p=rng.choice((0.0, 0.0, 0.2)),
        q_offset=rng.choice((None, None, 0, -5, 30)),
        score_std=rng.choice(SCORE_STDS),
        slab=rng.choice((None, None, *SLABS)),
    )


def check(case: Case, seed: int) -> None:
    """Every backend on one case, beside one oracle and one witness."""
    tensors = make_qkv(
        case.batch,
        case.seqlen_q,
        case.seqlen_k,
        case.nheads,
        case.nheads_k,
        case.head_dim,
        case.head_dim_v,
        dtype=case.dtype,
        seed=seed,
        score_std=case.score_std,
    )
    options = case.options(seed)
    options.setdefault("sigmoid_bias", -math.log(case.seqlen_k))
    expected = oracle(*tensors, **options)
    # float32 has heavy tails: the one largest score decides the maximum
    seen = witness(*tensors, draws=8 if case.dtype == torch.float32 else 2, **options)
    problem = make_problem(
        *tensors[:3], bias=None, slopes=None, sigmoid_bias=0.0, scale=None, causal=False, window_left=None,
        window_right=None, q_offset=None, dropout_p=0.0, origin=(0, 0, 0, 0), sigmoid="auto",
    )  # fmt: skip
    for backend in (name for name in NAMES if can(name, problem)):
        actual = compute(*tensors, backend=backend, **options)
        assert actual.keys() == expected.keys() == seen.keys()
        for name, result in actual.items():
            assert_within_budget(f"{backend} {name} of {case}", result, expected[name], seen[name])


@pytest.mark.parametrize("index", range(CASES))
def test_drawn_cases(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(index)
    if case.slab is not None:
        monkeypatch.setattr(blocked, "_tile", lambda problem: TILE)
        monkeypatch.setattr(blocked, "_strip", lambda problem: STRIP)
        monkeypatch.setattr(blocked, "_scores", lambda problem: case.slab * TILE[0] * TILE[1])
        interpret_in_tiles(monkeypatch, 32, 64 if case.slab == 1 else 16, has_descriptors=index % 3 > 0)
    check(case, index)


def test_drawn_cases_cover_every_pair_of_option_values() -> None:
    fields = (
        "dtype",
        "causal",
        "window_size",
        "bias",
        "slopes",
        "dropout_p",
        "q_offset",
        "nheads_k",
        "slab",
    )
    values = {name: {getattr(draw(i), name) for i in range(CASES)} for name in fields}
    cases = [draw(i) for i in range(CASES)]
    missing = [
        (first, a, second, b)
        for first in fields
        for second in fields
        if first < second
        for a in values[first]
        for b in values[second]
        if not any(getattr(case, first) == a and getattr(case, second) == b for case in cases)
    ]
    assert not missing
    assert values["window_size"] == set(WINDOWS)
    assert values["bias"] == set(BIASES)
    assert values["dtype"] == set(DTYPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1000, 1000), (513, 1100), (1100, 513), (1, 1030)])
def test_tiles_as_shipped_across_their_edges(dtype, causal, seqlen_q, seqlen_k) -> None:
    case = Case(
        1, seqlen_q, seqlen_k, 2, 1, 64, 64, dtype, causal, (None, None), "(h,)", "(h,)", 0.0, None, 1.0, None
    )  # fmt: skip
    check(case, seed=7)
