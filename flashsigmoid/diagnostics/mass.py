"""Where the mass of attention lies, of sequences whose A is too large to write down: of rows, of keys, the largest.

Sums of A are attention with ones for values, so they come out of the fused kernels; the largest weights do not. What
one layer of a model does during a forward is the business of probes.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.reference import attention_weights
from ..backends.rules import Window, validate
from ..functional import sigmoid_attention_shard

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

_BLOCK = 1024  # queries and keys whose weights are written down at once


def mass_of_rows(
    q: Float[Tensor, "batch seqlen_q nheads head_dim"],
    k: Float[Tensor, "batch seqlen_k nheads_k head_dim"],
    *,
    sigmoid_bias: float | Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    alibi_slopes: Tensor | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch nheads seqlen_q"]:
    """How much each query attends in all: sum_j A_ij, between 0 and the number of keys it sees.

    O(seqlen) memory, differentiable, in the dtype of q.

    Args:
        q, k, sigmoid_bias, scale, causal, window_size, alibi_slopes, backend: as in `sigmoid_attention`.

    Raises:
        ValueError, BackendUnsupported: as `sigmoid_attention`.

    Source: arXiv:2409.04431, section 2: b = -log n makes it about 1 where a training begins.
    """
    bias = -math.log(max(1, k.shape[1])) if sigmoid_bias is None else sigmoid_bias
    out = sigmoid_attention_shard(
        q, k, k.new_ones(*k.shape[:3], 1), sigmoid_bias=bias, q_offset=k.shape[1] - q.shape[1], scale=scale,
        causal=causal, window_size=window_size, alibi_slopes=alibi_slopes, backend=backend,
    )  # fmt: skip
    return out[..., 0].transpose(1, 2)


def mass_of_keys(
    q: Float[Tensor, "batch seqlen_q nheads head_dim"],
    k: Float[Tensor, "batch seqlen_k nheads_k head_dim"],
    *,
    sigmoid_bias: float | Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    alibi_slopes: Tensor | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch nheads seqlen_k"]:
    """How much each key is attended to by all queries: sum_i A_ij; a sink is a key with far more than the others.

    Queries and keys change places: A^T has key j at position j - q_offset, and the window's sides exchanged. O(seqlen)
    memory, with a copy of k for every query head; differentiable, in the dtype of q. With a bias for each row it is
    dV = A^T dO of ones, by the backward kernels, which is not differentiable and not for `torch.inference_mode`.

    Args:
        q, k, sigmoid_bias, scale, causal, window_size, alibi_slopes, backend: as in `sigmoid_attention`.

    Raises:
        ValueError, BackendUnsupported: as `sigmoid_attention`.

    Source: arXiv:2409.04431, section 2.
    """
    validate(q, k, k, sigmoid_bias, scale, causal, window_size, alibi_slopes, 0.0, "auto", backend)
    bias = -math.log(max(1, k.shape[1])) if sigmoid_bias is None else sigmoid_bias
    left, right = window_size
    if causal:
        right = 0 if right is None else min(0, right)
    keys = k.repeat_interleave(q.shape[2] // max(1, k.shape[2]), dim=2)
    if isinstance(bias, Tensor) and bias.dim() == 3:
        with torch.enable_grad():
            ones = k.new_ones(*keys.shape[:3], 1).requires_grad_()
            out = sigmoid_attention_shard(
                q.detach(), keys.detach(), ones, sigmoid_bias=bias.detach(), q_offset=k.shape[1] - q.shape[1],
                scale=scale, window_size=(left, right), backend=backend,
                alibi_slopes=None if alibi_slopes is None else alibi_slopes.detach(),
            )  # fmt: skip
            (mass,) = torch.autograd.grad(out, ones, torch.ones_like(out))
        return mass[..., 0].transpose(1, 2)
    out = sigmoid_attention_shard(
        keys, q, q.new_ones(*q.shape[:3], 1), sigmoid_bias=bias, q_offset=q.shape[1] - k.shape[1],
        scale=scale, window_size=(right, left), alibi_slopes=alibi_slopes, backend=backend,
    )  # fmt: skip
    return out[..., 0].transpose(1, 2)


def top_weights(
    q: Float[Tensor, "batch seqlen_q nheads head_dim"],
    k: Float[Tensor, "batch seqlen_k nheads_k head_dim"],
    count: int,
    *,
    sigmoid_bias: float | Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    alibi_slopes: Tensor | None = None,
) -> tuple[Float[Tensor, "batch nheads seqlen_q count"], Int64[Tensor, "batch nheads seqlen_q count"]]:
    """The largest weights of every query, falling, and their keys: plain torch, no gradient, on a GPU not by a kernel.

    A is written down in blocks of 1024 queries and keys, whatever a window hides. The weights are float32 (float64 for
    float64 inputs). Where a query sees fewer keys, weights of 0 follow.

    Args:
        count: how many, from 1 to seqlen_k.
        q, k, sigmoid_bias, scale, causal, window_size, alibi_slopes: as in `sigmoid_attention`.

    Raises:
        ValueError: a count out of range; as `sigmoid_attention`.
    """
    n = k.shape[1]
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= n:
        raise ValueError(f"count must be an integer from 1 to seqlen_k = {n}, got {count!r}")
    bias = -math.log(n) if sigmoid_bias is None else sigmoid_bias
    found = []
    with torch.no_grad():
        for first in range(0, max(1, q.shape[1]), _BLOCK):
            rows = slice(first, first + _BLOCK)
            b = bias[..., rows] if isinstance(bias, Tensor) and bias.dim() == 3 else bias
            offset = n - q.shape[1] + first
            found.append(_top_of_rows(q[:, rows], k, count, b, scale, causal, window_size, alibi_slopes, offset))
    values, keys = zip(*found, strict=True)
    return torch.cat(values, dim=2), torch.cat(keys, dim=2)


def _top_of_rows(
    q: Tensor, k: Tensor, count: int, bias: float | Tensor, scale: float | None, causal: bool, window_size: Window,
    alibi_slopes: Tensor | None, offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    best = where = None
    for start in range(0, k.shape[1], _BLOCK):
        a = attention_weights(
            q, k[:, start : start + _BLOCK], sigmoid_bias=bias, scale=scale, causal=causal, window_size=window_size,
            alibi_slopes=alibi_slopes, q_offset=offset - start,
        )  # fmt: skip
        keys = torch.arange(start, start + a.shape[3], device=q.device).expand(a.shape)
        if best is not None and where is not None:
            a, keys = torch.cat((best, a), dim=-1), torch.cat((where, keys), dim=-1)
        best, index = a.topk(min(count, a.shape[3]), dim=-1)
        where = keys.gather(-1, index)
    assert best is not None
    assert where is not None
    return best, where
