"""The torch.library ops flashsigmoid::fwd and flashsigmoid::bwd: schema, fake and autograd, for every fused backend.

Nothing is computed here: each op builds the `Problem`, selects a backend and calls it. Imports torch only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import select
from .problem import BackendUnsupported, make_problem

_SCALARS = (
    "float? sigmoid_bias, float? scale, bool causal, SymInt? window_left, SymInt? window_right, SymInt? q_offset, "
    "float dropout_p, SymInt[] origin, str sigmoid, str backend"
)
SCALAR_NAMES = tuple(field.split()[1] for field in _SCALARS.split(", "))

torch.library.define(
    "flashsigmoid::fwd",
    f"(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? slopes, Tensor? seed, {_SCALARS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "flashsigmoid::bwd",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? slopes, Tensor? seed, "
    f"{_SCALARS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _problem(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, slopes: Tensor | None, scalars: dict[str, Any]):
    return make_problem(q, k, v, bias=bias, slopes=slopes, **scalars)


def full_precision(device: str) -> AbstractContextManager[object]:
    """Autocast off: it would round the scores inside a backend."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@torch.library.impl("flashsigmoid::fwd", "default")
def _fwd(q, k, v, bias, slopes, seed, *scalars) -> Tensor:
    named = dict(zip(SCALAR_NAMES, scalars, strict=True))
    backend = named.pop("backend")
    problem = _problem(q, k, v, bias, slopes, named)
    if problem.is_empty:
        return q.new_zeros(problem.batch, problem.seqlen_q, problem.nheads, problem.head_dim_v)
    with full_precision(problem.device):
        return select(problem, backend).forward(problem, q, k, v, bias, slopes, seed)


@torch.library.impl("flashsigmoid::bwd", "default")
def _bwd(dout, q, k, v, bias, slopes, seed, *scalars) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    named = dict(zip(SCALAR_NAMES, scalars, strict=True))
    backend = named.pop("backend")
    problem = _problem(q, k, v, bias, slopes, named)
    if problem.is_empty:
        grads = _fake_bwd(dout, q, k, v, bias, slopes, seed, *scalars)
        return tuple(x.zero_() for x in grads)  # pyright: ignore[reportReturnType]
    with full_precision(problem.device):
        grads = select(problem, backend).backward(problem, dout, q, k, v, bias, slopes, seed)
    dq, dk, dv, row_sums, dslopes = grads
    return dq, dk, dv, _reduce_rows(row_sums, bias, q), _reduce_to(dslopes, slopes, q)


def _reduce_rows(row_sums: Tensor | None, bias: Tensor | None, q: Tensor) -> Tensor:
    """sum(dS) of every row, (batch, nheads, seqlen_q), summed to the shape of the bias."""
    if bias is None:
        return q.new_empty(0)
    assert row_sums is not None
    return _reduce_to(row_sums if bias.dim() == 3 else row_sums.sum(-1), bias, q)


def _reduce_to(grad: Tensor | None, like: Tensor | None, q: Tensor) -> Tensor:
    if like is None:
        return q.new_empty(0)
    assert grad is not None
    return grad.sum_to_size(like.shape).to(like.dtype).contiguous()


@torch.library.register_fake("flashsigmoid::fwd")
def _fake_fwd(q, k, v, bias, slopes, seed, *scalars) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


@torch.library.register_fake("flashsigmoid::bwd")
def _fake_bwd(dout, q, k, v, bias, slopes, seed, *scalars) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def grad(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    return grad(q), grad(k), grad(v), grad(bias), grad(slopes)


def _save_fwd(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.scalars = inputs[6:]


def _autograd_fwd(ctx, dout: Tensor):
    q, k, v, bias, slopes, seed = ctx.saved_tensors
    dq, dk, dv, dbias, dslopes = torch.ops.flashsigmoid.bwd(dout, q, k, v, bias, slopes, seed, *ctx.scalars)
    no_grad = (None,) * (1 + len(SCALAR_NAMES))
    return dq, dk, dv, dbias if bias is not None else None, dslopes if slopes is not None else None, *no_grad


def _autograd_bwd(ctx, *grads):
    raise BackendUnsupported(
        "double backward needs backend='reference', got a fused backend, which has no second derivative"
    )


torch.library.register_autograd("flashsigmoid::fwd", _autograd_fwd, setup_context=_save_fwd)
torch.library.register_autograd("flashsigmoid::bwd", _autograd_bwd)
