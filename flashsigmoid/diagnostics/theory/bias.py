"""Which b makes sigmoid attention look like softmax, and how the mass of a row grows with the number of keys.

Scores are independent normals of mean 0. Everything is float64; nothing here looks at a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

_WIDTH, _STEP = 12.0, 0.01  # of the trapezoids, in standard deviations: beyond 12 lies 1e-33 of a normal
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def log_n_bias(n: int) -> float:
    """b = -log n: with scores near 0 a row of n keys sums to n / (n + 1).

    Args:
        n: keys, at least 1.

    Raises:
        ValueError: n is not positive.

    Source: arXiv:2409.04431 (the recommended bias).
    """
    return -math.log(_positive_count(n))


def normal_bias(n: int, std: float) -> float:
    """b = -log n - s^2 / 2: what makes n exp(z + b) have mean 1 for z of N(0, s^2).

    Args:
        n: keys, at least 1.
        std: s, non-negative.

    Raises:
        ValueError: n is not positive, std is negative or not finite.

    Source: derived; for s = 0 it is the -log n of arXiv:2409.04431.
    """
    return log_n_bias(n) - 0.5 * _finite_std(std) ** 2


def normal_mean(fn: Callable[[Tensor], Tensor], std: float) -> float:
    """E fn(z) for z of N(0, s^2), by trapezoids, which converge geometrically for an analytic fn under a normal.

    Args:
        fn: elementwise on a float64 tensor.
        std: s, non-negative. For a sigmoid in fn at most about 25, where its poles come near: the error is
            exp(-2 pi^2 / (0.01 s)).

    Raises:
        ValueError: std is negative or not finite.
    """
    z = torch.arange(-_WIDTH, _WIDTH + _STEP / 2, _STEP, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square())
    return float((fn(_finite_std(std) * z) * density).sum() / density.sum())


def normal_scores(n: int, std: float, rows: int, seed: int = 0) -> Float[Tensor, "rows n"]:
    """Independent scores of N(0, s^2), the same ones times s for every s.

    Args:
        n: keys, at least 1.
        std: s, non-negative.
        rows: queries, at least 1.
        seed: of the draw. Default: 0.

    Raises:
        ValueError: n or rows is not positive, std is negative or not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (_positive_count(rows, "rows"), _positive_count(n))
    return _finite_std(std) * torch.randn(shape, generator=generator, dtype=torch.float64)


def distance_to_softmax(scores: Float[Tensor, "rows n"], bias: float) -> float:
    """How far sigmoid weights are from softmax's, relative to the size of those.

        sqrt(sum_ij (sigmoid(s_ij + b) - p_ij)^2 / sum_ij p_ij^2),   p = softmax(s)

    It is the relative error of the output as well, for values that are independent of the scores and of one another,
    with mean 0: then E |sum_j (a_j - p_j) v_j|^2 = E |v|^2 sum_j (a_j - p_j)^2.

    Args:
        scores: s, (rows, n).
        bias: b.

    Raises:
        ValueError: scores are not two-dimensional, empty, or not finite.
    """
    scores = _checked(scores)
    p = scores.softmax(-1)
    return float((torch.sigmoid(scores + bias) - p).norm() / p.norm())


def closest_bias(scores: Float[Tensor, "rows n"]) -> float:
    """The b of the smallest `distance_to_softmax`, to 1e-6: least of a grid of step 0.25, then golden sections.

        argmin_b sum_ij (sigmoid(s_ij + b) - softmax(s)_ij)^2

    Every b of interest lies within the grid: row by row sigmoid(s + b) <= exp(s + b), and at
    b = -log sum_j exp(s_j) sigmoid is below softmax everywhere, so the best b is above the least of those; and it is
    below the largest over i, j of logit(p_ij) - s_ij, above which sigmoid is above softmax everywhere.

    Args:
        scores: s, (rows, n) with n of at least 2.

    Raises:
        ValueError: scores are not two-dimensional, not finite, or have fewer than two keys.
    """
    scores = _checked(scores)
    if scores.shape[1] < 2:
        raise ValueError(f"scores must have at least 2 keys, got {scores.shape[1]}")
    p, total = scores.softmax(-1), scores.logsumexp(-1)
    # logit(p) - s = -log sum of the other exp(s_k)
    others = total[:, None] + torch.log1p(-p)
    low, high = float(-total.max()), float(-others[p < 1.0].min())

    def loss(bias: float) -> float:
        return float((torch.sigmoid(scores + bias) - p).square().sum())

    steps = max(2, math.ceil((high - low) / 0.25))
    grid = [low + (high - low) * i / steps for i in range(steps + 1)]
    best = min(range(steps + 1), key=lambda i: loss(grid[i]))
    left, right = grid[max(0, best - 1)], grid[min(steps, best + 1)]
    while right - left > 1e-6:
        span = _GOLDEN * (right - left)
        if loss(right - span) <= loss(left + span):
            right = left + span
        else:
            left = right - span
    return 0.5 * (left + right)


def unit_mass_bias(n: int, std: float) -> float:
    """The b for which a row of sigmoid weights sums to 1 in the mean, by quadrature and bisection to 1e-12.

        n E sigmoid(z + b) = 1,   z of N(0, s^2)

    Args:
        n: keys, at least 2.
        std: s, non-negative, see `normal_mean`.

    Raises:
        ValueError: n is below 2, std is negative or not finite.

    Source: derived.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    # exp(z + b) is above the sigmoid; P(z >= 0) = 1/2, and there sigmoid(z + b) >= sigmoid(b)
    low, high = normal_bias(n, std), 2.0 * (_finite_std(std) + math.log(n) + 1.0)
    while high - low > 1e-12 * max(1.0, abs(low)):
        middle = 0.5 * (low + high)
        if n * normal_mean(lambda z, b=middle: torch.sigmoid(z + b), std) < 1.0:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def scaled_row_mass(n: int, a: float, c: float, std: float = 1.0) -> float:
    """Mean mass of a row of n keys whose weights are n^-a sigmoid(z - c log n), z of N(0, s^2), by quadrature.

        m(n) = n^(1 - a) E sigmoid(z - c log n)

    For c > 0 it lies between two powers of n, since exp(y) - exp(2 y) <= sigmoid(y) <= exp(y):

        n^(1 - a - c) (e^(s^2/2) - n^-c e^(2 s^2))  <=  m(n)  <=  n^(1 - a - c) e^(s^2/2)

    so it has a limit other than 0 and infinity only for a + c = 1. So too for c = 0, with the limit 1/2. For c < 0
    every weight tends to n^-a, whatever the scores.

    Args:
        n: keys, at least 1.
        a: exponent of the factor.
        c: coefficient of -log n within the sigmoid; 1 is the recommended bias, with a = 0.
        std: s, see `normal_mean`. Default: 1.

    Raises:
        ValueError: n is not positive, std is negative or not finite.

    Source: derived; a = 0, c = 1 is the bias of arXiv:2409.04431, and n^-a with b = 0 an ablation there.
    """
    log_n = math.log(_positive_count(n))
    return math.exp((1.0 - a) * log_n) * normal_mean(lambda z: torch.sigmoid(z - c * log_n), std)


def row_mass_bounds(n: int, a: float, c: float, std: float = 1.0) -> tuple[float, float]:
    """The two bounds that `scaled_row_mass` states for c > 0; the lower may be negative for small n.

    Raises:
        ValueError: c is not positive; as `scaled_row_mass`.
    """
    if c <= 0.0:
        raise ValueError(f"c must be positive, got {c}")
    log_n, half = math.log(_positive_count(n)), 0.5 * _finite_std(std) ** 2
    power = math.exp((1.0 - a - c) * log_n)
    return power * (math.exp(half) - math.exp(4.0 * half - c * log_n)), power * math.exp(half)


def _positive_count(n: int, name: str = "n") -> int:
    if n < 1:
        raise ValueError(f"{name} must be at least 1, got {n}")
    return n


def _finite_std(std: float) -> float:
    if not (math.isfinite(std) and std >= 0.0):
        raise ValueError(f"std must be a non-negative number, got {std}")
    return std


def _checked(scores: Tensor) -> Tensor:
    if scores.ndim != 2 or not scores.numel():
        raise ValueError(f"scores must be (rows, n) with at least one of each, got {tuple(scores.shape)}")
    scores = scores.to(torch.float64)
    if not scores.isfinite().all():
        raise ValueError("scores must be finite, got some that are not")
    return scores
