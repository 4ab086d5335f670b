"""Seven formulas of sigmoid(x) for kernels on a GPU, of y = log2(e) x: which to take, and its text in PTX.

Costs and errors: docs/numerics.md.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch

from .problem import Problem

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Formula:
    """What a kernel is compiled with.

    The kernel evaluates `gain * sigmoid(x)` from `unit * x + shift`. Without `asm` (the interpreter, AMD) the same
    algebra runs element by element.
    """

    name: str  # "full", "pair", "fine", "narrow", "wide", "high", "tanh"
    unit: float  # of the scores: log2(e), 1 for full, or 0.5 for tanh and high
    gain: float = 1.0
    threshold: float = 0.0  # a series holds where y + shift is at most this; high: tanh where |y| is
    terms: tuple[float, ...] = ()  # c: e (1 + c1 e + c2 e^2 + ...), e = 2^y
    asm: str = ""
    constraints: str = ""
    pack: int = 1

    @property
    def shift(self) -> float:
        return math.log2(self.gain)


# (threshold, gain, terms) of series for 1 / (1 + e), with their relative error. Narrow: e' - e'^2 with e' = gain e, off
# by at most (1 - gain)^2 / (4 gain), 7e-4 for bfloat16 and 6e-5 for float16; the backward takes p - p^2 of it, so there
# the gain is 1 and the error up to 4^threshold. Wide: the least largest error on 0 < e <= 1/4, 4.4e-4 and 1.2e-6. Fine:
# on 0 < e <= 1/32, 1.1e-6.
_WIDE = {False: (-0.98042166, 0.72728918), True: (-0.99984406, 0.99378353, -0.92057201, 0.57202391)}
_FINE = (-0.99959702, 0.95791844)
_HIGH = 3.5  # of |x| / 2: the hardware's tanh gives weights within 1.3e-4 down to x = -7, and 1e-2 below -8
_SERIES = {
    ("narrow", "fwd", False): (-4.0, 0.948, (-1.0,)),
    ("narrow", "fwd", True): (-6.0, 0.985, (-1.0,)),
    ("narrow", "bwd", False): (-5.0, 1.0, (-1.0,)),
    ("narrow", "bwd", True): (-7.0, 1.0, (-1.0,)),
    **{("wide", kind, half): (-2.0, 1.0, _WIDE[half]) for kind in ("fwd", "bwd") for half in (False, True)},
    **{("fine", kind, half): (-5.0, 1.0, _FINE) for kind in ("fwd", "bwd") for half in (False, True)},
}


def make_formula(
    name: str, kind: str, is_float16: bool, pack: int, has_asm: bool, *, early: int | None = None
) -> Formula:
    """The formula `name` for `kind` "fwd" or "bwd", of `pack` scores that a thread evaluates together.

    Of a series' exponentials `early`, by default all, are asked for before the warp votes on its range.
    """
    if name == "full" or (name in ("pair", "high") and not has_asm):
        return Formula("full", 1.0)
    if name == "tanh":
        return Formula("tanh", 0.5, asm="tanh.approx.f32 $0, $1;" if has_asm else "", constraints="=f,f")
    if name == "pair":
        return Formula(
            "pair", LOG2E, asm=_block(_exponentials(2) + _pairs(2, 1.0)), constraints=_constraints(2), pack=2
        )
    if name == "high":
        asm = _tanh_or_pairs(pack)
        return Formula("high", 0.5, threshold=_HIGH, asm=asm, constraints=_constraints(pack), pack=pack)
    threshold, gain, terms = _SERIES[name, kind, is_float16]
    if not has_asm:
        return Formula(name, LOG2E, gain, threshold, terms)
    asm = _series_or_pairs(pack, pack if early is None else early, threshold, gain, terms)
    return Formula(name, LOG2E, gain, threshold, terms, asm, _constraints(pack), pack)


def _bits(x: float) -> str:
    return struct.pack(">f", x).hex().upper()


def _constraints(pack: int) -> str:
    return ",".join(["=&f"] * pack + ["f"] * pack)


def _block(body: str) -> str:
    return "{ .reg .f32 a,b,m,m0,m1,m2,m3; .reg .b32 t,x0,x1,x2,x3; .reg .pred wide; " + body + " }"


def _exponentials(pack: int) -> str:
    """$i = 2^y_i, at most 2^62: the product of two denominators stays finite."""
    return "".join(f"min.ftz.NaN.f32 a,${pack + i},0f42780000; ex2.approx.ftz.f32 ${i},a; " for i in range(pack))


def _pairs(pack: int, gain: float) -> str:
    """Two weights by one reciprocal, in place: p = e B r, q = f A r with A = 1 + e, B = 1 + f, r = 1 / (A B)."""
    text = ""
    for i in range(0, pack, 2):
        e, f, c = f"${i}", f"${i + 1}", _bits(1.0 / gain)
        text += f"fma.rn.ftz.f32 a,{e},0f{c},0f3F800000; fma.rn.ftz.f32 b,{f},0f{c},0f3F800000; "
        text += f"mul.ftz.f32 m,a,b; rcp.approx.ftz.f32 m,m; mul.ftz.f32 b,{e},b; mul.ftz.f32 a,{f},a; "
        text += f"mul.ftz.f32 {e},b,m; mul.ftz.f32 {f},a,m; "
    return text


def _series_or_pairs(pack: int, early: int, threshold: float, gain: float, terms: tuple[float, ...]) -> str:
    """The series if every score of the warp is at most `threshold`, else pairs of the same e: one of them is executed.

    As unsigned integers negative floats grow with their magnitude and stand above all positive ones, so the least of
    the bits belongs to the largest score. Exponentials that come after the vote have the series of the others to run
    beside.
    """
    exponentials = [f"ex2.approx.ftz.f32 ${i},${pack + i}; " for i in range(pack)]
    late = "".join(exponentials[early:])
    text = "".join(f"mov.b32 x{i},-1; " for i in range(4))
    for i in range(pack):
        text += exponentials[i] if i < early else ""
        text += f"mov.b32 t,${pack + i}; min.u32 x{i % 4},x{i % 4},t; "
    text += "min.u32 x0,x0,x1; min.u32 x2,x2,x3; min.u32 x0,x0,x2; "
    text += f"setp.lt.u32 wide,x0,0x{_bits(threshold)}; vote.sync.any.pred wide,wide,0xffffffff; @wide bra WIDE; "
    text += late
    for i in (*range(early, pack), *range(early)):
        if terms == (-1.0,):
            text += f"neg.f32 a,${i}; fma.rn.ftz.f32 ${i},a,${i},${i}; "
            continue
        *rest, highest = terms
        text += f"mov.f32 a,0f{_bits(highest)}; "
        text += "".join(f"fma.rn.ftz.f32 a,a,${i},0f{_bits(c)}; " for c in reversed(rest))
        text += f"mul.ftz.f32 a,a,${i}; fma.rn.ftz.f32 ${i},a,${i},${i}; "
    text += "bra.uni DONE; WIDE: " + late
    text += "".join(f"min.ftz.NaN.f32 ${i},${i},0f5E800000; " for i in range(pack))  # 2^62
    return _block(text + _pairs(pack, gain) + "DONE:")


def _tanh_or_pairs(pack: int) -> str:
    """0.5 + 0.5 tanh(x / 2) if no score of the warp is beyond -7 or 7, else pairs. No maximum sees NaN, which stays."""
    text = "".join(f"mov.f32 m{i},0f00000000; " for i in range(4))
    for i in range(pack):
        text += f"abs.f32 a,${pack + i}; max.f32 m{i % 4},m{i % 4},a; "
    text += "max.f32 m0,m0,m1; max.f32 m2,m2,m3; max.f32 m0,m0,m2; "
    text += f"setp.gt.f32 wide,m0,0f{_bits(_HIGH)}; vote.sync.any.pred wide,wide,0xffffffff; @wide bra WIDE; "
    for i in range(pack):
        text += f"tanh.approx.f32 a,${pack + i}; fma.rn.ftz.f32 ${i},a,0f3F000000,0f3F000000; "
    text += "bra.uni DONE; WIDE: "
    for i in range(pack):
        text += f"mul.ftz.f32 a,${pack + i},0f{_bits(2.0 * LOG2E)}; min.ftz.NaN.f32 a,a,0f42780000; "
        text += f"ex2.approx.ftz.f32 ${i},a; "
    return _block(text + _pairs(pack, 1.0) + "DONE:")


def choose_formula(problem: Problem, kernel: str) -> str:
    """ "full", "pair", "fine", "narrow", "wide", "high" or "tanh".

    float32 is always "full". "auto" takes a series where the scores of N(0, 1) seldom leave its range, given b; a
    tensor b is not read, and gets the wide one.
    """
    if problem.dtype == torch.float32:
        return "full"
    if problem.sigmoid == "fast":
        return "tanh"
    b = problem.sigmoid_bias
    if problem.sigmoid == "exact":
        return "fine" if b is not None and b <= -7.2 else "pair"
    if b is not None and b > -4.6:
        return "high" if problem.dtype == torch.bfloat16 else "pair"
    narrow = (-6.2 if kernel == "fwd" else -7.2) - (0.0 if problem.dtype == torch.bfloat16 else 1.4)
    return "wide" if b is None or b > narrow else "narrow"


def in_words(problem: Problem) -> str:
    """How the forward of this problem evaluates the sigmoid."""
    return {
        "full": "exact: 1 / (1 + exp(-x)) in float32",
        "pair": "exact: two weights share one reciprocal, relative error 2e-6",
        "fine": "exact: a series where a warp's scores are all below -3.4, else two share a reciprocal; 2e-6",
        "narrow": "adaptive: e - e^2 where a warp's scores are all below -2.8 (relative error 1e-3), else exact",
        "wide": "adaptive: a series where a warp's scores are all below -1.4 (relative error 4e-4), else exact",
        "high": "adaptive: tanh.approx where a warp's scores are all within 7 of 0 (relative error 1.3e-4), else exact",
        "tanh": "fast: tanh.approx, relative error of a weight 1e-2 below 1e-4 and nothing below 2e-7",
    }[choose_formula(problem, "fwd")]
