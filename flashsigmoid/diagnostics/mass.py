"""Where the mass of attention lies, of sequences whose A is too large to write down: of rows, of keys, the largest.

Sums of A are attention with ones for values, so they come out of the fused kernels; the largest weights have a kernel
of their own. What one layer of a model does during a forward is the business of probes.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends import BackendUnsupported, Problem, triton
from ..backends.problem import make_problem
from ..backends.reference import weights
from ..backends.rules import Window, split_bias, validate
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
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch nheads seqlen_q count"], Int64[Tensor, "batch nheads seqlen_q count"]]:
    """The largest weights of every query, falling, and their keys: O(seqlen * count) memory, no gradient.

    Of equal weights the earlier key comes first. Where a query sees fewer keys, weights of 0 follow, whose key is -1,
    as that of any weight of 0. The weights are float32 (float64 for float64 inputs).

    By "triton" a kernel finds 64 of them in a pass over the keys that are seen; "blocked" is plain torch, which writes
    A down in blocks of 1024 queries and keys, whatever a window hides.

    Args:
        count: how many, from 1 to seqlen_k.
        q, k, sigmoid_bias, scale, causal, window_size, alibi_slopes: as in `sigmoid_attention`.
        backend: "triton", "blocked", or "auto": on a GPU the first where it can (float32 only up to head_dim 128, since
            beyond registers spill), else the second.

    Raises:
        ValueError: a count out of range, another backend, or as `sigmoid_attention`.
        BackendUnsupported: "triton" was asked for and cannot, with its reason.
    """
    n = k.shape[1]
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= n:
        raise ValueError(f"count must be an integer from 1 to seqlen_k = {n}, got {count!r}")
    if backend not in ("auto", "triton", "blocked"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'blocked', got {backend!r}")
    validate(q, k, k, sigmoid_bias, scale, causal, window_size, alibi_slopes, 0.0, "exact", "auto")
    bias, b = split_bias(sigmoid_bias)
    problem = make_problem(
        q, k, k, bias=bias, slopes=alibi_slopes, sigmoid_bias=b, scale=scale, causal=causal,
        window_left=window_size[0], window_right=window_size[1], q_offset=None, dropout_p=0.0, origin=(0, 0, 0, 0),
        sigmoid="exact",
    )  # fmt: skip
    reason = triton.unsupported(problem)
    if backend == "triton" and reason is not None:
        raise BackendUnsupported(f"triton: {reason}")
    spills = problem.dtype == torch.float32 and problem.head_dim > 128
    with torch.no_grad():
        if backend == "triton" or (backend == "auto" and reason is None and problem.device != "cpu" and not spills):
            return triton.top_weights(problem, q, k, count, bias, alibi_slopes)
        return _top_in_blocks(problem, q, k, count, bias, alibi_slopes)


def _top_in_blocks(
    problem: Problem, q: Tensor, k: Tensor, count: int, bias: Tensor | None, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    found = []
    for first in range(0, max(1, q.shape[1]), _BLOCK):
        rows = q[:, first : first + _BLOCK]
        b = bias[..., first : first + _BLOCK] if bias is not None and bias.dim() == 3 else bias
        best = k.new_zeros(q.shape[0], q.shape[2], rows.shape[1], 0, dtype=problem.compute_dtype)
        keys = torch.zeros_like(best, dtype=torch.int64)
        for start in range(0, k.shape[1], _BLOCK):
            columns = k[:, start : start + _BLOCK]
            part = replace(
                problem, seqlen_q=rows.shape[1], seqlen_k=columns.shape[1], q_offset=problem.q_offset + first - start,
                bias_shape=None if b is None else tuple(b.shape),
            )  # fmt: skip
            a = weights(part, rows, columns, b, slopes)
            where = torch.arange(start, start + a.shape[3], device=q.device).expand(a.shape)
            # stable: of equal ones those found first stay first
            best, index = torch.cat((best, a), dim=-1).sort(dim=-1, descending=True, stable=True)
            best, keys = best[..., :count], torch.cat((keys, where), dim=-1).gather(-1, index[..., :count])
        found.append((best, keys.masked_fill(best == 0.0, -1)))
    best, keys = zip(*found, strict=True)
    return torch.cat(best, dim=2), torch.cat(keys, dim=2)
