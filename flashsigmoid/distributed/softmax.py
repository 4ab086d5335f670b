"""Softmax attention of sharded heads and a sharded sequence, so that a softmax twin trains on the mesh of its pair.

A baseline, not an engine: keys and values are gathered whole. Softmax has no partial outputs that simply add up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..nn import softmax_attention
from ..nn.attention import AttentionFn
from .context_parallel import shard, unshard
from .layout import Order, chunks


class ShardedSoftmax:
    """The `attention_fn` of a causal `nn.SoftmaxAttention`: its sequence is sharded over "cp", its heads over "tp".

        O_c = softmax(scale Q_c K[:c_stop]^T - slope |p_i - j|) V[:c_stop]      for every chunk c of this rank's queries

    Args:
        mesh: with the axes "dp", "cp" and "tp".
        order: in which the sequence was sharded.
        attention_fn: of the module; where cp is 1 it is called.
    """

    def __init__(self, mesh: DeviceMesh, *, order: Order, attention_fn: AttentionFn) -> None:
        self.cp, self.attention_fn = mesh["cp"], attention_fn
        self.order: Order = order

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        size = self.cp.size()
        if size == 1:
            return self.attention_fn(q, k, v, **options)
        k, v = (_Gathered.apply(x, self.cp, self.order) for x in (k, v))
        spans = chunks(q.shape[1] * size, size, self.cp.get_local_rank(), self.order)
        parts = q.split([stop - start for start, stop in spans], dim=1)
        # bottom-right causal of the keys up to a chunk's end
        outs = [
            softmax_attention(part, k[:, :stop], v[:, :stop], **options)
            for part, (_, stop) in zip(parts, spans, strict=True)
        ]
        return torch.cat(outs, dim=1)


class _Gathered(torch.autograd.Function):
    """The whole sequence on every rank; its gradient is the sum of theirs, in float32 at least."""

    @staticmethod
    def forward(ctx, x, mesh, order):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.mesh, ctx.order = mesh, order
        return unshard(x, mesh, order=order)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=ctx.mesh.get_group())
        return shard(total, ctx.mesh, order=ctx.order).to(grad.dtype), None, None
