"""The bound of regularity.py for a layer as it is trained: with QK-norm, RoPE, ALiBi, masks, at the weights it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...backends.reference import attention_weights
from ...nn.attention import SigmoidAttention, SoftmaxAttention, kept_keys_bias

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def unbounded(module: nn.Module) -> str | None:
    """Why `layer_bound` does not hold for a module, None if it does: the rule that is broken."""
    if not isinstance(module, SigmoidAttention) or isinstance(module, SoftmaxAttention):
        return "module must be an nn.SigmoidAttention"
    if module.gate_proj is not None:
        return "module must be without a gate"
    if module.training and module.dropout_p > 0.0:
        return "module must be without dropout"
    return None


def layer_bound(
    module: SigmoidAttention,
    x: Float[Tensor, "batch n dim"],
    key_mask: Bool[Tensor, "batch n"] | None = None,
) -> Float[Tensor, " batch"]:
    """An upper bound of the norm of the Jacobian of an `nn.SigmoidAttention` at X, the matrix of one sequence.

        ||J phi(X)|| <= sum_h ||W_oh W_vh|| ||A||_F + scale ||W_oh|| (u + w)
        u = max_i Lq_i sum_j A'_ij |k_j| |v_j|,   w^2 = sum_ij (A'_ij |q_i| Lk_j |v_j|)^2
        A' = A (1 - A),   Lq_i = ||W_q||, with QK-norm max |gain| ||W_q|| / rms(W_q x_i);  Lk_j likewise

    with A, q, k and v those of the head at X. Where regularity.py has suprema, this has the weights that are there, so
    it is below that bound, and holds with masks, window, ALiBi, RoPE, which does not change norms, biases of the
    projections and heads that share keys. Norms of matrices are Schatten's of order 16, which is at least the largest
    singular value and at most rank^(1/16) times it. docs/theory/regularity.md has the proof.

    Without gradient, in float32 or wider; O(n^2) memory. Nothing here waits for a GPU.

    Args:
        module: without gate, its attention_fn computing what `sigmoid_attention` does.
        x: (batch, n, dim).
        key_mask: as the module's. Default: all.

    Raises:
        ValueError: `unbounded` says why.

    Source: derived.
    """
    if (reason := unbounded(module)) is not None:
        raise ValueError(f"{reason}, got {module}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x, group = x.to(dtype), module.nheads // module.nheads_k
        # (batch, n, nheads, head_dim), and how much a head can stretch a token, (batch or 1, n or 1, nheads)
        q, stretch_q = _projected(module.q_proj, module.q_norm, module.nheads, x)
        k, stretch_k = _projected(module.k_proj, module.k_norm, module.nheads_k, x)
        v, _ = _projected(module.v_proj, nn.Identity(), module.nheads_k, x)
        bias = module.bias(x.device)
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, :, None, None], 0.0)
            if bias is None:
                bias = kept_keys_bias(key_mask, dtype).expand(-1, module.nheads)
        options = {key: value for key, value in module._options(x.device).items() if key != "dropout_p"}
        # (batch, nheads, n, n)
        a = attention_weights(module.rope.forward(q), module.rope.forward(k), sigmoid_bias=bias, **options)
        if key_mask is not None:
            a = a * key_mask[:, None, None, :]
        slope = a * (1.0 - a)
        k, v, stretch_k = (y.repeat_interleave(group, 2) for y in (k, v, stretch_k))
        # (batch, nheads, n)
        q, k, v = (y.norm(dim=-1).transpose(1, 2) for y in (q, k, v))
        stretch_q, stretch_k = (y.expand(*x.shape[:2], -1).transpose(1, 2) for y in (stretch_q, stretch_k))
        of_queries = (stretch_q * (slope @ (k * v)[..., None])[..., 0]).amax(-1)
        of_keys = (slope.square() @ (stretch_k * v).square()[..., None])[..., 0].mul(q.square()).sum(-1).sqrt()
        # (nheads, dim, head_dim) and (nheads, head_dim, dim)
        out = module.out_proj.weight.to(dtype).unflatten(1, (module.nheads, -1)).transpose(0, 1)
        value = module.v_proj.weight.to(dtype).unflatten(0, (module.nheads_k, -1)).repeat_interleave(group, 0)
        first = product_norm(out, value) * a.flatten(2).norm(dim=-1)
        scale = module.head_dim**-0.5
        return (first + scale * matrix_norm(out) * (of_queries + of_keys)).sum(-1)


def _projected(proj: nn.Linear, norm: nn.Module, nheads: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """A projection by heads, normalised where the module does, and the norm of its derivative, for each token."""
    weight, bias = proj.weight.to(x.dtype), proj.bias
    y = nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype)).unflatten(-1, (nheads, -1))
    stretch = matrix_norm(weight.unflatten(0, (nheads, -1)))[None, None]
    if isinstance(norm, nn.RMSNorm):
        rms = (y.square().mean(-1) + (norm.eps or 0.0)).sqrt()
        stretch = norm.weight.abs().max().to(x.dtype) * stretch / rms
    return norm.forward(y).to(x.dtype), stretch  # without the hooks that watch a training


def matrix_norm(x: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch"]:
    """Schatten's norm of order 16: at least the largest singular value, at most rank^(1/16) times it.

        (sum_i s_i^16)^(1/16) = trace((x^T x)^8)^(1/16)

    By products of matrices alone, where a decomposition would wait for the GPU.
    """
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    return _trace_norm(gram)


def product_norm(left: Float[Tensor, "*batch rows rank"], right: Float[Tensor, "*batch rank cols"]) -> Tensor:
    """`matrix_norm` of left @ right, by rank x rank: its s_i^2 are the eigenvalues of (left^T left)(right right^T)."""
    return _trace_norm((left.mT @ left) @ (right @ right.mT))


def _trace_norm(squares: Tensor) -> Tensor:
    """trace(squares^8)^(1/16), of a matrix whose eigenvalues are not negative, scaled so that nothing overflows."""
    trace = squares.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=torch.finfo(squares.dtype).tiny)
    power = squares / trace[..., None, None]
    for _ in range(3):
        power = power @ power
    return trace.sqrt() * power.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=0.0) ** (1 / 16)
