"""What the op means, in eager PyTorch: O(seqlen_q * seqlen_k) memory, any float dtype, differentiable twice.

Everything else is faster; nothing else is the specification. The equations are those of docs/semantics.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import keep_mask
from .problem import Problem, bias_rows, make_problem
from .rules import split_bias, validate

NAME = "reference"
PACKED = False
ALIGNED = False


def unsupported(problem: Problem, direction: str = "forward") -> str | None:
    """The specification covers every call."""
    return None


def formula(problem: Problem) -> str:
    """torch.sigmoid of scores in the compute dtype."""
    return f"exact: torch.sigmoid in {str(problem.compute_dtype).removeprefix('torch.')}"


def visible(problem: Problem, device: torch.device) -> Tensor | None:
    """Which key each query sees, (seqlen_q, seqlen_k) bool: p_i - left <= j <= p_i + right; None if every key is seen.

    >>> causal, 2 queries x 5 keys        causal, 5 queries x 2 keys
    ... 1 1 1 1 0                         0 0
    ... 1 1 1 1 1                         0 0
    ...                                   0 0
    ...                                   1 0
    ...                                   1 1
    """
    left, right = problem.band
    if left is None and right is None:
        return None
    distance = _distance(problem, device)
    keep = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        keep &= distance <= left
    if right is not None:
        keep &= distance >= -right
    return keep


def _distance(problem: Problem, device: torch.device) -> Tensor:
    """p_i - j as int64 (seqlen_q, seqlen_k), with p_i = i + q_offset."""
    p = torch.arange(problem.seqlen_q, device=device) + problem.q_offset
    return p[:, None] - torch.arange(problem.seqlen_k, device=device)


def scores(problem: Problem, q: Tensor, k: Tensor, bias: Tensor | None, slopes: Tensor | None) -> Tensor:
    """S = scale * Q K^T + b - slope * |p_i - j|, visible or not: (batch, nheads, seqlen_q, seqlen_k)."""
    dtype = problem.compute_dtype
    # query head h reads key head h // group: (batch, seqlen, nheads_k, group, head_dim)
    q = q.to(dtype).unflatten(2, (problem.nheads_k, problem.group))
    s = problem.scale * torch.einsum("bikgd,bjkd->bkgij", q, k.to(dtype)).flatten(1, 2)
    if bias is None:
        assert problem.sigmoid_bias is not None
        s = s + problem.sigmoid_bias
    else:
        s = s + bias_rows(bias.to(dtype), problem.batch, problem.nheads)[..., None]
    if slopes is not None:
        s = s - slopes.to(dtype)[..., None, None] * _distance(problem, q.device).abs()
    return s


def weights(problem: Problem, q: Tensor, k: Tensor, bias: Tensor | None, slopes: Tensor | None) -> Tensor:
    """A = sigmoid(S), 0 where not visible: (batch, nheads, seqlen_q, seqlen_k)."""
    a = torch.sigmoid(scores(problem, q, k, bias, slopes))
    keep = visible(problem, q.device)
    return a if keep is None else torch.where(keep, a, 0.0)


def dropped(problem: Problem, a: Tensor, seed: Tensor | None) -> Tensor:
    """A dropped out and rescaled by 1 / (1 - dropout_p) where a seed is given."""
    if seed is None:
        return a
    return a * keep_mask(seed, problem.dropout_p, problem.origin, tuple(a.shape)) / (1.0 - problem.dropout_p)


def product(problem: Problem, a: Tensor, v: Tensor) -> Tensor:
    """A V in the dtype of v."""
    a = a.unflatten(1, (problem.nheads_k, problem.group))
    out = torch.einsum("bkgij,bjkd->bikgd", a, v.to(a.dtype)).flatten(2, 3)
    return out.to(v.dtype).contiguous()


def forward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """O = A V, with dropout where a seed is given."""
    return product(problem, dropped(problem, weights(problem, q, k, bias, slopes), seed), v)


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    sigmoid_bias: float | Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    alibi_slopes: Tensor | None = None,
    q_offset: int | None = None,
) -> Tensor:
    """The weights A, before dropout: (batch, nheads, seqlen_q, seqlen_k) in float32 (float64 for float64 inputs).

    O(seqlen_q * seqlen_k) memory: for looking at attention, not for training. Arguments as in `sigmoid_attention`.

    Raises:
        ValueError: as `sigmoid_attention`.
    """
    validate(q, k, k, sigmoid_bias, scale, causal, window_size, alibi_slopes, 0.0, "auto", NAME)
    bias, number = split_bias(sigmoid_bias)
    left, right = window_size
    problem = make_problem(
        q, k, k, bias=bias, slopes=alibi_slopes, sigmoid_bias=number, scale=scale, causal=causal, window_left=left,
        window_right=right, q_offset=q_offset,
    )  # fmt: skip
    return weights(problem, q, k, bias, alibi_slopes)
