"""The op on a cache of keys and values: a decode step, a chunk of prefill, a prefix that all sequences share.

Rules, appending and copies are backends/cached.py's, the kernel's ops backends/decode.py's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backends
from .backends import Explanation, cached, decode, triton
from .backends.problem import BackendUnsupported, Problem
from .backends.rules import Window, split_bias, validate
from .functional import attend

if TYPE_CHECKING:
    from jaxtyping import Float, Int32


def sigmoid_attention_with_kvcache(
    q: Float[Tensor, "batch seqlen_q nheads head_dim"],
    k_cache: Float[Tensor, "batch capacity nheads_k head_dim"],
    v_cache: Float[Tensor, "batch capacity nheads_k head_dim_v"],
    k: Float[Tensor, "batch seqlen_new nheads_k head_dim"] | None = None,
    v: Float[Tensor, "batch seqlen_new nheads_k head_dim_v"] | None = None,
    *,
    cache_seqlens: Int32[Tensor, " batch"] | int,
    sigmoid_bias: float | Tensor,
    page_table: Int32[Tensor, "batch pages"] | None = None,
    rotary_cos: Float[Tensor, "positions half_rotary_dim"] | None = None,
    rotary_sin: Float[Tensor, "positions half_rotary_dim"] | None = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    window_size: Window = (None, None),
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    num_splits: int = 0,
    backend: str = "auto",
) -> Float[Tensor, "batch seqlen_q nheads head_dim_v"]:
    """Sigmoid attention to a cache of keys and values, after k and v are appended to it in place. Forward only.

        O = A V,   A = sigmoid(scale * Q K^T + b - alibi_slope * |p_i - j|),   A = 0 where not visible

    over the seqlen = cache_seqlens + seqlen_new keys of each sequence, with p_i = i + seqlen - seqlen_q: every sequence
    is a `sigmoid_attention` of its own, bottom-right causal. One query is a decode step, more are a chunk of prefill.
    `cache_seqlens` itself is not changed. On a GPU the host reads no length, and calls can be captured and compiled.

    Args:
        q: queries (batch, seqlen_q, nheads, head_dim), float16, bfloat16, float32 or float64.
        k_cache: keys (batch, capacity, nheads_k, head_dim), or pages (npages, page_size, nheads_k, head_dim), page_size
            a power of two from 16. What is beyond a sequence's length is never used.
        v_cache: values, as k_cache with head_dim_v.
        k: new keys (batch, seqlen_new, nheads_k, head_dim), written at cache_seqlens onwards. Default: none.
        v: new values, given together with k.
        cache_seqlens: keys each sequence has before this call, int32 or int64 (batch,), or one int for all.
        sigmoid_bias: b, required, the constant of the model's training: a bias that grew with the cache would make
            training and decoding disagree. A float, or a tensor (), (nheads,), (batch, nheads) or
            (batch, nheads, seqlen_q).
        page_table: int32 or int64 (batch, pages of a sequence): page j holds keys j * page_size onwards. Sequences may
            share pages that are not written to. Default: a contiguous cache.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), as many positions as the cache has room for; new keys are
            turned at their positions in the cache and query i at p_i. seqlen_q is then at most seqlen_new.
        rotary_interleaved: pairs are (x_2i, x_2i+1), else (x_i, x_i+rotary_dim/2). Default: False.
        causal: key j is visible to query i only if j <= p_i. Default: True.
        window_size, alibi_slopes, scale: as in `sigmoid_attention`.
        num_splits: into how many parts the decode kernel divides the keys, 0 for its own choice; decides the schedule,
            never the meaning, and is not used by other backends. Default: 0.
        backend: "auto", "triton" (the decode kernel), "blocked" or "reference". Default: "auto", on a GPU the decode
            kernel for a few queries, else the dense kernels on a copy of the cache (`kvcache.explain_with_kvcache`).

    Returns:
        (batch, seqlen_q, nheads, head_dim_v), contiguous, in the dtype of q, which autocast does not change. A sequence
        without keys gets zeros.

    Raises:
        ValueError: a shape, dtype, device or option outside the rules above; on a CPU also a length beyond the cache
            and a page that is not there. Nothing is written then.
        BackendUnsupported: the named backend cannot compute this call; the message says why.

    Source: arXiv:2409.04431, section 2; the interface of flash-attn's flash_attn_with_kvcache; pages arXiv:2309.06180.
    """
    cache, rotary, options = _checked_cache(
        q, k_cache, v_cache, k, v, cache_seqlens, page_table, rotary_cos, rotary_sin, rotary_interleaved, sigmoid_bias,
        scale, causal, window_size, alibi_slopes, num_splits, backend,
    )  # fmt: skip
    sides = (*split_bias(sigmoid_bias), alibi_slopes, scale, causal, *window_size)
    if _has_decode_kernel(q, cache, sides, backend):
        q = _append_by_kernel(q, cache, k, v, rotary, rotary_interleaved, 0)
        new = 0 if k is None else k.shape[1]
        return _decode(q, cache, sides, new, num_splits, False, q.dtype)
    q, cache = _append(q, cache, k, v, rotary, rotary_interleaved, 0)
    return _attend_to_cache(q, cache, sigmoid_bias, *options)


def sigmoid_attention_with_prefix(
    q: Float[Tensor, "batch seqlen_q nheads head_dim"],
    k_prefix: Float[Tensor, "seqlen_prefix nheads_k head_dim"],
    v_prefix: Float[Tensor, "seqlen_prefix nheads_k head_dim_v"],
    k_cache: Float[Tensor, "batch capacity nheads_k head_dim"],
    v_cache: Float[Tensor, "batch capacity nheads_k head_dim_v"],
    k: Float[Tensor, "batch seqlen_new nheads_k head_dim"] | None = None,
    v: Float[Tensor, "batch seqlen_new nheads_k head_dim_v"] | None = None,
    *,
    cache_seqlens: Int32[Tensor, " batch"] | int,
    sigmoid_bias: float | Tensor,
    page_table: Int32[Tensor, "batch pages"] | None = None,
    rotary_cos: Float[Tensor, "positions half_rotary_dim"] | None = None,
    rotary_sin: Float[Tensor, "positions half_rotary_dim"] | None = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    window_size: Window = (None, None),
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    num_splits: int = 0,
    backend: str = "auto",
) -> Float[Tensor, "batch seqlen_q nheads head_dim_v"]:
    """`sigmoid_attention_with_kvcache` of sequences that begin with the same keys, which are read once for all of them.

        O = A_prefix V_prefix + A_cache V_cache,   p_i = i + seqlen_prefix + seqlen - seqlen_q relative to key 0 of both

    Partial results over keys add, with no state to merge: the queries of the whole batch are rows of one product with
    the prefix, and the sum is taken in float32 and rounded once.

    Args:
        k_prefix: keys in front of every sequence's own, (seqlen_prefix, nheads_k, head_dim), at positions 0 onwards.
        v_prefix: their values.
        rotary_cos, rotary_sin: as many positions as the prefix and the cache together: new keys and queries are turned
            at their positions behind the prefix. The prefix is not turned.
        q, k_cache, v_cache, k, v, cache_seqlens, page_table: as in `sigmoid_attention_with_kvcache`; lengths are those
            of the cache.
        sigmoid_bias, rotary_interleaved, causal, window_size, alibi_slopes, scale, num_splits: as there.
        backend: "auto" shares the prefix on a GPU where there is a decode kernel for the call; elsewhere the prefix is
            copied in front of every sequence.

    Raises:
        ValueError, BackendUnsupported: as `sigmoid_attention_with_kvcache`.

    Source: arXiv:2409.04431, section 2: no weight depends on another key's.
    """
    cache, rotary, options = _checked_cache(
        q, k_cache, v_cache, k, v, cache_seqlens, page_table, rotary_cos, rotary_sin, rotary_interleaved, sigmoid_bias,
        scale, causal, window_size, alibi_slopes, num_splits, backend, prefix=(k_prefix, v_prefix),
    )  # fmt: skip
    n = k_prefix.shape[0]
    sides = (*split_bias(sigmoid_bias), alibi_slopes, scale, causal, *window_size)
    if _has_decode_kernel(q, cache, sides, backend):
        q = _append_by_kernel(q, cache, k, v, rotary, rotary_interleaved, n)
        new = 0 if k is None else k.shape[1]
        prefix = cached.Cache(k_prefix[None], v_prefix[None], cache.seqlens)
        shared = _decode(q, prefix, sides, new, num_splits, True, torch.float32)
        return (shared + _decode(q, cache, sides, new, num_splits, False, torch.float32)).to(q.dtype)
    q, cache = _append(q, cache, k, v, rotary, rotary_interleaved, n)
    return _attend_to_cache(q, cache.behind(k_prefix, v_prefix), sigmoid_bias, *options)


def explain_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    sigmoid_bias: float | Tensor,
    page_table: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window_size: Window = (None, None),
    alibi_slopes: Tensor | None = None,
    backend: str = "auto",
) -> Explanation:
    """What computes `sigmoid_attention_with_kvcache` of these arguments: the decode kernel, or why it does not.

    `reasons["decode kernel"]` is there where the kernel is not taken; `backend` is then the dense one that computes the
    call on a copy of the cache. Semi-public; nothing is computed.

    Raises:
        ValueError, BackendUnsupported: as `sigmoid_attention_with_kvcache`.
    """
    cache, _, _ = _checked_cache(
        q, k_cache, v_cache, None, None, 0, page_table, None, None, False, sigmoid_bias, scale, causal, window_size,
        alibi_slopes, 0, backend,
    )  # fmt: skip
    sides = (*split_bias(sigmoid_bias), alibi_slopes, scale, causal, *window_size)
    problem = _cache_problem(q, cache, sides)
    if _has_decode_kernel(q, cache, sides, backend):
        reasons = {"hopper": str(cached.unsupported("hopper"))}
        return Explanation("triton", triton.formula(problem), reasons, problem)
    dense = backends.explain(problem, backend)
    asked = f"backend={backend!r} was asked for"
    reason = decode.unsupported(problem, backend, q.device) if backend == "auto" else asked
    return replace(dense, reasons={"decode kernel": str(reason), **dense.reasons}, backward="", backward_reasons={})


_Sides = tuple[Tensor | None, float | None, Tensor | None, float | None, bool, int | None, int | None]


def _checked_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, cache_seqlens: Tensor | int,
    page_table: Tensor | None, rotary_cos: Tensor | None, rotary_sin: Tensor | None, rotary_interleaved: bool,
    sigmoid_bias: float | Tensor, scale: float | None, causal: bool, window_size: Window, alibi_slopes: Tensor | None,
    num_splits: int, backend: str,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> tuple[cached.Cache, tuple[Tensor, Tensor] | None, tuple[Any, ...]]:  # fmt: skip
    """The cache before anything is appended, the tables of RoPE, and the options of a dense call on its keys."""
    if sigmoid_bias is None:
        raise ValueError("sigmoid_bias is required, -log of the training context length, got None")
    if isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 0:
        raise ValueError(f"num_splits must be a non-negative integer, got {num_splits!r}")
    cache = cached.checked(q, k_cache, v_cache, k, v, cache_seqlens, page_table)
    if prefix is not None:
        cached.check_prefix(*prefix, cache, q)
    options = (scale, causal, window_size, alibi_slopes, 0.0, "auto", backend)
    like_k, like_v = (
        torch.empty((q.shape[0], 0, *x.shape[2:]), dtype=x.dtype, device=x.device) for x in (k_cache, v_cache)
    )
    validate(q, like_k, like_v, sigmoid_bias, *options)
    for name, x in (("sigmoid_bias", sigmoid_bias), ("alibi_slopes", alibi_slopes)):
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, a cache is forward only, got one that does")
    reason = cached.unsupported(backend)
    if reason is not None:
        raise BackendUnsupported(f"{backend}: {reason}")
    positions = cache.capacity + (0 if prefix is None else prefix[0].shape[0])
    return cache, cached.check_rotary(rotary_cos, rotary_sin, rotary_interleaved, q, k, positions), options


def _cache_problem(q: Tensor, cache: cached.Cache, sides: _Sides) -> Problem:
    bias, number, slopes, scale, causal, left, right = sides
    return decode.problem_of(
        q, cache.k, cache.v, cache.page_table, bias, slopes, number, scale, causal, left, right
    )  # fmt: skip


def _has_decode_kernel(q: Tensor, cache: cached.Cache, sides: _Sides, backend: str) -> bool:
    if backend not in ("auto", "triton"):
        return False
    reason = decode.unsupported(_cache_problem(q, cache, sides), backend, q.device)
    if reason is not None and backend == "triton":
        raise BackendUnsupported(f"triton: {reason}")
    return reason is None


def _decode(
    q: Tensor, cache: cached.Cache, sides: _Sides, new: int, num_splits: int, is_shared: bool, dtype: torch.dtype
) -> Tensor:
    bias, number, slopes, scale, causal, left, right = sides
    return decode.attend(
        q, cache.k, cache.v, cache.seqlens, cache.page_table, bias, slopes, number, scale, causal, left, right, new,
        num_splits, is_shared, dtype,
    )  # fmt: skip


def _append_by_kernel(
    q: Tensor, cache: cached.Cache, k: Tensor | None, v: Tensor | None, rotary: tuple[Tensor, Tensor] | None,
    interleaved: bool, behind: int,
) -> Tensor:  # fmt: skip
    """q, turned by RoPE if there is any; k and v are in the cache, its lengths as they were."""
    if k is None:
        return q
    tables = (None, None) if rotary is None else rotary
    given = (None if rotary is None else q, *tables, interleaved, behind)
    turned = decode.append(k, v, cache.k, cache.v, cache.seqlens, cache.page_table, *given)
    return q if rotary is None else turned


def _append(
    q: Tensor, cache: cached.Cache, k: Tensor | None, v: Tensor | None, rotary: tuple[Tensor, Tensor] | None,
    interleaved: bool, behind: int,
) -> tuple[Tensor, cached.Cache]:  # fmt: skip
    """q, turned by RoPE if there is any, and the cache after k and v."""
    if k is None or v is None:
        return q, cache
    if rotary is not None:
        position = cache.seqlens[:, None] + torch.arange(behind, behind + k.shape[1], device=q.device)
        q = cached.rotate(q, *rotary, position[:, k.shape[1] - q.shape[1] :], interleaved)
        k = cached.rotate(k, *rotary, position, interleaved)
    return q, cache.append(k, v)


def _attend_to_cache(
    q: Tensor, cache: cached.Cache, sigmoid_bias: float | Tensor, scale: float | None, causal: bool,
    window_size: Window, alibi_slopes: Tensor | None, dropout_p: float, sigmoid: str, backend: str,
) -> Tensor:  # fmt: skip
    """By the dense backends."""
    if not (cached.on_host(q) or backend == "reference"):
        keys, values, _ = cache.at_the_end()
        given = (sigmoid_bias, scale, causal, window_size, alibi_slopes, dropout_p, sigmoid, backend)
        return attend(q, keys, values, *given)
    out = q.new_zeros(*q.shape[:3], cache.v.shape[3])
    for index, seqlen in enumerate(cache.seqlens.tolist()):
        one = slice(index, index + 1)
        bias = sigmoid_bias[one] if isinstance(sigmoid_bias, Tensor) and sigmoid_bias.dim() > 1 else sigmoid_bias
        slopes = alibi_slopes[one] if alibi_slopes is not None and alibi_slopes.dim() > 1 else alibi_slopes
        given = (bias, scale, causal, window_size, slopes, dropout_p, sigmoid, backend)
        out[one] = attend(q[one], *cache.of(index, seqlen), *given)
    return out
