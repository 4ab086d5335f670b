"""Ways to compute sigmoid(s + b), written out element by element: those of the kernels, and those to be wary of.

What the hardware's approximate instructions add is measured on a GPU: docs/numerics.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...backends.formula import LOG2E, make_formula

if TYPE_CHECKING:
    from jaxtyping import Float


def series(scores: Float[Tensor, "*shape"], b: float, name: str) -> Float[Tensor, "*shape"]:
    """A series of the kernels' forward in float32: of e = 2^y, y = log2(e) (s + b), where y is below its threshold.

        e (1 + c1 e + c2 e^2)   if y + log2(gain) <= threshold,   else e / (1 + e)

    A kernel decides for 1,024 weights together and takes the second for all of them where one needs it.

    Args:
        scores: s.
        b: of the sigmoid.
        name: "narrow", "wide" or "fine", with the coefficients for bfloat16.
    """
    formula = make_formula(name, "fwd", False, 1, False)
    y = LOG2E * (scores.float() + b) + formula.shift
    e = y.exp2()
    value = e * sum((c * e**power for power, c in enumerate(formula.terms, 1)), torch.ones_like(e))
    exact = formula.gain * e / (formula.gain + e)
    return torch.where(y <= formula.threshold, value, exact) / formula.gain


def half_tanh(scores: Float[Tensor, "*shape"], b: float) -> Float[Tensor, "*shape"]:
    """1/2 + 1/2 tanh((s + b) / 2) in float32: a small weight is what is left of two halves."""
    return 0.5 + 0.5 * torch.tanh(0.5 * (scores.float() + b))


def narrow_scores(scores: Float[Tensor, "*shape"], b: float, dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """sigmoid of a sum s + b that was rounded to 16 bits: what is lost grows with |b|."""
    return torch.sigmoid((scores.to(dtype) + b).float())


# each of scores and b, float32
FORMULAS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "full": lambda scores, b: torch.sigmoid(scores.float() + b),
    "fine": partial(series, name="fine"),
    "wide": partial(series, name="wide"),
    "narrow": partial(series, name="narrow"),
    "half tanh": half_tanh,
    "float16 scores": partial(narrow_scores, dtype=torch.float16),
    "bfloat16 scores": partial(narrow_scores, dtype=torch.bfloat16),
}
