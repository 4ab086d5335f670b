"""The formulas of the Triton backend: their PTX, executed here instruction by instruction, against float64."""

from __future__ import annotations

import math
import re
import struct

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from flashsigmoid.backends.formula import LOG2E, Formula, make_formula
from flashsigmoid.backends.triton.sigmoid import sigmoid

LANES = 32


def execute(formula: Formula, y: np.ndarray) -> tuple[np.ndarray, bool]:
    """Run a formula's text on (pack, LANES) float32, exactly rounded functions; the results, and whether it jumped."""
    registers: dict[str, np.ndarray] = {
        f"${formula.pack + i}": y[i].view(np.uint32).copy() for i in range(formula.pack)
    }
    text = re.sub(r"\.reg [^;]*;", "", formula.asm.strip("{} "))
    lines = [line.strip() for line in re.split(r";|(?<=:)\s", text) if line.strip()]
    predicate, jumped, at = False, False, 0

    def bits(word: str) -> np.ndarray:
        if word.startswith("0f"):
            return np.full(LANES, int(word[2:], 16), np.uint32)
        if word.startswith("0x") or word.lstrip("-").isdigit():
            return np.full(LANES, int(word, 0) & 0xFFFFFFFF, np.uint32)
        return registers[word]

    def number(word: str) -> np.ndarray:
        return bits(word).view(np.float32).astype(np.float64)

    def put(word: str, value: np.ndarray) -> None:
        registers[word] = np.asarray(value).astype(np.float32).view(np.uint32)

    while at < len(lines):
        line, at = lines[at], at + 1
        if line.endswith(":"):
            continue
        name, _, rest = line.partition(" ")
        words = [word.strip() for word in rest.split(",")]
        if name == "@wide":
            if predicate:
                jumped, at = True, lines.index("WIDE:")
        elif name == "bra.uni":
            at = lines.index(f"{words[0]}:")
        elif name.startswith("ex2"):
            put(words[0], np.exp2(number(words[1])))
        elif name.startswith("rcp"):
            put(words[0], 1.0 / number(words[1]))
        elif name.startswith("tanh"):
            put(words[0], np.tanh(number(words[1])))
        elif name == "abs.f32":
            put(words[0], np.abs(number(words[1])))
        elif name == "max.f32":
            put(words[0], np.fmax(number(words[1]), number(words[2])))
        elif name.startswith("neg"):
            put(words[0], -number(words[1]))
        elif name.startswith("mov"):
            registers[words[0]] = bits(words[1]).copy()
        elif name == "min.u32":
            registers[words[0]] = np.minimum(bits(words[1]), bits(words[2]))
        elif name.startswith("min"):  # without .NaN the other operand is taken
            least = np.minimum if ".NaN" in name else np.fmin
            put(words[0], least(number(words[1]), number(words[2])))
        elif name.startswith("mul"):
            put(words[0], number(words[1]) * number(words[2]))
        elif name.startswith("add"):
            put(words[0], number(words[1]) + number(words[2]))
        elif name.startswith("fma"):
            put(words[0], number(words[1]) * number(words[2]) + number(words[3]))
        elif name.startswith("setp.lt.u32"):
            registers[words[0]] = bits(words[1]) < bits(words[2])
        elif name == "setp.gt.f32":
            registers[words[0]] = number(words[1]) > number(words[2])
        elif name.startswith("vote"):
            predicate = bool(registers[words[1]].any())
        else:
            raise AssertionError(f"unknown instruction {line}")
    return np.stack([registers[f"${i}"].view(np.float32) for i in range(formula.pack)]), jumped


def weights(formula: Formula, x: np.ndarray) -> tuple[np.ndarray, bool]:
    """sigmoid(x) by the formula, in its own units, without its gain."""
    y = (x * formula.unit + formula.shift).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        p, jumped = execute(formula, y)
    return p.astype(np.float64) / formula.gain, jumped


def scores(low: float, high: float, pack: int) -> np.ndarray:
    return np.linspace(low, high, pack * LANES).reshape(pack, LANES)


# the largest relative error of a weight inside a series' range
SERIES = {
    ("narrow", "fwd", False): 7.2e-4,
    ("narrow", "fwd", True): 6e-5,
    ("narrow", "bwd", False): 1e-3,
    ("narrow", "bwd", True): 6.2e-5,
    ("wide", "fwd", False): 4.5e-4,
    ("wide", "bwd", True): 2e-6,
    ("fine", "fwd", False): 1.2e-6,
    ("fine", "bwd", True): 1.2e-6,
}


@pytest.mark.parametrize("pack", [2, 8, 32])
@pytest.mark.parametrize(("key", "allowed"), SERIES.items(), ids=str)
def test_a_series_is_as_good_as_it_says_and_leaves_its_range_exactly(key, allowed, pack) -> None:
    name, kind, is_float16 = key
    formula = make_formula(name, kind, is_float16, pack, has_asm=True)
    edge = (formula.threshold - formula.shift) / LOG2E
    x = scores(-25.0, edge, pack)
    p, jumped = weights(formula, x)
    assert not jumped
    error = np.abs(p * (1.0 + np.exp(-x)) - 1.0)
    # a score's own rounding in float32 is 25 ln 2 2^-24
    assert error.max() <= allowed + 2e-6
    assert error.max() > allowed / 10  # the bound is not a loose one

    # one score beyond the edge anywhere, of either sign of y, takes the whole warp to the exact formula
    for beyond in (edge + 1e-3, -1e-30, 0.0, 1e-30, 3.0, 500.0):
        x[pack // 2, 11] = beyond
        p, jumped = weights(formula, x)
        assert jumped
        assert np.abs(p * (1.0 + np.exp(-x)) - 1.0).max() < 4e-6


@pytest.mark.parametrize("pack", [2, 8, 32])
def test_tanh_is_left_for_scores_that_it_is_not_good_for(pack) -> None:
    """Not the error of the hardware's tanh, which is exact here: which scores it gets."""
    formula = make_formula("high", "fwd", False, pack, has_asm=True)
    x = scores(-6.99, 6.99, pack)
    p, jumped = weights(formula, x)
    assert not jumped
    assert np.abs(p * (1.0 + np.exp(-x)) - 1.0).max() < 1e-4  # cancellation near x = -7
    for beyond in (-7.01, -30.0, -np.inf, 7.01, 500.0):
        x[pack // 2, 11] = beyond
        p, jumped = weights(formula, x)
        assert jumped
        seen = x > -np.inf
        assert np.abs(p[seen] * (1.0 + np.exp(-x[seen])) - 1.0).max() < 6e-6
        assert not p[~seen].any()


@pytest.mark.parametrize("name", ["pair", "narrow", "wide", "high"])
def test_every_score_has_its_weight(name) -> None:
    """Zeros at -inf, ones at large scores, never a NaN, beside any other score."""
    formula = make_formula(name, "fwd", False, 2, has_asm=True)
    extreme = np.array([-np.inf, -1e30, -2000.0, -100.0, -5.0, 0.0, 20.0, 60.0, 90.0, 2000.0, 1e30])
    for first in extreme:
        x = np.stack([np.full(LANES, first), np.resize(extreme, LANES)])
        p, _ = weights(formula, x)
        with np.errstate(over="ignore"):
            exact = 1.0 / (1.0 + np.exp(-x))
        assert not p[x == -np.inf].any()
        np.testing.assert_allclose(p, exact, rtol=1.1e-3, atol=1e-37)


def test_not_a_number_stays_one() -> None:
    for name in ("pair", "narrow", "wide", "high"):
        pack = 2 if name == "pair" else 4
        formula = make_formula(name, "fwd", False, pack, has_asm=True)
        x = np.full((pack, LANES), -9.0)
        x[1, 3] = np.nan
        p, _ = weights(formula, x)
        assert np.isnan(p[1, 3])
        assert np.isfinite(np.delete(p, 3, axis=1)).all()


def test_the_threshold_is_a_bit_pattern_of_the_text() -> None:
    formula = make_formula("narrow", "fwd", False, 2, has_asm=True)
    assert struct.pack(">f", -4.0).hex().upper() in formula.asm


def test_a_planted_fault_is_caught() -> None:
    """A check that sees only the first score of a thread."""
    formula = make_formula("wide", "fwd", False, 8, has_asm=True)
    broken = Formula(**{**vars(formula), "asm": re.sub(r"min\.u32 x1,x1,t;", "", formula.asm)})
    x = scores(-25.0, -5.0, 8)
    x[1, 0] = 2.0
    assert weights(formula, x)[1]
    assert not weights(broken, x)[1]


@triton.jit
def full_kernel(x, out, FORMULA: tl.constexpr):
    i = tl.arange(0, 1024)
    tl.store(out + i, sigmoid(tl.load(x + i), FORMULA))


@pytest.mark.parametrize(("key", "allowed"), SERIES.items(), ids=str)
def test_a_series_without_ptx_is_the_same(key, allowed) -> None:
    """What AMD and the interpreter evaluate, inside and outside of its range."""
    formula = make_formula(*key, 8, has_asm=False)
    x, out = torch.linspace(-25.0, 20.0, 1024), torch.empty(1024)
    full_kernel[(1,)](x * formula.unit + formula.shift, out, formula)
    exact = torch.sigmoid(x.double())
    # a score's own rounding in float32, as above
    assert (out.double() / formula.gain / exact - 1.0).abs().max() <= allowed + 4e-6


def test_the_full_formula_from_one_end_to_the_other() -> None:
    x = torch.linspace(-86.0, 86.0, 1024)
    out = torch.empty(1024)
    formula = make_formula("full", "fwd", False, 2, has_asm=False)
    full_kernel[(1,)](x, out, formula)
    exact = torch.sigmoid(x.double())
    # the roundings of an exponential, a sum and a quotient
    assert (out.double() / exact - 1.0).abs().max() <= 4.0 * 2.0**-23
    x[:5] = torch.tensor([-math.inf, -1e30, 1e30, math.inf, math.nan])
    full_kernel[(1,)](x, out, formula)
    assert torch.equal(out[:4], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert out[4].isnan()
