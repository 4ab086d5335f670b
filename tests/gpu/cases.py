"""Calls as plain data for the tests of kernels, drawn so that every two values of options meet, and their check.

FLASHSIGMOID_FUZZ_S is how many seconds each random test goes on, FLASHSIGMOID_FUZZ_SEED what it printed when it failed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import random
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashsigmoid.testing import Options, assert_within_budget, compute, make_qkv, oracle, witness

# tests/gpu/conftest.py skips all of this without a GPU; the CPU is for trying the tests themselves, interpreted
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32)
BIASES = (None, 0.0, -math.inf, "()", "(h,)", "(b,h)", "(b,h,i)")
SLOPES = (None, "(h,)", "(b,h)")
HEADS = ((8, 8), (8, 2), (8, 1))
LOADABLE = ("contiguous", "heads first", "packed heads")  # rows that the tensor memory accelerator can load
LAYOUTS = (*LOADABLE, "off by one channel", "every other channel", "broadcast")


def lay_out(layout: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """q, k, v, dout of the same shapes in other strides, with NaN between the values; "broadcast" repeats some."""

    def strided(x: Tensor) -> Tensor:
        batch, seqlen, nheads, dim = x.shape
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "packed heads":
            return x.new_full((batch, seqlen, 3 * nheads, dim), math.nan)[:, :, nheads : 2 * nheads].copy_(x)
        if layout == "off by one channel":
            return x.new_full((batch, seqlen, nheads, dim + 8), math.nan)[..., 1 : dim + 1].copy_(x)
        if layout == "every other channel":
            return x.new_full((batch, seqlen, nheads, 2 * dim), math.nan)[..., ::2].copy_(x)
        assert layout in ("contiguous", "broadcast"), layout
        return x

    q, k, v, dout = (strided(x) for x in tensors)
    if layout == "broadcast":  # a shared prefix, and the gradient of a sum
        return q, k[:1].expand_as(k), v[:1].expand_as(v), dout[:1, :1, :1, :1].expand_as(dout)
    return q, k, v, dout


def check(
    what: object, tensors: tuple[Tensor, ...], options: Options, sigmoid: str = "auto", draws: int | None = None
) -> None:
    """Everything that a forward and a backward give, inside the budget."""
    q, k, v, dout = tensors
    # the one largest score or result decides the maximum, and a few draws may be lucky, of few rows the more;
    # those of float32, which add one term after the other, take longest and are furthest from the budget
    small = min(q.shape[1], k.shape[1])
    draws = draws or (32 if small < 16 else 4 if q.dtype == torch.float32 else 16 if small < 128 else 8)
    expected, seen = oracle(q, k, v, dout, **options), witness(q, k, v, dout, draws=draws, **options)
    given: dict[str, Any] = {**options, "sigmoid": sigmoid}
    for name, result in compute(q, k, v, dout, backend="triton", **given).items():
        assert_within_budget(f"{name} of {what}", result, expected[name], seen[name])


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call as plain data; `drop_at` is the origin of a call with dropout."""

    batch: int = 1
    seqlen_q: int = 113
    seqlen_k: int = 203
    heads: tuple[int, int] = (8, 2)
    head_dims: tuple[int, int] = (64, 64)
    dtype: torch.dtype = torch.bfloat16
    causal: bool = False
    window_size: tuple[int | None, int | None] = (None, None)
    bias: float | str | None = None
    slopes: str | None = None
    drop_at: tuple[int, int, int, int] | None = None
    q_offset: int | None = None
    sigmoid: str = "auto"
    layout: str = "contiguous"
    score_mean: float = 0.0
    score_std: float = 1.0

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))

    @property
    def is_legal(self) -> bool:
        """Whether the formula that was asked for is accurate there: tanh is where the weights that matter are large."""
        is_wide = self.score_std >= 3.0 and self.window_size == (None, None) and min(self.seqlen_q, self.seqlen_k) > 60
        has_large = self.score_mean == 0.0 and self.seqlen_q > 1
        return self.sigmoid != "fast" or (self.slopes is None and (has_large or is_wide))

    def pairs(self, names: tuple[str, ...]) -> set[tuple[str, Any, str, Any]]:
        values = [(name, getattr(self, name)) for name in names]
        return {(*a, *b) for a, b in itertools.combinations(values, 2)}

    def tensors(self, seed: int) -> tuple[Tensor, ...]:
        made = make_qkv(
            self.batch, self.seqlen_q, self.seqlen_k, *self.heads, *self.head_dims, dtype=self.dtype, device=DEVICE,
            seed=seed, score_std=self.score_std,
        )  # fmt: skip
        return lay_out(self.layout, made)

    def options(self, seed: int) -> Options:
        generator = torch.Generator().manual_seed(seed)
        nheads = self.heads[0]
        shapes: dict[Any, tuple[int, ...]] = {
            "()": (),
            "(h,)": (nheads,),
            "(b,h)": (self.batch, nheads),
            "(b,h,i)": (self.batch, nheads, self.seqlen_q),
        }
        options = Options(causal=self.causal, window_size=self.window_size)
        if isinstance(self.bias, str):
            bias = torch.randn(shapes[self.bias], generator=generator) - 4.0
            options["sigmoid_bias"] = (bias + self.score_mean).to(DEVICE)
        else:
            options["sigmoid_bias"] = self.score_mean + (-math.log(self.seqlen_k) if self.bias is None else self.bias)
        if self.slopes is not None:
            options["alibi_slopes"] = (torch.rand(shapes[self.slopes], generator=generator) * 0.2).to(DEVICE)
        if self.drop_at is not None:
            seed_tensor = torch.tensor([seed * 2**33 - 11], device=DEVICE)
            options |= Options(dropout_p=0.2, seed=seed_tensor, origin=self.drop_at)
        if self.q_offset is not None:
            options["q_offset"] = self.q_offset
        return options

    def check(self, seed: int) -> None:
        check(self, self.tensors(seed), self.options(seed), self.sigmoid)


# one row; less than, exactly and more than a block; several blocks and a bit
SEQLENS = (1, 63, 64, 65, 113, 203, 256, 400)
PAIRED: dict[str, tuple[Any, ...]] = {
    "dtype": DTYPES,
    "causal": (False, True),
    "window_size": ((None, None), (70, 30), (0, 0), (None, 5), (100, None)),
    "bias": BIASES,
    "slopes": SLOPES,
    "drop_at": (None, (0, 0, 0, 0), (3, 1, 5, 6)),
    "q_offset": (None, 0, -37, 150),
    "heads": HEADS,
    "sigmoid": ("auto", "exact", "fast"),
    "layout": LAYOUTS,
    "score_mean": (0.0, -4.0),
    "score_std": (1.0, 3.0),
}
NEVER = {("slopes", slopes, "sigmoid", "fast") for slopes in SLOPES if slopes is not None}
CASES = 150


def all_pairs() -> set[tuple[str, Any, str, Any]]:
    pairs = set()
    for (a, values), (b, others) in itertools.combinations(PAIRED.items(), 2):
        pairs |= {(a, x, b, y) for x in values for y in others}
    return pairs - NEVER


@functools.cache
def drawn() -> tuple[Case, ...]:
    """Of fifty random cases the one that has most new pairs; when all pairs are there, any."""
    rng = random.Random("triton")
    missing = all_pairs()

    def candidate() -> Case:
        while True:
            case = Case(
                batch=rng.choice((1, 2, 3)),
                seqlen_q=rng.choice(SEQLENS),
                seqlen_k=rng.choice(SEQLENS),
                head_dims=rng.choice(((64, 64), (128, 128), (40, 40), (64, 128), (96, 32), (59, 64))),
                **{name: rng.choice(values) for name, values in PAIRED.items()},
            )
            if case.is_legal:
                return case

    cases: list[Case] = []
    for _ in range(CASES):
        some = [candidate() for _ in range(50 if missing else 1)]
        cases.append(max(some, key=lambda case: len(case.pairs(tuple(PAIRED)) & missing)))
        missing -= cases[-1].pairs(tuple(PAIRED))
    return tuple(cases)


def time_is_left() -> Iterator[random.Random]:
    """Random generators, each of its own printed seed, until FLASHSIGMOID_FUZZ_S seconds are over."""
    seed = int(os.environ.get("FLASHSIGMOID_FUZZ_SEED", secrets.randbits(32)))
    end = time.monotonic() + float(os.environ.get("FLASHSIGMOID_FUZZ_S", "60"))
    print(f"FLASHSIGMOID_FUZZ_SEED={seed}")
    for count in itertools.count():
        yield random.Random(f"{seed} {count}")
        if time.monotonic() > end:
            print(f"{count + 1} rounds")
            return


def random_class(rng: random.Random, dtype: torch.dtype) -> dict[str, Any]:
    """What kernels are compiled for."""
    head_dim = rng.randint(1, 256)
    return {
        "dtype": dtype,
        "head_dims": (head_dim, rng.choice((head_dim, head_dim, rng.randint(1, 256)))),
        "causal": rng.random() < 0.5,
        "window_size": rng.choice(((None, None), (None, None), (rng.randint(0, 300), rng.choice((None, 9))))),
        "slopes": rng.choice(SLOPES),
        "sigmoid": rng.choice(("auto", "exact", "fast")),
        "drop_at": rng.choice((None, None, (1, 2, 3, rng.randint(0, 9)))),
    }


def for_hopper(case: Case) -> Case:
    """A case for the Triton kernels, as near as Hopper's come to it."""
    return dataclasses.replace(
        case,
        dtype=torch.bfloat16 if case.dtype == torch.float32 else case.dtype,
        head_dims=tuple(-(-dim // 8) * 8 for dim in case.head_dims),
        drop_at=None,
        layout=case.layout if case.layout in LOADABLE else "contiguous",
    )
