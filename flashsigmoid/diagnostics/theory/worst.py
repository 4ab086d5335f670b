"""The worst point of a ball: a search for the largest norm of the Jacobian, the same for sigmoid and softmax.

The attention, its bounds and its norm at a point are regularity.py's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import vjp

from .regularity import Kind, Norm, Weights, attention, operator_norm, pushed

if TYPE_CHECKING:
    from jaxtyping import Float

_CANDIDATES = 64  # for each start of a search: with 16, chance found worse points for sigmoid at R = 32


def growth_exponent(radii: Sequence[float], norms: Sequence[float]) -> list[float]:
    """d log norm / d log R between neighbouring radii: 2 for c R^2, growing without end for exp(c R^2).

    Raises:
        ValueError: not as many norms as radii, or fewer than two.
    """
    if len(radii) != len(norms) or len(radii) < 2:
        raise ValueError(f"radii and norms must be as many, at least 2, got {len(radii)} and {len(norms)}")
    points = list(zip(map(math.log, radii), map(math.log, norms), strict=True))
    return [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in itertools.pairwise(points)]


def starts(n: int, dim: int, radius: float, restarts: int, seed: int = 0) -> Float[Tensor, "restarts n dim"]:
    """Tokens of norm `radius`, in turns: independent directions; two noisy clusters; two of any spread, or one.

    Clusters, since the largest norms known of softmax have few keys that many queries see, and those of sigmoid many
    equal tokens whose scores are near -b.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, centres = normal(restarts, n, dim), normal(restarts, 2, 1, dim)
    kind = torch.arange(restarts)[:, None, None] % 3
    sizes = torch.randint(1, n + 1, (restarts, 1, 1), generator=generator)
    sizes = torch.where(kind == 1, sizes.clamp(max=max(1, n - 1)), sizes)
    spread = 10.0 ** (-3.0 * torch.rand(restarts, 1, 1, generator=generator, dtype=torch.float64))
    spread = torch.where(kind == 1, 0.1, spread)
    first = torch.arange(n)[:, None] < sizes
    clustered = torch.where(first, centres[:, 0], centres[:, 1]) + spread * x
    x = torch.where(kind == 0, x, clustered)
    return radius * x / x.norm(dim=-1, keepdim=True)


def worst_point(
    weights: Weights,
    n: int,
    radius: float,
    kind: Kind = "sigmoid",
    *,
    restarts: int = 16,
    steps: int = 200,
    seed: int = 0,
    also: Float[Tensor, "more n dim"] | None = None,
) -> tuple[Norm, Float[Tensor, "n dim"]]:
    """The largest ||J phi(X)||_2 that gradient ascent finds among X of n tokens, each of norm at most `radius`.

    Each start is the best of 64, or one of `also` if that is better. One step: X along the gradient of
    <u, J phi(X) v>, with u, v its singular vectors by power steps, and tokens outside the ball back to its sphere. What
    is no better there is taken back, and the next step is 0.4 times as long, else 1.5 times: in a large ball what
    matters are distances of 1 / radius, which no schedule would know of. For sigmoid and softmax candidates, steps and
    cost are the same. What is found is a lower bound of the supremum, no more.

    Args:
        weights: of the attention.
        n: tokens.
        radius: R.
        kind: "sigmoid" or "softmax".
        restarts: of different `starts`, side by side. Default: 16.
        steps: of each. Default: 200.
        seed: of the starts. Default: 0.
        also: more starts, as the worst point of a smaller ball. Default: none.

    Returns:
        The norm, by `operator_norm`, and the point.

    Raises:
        ValueError: n, radius, restarts or steps is not positive.
    """
    for name, number in {"n": n, "radius": radius, "restarts": restarts, "steps": steps}.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive, got {number}")

    def phi(x: Tensor) -> Tensor:
        return attention(x, weights, kind)

    def climb(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|J v|, the next v, and the direction of the gradient."""
        u, next_v, reached = _power_step(phi, x, v)
        return reached, next_v, _unit(torch.func.grad(lambda x: (u * pushed(phi, x, v)).sum())(x))

    x = starts(n, weights.wq.shape[-1], radius, _CANDIDATES * restarts, seed)
    x, v = _best_starts(phi, x if also is None else torch.cat([x, _into_ball(also, radius)]), restarts, seed)
    best, v, uphill = climb(x, v)
    pace = torch.full((restarts, 1, 1), 0.1 * radius, dtype=x.dtype)
    for _ in range(steps - 1):
        tried = _into_ball(x + pace * uphill, radius)
        reached, tried_v, tried_uphill = climb(tried, v)
        is_better = (reached >= best)[:, None, None]
        best = torch.maximum(best, reached)
        x, v, uphill = (torch.where(is_better, *pair) for pair in ((tried, x), (tried_v, v), (tried_uphill, uphill)))
        pace = pace * torch.where(is_better, 1.5, 0.4)
    winner = int(best.argmax())
    return operator_norm(phi, x[winner], max_steps=200, start=v[winner]), x[winner]


def worst_norms(weights: Weights, n: int, radii: Sequence[float], kind: Kind = "sigmoid", **budget: int) -> list[Norm]:
    """`worst_point` for growing radii; each search starts from the last one's point as well, as it is and enlarged.

    Args:
        weights, n, kind: as there.
        radii: ascending.
        budget: restarts, steps and seed, as there.

    Raises:
        ValueError: the radii do not ascend; as `worst_point`.
    """
    if any(r1 <= r0 for r0, r1 in itertools.pairwise(radii)):
        raise ValueError(f"radii must ascend, got {list(radii)}")
    found: list[Norm] = []
    also = None
    for radius, larger in zip(radii, [*radii[1:], radii[-1]], strict=True):
        norm, last = worst_point(weights, n, radius, kind, also=also, **budget)
        also = torch.stack([last, last * (larger / radius)])  # enlarged, equal scores of softmax stay equal
        found.append(norm)
    return found


def _best_starts(fn: Callable[[Tensor], Tensor], x: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The best of each `_CANDIDATES` points and of those beyond, and their right singular vectors, by power steps."""
    v = _unit(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64))
    vs, norms = [], []
    for some_x, some_v in zip(x.split(count), v.split(count), strict=True):  # in parts, for the memory of a long n
        norm = torch.zeros(())
        for _ in range(4):
            _, some_v, norm = _power_step(fn, some_x, some_v)
        vs.append(some_v)
        norms.append(norm)
    reached, vs = torch.cat(norms), torch.cat(vs)
    drawn = _CANDIDATES * count
    chosen = reached[:drawn].unflatten(0, (count, -1)).argmax(1) + _CANDIDATES * torch.arange(count)
    chosen = torch.cat([chosen, torch.arange(drawn, len(x))])
    chosen = chosen[reached[chosen].topk(count).indices]
    return x[chosen], vs[chosen]


def _power_step(fn: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each of a batch: u = J v / |J v|, the next v = J^T u / |J^T u|, and |J v|."""
    u = pushed(fn, x, v)
    reached = u.flatten(1).norm(dim=1)
    u = _unit(u)
    return u, _unit(vjp(fn, x)[1](u)[0]), reached


def _into_ball(x: Tensor, radius: float) -> Tensor:
    """Tokens that are too long, shortened to the radius."""
    return x * (radius / x.norm(dim=-1, keepdim=True)).clamp(max=1.0)


def _unit(x: Tensor) -> Tensor:
    """Each of a batch over its norm; zero stays zero."""
    return x / x.flatten(1).norm(dim=1)[:, None, None].clamp(min=torch.finfo(x.dtype).tiny)
