"""torch's scaled_dot_product_attention with sigmoid attention inside: its layout, its top-left causal, its masks.

Only masks that say something other than causal, padding or a constant of a row need more than the op; they are
computed here as the specification would, in plain torch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import backends, functional
from ..backends import BackendUnsupported, Explanation, op, reference
from ..backends.problem import bias_rows, make_problem
from ..backends.rules import autocast, split_bias, validate, validate_number

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

_WHY_BOOL = "a boolean attn_mask that differs between queries and between keys"
_WHY_HEADS = "a boolean attn_mask that differs between the query heads of one key head"
_WHY_FLOAT = "a float attn_mask that differs between keys, whose values are not read (boolean padding is free)"
_MEMORY = "the maths of reference, O(seqlen_q * seqlen_k) memory"


def scaled_dot_product_sigmoid_attention(
    query: Float[Tensor, "... nheads seqlen_q head_dim"],
    key: Float[Tensor, "... nheads_k seqlen_k head_dim"],
    value: Float[Tensor, "... nheads_k seqlen_k head_dim_v"],
    attn_mask: Shaped[Tensor, "*mask"] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    sigmoid_bias: float | Tensor | None = None,
    backend: str = "auto",
) -> Float[Tensor, "... nheads seqlen_q head_dim_v"]:
    """`torch.nn.functional.scaled_dot_product_attention`, argument by argument, with a sigmoid for its softmax.

        O = A V,   A = sigmoid(scale * Q K^T + b + attn_mask),   A = 0 where a boolean attn_mask is False

    is_causal is top-left aligned, as in torch; a query that sees nothing gets zeros:

        2 queries, 5 keys      5 queries, 2 keys
        1 0 0 0 0              1 0
        1 1 0 0 0              1 1
                               1 1
                               1 1
                               1 1

    What an attn_mask costs, by its shape as it broadcasts to (..., nheads, seqlen_q, seqlen_k); a dimension that was
    expanded counts as 1:

        boolean (..., 1, 1, seqlen_k)       nothing: the value rows of hidden keys are zeroed, which is exact
        boolean (..., nheads, 1, seqlen_k)  the same, if nheads_k == nheads
        any     (..., nheads, seqlen_q, 1)  nothing: it is a part of b
        torch.nn.attention.bias.CausalBias  nothing: it is a causal mask
        any other                           O(seqlen_q * seqlen_k) memory, in plain torch: `explain_sdpa` says so,
                                            and an explicit fused backend raises

    Args:
        query: (..., nheads, seqlen_q, head_dim), with any number of batch dimensions in front, none too.
        key: (..., nheads_k, seqlen_k, head_dim).
        value: (..., nheads_k, seqlen_k, head_dim_v).
        attn_mask: boolean, True where a key takes part; or floating point, added to the scores, which may require a
            gradient; or a CausalBias. It broadcasts to (..., nheads, seqlen_q, seqlen_k). Default: none.
        dropout_p: probability of dropping a weight, at every call, as in torch. Default: 0.
        is_causal: key j is visible to query i only if j <= i; not together with attn_mask. Default: False.
        scale: factor of Q K^T. Default: head_dim ** -0.5.
        enable_gqa: let nheads be a multiple of nheads_k: query head h reads key head h // (nheads // nheads_k).
            Default: False, nheads must equal nheads_k.
        sigmoid_bias: b, a float, or a tensor (), (nheads,), (..., nheads) or (..., nheads, seqlen_q), which may
            require a gradient. Default: -log(seqlen_k), whatever a mask hides.
        backend: as in `flashsigmoid.sigmoid_attention`. Default: "auto".

    Returns:
        (..., nheads, seqlen_q, head_dim_v), stored (..., seqlen_q, nheads, head_dim_v), in query's or autocast's dtype.

    Raises:
        ValueError: an argument outside the rules above.
        BackendUnsupported: the named backend cannot compute this call; the message says why.

    Source: the interface of torch.nn.functional.scaled_dot_product_attention; arXiv:2409.04431, section 2.
    """
    call = _prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, sigmoid_bias, backend)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    if call.mask is not None:
        out = _masked(call, call.mask, scale, dropout_p, seed)
    else:
        out = functional.sigmoid_attention_shard(
            call.q,
            call.k,
            call.v,
            sigmoid_bias=call.sigmoid_bias,
            q_offset=call.q_offset,
            seed=seed,
            scale=scale,
            causal=call.causal,
            dropout_p=dropout_p,
            backend=backend,
        )
    # (batch, seqlen_q, nheads, head_dim_v) -> (..., nheads, seqlen_q, head_dim_v)
    out = out.transpose(1, 2)
    return out.reshape(*query.shape[:-3], *out.shape[1:])


def explain_sdpa(
    query: Float[Tensor, "... nheads seqlen_q head_dim"],
    key: Float[Tensor, "... nheads_k seqlen_k head_dim"],
    value: Float[Tensor, "... nheads_k seqlen_k head_dim_v"],
    attn_mask: Shaped[Tensor, "*mask"] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    sigmoid_bias: float | Tensor | None = None,
    backend: str = "auto",
) -> Explanation:
    """Which backend `scaled_dot_product_sigmoid_attention` takes for these arguments, and why not the others.

    No attention is computed. `str()` of the result is the text.

    Raises:
        ValueError, BackendUnsupported: as `scaled_dot_product_sigmoid_attention`.
    """
    call = _prepare(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, sigmoid_bias, backend)
    chosen = backend if call.mask is None else "reference"
    told = functional.explain(
        call.q,
        call.k,
        call.v,
        sigmoid_bias=call.sigmoid_bias,
        scale=scale,
        causal=call.causal,
        dropout_p=dropout_p,
        backend=chosen,
    )
    tensors = autocast(call.q, call.k, call.v)
    told = backends.explain(dataclasses.replace(told.problem, q_offset=call.q_offset), chosen, tensors)
    if call.mask is None:
        return told
    return dataclasses.replace(told, reasons={name: call.why for name in backends.NAMES if name != "reference"})


class _Call(NamedTuple):
    """One call in our layout."""

    q: Tensor  # (batch, seqlen_q, nheads, head_dim)
    k: Tensor  # (batch, seqlen_k, nheads_k, head_dim)
    v: Tensor  # (batch, seqlen_k, nheads_k, head_dim_v)
    sigmoid_bias: float | Tensor
    causal: bool
    q_offset: int
    mask: Tensor | None = None  # what the op cannot say: each dimension of the scores, or 1
    why: str = ""


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    sigmoid_bias: float | Tensor | None,
    backend: str,
) -> _Call:
    _validate(query, key, value, enable_gqa)
    validate_number("dropout_p", dropout_p)  # before it is asked whether there is a seed to draw
    *lead, nheads, seqlen_q, _ = query.shape
    nheads_k, seqlen_k = key.shape[-3:-1]
    if sigmoid_bias is None:
        sigmoid_bias = -math.log(seqlen_k) if seqlen_k else 0.0
    elif isinstance(sigmoid_bias, Tensor):
        sigmoid_bias = _dense_bias(sigmoid_bias, lead, nheads, seqlen_q)
    q, k, v = (_four(x, lead).transpose(1, 2) for x in (query, key, value))
    call = _Call(q, k, v, sigmoid_bias, is_causal, q_offset=0)
    if attn_mask is None:
        return call  # functional validates
    if is_causal:
        raise ValueError("attn_mask must be None when is_causal=True, got both")
    if type(attn_mask).__module__ == "torch.nn.attention.bias":
        # here, since it imports torch._dynamo, one second; with such a mask it is there already
        from torch.nn.attention.bias import CausalBias, CausalVariant

        assert isinstance(attn_mask, CausalBias)
        size = (attn_mask.seq_len_q, attn_mask.seq_len_kv)
        if size != (seqlen_q, seqlen_k):
            raise ValueError(f"a CausalBias must have the size {(seqlen_q, seqlen_k)} of the scores, got {size}")
        bottom_right = attn_mask.variant == CausalVariant.LOWER_RIGHT
        return call._replace(causal=True, q_offset=seqlen_k - seqlen_q if bottom_right else 0)

    q, k, v = autocast(q, k, v)
    validate(q, k, v, sigmoid_bias, scale, False, (None, None), None, dropout_p, "auto", backend)
    call = call._replace(q=q, k=k, v=v)
    # (batch or 1, nheads or 1, seqlen_q or 1, seqlen_k or 1)
    mask = _dense_mask(attn_mask, (*lead, nheads, seqlen_q, seqlen_k), query)
    boolean = mask.dtype == torch.bool
    _, heads, rows, keys = mask.shape
    if keys == 1:
        return call._replace(sigmoid_bias=_row_bias(call, mask[..., 0]))
    if boolean and rows == 1 and heads in (1, nheads_k):
        # (batch or 1, 1, nheads or 1, seqlen_k) -> (batch or 1, seqlen_k, nheads or 1, 1)
        return call._replace(v=v.masked_fill(~mask.permute(0, 3, 1, 2), 0.0))
    reason = _WHY_FLOAT if not boolean else _WHY_HEADS if rows == 1 else _WHY_BOOL
    why = f"{reason}: {_MEMORY}"
    if backend not in ("auto", "reference"):
        raise BackendUnsupported(f"{backend}: {why}")
    return call._replace(mask=mask, why=why)


def _masked(call: _Call, mask: Tensor, scale: float | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    """O = A V, A = sigmoid(scale * Q K^T + b + mask), with the dropout of every backend."""
    bias, number = split_bias(call.sigmoid_bias)
    problem = make_problem(
        call.q, call.k, call.v, bias=bias, sigmoid_bias=number, scale=scale, q_offset=0, dropout_p=dropout_p
    )
    with op.full_precision(problem.device):
        s = reference.scores(problem, call.q, call.k, bias, None)
        a = torch.where(mask, torch.sigmoid(s), 0.0) if mask.dtype == torch.bool else torch.sigmoid(s + mask.to(s))
        return reference.product(problem, reference.dropped(problem, a, seed), call.v)


def _rows(call: _Call) -> Tensor:
    """b as (batch, nheads, seqlen_q or 1) in float32, or float64 where it or query is."""
    b, q = call.sigmoid_bias, call.q
    if not isinstance(b, Tensor):
        b = torch.full((), float(b), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return bias_rows(b.to(torch.promote_types(b.dtype, torch.float32)), q.shape[0], q.shape[2])


def _row_bias(call: _Call, mask: Tensor) -> Tensor:
    """b + mask for a mask (batch or 1, nheads or 1, seqlen_q or 1), as (batch, nheads) or (batch, nheads, seqlen_q)."""
    rows = _rows(call)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=rows.dtype).masked_fill(~mask, -math.inf)
    rows = rows + mask
    return rows[..., 0] if rows.shape[-1] == 1 else rows


def _dense_bias(b: Tensor, lead: list[int], nheads: int, seqlen_q: int) -> Tensor:
    """A bias with batch dimensions `lead` as one with the single batch of the op."""
    if tuple(b.shape) in ((), (nheads,)):
        return b
    for tail in ((nheads,), (nheads, seqlen_q)):
        if tuple(b.shape) == (*lead, *tail):
            return b.reshape(math.prod(lead), *tail)
    raise ValueError(
        "sigmoid_bias must have shape (), (nheads,), (..., nheads) or (..., nheads, seqlen_q), "
        f"got {tuple(b.shape)} for batch {tuple(lead)}, nheads={nheads}, seqlen_q={seqlen_q}"
    )


def _four(x: Tensor, lead: list[int]) -> Tensor:
    """(..., nheads, rows, dim) -> (batch, nheads, rows, dim), a view where strides allow."""
    return x if len(lead) == 1 else x.reshape(math.prod(lead), *x.shape[-3:])


def _dense_mask(mask: Tensor, shape: tuple[int, ...], query: Tensor) -> Tensor:
    """A mask that broadcasts to `shape` as (batch or 1, nheads or 1, seqlen_q or 1, seqlen_k or 1)."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(f"attn_mask must be a boolean or floating-point tensor, got {getattr(mask, 'dtype', mask)}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask must be on the device of query, {query.device}, got {mask.device}")
    sizes = (1,) * (len(shape) - mask.dim()) + tuple(mask.shape)
    # with `in` torch 2.11's compiler takes a size that it has a symbol for to be in no tuple
    if len(sizes) != len(shape) or any(size != 1 and size != full for size, full in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"attn_mask must broadcast to (..., nheads, seqlen_q, seqlen_k), got {tuple(mask.shape)} for {tuple(shape)}"
        )
    mask = mask.reshape(sizes)
    if not mask.requires_grad:
        # a dimension that was expanded holds one value; a gradient would be expected in each of its places
        for dim, stride in enumerate(mask.stride()):
            if stride == 0 and mask.shape[dim] > 1:
                mask = mask.narrow(dim, 0, 1)
    lead, tail = mask.shape[:-3], mask.shape[-3:]
    if any(size != 1 for size in lead):
        return mask.expand(*shape[:-3], *tail).reshape(math.prod(shape[:-3]), *tail)
    return mask.reshape(1, *tail)


def _validate(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """What is said in torch's layout here; dtypes, devices and options are the business of functional."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.is_nested or x.dim() < 3:
            got = tuple(x.shape) if isinstance(x, Tensor) and not x.is_nested else type(x).__name__
            raise ValueError(f"{name} must be a dense tensor (..., nheads, seqlen, head_dim), got {got}")
    shapes = f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.shape[:-3] != key.shape[:-3] or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must share batch and head_dim of query, {shapes}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"value must share batch, nheads and seqlen of key, {shapes}")
    nheads, nheads_k = query.shape[-3], key.shape[-3]
    if not enable_gqa and nheads != nheads_k:
        raise ValueError(f"key must share nheads of query unless enable_gqa=True, {shapes}")
