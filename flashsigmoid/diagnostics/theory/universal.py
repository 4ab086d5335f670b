"""A transformer of sigmoid attention written down, not trained, that approximates a given equivariant function.

The attention is nn.SigmoidAttention with weights set by hand: four heads of dimension 1 in a selective shift. Float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...nn.attention import SigmoidAttention

if TYPE_CHECKING:
    from jaxtyping import Float

MAX_CONTEXTS = 300_000
_EXACT = 2**53  # integers below it are exact in float64
_ONE = 40.0  # sigmoid(40) is 1 in float64


class Steps(nn.Module):
    """A feed-forward layer of one input channel that is a staircase, up to the width of its sigmoids.

        y = base + sum_k jump_k sigmoid(steepness (z - t_k))

    Away from every t_k by m, each sigmoid is within exp(-steepness m) of its step.

    Args:
        thresholds: t, (steps,).
        jumps: (steps, dim_out).
        base: (dim_out,), the value below all thresholds.
        steepness: of the sigmoids.
    """

    thresholds: Tensor
    jumps: Tensor
    base: Tensor

    def __init__(self, thresholds: Tensor, jumps: Tensor, base: Tensor, steepness: float) -> None:
        super().__init__()
        self.steepness = steepness
        self.register_buffer("thresholds", thresholds.double())
        self.register_buffer("jumps", jumps.double())
        self.register_buffer("base", base.double())

    def forward(self, z: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch dim_out"]:
        """z to the height of the staircase there."""
        return self.base + torch.sigmoid(self.steepness * (z[..., None] - self.thresholds)) @ self.jumps


class SelectiveShift(nn.Module):
    """Adds to the tokens of one bin a sum over the tokens above a threshold, by four sigmoid heads of dimension 1.

        x_i <- x_i + factor * Psi(x)_i
        Psi(x)_i = sum over k with x_k > above of x_k   if lower < x_i < upper,   else 0

    where x is one channel. With H the Heaviside step and [P] = 1 where P holds, else 0,

        H((x_i - lower)(x_k - t)) - H((x_i - upper)(x_k - t)) = +[lower < x_i < upper] if x_k > t, else -[...]
        H(x_i - lower) - H(x_i - upper)                       =  [lower < x_i < upper]

    so half the sum of the two lines is `[lower < x_i < upper] [x_k > t]`: each H is a head with values x_k, its scores
    a product of one number of the query and one of the key, and sigmoid(steepness .) is its H. If no x is within m of
    lower, upper and t,

        |what the module adds - factor * Psi(x)_i| <= |factor| sum_k |x_k| (exp(-steepness m^2) + exp(-steepness m))

    Args:
        dim: channels.
        channel: of x.
        lower, upper: the bin.
        above: t, the threshold of the keys. Default: upper.
        factor: of the sum. Default: 1.
        steepness: lambda, positive.

    Raises:
        ValueError: the bin is empty, steepness is not positive.

    Source: Psi with t = upper, and that four heads of dimension 1 are enough, is how we recall the proof of universal
    approximation in arXiv:2409.04431; these four heads, the free t and the error are derived here.
    """

    def __init__(
        self,
        dim: int,
        channel: int,
        lower: float,
        upper: float,
        *,
        above: float | None = None,
        factor: float = 1.0,
        steepness: float = 400.0,
    ) -> None:
        super().__init__()
        if not lower < upper:
            raise ValueError(f"lower must be below upper, got {lower} and {upper}")
        if not steepness > 0:
            raise ValueError(f"steepness must be positive, got {steepness}")
        threshold = upper if above is None else above
        # scale is head_dim ** -0.5 = 1
        heads = SigmoidAttention(dim, 4, head_dim=1, qk_norm=False, sigmoid_bias=0.0, proj_bias=True).double()
        one = torch.zeros(dim, dtype=torch.float64)
        one[channel] = 1.0
        edges = torch.tensor([lower, upper, lower, upper], dtype=torch.float64)
        is_product = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
        signs = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64)
        set_linear(heads.q_proj, steepness * one.expand(4, dim), -steepness * edges)
        set_linear(heads.k_proj, is_product[:, None] * one, 1.0 - is_product * (1.0 + threshold))
        set_linear(heads.v_proj, one.expand(4, dim), torch.zeros(4))
        set_linear(heads.out_proj, factor * one[:, None] * signs, torch.zeros(dim))
        self.attention = heads

    def forward(self, x: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim"]:
        """x with its channel shifted."""
        return x + self.attention(x)


class Sum(nn.Module):
    """Adds factor * sum_k x_k of one channel to another, in every token: a sigmoid head with b = 40, so all weights 1.

    Args:
        dim: channels.
        source, target: channels.
        factor: of the sum.
    """

    def __init__(self, dim: int, source: int, target: int, factor: float) -> None:
        super().__init__()
        head = SigmoidAttention(dim, 1, head_dim=1, qk_norm=False, sigmoid_bias=_ONE).double()
        for linear in (head.q_proj, head.k_proj, head.v_proj, head.out_proj):
            set_linear(linear, torch.zeros_like(linear.weight))
        with torch.no_grad():
            head.v_proj.weight[0, source] = 1.0
            head.out_proj.weight[target, 0] = factor
        self.attention = head

    def forward(self, x: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim"]:
        """x with the sum added."""
        return x + self.attention(x)


class ContextualMap(nn.Module):
    """Sends a token's number and the set of all tokens to one integer, another one for each such pair.

    Tokens are integers l of 0 to levels - 1. Each layer of a channel that begins as y = l + 1 is a `SelectiveShift`,
    from the top bin down to the bottom: with a_1 > ... > a_p the different values of l + 1, m_j how often each occurs,

        y_j = a_j + M (S_(j-1) + m_j a_j),    S_j = S_(j-1) + m_j y_j,    S_0 = 0

    and at last every token gets l + levels * S_p. For different tokens, all m_j = 1,

        S_j = (1 + M)(S_(j-1) + a_j),   so   S_p = sum_j a_j (1 + M)^(p - j + 1),

    digits of a number to the base 1 + M > levels, which tells them all. For tokens that occur repeatedly there is no
    proof here, and there need not be one: `Approximator` counts the collisions over the whole grid.

    Args:
        n: tokens.
        levels: of l.
        repeats: whether the bin itself is among the keys of its shift, t = lower; else t = upper, as in the paper's
            Psi, for which equal tokens collide. Default: True.
        steepness: of the shifts.

    Raises:
        ValueError: n or levels is not positive; integers would not be exact in float64.

    Source: derived; selective shifts from one bin to the next are the contextual map of arXiv:1912.10077 and, with
    sigmoid heads, of arXiv:2409.04431.
    """

    def __init__(self, n: int, levels: int, *, repeats: bool = True, steepness: float = 400.0) -> None:
        super().__init__()
        for name, number in {"n": n, "levels": levels}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        factor = n * levels + 1
        largest = levels * (n * levels) * (1 + factor * n) ** n  # S_j <= (1 + M n)(S_(j-1) + n levels)
        if 2 * largest >= _EXACT:
            raise ValueError(f"numbers of {n} tokens and {levels} levels must be below 2^53, got up to {largest:.2g}")
        shifts = [
            SelectiveShift(
                2,
                1,
                level - 0.5,
                level + 0.5,
                above=level - 0.5 if repeats else None,
                factor=factor,
                steepness=steepness,
            )
            for level in range(levels, 0, -1)
        ]
        self.layers = nn.Sequential(*shifts, Sum(2, source=1, target=0, factor=levels))

    def forward(self, l: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """Integers to integers, in float64."""
        return self.layers(torch.stack([l, l + 1.0], -1))[..., 0]


class Approximator(nn.Module):
    """A transformer that is within the modulus of continuity of a permutation-equivariant function on [0, 1]^(n x dim).

        quantiser        x -> the cell of every coordinate, of width delta = 1 / cells: `Steps`
        number           a cell of every coordinate -> l, its digits to the base `cells`: a linear map
        contextual map   l and the set of all l -> one integer: `ContextualMap`
        value map        that integer -> fn at the centres of the cells: `Steps`, one per context

    A token and the centre of its cell differ by delta / 2 at most in each coordinate, so in the maximum norm

        max |T(X) - fn(X)| <= omega(delta / 2),   omega(h) = sup max |fn(X) - fn(Y)| over max |X - Y| <= h

    for every X with no coordinate within 40 / 1e12 of an edge between cells, where a sigmoid is no step yet: all X but
    a share of n dim cells 1e-10, and so in L^p as well.

    Args:
        fn: (batch, n, dim) to (batch, n, dim_out), float64, permutation-equivariant and continuous.
        n: tokens.
        dim: channels of a token.
        cells: per coordinate, 1 / delta.

    Raises:
        ValueError: fn is not equivariant on the grid; the grid has more than 300,000 tokens in their contexts, or
            numbers that float64 does not hold; two contexts got one number.

    Source: arXiv:2409.04431 (the theorem, in L^p, with four heads of dimension 1 and MLPs of width 4, as we recall it);
    the construction is derived after the pieces of arXiv:1912.10077 and differs from both in its contextual map, which
    covers equal tokens, and in its feed-forwards, which are wide.
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], n: int, dim: int, cells: int) -> None:
        super().__init__()
        if min(n, dim, cells) < 1:
            raise ValueError(f"n, dim and cells must be at least 1, got {n}, {dim} and {cells}")
        self.dim, self.cells, levels = dim, cells, cells**dim
        contexts = n * math.comb(levels + n - 1, n)
        if contexts > MAX_CONTEXTS:
            raise ValueError(f"a grid must have at most {MAX_CONTEXTS} tokens in their contexts, got {contexts}")
        edges = torch.arange(1, cells, dtype=torch.float64) / cells
        self.quantiser = Steps(edges, torch.ones(cells - 1, 1), torch.zeros(1), 1e12)
        self.number = nn.Linear(dim, 1, bias=False).double()
        set_linear(self.number, (float(cells) ** torch.arange(dim))[None])
        self.contextual_map = ContextualMap(n, levels)

        tokens = token_sets(n, levels)
        points = cell_centres(tokens, dim, cells)
        values = fn(points)
        swap, cycle = [*reversed(range(min(n, 2))), *range(2, n)], [*range(1, n), 0]
        for order in (swap, cycle):  # the two make every permutation
            if not torch.allclose(fn(points[:, order]), values[:, order], rtol=1e-9, atol=1e-12):
                raise ValueError("fn must be permutation-equivariant, got another value for permuted tokens")
        with torch.no_grad():
            ids = torch.cat([self.contextual_map(some) for some in tokens.double().split(4096)])
        if found := collisions(tokens, ids):
            raise ValueError(f"the contextual map must tell contexts apart, got {found} that share their number")
        knots, first = unique_with_index(ids.flatten())
        heights = values.flatten(0, 1)[first]
        self.value_map = Steps((knots[1:] + knots[:-1]) / 2, heights.diff(dim=0), heights[0], 100.0)

    def forward(self, x: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim_out"]:
        """x in [0, 1] to approximately fn(x)."""
        l = self.number(self.quantiser(x.double())[..., 0])[..., 0]
        return self.value_map(self.contextual_map(l))


def token_sets(n: int, levels: int) -> Float[Tensor, "sets n"]:
    """Every multiset of n integers of 0 to levels - 1, ascending, as int64."""
    return torch.combinations(torch.arange(levels), n, with_replacement=True)


def cell_centres(tokens: Tensor, dim: int, cells: int) -> Float[Tensor, "*batch dim"]:
    """The centre of the cell whose digits to the base `cells` are those of a token's number."""
    digits = tokens[..., None] // cells ** torch.arange(dim) % cells
    return (digits.double() + 0.5) / cells


def collisions(tokens: Tensor, ids: Tensor) -> int:
    """How many contexts, pairs of a token and the multiset it is in, have a number that an earlier one has too.

    Equal tokens of one multiset are one context and must share theirs; else each counts as a collision too.

    Args:
        tokens: (sets, n) integers, one row for each multiset.
        ids: (sets, n), what a contextual map makes of them.
    """
    sets = torch.arange(len(tokens))[:, None].expand_as(tokens)
    pairs = torch.stack([sets, tokens], -1).flatten(0, 1)
    contexts = len(pairs.unique(dim=0))
    numbered = torch.cat([pairs.double(), ids.flatten()[:, None].double()], -1)
    split = len(numbered.unique(dim=0)) - contexts  # one context, several numbers
    return contexts - len(ids.unique()) + 2 * split


def unique_with_index(x: Float[Tensor, " length"]) -> tuple[Tensor, Tensor]:
    """The values in ascending order, and where each stands first."""
    values, inverse = x.unique(return_inverse=True)
    first = torch.full_like(values, len(x), dtype=torch.int64)
    return values, first.scatter_reduce(0, inverse, torch.arange(len(x)), "amin")


def set_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """Write the numbers of a projection."""
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
