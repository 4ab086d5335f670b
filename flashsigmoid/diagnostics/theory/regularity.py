"""How fast attention can change: a bound of its Jacobian, and the true norm at a point. Of a ball: worst.py.

Sigmoid and softmax by their equations in explicit float64 tensors, O(n^2) memory; the op is not called, and
tests/diagnostics/theory compare the two.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.func import jvp, vjp

from ...nn.attention import SigmoidAttention

if TYPE_CHECKING:
    from jaxtyping import Float

Kind = Literal["sigmoid", "softmax"]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The matrices of multi-head self-attention without QK-norm, RoPE and gate.

        phi(X)_i = sum_h W_oh sum_j A_hij W_vh x_j,    A_h = sigmoid(scale <W_qh x_i, W_kh x_j> + b_h)

    Args:
        wq, wk: (nheads, head_dim, dim); a key head that several query heads read is repeated.
        wv: (nheads, head_dim_v, dim).
        wo: (nheads, dim, head_dim_v).
        scale: factor of the scores.
        sigmoid_bias: b, (nheads,).

    Raises:
        ValueError: shapes that do not go together.
    """

    wq: Float[Tensor, "nheads head_dim dim"]
    wk: Float[Tensor, "nheads head_dim dim"]
    wv: Float[Tensor, "nheads head_dim_v dim"]
    wo: Float[Tensor, "nheads dim head_dim_v"]
    scale: float
    sigmoid_bias: Float[Tensor, " nheads"]

    def __post_init__(self) -> None:
        nheads, _, dim = self.wq.shape
        head_dim_v = self.wv.shape[1]
        expected = {
            "wk": tuple(self.wq.shape),
            "wv": (nheads, head_dim_v, dim),
            "wo": (nheads, dim, head_dim_v),
            "sigmoid_bias": (nheads,),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must be {shape} beside wq, got {tuple(getattr(self, name).shape)}")

    @property
    def qk_norms(self) -> Float[Tensor, " nheads"]:
        """scale ||W_q^T W_k|| of every head."""
        return abs(self.scale) * torch.linalg.matrix_norm(self.wq.mT @ self.wk, 2)

    @property
    def ov_norms(self) -> Float[Tensor, " nheads"]:
        """||W_o W_v|| of every head."""
        return torch.linalg.matrix_norm(self.wo @ self.wv, 2)


def random_weights(dim: int, nheads: int, head_dim: int, sigmoid_bias: float, seed: int = 0) -> Weights:
    """Independent normals of variance 1 / fan-in, scale head_dim ** -0.5, one b.

    Args:
        dim: channels of x.
        nheads: heads.
        head_dim: channels of a head.
        sigmoid_bias: b of all heads.
        seed: of the draw. Default: 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    wq, wk, wv = (normal(nheads, head_dim, dim) for _ in range(3))
    return Weights(
        wq=wq,
        wk=wk,
        wv=wv,
        wo=normal(nheads, dim, head_dim) / math.sqrt(nheads),
        scale=head_dim**-0.5,
        sigmoid_bias=torch.full((nheads,), float(sigmoid_bias), dtype=torch.float64),
    )


def weights_of(module: SigmoidAttention, seqlen: int) -> Weights:
    """The matrices of one of our modules, in float64.

    Args:
        module: `nn.SigmoidAttention`, or its softmax twin, without QK-norm, out_norm, position, gate, mask and
            biases of the projections.
        seqlen: n of -log n where the module has no constant b.

    Raises:
        ValueError: the module has one of those.
    """
    plain = {
        "qk_norm": isinstance(module.q_norm, torch.nn.Identity),
        "out_norm": isinstance(module.out_norm, torch.nn.Identity),
        "position": module.position is None,
        "gate": module.gate_proj is None,
        "proj_bias": module.q_proj.bias is None,
        "causal or window_size": not module.causal and module.window_size == (None, None),
    }
    for name, is_plain in plain.items():
        if not is_plain:
            raise ValueError(f"module must be without {name}, got {module}")
    nheads, group = module.nheads, module.nheads // module.nheads_k

    def heads(weight: Tensor, repeat: int) -> Tensor:
        return weight.detach().double().unflatten(0, (-1, module.head_dim)).repeat_interleave(repeat, 0)

    bias = module.sigmoid_bias
    bias = -math.log(seqlen) if bias is None else bias
    return Weights(
        wq=heads(module.q_proj.weight, 1),
        wk=heads(module.k_proj.weight, group),
        wv=heads(module.v_proj.weight, group),
        wo=module.out_proj.weight.detach().double().unflatten(1, (nheads, module.head_dim)).transpose(0, 1),
        scale=module.head_dim**-0.5,
        sigmoid_bias=torch.as_tensor(bias, dtype=torch.float64).detach().expand(nheads),
    )


def attention(
    x: Float[Tensor, "*batch n dim"], weights: Weights, kind: Kind = "sigmoid"
) -> Float[Tensor, "*batch n dim"]:
    """phi(X) of `Weights`, or the same with softmax over the keys, for which b has no effect."""
    q, k, v = (x.unsqueeze(-3) @ w.mT for w in (weights.wq, weights.wk, weights.wv))
    scores = weights.scale * q @ k.mT
    if kind == "sigmoid":
        a = torch.sigmoid(scores + weights.sigmoid_bias[:, None, None])
    else:
        a = scores.softmax(-1)
    return (a @ v @ weights.wo.mT).sum(-3)


def jacobian_bound(
    x: Float[Tensor, "*batch n dim"], weights: Weights, over: Literal["reals", "scores"] = "reals"
) -> Float[Tensor, "*batch"]:
    """An upper bound of ||J phi(X)||_2, from R^(n x dim) to itself, for sigmoid self-attention at X.

        ||J phi(X)|| <= sum_h ||W_oh W_vh|| (s0_h + 2 s1_h scale ||W_qh^T W_kh|| mean_i |x_i|^2)
        s0 = n sup sigmoid,   s1 = n sup sigmoid'

    with the suprema over the reals, 1 and 1/4, or over the scores that tokens as long as the longest can have,
    |s - b| <= scale ||W_q^T W_k|| max_i |x_i|^2. Masks and ALiBi's slopes only lower the weights: the bound of the
    reals holds with them too. docs/theory/regularity.md has the proof.

    Args:
        x: (..., n, dim).
        weights: of the attention.
        over: "reals" does not depend on b; "scores" is smaller. Default: "reals".

    Raises:
        ValueError: over is neither.

    Source: derived, for one head the form that we recall of the regularity theorem of arXiv:2409.04431; heads, scale
    and the suprema over scores are ours.
    """
    if over not in ("reals", "scores"):
        raise ValueError(f"over must be 'reals' or 'scores', got {over!r}")
    squares = x.square().sum(-1)
    n, mean = squares.shape[-1], squares.mean(-1, keepdim=True)
    if over == "reals":
        s0, s1 = torch.ones_like(mean), torch.full_like(mean, 0.25)
    else:
        reach = weights.qk_norms * squares.amax(-1, keepdim=True)
        s0 = torch.sigmoid(weights.sigmoid_bias + reach)
        nearest = torch.sigmoid((weights.sigmoid_bias.abs() - reach).clamp(min=0.0))
        s1 = nearest * (1.0 - nearest)
    return (weights.ov_norms * n * (s0 + 2.0 * s1 * weights.qk_norms * mean)).sum(-1)


def softmax_jacobian_bound(x: Float[Tensor, "*batch n dim"], weights: Weights) -> Float[Tensor, "*batch"]:
    """An upper bound of ||J phi(X)||_2 for softmax in place of sigmoid: of order R^2 as well, once n is fixed.

        ||J phi(X)|| <= sum_h ||W_oh W_vh|| (sqrt(n) + (1 + sqrt(n)) scale ||W_qh^T W_kh|| max_i |x_i|^2)

    The growth of exp(c R^2) that is known of softmax needs n to grow with it. docs/theory/regularity.md has the proof.

    Args:
        x: (..., n, dim).
        weights: of the attention; b has no effect.

    Source: derived.
    """
    squares, root = x.square().sum(-1), math.sqrt(x.shape[-2])
    longest = squares.amax(-1, keepdim=True)
    return (weights.ov_norms * (root + (1.0 + root) * weights.qk_norms * longest)).sum(-1)


@dataclass(frozen=True)
class Norm:
    """What a power iteration found: `value` is at most the true norm, and equal to it once it has converged."""

    value: float
    direction: Tensor  # unit, of the inputs
    residual: float  # |J^T J v - value^2 v| / value^2; some singular value is within residual / 2 of value, relatively
    steps: int


def operator_norm(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    max_steps: int = 1000,
    tol: float = 1e-6,
    seed: int = 0,
    start: Tensor | None = None,
) -> Norm:
    """||J fn(x)||_2 by power iteration on J^T J, a jvp and a vjp in each step: no Jacobian is ever formed.

        v <- J^T J v / |J^T J v|,    ||J|| = |J v|

    A cluster of singular values at the top converges slowly; |J v| is then still within the cluster.

    Args:
        fn: differentiable in both modes, from a tensor to a tensor. Of the op, backend="reference" is.
        x: the point, floating.
        max_steps: Default: 1000.
        tol: ends when the residual is below it. Default: 1e-6, for a value good to about 1e-12.
        seed: of the first direction. Default: 0.
        start: the first direction instead, of the shape of x, not zero.

    Raises:
        ValueError: max_steps is not positive; x or J is not finite.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if not x.isfinite().all():
        raise ValueError("x must be finite, got some that is not")
    if start is None:
        start = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x)
    v = start / start.norm()
    pull = vjp(fn, x)[1]
    value, residual, steps = 0.0, math.inf, 0
    for steps in range(1, max_steps + 1):
        forward = pushed(fn, x, v).detach()  # of parameters too
        back = pull(forward)[0].detach()
        square, length = float(forward.square().sum()), float(back.norm())
        if not math.isfinite(length):
            raise ValueError(f"the Jacobian must be finite, got a product of norm {length}")
        value = math.sqrt(square)
        if length == 0.0:
            return Norm(value, v, 0.0, steps)
        residual = float((back - square * v).norm()) / square
        if residual < tol:
            break
        v = back / length
    return Norm(value, v, residual, steps)


def jacobian_norms(
    x: Float[Tensor, "batch n dim"], weights: Weights, kind: Kind = "sigmoid"
) -> Float[Tensor, " batch"]:
    """||J phi(X)||_2 at a batch of small X, (batch,), from full Jacobians of (n dim)^2 and their singular values."""
    full = torch.func.vmap(torch.func.jacrev(lambda one: attention(one, weights, kind)))(x)
    size = x.shape[-2] * x.shape[-1]
    return torch.linalg.matrix_norm(full.reshape(-1, size, size), 2)


def pushed(fn: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """J fn(x) v, forward mode."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # torch of its own code, at the first jvp
        return jvp(fn, (x,), (v,))[1]
