"""The op as a function: defaults, validation and dispatch. How it is computed is the business of backends/."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .backends import Explanation, cached, decode, op, packed, reference, triton
from .backends.problem import BackendUnsupported, Problem, make_problem

if TYPE_CHECKING:
    from jaxtyping import Float, Int32

Window = tuple[int | None, int | None]
_SIGMOIDS = ("auto", "exact", "fast")
# asked once: the compiler of torch 2.11 cannot trace the question
_AUTOCAST = {
    device for device in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia") if torch.amp.is_autocast_available(device)
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sigmoid_attention(
    q: Float[Tensor, "batch seqlen_q nheads head_dim"],
    k: Float[Tensor, "batch seqlen_k nheads_k head_dim"],
    v: Float[Tensor, "batch seqlen_k nheads_k head_dim_v"],
    *,
    sigmoid_bias: float | Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    sigmoid: str = "auto",
    backend: str = "auto",
) -> Float[Tensor, "batch seqlen_q nheads head_dim_v"]:
    """Sigmoid attention: every weight on its own, no row to normalise.

        O = A V,   A = sigmoid(scale * Q K^T + b - alibi_slope * |p_i - j|),   A = 0 where not visible

    with p_i = i + seqlen_k - seqlen_q the position of query i relative to key 0. A query that sees nothing gets zeros.

    Causal is bottom-right aligned, as in flash-attn:

        2 queries, 5 keys      5 queries, 2 keys
        1 1 1 1 0              0 0
        1 1 1 1 1              0 0
                               0 0
                               1 0
                               1 1

    Args:
        q: queries (batch, seqlen_q, nheads, head_dim), float16, bfloat16, float32 or float64, any strides.
        k: keys (batch, seqlen_k, nheads_k, head_dim); query head h reads key head h // (nheads // nheads_k).
        v: values (batch, seqlen_k, nheads_k, head_dim_v). A key is masked exactly by zeroing its row of v.
        sigmoid_bias: b, a float, or a tensor of shape (), (nheads,), (batch, nheads) or (batch, nheads, seqlen_q),
            which may require a gradient. -inf is legal and gives zeros. Default: -log(seqlen_k). A model should pass
            the constant of its training context length, so that a row does not change with what follows it.
        scale: factor of Q K^T. Default: head_dim ** -0.5.
        causal: key j is visible to query i only if j <= p_i. Default: False.
        window_size: (left, right) in keys: p_i - left <= j <= p_i + right; None is unlimited. Default: (None, None).
        alibi_slopes: (nheads,) or (batch, nheads), which may require a gradient. Default: no ALiBi.
        dropout_p: probability of dropping a weight; kept ones are divided by 1 - dropout_p. The mask is a function of a
            seed from torch's generator and of global indices, the same in every backend. Default: 0.
        sigmoid: "exact", "fast" (a cheaper formula where the backend has one) or "auto". Default: "auto".
        backend: "auto", "triton", "blocked" or "reference". A named backend never falls back. Default: "auto".

    Returns:
        (batch, seqlen_q, nheads, head_dim_v), contiguous, in the dtype of q. Under autocast, in autocast's dtype.

    Raises:
        ValueError: a shape, dtype, device or option outside the rules above.
        BackendUnsupported: the named backend cannot compute this call; the message says why.

    Source: arXiv:2409.04431, section 2 (the op) and the recommended b = -log n.
    """
    return _attention(
        *_autocast(q, k, v),
        sigmoid_bias,
        scale,
        causal,
        window_size,
        alibi_slopes,
        dropout_p,
        sigmoid,
        backend,
    )


def sigmoid_attention_varlen(
    q: Float[Tensor, "total_q nheads head_dim"],
    k: Float[Tensor, "total_k nheads_k head_dim"],
    v: Float[Tensor, "total_k nheads_k head_dim_v"],
    *,
    cu_seqlens_q: Int32[Tensor, " batch+1"],
    cu_seqlens_k: Int32[Tensor, " batch+1"],
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    sigmoid_bias: float | Tensor,
    scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    sigmoid: str = "auto",
    backend: str = "auto",
) -> Float[Tensor, "total_q nheads head_dim_v"]:
    """Sigmoid attention of sequences of different lengths, packed one after the other without padding.

        O[r] = sigmoid_attention(Q[r], K[c], V[c])    with r = cu_seqlens_q[s] : cu_seqlens_q[s + 1], c likewise,

    for every sequence s; causal is bottom-right aligned in each. Rows behind the last sequence, and rows of a sequence
    without keys, are zero. On a GPU the lengths are never read by the host.

    Args:
        q: queries (total_q, nheads, head_dim), float16, bfloat16, float32 or float64, any strides.
        k: keys (total_k, nheads_k, head_dim); query head h reads key head h // (nheads // nheads_k).
        v: values (total_k, nheads_k, head_dim_v).
        cu_seqlens_q: int32 (batch + 1,), on the device of q: 0, then where each sequence's queries end.
        cu_seqlens_k: the same of the keys.
        max_seqlen_q: the longest sequence's queries; decides block sizes, never the result. Default: total_q.
        max_seqlen_k: the same of the keys. Default: total_k.
        sigmoid_bias: b, required, since sequences of different lengths share it: a float, or a tensor of shape (),
            (nheads,), (batch, nheads) or (total_q, nheads), which may require a gradient; where batch equals total_q,
            rows are meant.
        scale, causal, window_size, dropout_p, sigmoid, backend: as in `sigmoid_attention`.
        alibi_slopes: (nheads,) or (batch, nheads), which may require a gradient. Default: no ALiBi.

    Returns:
        (total_q, nheads, head_dim_v), contiguous, in the dtype of q. Under autocast, in autocast's dtype.

    Raises:
        ValueError: a shape, dtype, device or option outside the rules above; lengths that do not rise, where the host
            has them.
        BackendUnsupported: the named backend cannot compute this call; the message says why.

    Source: arXiv:2409.04431, section 2.
    """
    if sigmoid_bias is None:
        raise ValueError("sigmoid_bias is required where sequences have different lengths, got None")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        is_integer = isinstance(longest, int | torch.SymInt) and not isinstance(longest, bool)
        if longest is not None and not (is_integer and longest >= 0):
            raise ValueError(f"{name} must be a non-negative integer, got {longest!r}")
    return _attention(
        *_autocast(q, k, v),
        sigmoid_bias,
        scale,
        causal,
        window_size,
        alibi_slopes,
        dropout_p,
        sigmoid,
        backend,
        cu_seqlens=(cu_seqlens_q, cu_seqlens_k),
        max_seqlens=(max_seqlen_q, max_seqlen_k),
    )


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
        backend: "auto", "triton" (the decode kernel), "blocked" or "reference". Default: "auto", which on a GPU takes
            the decode kernel for up to 16 queries of a sequence, else the dense kernels on a copy of the cache
            (`functional.explain_with_kvcache` says why).

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
        q, k_cache, v_cache, k, v, cache_seqlens, page_table, rotary_cos, rotary_sin, sigmoid_bias, scale, causal,
        window_size, alibi_slopes, num_splits, backend,
    )  # fmt: skip
    sides = (*_split_bias(sigmoid_bias), alibi_slopes, scale, causal, *window_size)
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
        q, k_cache, v_cache, k, v, cache_seqlens, sigmoid_bias, page_table, rotary_interleaved, causal, window_size,
            alibi_slopes, scale, num_splits: as in `sigmoid_attention_with_kvcache`; lengths are those of the cache.
        backend: "auto" shares the prefix on a GPU where there is a decode kernel for the call; elsewhere the prefix is
            copied in front of every sequence.

    Raises:
        ValueError, BackendUnsupported: as `sigmoid_attention_with_kvcache`.

    Source: arXiv:2409.04431, section 2: no weight depends on another key's.
    """
    cache, rotary, options = _checked_cache(
        q, k_cache, v_cache, k, v, cache_seqlens, page_table, rotary_cos, rotary_sin, sigmoid_bias, scale, causal,
        window_size, alibi_slopes, num_splits, backend, prefix=(k_prefix, v_prefix),
    )  # fmt: skip
    n = k_prefix.shape[0]
    sides = (*_split_bias(sigmoid_bias), alibi_slopes, scale, causal, *window_size)
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
        q, k_cache, v_cache, None, None, torch.zeros(q.shape[:1], dtype=torch.int32, device=q.device), page_table,
        None, None, sigmoid_bias, scale, causal, window_size, alibi_slopes, 0, backend,
    )  # fmt: skip
    sides = (*_split_bias(sigmoid_bias), alibi_slopes, scale, causal, *window_size)
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
    page_table: Tensor | None, rotary_cos: Tensor | None, rotary_sin: Tensor | None, sigmoid_bias: float | Tensor,
    scale: float | None, causal: bool, window_size: Window, alibi_slopes: Tensor | None, num_splits: int, backend: str,
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
    like_k, like_v = (x.new_empty(q.shape[0], 0, *x.shape[2:]) for x in (k_cache, v_cache))
    _validate(q, like_k, like_v, sigmoid_bias, *options)
    for name, x in (("sigmoid_bias", sigmoid_bias), ("alibi_slopes", alibi_slopes)):
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, a cache is forward only, got one that does")
    reason = cached.unsupported(backend)
    if reason is not None:
        raise BackendUnsupported(f"{backend}: {reason}")
    positions = cache.capacity + (0 if prefix is None else prefix[0].shape[0])
    return cache, cached.check_rotary(rotary_cos, rotary_sin, q, k, positions), options


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
        return _attention(q, keys, values, *given)
    out = q.new_zeros(*q.shape[:3], cache.v.shape[3])
    for index, seqlen in enumerate(cache.seqlens.tolist()):
        one = slice(index, index + 1)
        bias = sigmoid_bias[one] if isinstance(sigmoid_bias, Tensor) and sigmoid_bias.dim() > 1 else sigmoid_bias
        slopes = alibi_slopes[one] if alibi_slopes is not None and alibi_slopes.dim() > 1 else alibi_slopes
        given = (bias, scale, causal, window_size, slopes, dropout_p, sigmoid, backend)
        out[one] = _attention(q[one], *cache.of(index, seqlen), *given)
    return out


def sigmoid_attention_fp8(
    q: Float[Tensor, "batch seqlen_q nheads head_dim"],
    k: Float[Tensor, "batch seqlen_k nheads_k head_dim"],
    v: Float[Tensor, "batch seqlen_k nheads_k head_dim_v"],
    q_scale: float | Tensor,
    k_scale: float | Tensor,
    v_scale: float | Tensor,
    *,
    sigmoid_bias: float | Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    alibi_slopes: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    sigmoid: str = "auto",
    backend: str = "auto",
) -> Float[Tensor, "batch seqlen_q nheads head_dim_v"]:
    """Sigmoid attention of 8-bit inputs, forward only.

        O = A V * v_scale,   A = sigmoid(scale * q_scale * k_scale * Q K^T + b - alibi_slope * |p_i - j|)

    The weights are multiplied by a power of two for each row of a block before they are rounded to 8 bits, since a
    weight near 1/n would be rounded to zero; sums are float32. Compute capability 9.0 or later; elsewhere, and by
    backend="reference", the inputs are converted to float32 and weights are not rounded.

    Args:
        q: queries, float8_e4m3fn, head_dim a multiple of 16 on a GPU.
        k: keys, float8_e4m3fn.
        v: values, float8_e4m3fn. Copied once with its keys innermost.
        q_scale: factor of q, a float, or float32 of shape (), (nheads,) or (batch, nheads).
        k_scale: factor of k, a float, or float32 of shape (), (nheads_k,) or (batch, nheads_k).
        v_scale: factor of v, as k_scale.
        sigmoid_bias, scale, causal, window_size, alibi_slopes, sigmoid: as in `sigmoid_attention`, without gradients.
        out_dtype: of the result. Default: bfloat16.
        backend: "auto", "triton" or "reference". A named backend never falls back. Default: "auto".

    Raises:
        ValueError: a shape, dtype, device or option outside the rules above.
        BackendUnsupported: the named backend cannot compute this call; the message says why.

    Source: arXiv:2409.04431, section 2; the format e4m3 of arXiv:2209.05433.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dtype != torch.float8_e4m3fn:
            raise ValueError(
                f"{name} must be float8_e4m3fn, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
            )
    if out_dtype not in _DTYPES[:3]:
        raise ValueError(f"out_dtype must be float16, bfloat16 or float32, got {out_dtype}")
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend must be one of auto, triton, reference, got {backend!r}")
    for name, x in (("sigmoid_bias", sigmoid_bias), ("alibi_slopes", alibi_slopes)):
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, 8-bit attention is forward only, got one that does")
    options = (sigmoid_bias, scale, causal, window_size, alibi_slopes, 0.0, sigmoid)
    like_q, like_k, like_v = (torch.empty((), device=x.device).expand(x.shape) for x in (q, k, v))
    _validate(like_q, like_k, like_v, *options, "auto")
    batch, heads_k = q.shape[0], k.shape[2]
    factors = [
        _factor(name, x, q, (batch, heads))
        for name, x, heads in (
            ("q_scale", q_scale, q.shape[2]),
            ("k_scale", k_scale, heads_k),
            ("v_scale", v_scale, heads_k),
        )
    ]
    bias, number = _split_bias(sigmoid_bias)
    left, right = window_size
    scalars: Any = (number, scale, causal, left, right, None, 0.0, (0, 0, 0, 0), sigmoid)
    if backend != "reference":
        names = op.SCALAR_NAMES[: len(scalars)]
        problem = make_problem(q, k, v, bias=bias, slopes=alibi_slopes, **dict(zip(names, scalars, strict=True)))
        reason = triton.unsupported_fp8(problem)
        if reason is None and (backend == "triton" or q.device.type != "cpu"):
            return torch.ops.flashsigmoid.fwd_fp8(
                q, k, v, *factors, bias, alibi_slopes, *scalars, None, None, False, "triton", out_dtype
            )
        if backend == "triton":
            raise BackendUnsupported(f"triton: {reason}")
    q, k, v = (x.float() * factor[:, None, :, None] for x, factor in zip((q, k, v), factors, strict=True))
    return _attention(q, k, v, *options, "auto" if backend == "auto" else "reference").to(out_dtype)


def _factor(name: str, x: float | Tensor, q: Tensor, heads: tuple[int, int]) -> Tensor:
    """A scale as float32 (batch, nheads)."""
    if not isinstance(x, Tensor):
        _validate_number(name, x)
        x = torch.full((), float(x), device=q.device)
    legal = ((), heads[1:], heads)
    if tuple(x.shape) not in legal or x.dtype != torch.float32 or x.device != q.device:
        got = f"{tuple(x.shape)} {x.dtype} on {x.device}"
        raise ValueError(f"{name} must be a number or float32 of shape (), (nheads,) or (batch, nheads), got {got}")
    return x.expand(heads)


def sigmoid_attention_shard(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sigmoid_bias: float | Tensor,
    q_offset: int,
    origin: tuple[int, int, int, int] = (0, 0, 0, 0),
    seed: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    sigmoid: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """One block of a larger attention problem; the outputs of disjoint key blocks add up to the whole.

        p_i = i + q_offset

    Semi-public: what context parallel, shared prefixes, chunked prefill and SDPA's top-left causal (q_offset = 0) are
    made of. `sigmoid_bias` is required, since the seqlen_k of a block is not the n of the problem.

    Args:
        q_offset: position of query 0 relative to key 0 of this block, any sign. flash-attn's causal is
            seqlen_k - seqlen_q, torch's top-left is 0.
        origin: global (batch, head, query, key) index of the block's first element; only dropout reads it.
        seed: int64 tensor of one element, the dropout seed shared by all blocks; required if dropout_p > 0.
        q, k, v, sigmoid_bias, scale, causal, window_size, alibi_slopes, dropout_p, sigmoid, backend: as in
            `sigmoid_attention`.

    Raises:
        ValueError, BackendUnsupported: as `sigmoid_attention`.
    """
    if dropout_p > 0 and seed is None:
        raise ValueError(f"seed is required when dropout_p > 0, got seed=None, dropout_p={dropout_p}")
    if len(origin) != 4 or min(origin) < 0:
        raise ValueError(f"origin must be four non-negative indices (batch, head, query, key), got {origin}")
    return _attention(
        *_autocast(q, k, v),
        sigmoid_bias,
        scale,
        causal,
        window_size,
        alibi_slopes,
        dropout_p,
        sigmoid,
        backend,
        q_offset=q_offset,
        origin=origin,
        seed=seed,
    )


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sigmoid_bias: float | Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    sigmoid: str = "auto",
    backend: str = "auto",
) -> Explanation:
    """Which backend `sigmoid_attention` takes for these arguments, by which formula, and why not the others.

    Nothing is computed; only shapes, dtypes, devices and options are read. `str()` of the result is the text.

    Raises:
        ValueError, BackendUnsupported: as `sigmoid_attention`.
    """
    q, k, v = _autocast(q, k, v)
    _validate(q, k, v, sigmoid_bias, scale, causal, window_size, alibi_slopes, dropout_p, sigmoid, backend)
    bias, number = _split_bias(sigmoid_bias)
    problem = make_problem(
        q,
        k,
        v,
        bias=bias,
        slopes=alibi_slopes,
        sigmoid_bias=number,
        scale=scale,
        causal=causal,
        window_left=window_size[0],
        window_right=window_size[1],
        q_offset=None,
        dropout_p=dropout_p,
        origin=(0, 0, 0, 0),
        sigmoid=sigmoid,
        needs_sums=op.needs_sums(bias, alibi_slopes),
    )
    return backends.explain(problem, backend, (q, k, v))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sigmoid_bias: float | Tensor | None,
    scale: float | None,
    causal: bool,
    window_size: Window,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    sigmoid: str,
    backend: str,
    *,
    q_offset: int | None = None,
    origin: tuple[int, int, int, int] = (0, 0, 0, 0),
    seed: Tensor | None = None,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    max_seqlens: tuple[int | None, int | None] = (None, None),
) -> Tensor:
    given = (sigmoid_bias, scale, causal, window_size, alibi_slopes, dropout_p, sigmoid, backend)
    _validate(q, k, v, *given, cu_seqlens=cu_seqlens)
    bias, number = _split_bias(sigmoid_bias)
    if dropout_p > 0 and seed is None:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    left, right = window_size
    if backend != "reference":
        _refuse_tangents(q, k, v, bias, alibi_slopes)
        return op.forward(
            q, k, v, bias, alibi_slopes, seed, *(cu_seqlens or (None, None)),
            number, scale, causal, left, right, q_offset, float(dropout_p), origin, sigmoid, *max_seqlens,
            op.needs_sums(bias, alibi_slopes), backend,
        )  # fmt: skip
    problem = make_problem(
        q,
        k,
        v,
        bias=bias,
        slopes=alibi_slopes,
        sigmoid_bias=number,
        scale=scale,
        causal=causal,
        window_left=left,
        window_right=right,
        q_offset=q_offset,
        dropout_p=float(dropout_p),
        origin=origin,
        sigmoid=sigmoid,
        cu_seqlens_q=None if cu_seqlens is None else cu_seqlens[0],
        max_seqlen_q=max_seqlens[0],
        max_seqlen_k=max_seqlens[1],
    )
    with op.full_precision(q.device.type):
        if cu_seqlens is None:
            return reference.forward(problem, q, k, v, bias, alibi_slopes, seed)
        return packed.forward(backends.load("reference"), problem, q, k, v, bias, alibi_slopes, seed, cu_seqlens)


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """A torch.library op would drop them without a word."""
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise BackendUnsupported(
            "forward-mode derivatives need backend='reference', got a fused backend, which has none"
        )


def _split_bias(sigmoid_bias: float | Tensor | None) -> tuple[Tensor | None, float | None]:
    if isinstance(sigmoid_bias, Tensor):
        return sigmoid_bias, None
    return None, None if sigmoid_bias is None else float(sigmoid_bias)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in autocast's dtype where autocast is on; float64 is left alone, as autocast does."""
    device = q.device.type
    if device not in _AUTOCAST or not torch.is_autocast_enabled(device) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sigmoid_bias: float | Tensor | None,
    scale: float | None,
    causal: bool,
    window_size: Window,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    sigmoid: str,
    backend: str,
    *,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
) -> None:
    is_packed = cu_seqlens is not None
    layout = "(total, nheads, head_dim)" if is_packed else "(batch, seqlen, nheads, head_dim)"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.is_nested or x.dim() != (3 if is_packed else 4):
            got = tuple(x.shape) if isinstance(x, Tensor) and not x.is_nested else type(x).__name__
            raise ValueError(f"{name} must be a dense tensor {layout}, got {got}")
        if x.dtype not in _DTYPES or x.dtype != q.dtype:
            raise ValueError(
                "q, k, v must share one dtype of float16, bfloat16, float32, float64, "
                f"got {q.dtype}, {k.dtype}, {v.dtype}"
            )
        if x.device != q.device:
            raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
    seqlen_q, nheads, head_dim = q.shape[-3:]
    nheads_k = k.shape[-2]
    if head_dim == 0 or v.shape[-1] == 0:
        raise ValueError(f"head_dim and head_dim_v must be at least 1, got {head_dim} and {v.shape[-1]}")
    if k.shape[:-3] != q.shape[:-3] or k.shape[-1] != head_dim:
        shared = "head_dim" if is_packed else "batch and head_dim"
        raise ValueError(f"k must share {shared} of q, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        shared = "total and nheads" if is_packed else "batch, seqlen and nheads"
        raise ValueError(f"v must share {shared} of k, got k {tuple(k.shape)} and v {tuple(v.shape)}")
    if nheads == 0 or nheads_k == 0 or nheads % nheads_k:
        raise ValueError(f"nheads must be a positive multiple of nheads_k, got nheads={nheads}, nheads_k={nheads_k}")
    batch = q.shape[0] if cu_seqlens is None else _validate_cu_seqlens(q, *cu_seqlens)

    legal = ((), (nheads,), (batch, nheads), (seqlen_q, nheads) if is_packed else (batch, nheads, seqlen_q))
    last = "(total_q, nheads)" if is_packed else "(batch, nheads, seqlen_q)"
    if isinstance(sigmoid_bias, Tensor):
        _validate_side(
            "sigmoid_bias",
            sigmoid_bias,
            q,
            legal,
            f"(), (nheads,), (batch, nheads) or {last}",
        )
    elif sigmoid_bias is not None:
        _validate_number("sigmoid_bias", sigmoid_bias)
        if not sigmoid_bias < math.inf:  # NaN too; a compiler that has met two biases traces a symbol, not a number
            raise ValueError(f"sigmoid_bias must be a number below +inf, got {sigmoid_bias}")
    if alibi_slopes is not None:
        if not isinstance(alibi_slopes, Tensor):
            raise ValueError(f"alibi_slopes must be a tensor, got {type(alibi_slopes).__name__}")
        _validate_side("alibi_slopes", alibi_slopes, q, legal[1:3], "(nheads,) or (batch, nheads)")
    if scale is not None:
        _validate_number("scale", scale)
        if not -math.inf < scale < math.inf:
            raise ValueError(f"scale must be finite, got {scale}")
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be True or False, got {causal!r}")
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {window_size!r}")
    for side in window_size:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int | torch.SymInt) or side < 0):
            raise ValueError(f"window_size must be non-negative integers, None for unlimited, got {window_size!r}")
    _validate_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if sigmoid not in _SIGMOIDS:
        raise ValueError(f"sigmoid must be one of {', '.join(_SIGMOIDS)}, got {sigmoid!r}")
    if backend != "auto" and backend not in backends.NAMES:
        raise ValueError(f"backend must be one of auto, {', '.join(backends.NAMES)}, got {backend!r}")


def _validate_cu_seqlens(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> int:
    """The number of sequences. The lengths themselves are read only where that costs no synchronisation, when used."""
    shapes = []
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu, Tensor) or cu.dim() != 1 or cu.dtype != torch.int32 or cu.shape[0] < 1:
            got = f"{tuple(cu.shape)} {cu.dtype}" if isinstance(cu, Tensor) else repr(cu)
            raise ValueError(f"{name} must be an int32 tensor (batch + 1,), got {got}")
        if cu.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {cu.device}")
        shapes.append(cu.shape[0])
    if shapes[0] != shapes[1]:
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must have one length, got {shapes[0]} and {shapes[1]}")
    return shapes[0] - 1


def _validate_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise ValueError(f"{name} must be a number, got {value!r}")


def _validate_side(name: str, x: Tensor, q: Tensor, legal: tuple[tuple[int, ...], ...], words: str) -> None:
    if tuple(x.shape) not in legal:
        raise ValueError(f"{name} must have shape {words}, got {tuple(x.shape)} for q {tuple(q.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
