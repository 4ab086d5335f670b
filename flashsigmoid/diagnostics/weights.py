"""Numbers of attention weights and outputs, and the weights of softmax: tensors in, one number or A out.

Explicit weights are O(seqlen_q * seqlen_k) memory. Who sees them inside of a model: probes.py and watch.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends import reference
from ..backends.problem import make_problem
from ..backends.rules import validate

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def attention_norm(out: Float[Tensor, "batch seqlen_q nheads head_dim_v"]) -> Float[Tensor, ""]:
    """Mean over tokens of the L2 norm of A V, the heads of a token concatenated, in at least float32.

        mean_bi sqrt(sum_hd out_bihd^2)

    Args:
        out: A V, (batch, seqlen_q, nheads, head_dim_v), before the output projection.

    Source: arXiv:2409.04431, whose main empirical finding is that this norm must stay small early on.
    """
    return _wide(out).flatten(2).norm(dim=-1).mean()


def row_mass(weights: Float[Tensor, "batch nheads seqlen_q seqlen_k"]) -> Float[Tensor, ""]:
    """Mean over rows of what a row of A sums to, in at least float32.

        mean_bhi sum_j A_bhij

    1 for softmax. About 1 for sigmoid at the start with b = -log n, n / 2 without b.

    Args:
        weights: A, (batch, nheads, seqlen_q, seqlen_k).
    """
    return _wide(weights).sum(-1).mean()


def sink_mass(weights: Float[Tensor, "batch nheads seqlen_q seqlen_k"], keys: int = 1) -> Float[Tensor, ""]:
    """Mean over rows of the share of a row's mass that lies on the first keys, in at least float32.

        mean_bhi sum_{j < keys} A_bhij / sum_j A_bhij

    A row without mass has no share and is left out; nan if there is no other. Even weights under a causal
    mask give (1 + 1/2 + ... + 1/n) / n for one key.

    Args:
        weights: A, (batch, nheads, seqlen_q, seqlen_k).
        keys: how many count as first. Default: 1.

    Source: arXiv:2410.10781 (attention sinks, and their absence where attention does not normalise).
    """
    weights = _wide(weights)
    mass = weights.sum(-1)
    share = weights[..., :keys].sum(-1) / mass.clamp(min=torch.finfo(weights.dtype).tiny)
    return _mean_where(share, mass > 0)


def effective_keys(weights: Float[Tensor, "batch nheads seqlen_q seqlen_k"]) -> Float[Tensor, ""]:
    """Mean over rows of how many keys of equal weight would be as spread as a row is, in at least float32.

        mean_bhi exp(-sum_j p_bhij log p_bhij),   p_bhij = A_bhij / sum_j A_bhij

    1 where all mass lies on one key, k where it is even on k. A row without mass is left out; nan if there is no other.

    Args:
        weights: A, (batch, nheads, seqlen_q, seqlen_k), not negative.
    """
    weights = _wide(weights)
    mass = weights.sum(-1, keepdim=True)
    counts = torch.special.entr(weights / mass.clamp(min=torch.finfo(weights.dtype).tiny)).sum(-1).exp()
    return _mean_where(counts, mass[..., 0] > 0)


def saturation(weights: Float[Tensor, "batch nheads seqlen_q seqlen_k"], above: float = 0.99) -> Float[Tensor, ""]:
    """Mean over rows of the share of a row's mass on weights so near 1 that their scores hardly get a gradient.

        mean_bhi sum_{j: A_bhij > above} A_bhij / sum_j A_bhij

    The derivative of a weight is A (1 - A) for sigmoid, and of softmax by its own score: below 1 - above times it. A
    row without mass is left out; nan if there is no other.

    Args:
        weights: A, (batch, nheads, seqlen_q, seqlen_k).
        above: Default: 0.99.
    """
    weights = _wide(weights)
    mass = weights.sum(-1)
    near = torch.where(weights > above, weights, 0.0).sum(-1)
    return _mean_where(near / mass.clamp(min=torch.finfo(weights.dtype).tiny), mass > 0)


def softmax_weights(
    q: Float[Tensor, "batch seqlen_q nheads head_dim"],
    k: Float[Tensor, "batch seqlen_k nheads_k head_dim"],
    *,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    alibi_slopes: Tensor | None = None,
    key_mask: Bool[Tensor, "batch seqlen_k"] | None = None,
) -> Float[Tensor, "batch nheads seqlen_q seqlen_k"]:
    """The weights of `nn.softmax_attention` themselves, before dropout.

        A = softmax(scale * Q K^T - alibi_slope * |p_i - j|) over the visible keys j

    with p_i = i + seqlen_k - seqlen_q. A row that sees nothing is zero.

    Args:
        q, k, scale, causal, window_size, alibi_slopes, key_mask: as in `nn.softmax_attention`.

    Returns:
        (batch, nheads, seqlen_q, seqlen_k) in float32, float64 for float64 inputs.
    """
    validate(q, k, k, None, scale, causal, window_size, alibi_slopes, 0.0, "auto", "reference")
    left, right = window_size
    problem = make_problem(
        q, k, k, slopes=alibi_slopes, sigmoid_bias=0.0, scale=scale, causal=causal, window_left=left, window_right=right
    )
    # (batch, nheads, seqlen_q, seqlen_k)
    scores = reference.scores(problem, q, k, None, alibi_slopes)
    keep = torch.ones_like(scores, dtype=torch.bool)
    seen = reference.visible(problem, q.device)
    if seen is not None:
        keep = keep & seen
    if key_mask is not None:
        keep = keep & key_mask[:, None, None, :]
    # a row of -inf is nan, and a row that sees nothing is zero
    return torch.where(keep, scores.masked_fill(~keep, -torch.inf).softmax(-1), 0.0)


def sdpa_weights(
    query: Float[Tensor, "*batch seqlen_q head_dim"],
    key: Float[Tensor, "*batch_k seqlen_k head_dim"],
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "*batch seqlen_q seqlen_k"]:
    """The weights of torch's `scaled_dot_product_attention` itself, before dropout.

        A = softmax(scale * Q K^T + mask)         is_causal is torch's: top-left

    A row that sees nothing is zero.

    Args:
        query, key, attn_mask, is_causal, scale, enable_gqa: as torch's, heads in the third dimension from the end.

    Returns:
        (..., seqlen_q, seqlen_k) in float32, float64 for float64 inputs.
    """
    query, key = _wide(query), _wide(key)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * (query @ key.transpose(-1, -2))
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask.to(scores.dtype)
    return scores.softmax(-1).nan_to_num(0.0) if attn_mask is not None else scores.softmax(-1)


def _mean_where(x: Tensor, keep: Tensor) -> Tensor:
    """The mean of some, nan of none; nothing waits for a GPU."""
    return torch.where(keep, x, 0.0).sum() / keep.sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
