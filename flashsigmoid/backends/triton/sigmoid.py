"""sigmoid(x) of a tile in float32, by a formula of backends/formula.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(y, FORMULA: tl.constexpr):
    """gain * sigmoid(x) of y = unit * x + shift, elementwise, float32."""
    if FORMULA.asm != "":
        p = tl.inline_asm_elementwise(
            FORMULA.asm, FORMULA.constraints, [y], dtype=tl.float32, is_pure=True, pack=FORMULA.pack
        )
        if FORMULA.name == "tanh":
            p = 0.5 * p + 0.5
    elif FORMULA.name == "tanh":
        p = 1.0 / (1.0 + tl.exp(-2.0 * y))
    elif FORMULA.name == "narrow" or FORMULA.name == "wide" or FORMULA.name == "fine":
        e = tl.exp2(tl.minimum(y, FORMULA.threshold))
        series = e * 0.0
        for i in tl.static_range(len(FORMULA.terms)):
            series = (series + FORMULA.terms[len(FORMULA.terms) - 1 - i]) * e
        exact = FORMULA.gain / (1.0 + FORMULA.gain * tl.exp2(-y))
        p = tl.where(y <= FORMULA.threshold, e + e * series, exact)
    else:
        # e^-x = 2^n e^r, n whole: in 2^(-log2(e) x) alone the exponent's rounding is up to 2^-18 of the result
        x = tl.where(y < -87.0, -87.0, tl.where(y > 87.0, 87.0, y))
        n = tl.floor(0.5 - 1.4426950408889634 * x)
        r = (-x - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts, the first exact in nine bits
        e = tl.exp2(n) * tl.exp2(r * 1.4426950408889634)
        p = tl.where(y < -87.0, 0.0, tl.div_rn(1.0, 1.0 + e))
    return p
