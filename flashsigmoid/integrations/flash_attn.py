"""The functions of flash-attn with sigmoid attention inside: argument order and defaults of Apple's FlashSigmoid.

FlashSigmoid is a fork of flash-attn 2.5.6, so both have these names; flash-attn itself is not needed. What flash-attn
added later (softcap, block_table) and its function for a KV cache are not here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import functional

if TYPE_CHECKING:
    from jaxtyping import Float, Int32


def flash_attn_func(
    q: Float[Tensor, "batch seqlen_q nheads head_dim"],
    k: Float[Tensor, "batch seqlen_k nheads_k head_dim"],
    v: Float[Tensor, "batch seqlen_k nheads_k head_dim_v"],
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    sigmoid_bias: float | Tensor | None = 0.0,
) -> Float[Tensor, "batch seqlen_q nheads head_dim_v"]:
    """`flash_attn_func` of Apple's FlashSigmoid, argument by argument.

        O = A V,   A = sigmoid(softmax_scale * Q K^T + b - alibi_slope * |i + seqlen_k - seqlen_q - j|)

    A = 0 where not visible. Causal is bottom-right aligned, and a query that sees nothing gets zeros:

        2 queries, 5 keys      5 queries, 2 keys
        1 1 1 1 0              0 0
        1 1 1 1 1              0 0
                               0 0
                               1 0
                               1 1

    Args:
        q: queries (batch, seqlen_q, nheads, head_dim), any dtype and strides of `flashsigmoid.sigmoid_attention`.
        k: keys (batch, seqlen_k, nheads_k, head_dim); query head h reads key head h // (nheads // nheads_k).
        v: values (batch, seqlen_k, nheads_k, head_dim_v).
        dropout_p: probability of dropping a weight. Default: 0.
        softmax_scale: factor of Q K^T. Default: head_dim ** -0.5.
        causal: key j is visible to query i only if j <= i + seqlen_k - seqlen_q. Default: False.
        window_size: (left, right) in keys around i + seqlen_k - seqlen_q; -1 or None is unlimited. Default: (-1, -1).
        alibi_slopes: (nheads,) or (batch, nheads), which may require a gradient. Default: no ALiBi.
        deterministic: promise the same gradients, bit for bit, at every call. They are on a CPU; elsewhere a backend
            reads `torch.use_deterministic_algorithms` when the backward runs, and True only makes sure that it is on.
            Default: False.
        return_attn_probs: must be False: there is no lse to return, and the weights have a function of their own,
            `flashsigmoid.backends.reference.attention_weights`. Default: False.
        sigmoid_bias: b, a float or a tensor that may require a gradient, in the shapes of `sigmoid_attention`; None is
            -log(seqlen_k). Default: 0, as in FlashSigmoid, which makes the first outputs of a model about seqlen_k / 2
            times too large: pass -log of the training context length.

    Returns:
        (batch, seqlen_q, nheads, head_dim_v), contiguous, in the dtype of q.

    Raises:
        ValueError: an argument outside the rules above; deterministic=True outside a CPU without
            `torch.use_deterministic_algorithms(True)`; return_attn_probs=True.

    Source: the interface of github.com/apple/ml-sigmoid-attention, flash_sigmoid 2.5.6; arXiv:2409.04431, section 2.
    """
    _check(q, deterministic, return_attn_probs)
    return functional.sigmoid_attention(
        q,
        k,
        v,
        sigmoid_bias=sigmoid_bias,
        scale=softmax_scale,
        causal=causal,
        window_size=_window(window_size),
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
    )


def flash_attn_kvpacked_func(
    q: Float[Tensor, "batch seqlen_q nheads head_dim"],
    kv: Float[Tensor, "batch seqlen_k 2 nheads_k head_dim"],
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    sigmoid_bias: float | Tensor | None = 0.0,
) -> Float[Tensor, "batch seqlen_q nheads head_dim"]:
    """`flash_attn_func` of k, v = kv[:, :, 0], kv[:, :, 1], which are views: nothing is copied.

    Args:
        q: queries (batch, seqlen_q, nheads, head_dim).
        kv: keys and values (batch, seqlen_k, 2, nheads_k, head_dim).
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, sigmoid_bias: as
            in `flash_attn_func`.

    Raises:
        ValueError: as `flash_attn_func`, or kv is not packed so.

    Source: as `flash_attn_func`.
    """
    k, v = _unpack("kv", kv, "(batch, seqlen, 2, nheads_k, head_dim)")
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        sigmoid_bias,
    )


def flash_attn_qkvpacked_func(
    qkv: Float[Tensor, "batch seqlen 3 nheads head_dim"],
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    sigmoid_bias: float | Tensor | None = 0.0,
) -> Float[Tensor, "batch seqlen nheads head_dim"]:
    """`flash_attn_func` of q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], which are views: nothing is copied.

    Args:
        qkv: queries, keys and values (batch, seqlen, 3, nheads, head_dim).
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, sigmoid_bias: as
            in `flash_attn_func`.

    Raises:
        ValueError: as `flash_attn_func`, or qkv is not packed so.

    Source: as `flash_attn_func`.
    """
    q, k, v = _unpack("qkv", qkv, "(batch, seqlen, 3, nheads, head_dim)")
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        sigmoid_bias,
    )


def flash_attn_varlen_func(
    q: Float[Tensor, "total_q nheads head_dim"],
    k: Float[Tensor, "total_k nheads_k head_dim"],
    v: Float[Tensor, "total_k nheads_k head_dim_v"],
    cu_seqlens_q: Int32[Tensor, " batch+1"],
    cu_seqlens_k: Int32[Tensor, " batch+1"],
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sigmoid_bias: float | Tensor,
) -> Float[Tensor, "total_q nheads head_dim_v"]:
    """`flash_attn_varlen_func` of flash-attn 2.5.6 with sigmoid attention: `flash_attn_func` for every sequence.

    Sequence s is the rows cu_seqlens_q[s] to cu_seqlens_q[s + 1] of q and the rows cu_seqlens_k[s] to
    cu_seqlens_k[s + 1] of k and v. FlashSigmoid has no such function, so there is no default to keep: `sigmoid_bias` is
    required, by name, since sequences of several lengths have no one seqlen_k.

    Args:
        q: queries of all sequences (total_q, nheads, head_dim).
        k: keys (total_k, nheads_k, head_dim).
        v: values (total_k, nheads_k, head_dim_v).
        cu_seqlens_q: int32 (batch + 1,), where each sequence of queries begins, and total_q.
        cu_seqlens_k: int32 (batch + 1,), where each sequence of keys begins, and total_k.
        max_seqlen_q: length of the longest sequence of queries.
        max_seqlen_k: length of the longest sequence of keys.
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs: as in
            `flash_attn_func`.
        sigmoid_bias: b, a float or a tensor (), (nheads,), (batch, nheads) or (total_q, nheads). Required.

    Raises:
        ValueError: as `flash_attn_func`, or cu_seqlens_q or cu_seqlens_k is no such tensor.

    Source: the interface of github.com/Dao-AILab/flash-attention 2.5.6; arXiv:2409.04431, section 2.
    """
    _check(q, deterministic, return_attn_probs)
    return functional.sigmoid_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        sigmoid_bias=sigmoid_bias,
        scale=softmax_scale,
        causal=causal,
        window_size=_window(window_size),
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
    )


def flash_attn_varlen_kvpacked_func(
    q: Float[Tensor, "total_q nheads head_dim"],
    kv: Float[Tensor, "total_k 2 nheads_k head_dim"],
    cu_seqlens_q: Int32[Tensor, " batch+1"],
    cu_seqlens_k: Int32[Tensor, " batch+1"],
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sigmoid_bias: float | Tensor,
) -> Float[Tensor, "total_q nheads head_dim"]:
    """`flash_attn_varlen_func` of k, v = kv[:, 0], kv[:, 1], which are views: nothing is copied.

    Args:
        q: queries of all sequences (total_q, nheads, head_dim).
        kv: keys and values (total_k, 2, nheads_k, head_dim).
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in `flash_attn_varlen_func`.
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, sigmoid_bias: as
            in `flash_attn_varlen_func`.

    Raises:
        ValueError: as `flash_attn_varlen_func`, or kv is not packed so.

    Source: as `flash_attn_varlen_func`.
    """
    k, v = _unpack("kv", kv, "(total_k, 2, nheads_k, head_dim)")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        sigmoid_bias=sigmoid_bias,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Float[Tensor, "total 3 nheads head_dim"],
    cu_seqlens: Int32[Tensor, " batch+1"],
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sigmoid_bias: float | Tensor,
) -> Float[Tensor, "total nheads head_dim"]:
    """`flash_attn_varlen_func` of q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2], which are views: nothing is copied.

    Args:
        qkv: queries, keys and values of all sequences (total, 3, nheads, head_dim).
        cu_seqlens: int32 (batch + 1,), where each sequence begins, and total.
        max_seqlen: length of the longest sequence.
        dropout_p, softmax_scale, causal, window_size, alibi_slopes, deterministic, return_attn_probs, sigmoid_bias: as
            in `flash_attn_varlen_func`.

    Raises:
        ValueError: as `flash_attn_varlen_func`, or qkv is not packed so.

    Source: as `flash_attn_varlen_func`.
    """
    q, k, v = _unpack("qkv", qkv, "(total, 3, nheads, head_dim)")
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        alibi_slopes,
        deterministic,
        return_attn_probs,
        sigmoid_bias=sigmoid_bias,
    )


def _unpack(name: str, packed: Tensor, words: str) -> tuple[Tensor, ...]:
    """The views that lie side by side in the third dimension from the end; their gradients are stacked once."""
    parts, dim = len(name), words.count(",") + 1
    if not isinstance(packed, Tensor) or packed.is_nested or packed.dim() != dim or packed.shape[-3] != parts:
        got = tuple(packed.shape) if isinstance(packed, Tensor) and not packed.is_nested else type(packed).__name__
        raise ValueError(f"{name} must be a dense tensor {words}, got {got}")
    return packed.unbind(-3)


def _window(window_size: tuple[int | None, int | None]) -> functional.Window:
    """flash-attn's (left, right), where -1 is unlimited, as ours, where None is."""
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), -1 for unlimited, got {window_size!r}")
    left, right = (None if side is None or side == -1 else side for side in window_size)
    for side in (left, right):
        if isinstance(side, int | torch.SymInt) and side < 0:
            raise ValueError(f"window_size must be non-negative integers, -1 for unlimited, got {window_size!r}")
    return left, right


def _check(q: Tensor, deterministic: bool, return_attn_probs: bool) -> None:
    """Refuse what only the caller can give: determinism is a switch of the process, not of a call, in torch."""
    if return_attn_probs:
        raise ValueError(
            "return_attn_probs must be False, got True: sigmoid attention has no lse, and its weights are "
            "flashsigmoid.backends.reference.attention_weights(q, k, ...)"
        )
    if deterministic and q.device.type != "cpu" and not torch.are_deterministic_algorithms_enabled():
        raise ValueError(
            "deterministic=True needs torch.use_deterministic_algorithms(True), on until the backward has run, "
            f"got it off for tensors on {q.device}"
        )
