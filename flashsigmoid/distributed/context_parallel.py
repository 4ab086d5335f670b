"""Sigmoid attention with the sequence sharded over one axis of a DeviceMesh, forward and backward.

Partial outputs of disjoint keys add up, and a shard is only another q_offset: no lse, no rescaling, no second pass.
Who holds what is layout.py's business, how it travels exchange.py's, what that costs cost.py's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from ..backends.rules import Window, autocast, validate
from ..functional import sigmoid_attention_shard
from .blocks import Block, Call, Sides, attend, attend_backward, blocks_of, joined, within
from .cost import SCHEMES, Sizes, choose_scheme
from .exchange import Axis, axis_of
from .layout import Layout, Order, chunks

if TYPE_CHECKING:
    from jaxtyping import Float, Int32


def sigmoid_attention(
    q: Float[Tensor, "batch local_q nheads head_dim"],
    k: Float[Tensor, "batch local_k nheads_k head_dim"],
    v: Float[Tensor, "batch local_k nheads_k head_dim_v"],
    *,
    mesh: DeviceMesh,
    order: Order = "zigzag",
    scheme: str = "auto",
    origin: tuple[int, int] = (0, 0),
    sigmoid_bias: float | Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    sigmoid: str = "auto",
    backend: str = "auto",
) -> Float[Tensor, "batch local_q nheads head_dim_v"]:
    """The rows of `flashsigmoid.sigmoid_attention` that belong to this rank, from the rows of q, k, v that it holds.

        O_r = sum over ranks s of sigmoid(scale * Q_r K_s^T + b - alibi_slope * |p_i - j|) V_s

    with the positions p_i and j of the whole. Every rank of the axis calls it, with the same options. Blocks that no
    query sees are not sent, of a window only what it reaches. `functools.partial(sigmoid_attention, mesh=mesh)` is an
    `attention_fn` of `nn.SigmoidAttention`; what else a module needs, `plans.apply_context_parallel` sets.

    Args:
        q: this rank's queries, `shard` of (batch, seqlen_q, nheads, head_dim).
        k: this rank's keys, `shard` of (batch, seqlen_k, nheads_k, head_dim).
        v: this rank's values, `shard` of (batch, seqlen_k, nheads_k, head_dim_v).
        mesh: one axis, as mesh["cp"]; gloo for tensors on a CPU, NCCL for those on a GPU.
        order: "zigzag" (equal work under a causal mask) or "contiguous", as the tensors were sharded.
        scheme: what travels. "all_gather": keys and values, all at once, one call of the op for each chunk of queries.
            "ring": keys and values, one rank's at a time, the next on its way meanwhile. "reduce_scatter": queries, and
            partial outputs back. "auto": by `cost.choose_scheme`.
        origin: global (batch, head) index of the first element, where those are sharded too; only dropout reads it.
        sigmoid_bias: b, as in `flashsigmoid.sigmoid_attention`; of shape (batch, nheads, local_q) it is sharded as q.
            Default: -log(seqlen_k) of the whole.
        dropout_p: as there; the seed is that of the axis's rank 0, and the mask that of the unsharded call.
        scale, causal, window_size, alibi_slopes, sigmoid, backend: as there.

    Returns:
        (batch, local_q, nheads, head_dim_v) in the dtype of q. Partial results are float32 (float64 for float64
        inputs), travel so and are added so; what one call of the op gives whole is not a partial result.
        A gradient of a bias that is not sharded, or of slopes, is this rank's part, as that of any weight: their sum
        over the axis is the gradient.

    Raises:
        ValueError: a mesh of several axes, an unknown order or scheme, rows that do not divide into the chunks of
            the order, or what `flashsigmoid.sigmoid_attention` refuses.
        BackendUnsupported: the named backend cannot compute a block.

    Source: arXiv:2409.04431, section 2; the ring of blocks arXiv:2310.01889, the zig-zag order that of Llama 3's
    context parallel, arXiv:2407.21783, section 3.3.2.
    """
    q, k, v = autocast(q, k, v)
    options = (scale, causal, window_size, alibi_slopes, dropout_p, sigmoid, backend)
    validate(q, k, v, sigmoid_bias, *options)
    axis = axis_of(mesh)
    rows_q, rows_k = q.shape[1] * axis.size, k.shape[1] * axis.size
    row_bias = isinstance(sigmoid_bias, Tensor) and sigmoid_bias.dim() == 3
    cu_seqlens = ((0, rows_q), (0, rows_k))
    return _attention(q, k, v, axis, order, scheme, origin, sigmoid_bias, options, cu_seqlens, row_bias, False)


def sigmoid_attention_varlen(
    q: Float[Tensor, "local_q nheads head_dim"],
    k: Float[Tensor, "local_k nheads_k head_dim"],
    v: Float[Tensor, "local_k nheads_k head_dim_v"],
    *,
    cu_seqlens_q: Int32[Tensor, " batch+1"],
    cu_seqlens_k: Int32[Tensor, " batch+1"],
    mesh: DeviceMesh,
    order: Order = "zigzag",
    scheme: str = "auto",
    origin: tuple[int, int] = (0, 0),
    sigmoid_bias: float | Tensor,
    scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    sigmoid: str = "auto",
    backend: str = "auto",
) -> Float[Tensor, "local_q nheads head_dim_v"]:
    """The same of packed sequences: all rows together are sharded, wherever the sequences end.

    A call of the op for every sequence and pair of chunks, and the host reads the lengths, so this is for few long
    sequences.

    Args:
        q: this rank's rows, `shard` (dim 0) of (total_q, nheads, head_dim).
        k, v: this rank's rows, `shard` (dim 0) of those of all keys.
        cu_seqlens_q: int32 (batch + 1,), on the device of q: 0, then where each sequence's queries end among the rows
            of all ranks, at most total_q.
        cu_seqlens_k: the same of the keys.
        sigmoid_bias: b, required: a float, or a tensor of shape (), (nheads,), (batch, nheads) or (local_q, nheads),
            the last sharded as q; where batch equals local_q, rows are meant.
        alibi_slopes: (nheads,) or (batch, nheads).
        mesh, order, scheme, origin, scale, causal, window_size, dropout_p, sigmoid, backend: as in
            `sigmoid_attention`.

    Returns:
        (local_q, nheads, head_dim_v). Rows behind the last sequence are zero.

    Raises:
        ValueError: as `sigmoid_attention`; lengths that do not rise from 0 to at most the rows of all ranks.
        BackendUnsupported: as `sigmoid_attention`.

    Source: arXiv:2409.04431, section 2.
    """
    if sigmoid_bias is None:
        raise ValueError("sigmoid_bias is required where sequences have different lengths, got None")
    q, k, v = autocast(q, k, v)
    options = (scale, causal, window_size, alibi_slopes, dropout_p, sigmoid, backend)
    validate(q, k, v, sigmoid_bias, *options, cu_seqlens=(cu_seqlens_q, cu_seqlens_k))
    axis = axis_of(mesh)
    ends = []
    for name, cu, local in (("cu_seqlens_q", cu_seqlens_q, q.shape[0]), ("cu_seqlens_k", cu_seqlens_k, k.shape[0])):
        lengths = cu.tolist()
        if lengths[0] != 0 or lengths != sorted(lengths) or lengths[-1] > local * axis.size:
            raise ValueError(f"{name} must rise from 0 to at most {local * axis.size}, got {lengths}")
        ends.append(tuple(lengths))
    row_bias = isinstance(sigmoid_bias, Tensor) and tuple(sigmoid_bias.shape) == tuple(q.shape[:2])
    if isinstance(sigmoid_bias, Tensor) and row_bias:
        sigmoid_bias = sigmoid_bias.T[None]
    q, k, v = q[None], k[None], v[None]
    return _attention(q, k, v, axis, order, scheme, origin, sigmoid_bias, options, tuple(ends), row_bias, True)[0]


def shard(x: Tensor, mesh: DeviceMesh, *, dim: int = 1, order: Order = "zigzag") -> Tensor:
    """This rank's part of a tensor that every rank has whole, along a dim of the sequence.

    Args:
        x: the whole.
        mesh: one axis.
        dim: of the sequence: 1 of (batch, seqlen, ...), 0 of packed rows. Default: 1.
        order: "zigzag" or "contiguous". Default: "zigzag".

    Raises:
        ValueError: the size of dim does not divide into the chunks; an unknown order; a mesh of several axes.
    """
    axis = axis_of(mesh)
    parts = chunks(x.shape[dim], axis.size, axis.rank, order)
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in parts], dim=dim)


def unshard(x: Tensor, mesh: DeviceMesh, *, dim: int = 1, order: Order = "zigzag") -> Tensor:
    """The whole on every rank, from each rank's part: the inverse of `shard`. No gradient passes.

    Args, Raises: as `shard`.
    """
    axis = axis_of(mesh)
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(axis.size)]
    dist.all_gather(parts, x, group=axis.group)
    whole = x.new_empty(*x.shape[:dim], x.shape[dim] * axis.size, *x.shape[dim + 1 :])
    for rank, part in enumerate(parts):
        row = 0
        for start, stop in chunks(whole.shape[dim], axis.size, rank, order):
            whole.narrow(dim, start, stop - start).copy_(part.narrow(dim, row, stop - start))
            row += stop - start
    return whole


def _attention(
    q, k, v, axis: Axis, order: Order, scheme: str, origin, sigmoid_bias, options, cu_seqlens, row_bias, is_packed
) -> Tensor:  # fmt: skip
    """Of (batch, rows, heads, dim), packed rows being a batch of one."""
    scale, causal, window_size, slopes, dropout_p, sigmoid, backend = options
    if scheme != "auto" and scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of auto, {', '.join(SCHEMES)}, got {scheme!r}")
    bias = sigmoid_bias if isinstance(sigmoid_bias, Tensor) else None
    rows_q, rows_k = q.shape[1] * axis.size, k.shape[1] * axis.size
    for rows in (rows_q, rows_k):
        chunks(rows, axis.size, axis.rank, order)  # raises before anything is sent
    if sigmoid_bias is None:
        sigmoid_bias = -math.log(max(1, rows_k))
    number = None if isinstance(sigmoid_bias, Tensor) else sigmoid_bias
    seed = None
    if dropout_p > 0:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
        dist.broadcast(seed, group=axis.group, group_src=0)
    if axis.size == 1 and not is_packed:
        return sigmoid_attention_shard(
            q, k, v, sigmoid_bias=sigmoid_bias, q_offset=rows_k - rows_q, origin=(*origin, 0, 0),
            seed=seed, scale=scale, causal=causal, window_size=window_size, alibi_slopes=slopes, dropout_p=dropout_p,
            sigmoid=sigmoid, backend=backend,
        )  # fmt: skip
    left, right = window_size
    band = (left, (0 if right is None else min(0, right)) if causal else right)
    layout = Layout(axis.size, order, rows_q, rows_k, cu_seqlens[0], cu_seqlens[1], band)
    if scheme == "auto":
        sizes = Sizes(
            q.shape[0], q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype.itemsize,
            bias.dtype.itemsize if bias is not None and row_bias else 0,
        )  # fmt: skip
        scheme = choose_scheme(
            layout, sizes, training=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        )
    call = Call(
        axis, layout, scheme, origin, number, dropout_p, row_bias, is_packed,
        {
            "scale": scale, "causal": causal, "window_size": tuple(window_size), "sigmoid": sigmoid, "backend": backend
        },
    )  # fmt: skip
    return _ContextParallel.apply(call, q, k, v, bias, slopes, seed)  # pyright: ignore[reportReturnType]


class _ContextParallel(torch.autograd.Function):
    """Forward and backward of every scheme. Saved are this rank's inputs alone: what travelled travels again."""

    @staticmethod
    def forward(ctx, call, q, k, v, bias, slopes, seed):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.call = call
        ctx.save_for_backward(q, k, v, bias, slopes, seed)
        wide = _wide(q)
        layout, exchange, rank = call.layout, call.exchange, call.axis.rank
        sides = Sides(None if call.row_bias else bias, slopes, seed, {})
        mine = {"q": q, **({"bias": bias.transpose(1, 2)} if call.row_bias else {})}
        home = {"out": q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide)}
        visitors = exchange.visitors(mine if call.queries_travel else {"k": k, "v": v}, call.ahead)
        queries = blocks_of(layout.queries(rank), {**mine, **home})
        keys = blocks_of(layout.keys(rank), {"k": k, "v": v})
        if call.scheme == "all_gather":
            keys += [block for _, spans, arrived in visitors for block in blocks_of(spans, arrived)]
            attend(call, sides, queries, joined(keys), are_all=True)
            return home["out"].to(q.dtype)
        attend(call, sides, queries, keys)
        homecoming = exchange.homecoming(home if call.queries_travel else {})
        for step, spans, arrived in visitors:
            if call.queries_travel:
                part = {"out": _zeros(arrived["q"], wide, v.shape[3])}
                attend(call, sides, blocks_of(spans, {**arrived, **part}), keys)
                homecoming.send(step, part)
            else:
                attend(call, sides, queries, blocks_of(spans, arrived))
            arrived.clear()  # its memory is free before more is sent for
        homecoming.finish()
        return home["out"].to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        call: Call = ctx.call
        q, k, v, bias, slopes, seed = ctx.saved_tensors
        wide = _wide(q)
        layout, exchange, rank = call.layout, call.exchange, call.axis.rank
        needs_bias, needs_slopes = ctx.needs_input_grad[4], ctx.needs_input_grad[5]
        sums = {"slopes": torch.zeros_like(slopes, dtype=wide)} if needs_slopes else {}
        if needs_bias and not call.row_bias:
            sums["bias"] = torch.zeros_like(bias, dtype=wide)
        sides = Sides(None if call.row_bias else bias, slopes, seed, sums)
        mine = {"q": q, "dout": dout, **({"bias": bias.transpose(1, 2)} if call.row_bias else {})}
        theirs = {"k": k, "v": v}
        # (batch, rows, ...), a gradient for each of this rank's rows
        grads_q = {"q": "dq", **({"bias": "dbias"} if call.row_bias and needs_bias else {})}
        grads_k = {"k": "dk", "v": "dv"}
        home_q = {grad: _zeros(mine[name], wide) for name, grad in grads_q.items()}
        home_k = {grad: _zeros(theirs[name], wide) for name, grad in grads_k.items()}
        travels, grads, home = (mine, grads_q, home_q) if call.queries_travel else (theirs, grads_k, home_k)
        visitors = exchange.visitors(travels, call.ahead)
        homecoming = exchange.homecoming(home)
        queries = blocks_of(layout.queries(rank), {**mine, **home_q})
        keys = blocks_of(layout.keys(rank), {**theirs, **home_k})

        def parts(arrived: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {grad: _zeros(arrived[name], wide) for name, grad in grads.items()}

        if call.scheme == "all_gather":
            guests = [(step, spans, arrived) for step, spans, arrived in visitors]
            own = blocks_of(layout.keys(rank), theirs)
            runs = joined(own + [block for _, spans, arrived in guests for block in blocks_of(spans, arrived)])
            runs = [Block(run.span, {**run.of, **parts(run.of)}) for run in runs]
            attend_backward(call, sides, queries, runs)
            for name, total in home_k.items():
                for block in blocks_of(layout.keys(rank), {name: total}):
                    block.of[name].add_(within(runs, block.span)[name])
            for step, spans, _ in guests:
                found = [within(runs, span) for span in spans]
                homecoming.send(step, {name: torch.cat([x[name] for x in found], dim=1) for name in home_k if found})
        else:
            attend_backward(call, sides, queries, keys)
            for step, spans, arrived in visitors:
                part = parts(arrived)
                block = blocks_of(spans, {**arrived, **part})
                attend_backward(call, sides, *((block, keys) if call.queries_travel else (queries, block)))
                homecoming.send(step, part)
                block.clear()
                arrived.clear()
        homecoming.finish()

        dbias = home_q["dbias"].transpose(1, 2) if "dbias" in home_q else sums.get("bias")
        given = ((q, home_q["dq"]), (k, home_k["dk"]), (v, home_k["dv"]), (bias, dbias), (slopes, sums.get("slopes")))
        return None, *(None if x is None else x.to(like.dtype) for like, x in given), None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _zeros(like: Tensor, dtype: torch.dtype, last: int | None = None) -> Tensor:
    """Zeros for sums over the rows of a tensor, with another last dimension if it is given."""
    return like.new_zeros(*like.shape[:-1], like.shape[-1] if last is None else last, dtype=dtype)
