"""Calls that were made before: from their tensors to their launches, past validation, problem, choice and plans.

A call is known by everything but what its tensors hold. Nothing is computed here. Where something listens to the op,
an option is a tensor, or an address is off 16 bytes or none, a call is not known.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import op, select
from .gpu import allows_tf32, threads
from .problem import Problem

_MOST = 4096  # calls, or backwards of a call, after which all are forgotten
_NO_SIDES = (None,) * 5  # bias, slopes, seed, cu_seqlens of q and of k
_NUMBERS = {float, int, type(None)}
_INTEGERS = {int, type(None)}
_calls: dict[Any, Known] = {}


def find(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: Any, causal: Any, window: Any, slopes: Any, dropout_p: Any,
    sigmoid: Any, backend: Any, q_offset: Any, origin: Any,
) -> tuple[Any, Known | None]:  # fmt: skip
    """The key of a call of `functional.attend`, None where it cannot have one, and the call if it is known."""
    if not op.is_plain((q, k, v)) or forward_ad._current_level >= 0:
        return None, None
    try:
        left, right = window
        # 1, 1.0 and True would be one key
        if not (
            bias.__class__ in _NUMBERS and scale.__class__ in _NUMBERS and causal.__class__ is bool
            and left.__class__ in _INTEGERS and right.__class__ in _INTEGERS and q_offset.__class__ in _INTEGERS
            and slopes is None and dropout_p.__class__ is float and dropout_p == 0.0
        ):  # fmt: skip
            return None, None
        key = _key(q, k, v, bias, scale, causal, left, right, sigmoid, backend, q_offset, origin)
        return key, _calls.get(key)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # no dense tensor, or no option: validation says so
        return None, None


def remember(key: Any, inputs: tuple[Any, ...]) -> None:
    """A call of the op that `find` gave the key of, once it has been computed."""
    problem, backend = op.make(*inputs)
    run = _prepare(problem, backend, "forward", inputs[:3]) or partial(op.compute_fwd, problem, backend)
    if len(_calls) >= _MOST:
        _calls.clear()
    _calls[key] = Known(run, problem, backend, inputs[3 + len(_NO_SIDES) :])


def forget() -> None:
    """All calls, after a change of what they were made by."""
    _calls.clear()


def _key(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Any, ...] | None:
    """Of all that decides how they are computed in this thread; None where an address is off 16 bytes, or none."""
    of_q, of_k, of_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if (of_q | of_k | of_v) % 16 or not (of_q and of_k and of_v):
        return None
    return (
        threads.token,
        torch._C._get_deterministic_algorithms(),
        q.dtype is torch.float32 and allows_tf32(),
        q.shape, q.stride(), q.dtype, q.device,
        k.shape, k.stride(), k.dtype, k.device,
        v.shape, v.stride(), v.dtype, v.device,
        *rest,
    )  # fmt: skip


def _prepare(problem: Problem, backend: str, direction: str, tensors: tuple[Tensor, ...]) -> Callable[..., Any] | None:
    """What computes the direction by launches that are known by now, if it is by such."""
    prepare = None if problem.is_empty else getattr(select(problem, backend, direction, tensors), "prepare", None)
    return None if prepare is None else prepare(problem, *tensors)


class Known:
    """A call that was made before, with q, k and v to come, and its backwards by the layout of dout."""

    def __init__(self, run: Callable[..., Tensor], problem: Problem, backend: str, scalars: tuple[Any, ...]):
        self.run = run
        self.problem, self.backend, self.scalars = problem, backend, scalars
        self.backwards: dict[Any, Callable[..., Any]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _apply(self, q, k, v)
        return self.run(q, k, v, *_NO_SIDES)

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        op.refuse_batches(dout)
        # with grad enabled a second derivative may be asked for: the op says that there is none
        address = dout.data_ptr() if op.is_plain((dout, q, k, v)) else 0
        if torch.is_grad_enabled() or not address:
            return torch.ops.flashsigmoid.bwd(dout, q, k, v, *_NO_SIDES, *self.scalars)[:3]
        key = None
        if address % 16 == 0:
            key = _key(q, k, v, dout.shape, dout.stride(), dout.dtype, dout.device)
        run = self.backwards.get(key)
        if run is not None:
            return run(dout, q, k, v, *_NO_SIDES)[:3]
        grads = op.compute_bwd(self.problem, self.backend, dout, q, k, v, *_NO_SIDES)
        if key is not None:
            if len(self.backwards) >= _MOST:
                self.backwards.clear()
            run = _prepare(self.problem, self.backend, "backward", (q, k, v, dout))
            self.backwards[key] = run or partial(op.compute_bwd, self.problem, self.backend)
        return grads[:3]


class _Attention(torch.autograd.Function):
    """A known call, differentiable once."""

    @staticmethod
    def forward(ctx, call, q, k, v):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(q, k, v)
        ctx.call = call
        return call.run(q, k, v, *_NO_SIDES)

    @staticmethod
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.call.backward(dout, *ctx.saved_tensors)


# torch's own apply first looks for transforms of torch.func, of which `find` knows that there are none
_apply: Any = super(torch.autograd.Function, _Attention).apply  # pyright: ignore[reportAttributeAccessIssue]
