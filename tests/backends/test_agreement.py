"""Every backend against the float64 oracle, inside the one error budget: out, dq, dk, dv, db, dslopes.

The cases are drawn once, from a fixed seed, so that every value of every option meets every other; shapes are odd on
purpose. Tiles are small in most of the cases, so that a small problem has many, and as shipped in the rest. `make
test-long` has more cases, and larger ones.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from backends.here import NAMES, can, interpret_in_tiles

from flashsigmoid.backends import blocked
from flashsigmoid.backends.problem import make_problem
from flashsigmoid.testing import Options, assert_within_budget, compute, make_qkv, oracle, witness

# small enough for many tiles and for strips that do not divide them; one head, some heads, several sequences at once
TILE, STRIP, SLABS = (48, 40), 20, (1, 3, 100)
# one key; less than, exactly and one more than a small tile; a full tile and a bit; two odd multiples
SEQLENS = (1, 2, 47, 48, 49, 63, 64, 65, 127, 200)
HEAD_DIMS = (8, 32, 40, 64, 80, 96, 128, 192, 256)
OPTIONS: dict[str, tuple[Any, ...]] = {
    "batch": (1, 2, 3),
    "seqlen_q": SEQLENS,
    "seqlen_k": SEQLENS,
    "heads": ((2, 2), (8, 2), (4, 1), (1, 1)),
    "head_dim": HEAD_DIMS,
    "head_dim_v": HEAD_DIMS,
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "causal": (False, True),
    "window_size": ((None, None), (7, 3), (0, 0), (None, 5), (60, None)),
    "bias": (None, "zero", "-inf", "()", "(h,)", "(b,h)", "(b,h,i)"),
    "slopes": (None, "(h,)", "(b,h)"),
    "dropout_p": (0.0, 0.2),
    "q_offset": (None, 0, -5, 30),
    "score_std": (1.0, 3.0),
    "slab": (None, *SLABS),
}
PAIRS = {(a, x, b, y) for (a, xs), (b, ys) in itertools.combinations(OPTIONS.items(), 2) for x in xs for y in ys}
MOST_SCORES = 2**16  # of a drawn case, all heads together
MORE = 320


@dataclass(frozen=True, kw_only=True)
class Case:
    batch: int = 1
    seqlen_q: int
    seqlen_k: int
    heads: tuple[int, int]
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    causal: bool
    window_size: tuple[int | None, int | None] = (None, None)
    bias: str | None
    slopes: str | None
    dropout_p: float = 0.0
    q_offset: int | None = None
    score_std: float = 1.0
    slab: int | None = None  # heads per operation with tiles of TILE; None: tiles and heads as shipped

    def scores(self) -> int:
        return self.batch * self.heads[0] * self.seqlen_q * self.seqlen_k

    def pairs(self) -> set[tuple[str, Any, str, Any]]:
        values = [(name, getattr(self, name)) for name in OPTIONS]
        return {(*a, *b) for a, b in itertools.combinations(values, 2)}

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{dtype}-b{self.batch}-q{self.seqlen_q}-k{self.seqlen_k}-h{self.heads[0]}:{self.heads[1]}-d{self.head_dim}"
            f":{self.head_dim_v}-{'causal' if self.causal else 'full'}-w{self.window_size}-bias{self.bias}"
            f"-alibi{self.slopes}-p{self.dropout_p}-off{self.q_offset}-s{self.score_std:g}-slab{self.slab}"
        )

    def options(self, seed: int) -> Options:
        generator = torch.Generator().manual_seed(seed)
        side = torch.float64 if self.dtype == torch.float64 else torch.float32
        shapes = {
            "()": (),
            "(h,)": (self.heads[0],),
            "(b,h)": (self.batch, self.heads[0]),
            "(b,h,i)": (self.batch, self.heads[0], self.seqlen_q),
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


def draw(rng: random.Random, **given: Any) -> Case:
    return Case(**{name: rng.choice(values) for name, values in OPTIONS.items()} | given)


def draw_any(index: int) -> Case:
    """Of any size, the plain values of options more often than the others."""
    rng = random.Random(f"agreement {index}")
    heads, head_dim = (rng.choice(OPTIONS[name]) for name in ("heads", "head_dim"))
    return Case(
        heads=heads,
        head_dim=head_dim,
        batch=rng.choice(OPTIONS["batch"]),
        seqlen_q=rng.choice(SEQLENS),
        seqlen_k=rng.choice(SEQLENS),
        head_dim_v=rng.choice((head_dim, head_dim, rng.choice(HEAD_DIMS))),
        dtype=OPTIONS["dtype"][index % 4],
        causal=rng.random() < 0.5,
        window_size=rng.choice(((None, None), *OPTIONS["window_size"])),
        bias=rng.choice(OPTIONS["bias"]),
        slopes=rng.choice(OPTIONS["slopes"]),
        dropout_p=rng.choice((0.0, *OPTIONS["dropout_p"])),
        q_offset=rng.choice((None, *OPTIONS["q_offset"])),
        score_std=rng.choice(OPTIONS["score_std"]),
        slab=rng.choice((None, *OPTIONS["slab"])),
    )


@functools.cache
def drawn() -> tuple[Case, ...]:
    """Of some small random cases with a missing pair the one that has most of them, until all pairs are there."""
    rng, missing, cases = random.Random("agreement"), set(PAIRS), []
    while missing:
        a, x, b, y = min(missing, key=str)
        some = (draw(rng, **{a: x, b: y}) for _ in itertools.count())
        small = itertools.islice((case for case in some if case.scores() <= MOST_SCORES), 50)
        cases.append(max(small, key=lambda case: len(case.pairs() & missing)))
        missing -= cases[-1].pairs()
    return tuple(cases)


def draws(case: Case) -> int:
    """Of the witness: in float32 one element may decide the maximum, of few scores it does."""
    if case.dtype != torch.float32:
        return 2
    return 32 if case.scores() <= 2**10 else 8


def check(case: Case, seed: int) -> None:
    """Every backend on one case, beside one oracle and one witness."""
    tensors = make_qkv(
        case.batch,
        case.seqlen_q,
        case.seqlen_k,
        *case.heads,
        case.head_dim,
        case.head_dim_v,
        dtype=case.dtype,
        seed=seed,
        score_std=case.score_std,
    )
    options = case.options(seed)
    options.setdefault("sigmoid_bias", -math.log(case.seqlen_k))
    expected = oracle(*tensors, **options)
    seen = witness(*tensors, draws=draws(case), **options)
    problem = make_problem(*tensors[:3], sigmoid_bias=0.0)
    for backend in (name for name in NAMES if can(name, problem)):
        actual = compute(*tensors, backend=backend, **options)
        assert actual.keys() == expected.keys() == seen.keys()
        for name, result in actual.items():
            assert_within_budget(f"{backend} {name} of {case}", result, expected[name], seen[name])


def check_in_small_tiles(case: Case, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.slab is not None:
        monkeypatch.setattr(blocked, "_tile", lambda problem: TILE)
        monkeypatch.setattr(blocked, "_strip", lambda problem: STRIP)
        monkeypatch.setattr(blocked, "_scores", lambda problem: case.slab * TILE[0] * TILE[1])
        interpret_in_tiles(monkeypatch, 32, 64 if case.slab == 1 else 16, has_descriptors=index % 3 > 0)
    check(case, index)


@pytest.mark.parametrize("index", range(len(drawn())))
def test_drawn_cases(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_in_small_tiles(drawn()[index], index, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("index", range(MORE))
def test_more_and_larger_cases(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_in_small_tiles(draw_any(index), index, monkeypatch)


def test_drawn_cases_cover_every_pair_of_option_values() -> None:
    assert set().union(*(case.pairs() for case in drawn())) == PAIRS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(513, 513), (513, 770), (770, 513), (1, 1030)])
def test_tiles_as_shipped_across_their_edges(dtype, causal, seqlen_q, seqlen_k) -> None:
    """Those of plain torch are 512 x 256, the interpreter's 128 x 128."""
    case = Case(
        seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads=(2, 1), head_dim=16, head_dim_v=16, dtype=dtype, causal=causal,
        bias="(h,)", slopes="(h,)",
    )  # fmt: skip
    check(case, seed=7)
