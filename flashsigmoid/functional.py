"""The op as a function: defaults, validation and dispatch. How it is computed is the business of backends/."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .backends import Explanation, known, op, packed, reference, triton
from .backends.problem import BackendUnsupported, make_problem
from .backends.rules import Window, autocast, split_bias, validate, validate_number

if TYPE_CHECKING:
    from jaxtyping import Float, Int32


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
        backend: "auto", "hopper", "triton", "blocked" or "reference"; a named one never falls back. Default: "auto".

    Returns:
        (batch, seqlen_q, nheads, head_dim_v), contiguous, in the dtype of q. Under autocast, in autocast's dtype.

    Raises:
        ValueError: a shape, dtype, device or option outside the rules above.
        BackendUnsupported: the named backend cannot compute this call; the message says why.

    Source: arXiv:2409.04431, section 2 (the op) and the recommended b = -log n.
    """
    return attend(
        *autocast(q, k, v),
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
    return attend(
        *autocast(q, k, v),
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
    weight near 1/n would be rounded to zero; sums are float32. Compute capability 9.0 or later, and rows of q and k
    that begin at multiples of 16 bytes; elsewhere, and by backend="reference", the inputs are converted to float32 and
    weights are not rounded.

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
    if out_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"out_dtype must be float16, bfloat16 or float32, got {out_dtype}")
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend must be one of auto, triton, reference, got {backend!r}")
    given = {"q": q, "k": k, "v": v, "q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    for name, x in (given | {"sigmoid_bias": sigmoid_bias, "alibi_slopes": alibi_slopes}).items():
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, 8-bit attention is forward only, got one that does")
    options = (sigmoid_bias, scale, causal, window_size, alibi_slopes, 0.0, sigmoid)
    like_q, like_k, like_v = (torch.empty((), device=x.device).expand(x.shape) for x in (q, k, v))
    validate(like_q, like_k, like_v, *options, "auto")
    batch, heads_k = q.shape[0], k.shape[2]
    factors = [
        _factor(name, x, q, (batch, heads))
        for name, x, heads in (
            ("q_scale", q_scale, q.shape[2]),
            ("k_scale", k_scale, heads_k),
            ("v_scale", v_scale, heads_k),
        )
    ]
    bias, number = split_bias(sigmoid_bias)
    left, right = window_size
    scalars: Any = (number, scale, causal, left, right, None, 0.0, (0, 0, 0, 0), sigmoid)
    if backend != "reference":
        names = op.SCALAR_NAMES[: len(scalars)]
        problem = make_problem(q, k, v, bias=bias, slopes=alibi_slopes, **dict(zip(names, scalars, strict=True)))
        reason = triton.unsupported_fp8(problem)
        if reason is None and op.is_plain((q, k)):
            reason = triton.unaligned_fp8(q, k)
        if reason is None and (backend == "triton" or q.device.type != "cpu"):
            return torch.ops.flashsigmoid.fwd_fp8(
                q, k, v, *factors, bias, alibi_slopes, *scalars, None, None, False, "triton", out_dtype
            )
        if backend == "triton":
            raise BackendUnsupported(f"triton: {reason}")
    q, k, v = (x.float() * factor[:, None, :, None] for x, factor in zip((q, k, v), factors, strict=True))
    return attend(q, k, v, *options, "auto" if backend == "auto" else "reference").to(out_dtype)


def _factor(name: str, x: float | Tensor, q: Tensor, heads: tuple[int, int]) -> Tensor:
    """A scale as float32 (batch, nheads)."""
    if not isinstance(x, Tensor):
        validate_number(name, x)
        if not -math.inf < x < math.inf:
            raise ValueError(f"{name} must be finite, got {x}")
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
    if sigmoid_bias is None:
        raise ValueError("sigmoid_bias is required of a block, whose seqlen_k is not the n of the problem, got None")
    if isinstance(q_offset, bool) or not isinstance(q_offset, int | torch.SymInt):
        raise ValueError(f"q_offset must be an integer, got {q_offset!r}")
    validate_number("dropout_p", dropout_p)
    if dropout_p > 0 and seed is None:
        raise ValueError(f"seed is required when dropout_p > 0, got seed=None, dropout_p={dropout_p}")
    if seed is not None and (not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1):
        got = f"{tuple(seed.shape)} {seed.dtype}" if isinstance(seed, Tensor) else repr(seed)
        raise ValueError(f"seed must be an int64 tensor of one element, got {got}")
    if len(origin) != 4 or not all(isinstance(x, int | torch.SymInt) and 0 <= x < 2**32 for x in origin):
        raise ValueError(f"origin must be four indices (batch, head, query, key) from 0 to 2**32 - 1, got {origin}")
    return attend(
        *autocast(q, k, v),
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

    Nothing is computed; only shapes, strides, dtypes, devices and options are read. The gradient of out is taken to be
    dense: one that is not may have another backward. `str()` of the result is the text.

    Raises:
        ValueError, BackendUnsupported: as `sigmoid_attention`.
    """
    q, k, v = autocast(q, k, v)
    validate(q, k, v, sigmoid_bias, scale, causal, window_size, alibi_slopes, dropout_p, sigmoid, backend)
    bias, number = split_bias(sigmoid_bias)
    left, right = window_size
    problem = make_problem(
        q, k, v, bias=bias, slopes=alibi_slopes, sigmoid_bias=number, scale=scale, causal=causal, window_left=left,
        window_right=right, dropout_p=dropout_p, sigmoid=sigmoid, needs_sums=op.needs_sums(bias, alibi_slopes),
    )  # fmt: skip
    return backends.explain(problem, backend, (q, k, v))


def attend(
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
    """What every call comes to, beyond autocast: validation, then the op, or the reference."""
    given = (sigmoid_bias, scale, causal, window_size, alibi_slopes, dropout_p, sigmoid, backend)
    key = None
    if cu_seqlens is None and seed is None:
        key, call = known.find(q, k, v, *given, q_offset, origin)
        if call is not None:
            return call(q, k, v)
    validate(q, k, v, *given, cu_seqlens=cu_seqlens)
    bias, number = split_bias(sigmoid_bias)
    if dropout_p > 0 and seed is None:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    left, right = window_size
    inputs = (
        q, k, v, bias, alibi_slopes, seed, *(cu_seqlens or (None, None)),
        number, scale, causal, left, right, q_offset, float(dropout_p), origin, sigmoid, *max_seqlens,
        op.needs_sums(bias, alibi_slopes), backend,
    )  # fmt: skip
    if backend != "reference":
        _refuse_tangents(q, k, v, bias, alibi_slopes)
        out = op.forward(*inputs)
        if key is not None:
            known.remember(key, inputs)
        return out
    problem, _ = op.make(*inputs)
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
            "forward-mode derivatives need backend='reference', got another backend, which has none"
        )
