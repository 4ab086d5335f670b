"""The torch.library ops flashsigmoid::fwd and flashsigmoid::bwd: schema, fake and autograd, for every fused backend.

Nothing is computed here: each op builds the `Problem`, selects a backend and calls it. `forward` is the op, or the same
past the dispatcher where nothing listens to it. Imports torch only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from . import packed, select
from .problem import BackendUnsupported, Problem, make_problem
from .rules import AUTOCAST

_SCALARS = (
    "float? sigmoid_bias, float? scale, bool causal, SymInt? window_left, SymInt? window_right, SymInt? q_offset, "
    "float dropout_p, SymInt[] origin, str sigmoid, SymInt? max_seqlen_q, SymInt? max_seqlen_k, bool needs_sums, "
    "str backend"
)
_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? slopes, Tensor? seed, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
_TENSOR_COUNT = len(_TENSORS.split(", "))
_PLAIN = {Tensor, torch.nn.Parameter}
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
SCALAR_NAMES = tuple(field.split()[1] for field in _SCALARS.split(", "))

torch.library.define(
    "flashsigmoid::fwd",
    f"({_TENSORS}, {_SCALARS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "flashsigmoid::bwd",
    f"(Tensor dout, {_TENSORS}, {_SCALARS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "flashsigmoid::fwd_fp8",
    "(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor? bias, Tensor? slopes, "
    f"{_SCALARS}, ScalarType out_dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def forward_part(*inputs) -> Tensor:
    """What flashsigmoid::fwd computes, as a summand: float32 (float64), not rounded to the dtype of q. No autograd."""
    problem, backend = make(*inputs)
    if _is_simulated(inputs[:_TENSOR_COUNT]):
        return torch.ops.flashsigmoid.fwd(*inputs).to(problem.compute_dtype)
    return compute_fwd(_partial(problem), backend, *inputs[:_TENSOR_COUNT])


def backward_part(dout: Tensor, *inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What flashsigmoid::bwd computes, in the same way; the gradient of a bias or of slopes too."""
    problem, backend = make(*inputs)
    if _is_simulated(inputs[:_TENSOR_COUNT]):
        grads = torch.ops.flashsigmoid.bwd(dout, *inputs)
        return tuple(x.to(problem.compute_dtype) for x in grads)  # pyright: ignore[reportReturnType]
    return compute_bwd(_partial(problem), backend, dout, *inputs[:_TENSOR_COUNT])


def _is_simulated(tensors: Sequence[Tensor | None]) -> bool:
    """Whether they are tensors without contents."""
    return any(x is not None and x.__class__ not in _PLAIN for x in tensors)


@functools.lru_cache(maxsize=4096)
def _partial(problem: Problem) -> Problem:
    return replace(problem, is_partial=True)


def full_precision(device: str) -> AbstractContextManager[object]:
    """Autocast off: it would round the scores inside a backend."""
    if device in AUTOCAST and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def make(q, k, v, bias, slopes, seed, cu_q, cu_k, *scalars) -> tuple[Problem, str]:
    """The problem, and the backend that was asked for."""
    named = dict(zip(SCALAR_NAMES, scalars, strict=True))
    backend = named.pop("backend")
    return make_problem(q, k, v, bias=bias, slopes=slopes, cu_seqlens_q=cu_q, **named), backend


def _fwd(*inputs) -> Tensor:
    return compute_fwd(*make(*inputs), *inputs[:_TENSOR_COUNT])


def _bwd(dout, *inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return compute_bwd(*make(*inputs), dout, *inputs[:_TENSOR_COUNT])


def compute_fwd(problem: Problem, backend: str, q, k, v, bias, slopes, seed, cu_q, cu_k) -> Tensor:
    if problem.is_empty:
        return q.new_zeros(*q.shape[:-1], problem.head_dim_v, dtype=problem.result_dtype)
    with full_precision(problem.device):
        module = select(problem, backend, "forward", (q, k, v))
        if cu_q is None:
            return module.forward(problem, q, k, v, bias, slopes, seed)
        return packed.forward(module, problem, q, k, v, bias, slopes, seed, (cu_q, cu_k))


def compute_bwd(
    problem: Problem, backend: str, dout, q, k, v, bias, slopes, seed, cu_q, cu_k
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if problem.is_empty:
        grads = _gradients(q, k, v, bias, slopes, problem.needs_sums)
        return tuple(x.zero_() for x in grads)  # pyright: ignore[reportReturnType]
    with full_precision(problem.device):
        module = select(problem, backend, "backward", (q, k, v, dout))
        if cu_q is None:
            grads = module.backward(problem, dout, q, k, v, bias, slopes, seed)
        else:
            grads = packed.backward(module, problem, dout, q, k, v, bias, slopes, seed, (cu_q, cu_k))
    dq, dk, dv, row_sums, slope_sums = grads
    dbias = q.new_empty(0)
    if bias is not None and problem.needs_sums:
        assert row_sums is not None
        dbias = row_sums if problem.has_row_bias else packed.sum_heads(row_sums, cu_q)
        dbias = _reduce_to(dbias, bias, problem)
    dslopes = q.new_empty(0)
    if slopes is not None and problem.needs_sums:
        assert slope_sums is not None
        dslopes = _reduce_to(packed.sum_heads(slope_sums, cu_q), slopes, problem)
    return dq, dk, dv, dbias, dslopes


def _fwd_fp8(q, k, v, q_scale, k_scale, v_scale, bias, slopes, *scalars) -> Tensor:
    named = dict(zip((*SCALAR_NAMES, "out_dtype"), scalars, strict=True))
    out_dtype = named.pop("out_dtype")
    named.pop("backend")
    problem = make_problem(q, k, v, bias=bias, slopes=slopes, **named)
    if problem.is_empty:
        return q.new_zeros(*q.shape[:-1], problem.head_dim_v, dtype=out_dtype)
    from .triton import forward_fp8

    return forward_fp8(problem, q, k, v, (q_scale, k_scale, v_scale), bias, slopes, out_dtype)


def _reduce_to(grad: Tensor, like: Tensor, problem: Problem) -> Tensor:
    dtype = grad.dtype if problem.is_partial else like.dtype
    return grad.sum_to_size(like.shape).to(dtype).contiguous()


@torch.library.register_fake("flashsigmoid::fwd")
def _fake_fwd(q, k, v, bias, slopes, seed, cu_q, cu_k, *scalars) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@torch.library.register_fake("flashsigmoid::fwd_fp8")
def _fake_fwd_fp8(q, k, v, *rest) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1], dtype=rest[-1])


@torch.library.register_fake("flashsigmoid::bwd")
def _fake_bwd(dout, q, k, v, bias, slopes, seed, cu_q, cu_k, *scalars) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(q, k, v, bias, slopes, scalars[SCALAR_NAMES.index("needs_sums")])


def _gradients(q, k, v, bias, slopes, needs_sums: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty; of a bias and slopes without elements where nobody asks for them."""

    def grad(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    sides = (bias, slopes) if needs_sums else (None, None)
    return grad(q), grad(k), grad(v), grad(sides[0]), grad(sides[1])


def forward(*inputs) -> Tensor:
    """flashsigmoid::fwd; in plain eager mode past the dispatcher, which costs more than the kernels of a short call."""
    tensors = inputs[:_TENSOR_COUNT]
    if not is_plain(tensors) or _are_unstored(tensors):
        if _is_eager() and _is_transformed() and not _is_functionalized():
            return _Transformed.apply(inputs[_TENSOR_COUNT:], *tensors)  # pyright: ignore[reportReturnType]
        return torch.ops.flashsigmoid.fwd(*inputs)
    problem, backend = make(*inputs)
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                scalars = inputs[_TENSOR_COUNT:]
                return _Attention.apply(problem, backend, scalars, *tensors)  # pyright: ignore[reportReturnType]
    return compute_fwd(problem, backend, *tensors)


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing would see the op: no compiler, tracer, transform, mode or kind of tensor of its own."""
    if not _is_eager() or _is_transformed() or torch._C._get_tracing_state() is not None:
        return False
    for x in tensors:
        # a tensor that is negated by a bit has the other sign in memory
        if x is not None and (x.__class__ not in _PLAIN or x.is_neg()):
            return False
    return tensors[0] is None or not tensors[0].is_meta


def _are_unstored(tensors: Sequence[Tensor | None]) -> bool:
    """Whether any are the zeros of forward-mode derivatives, which have no memory before an operator takes them."""
    return any(x is not None and x._is_zerotensor() for x in tensors)


def _is_eager() -> bool:
    """Neither compiled nor under a dispatch mode, be it one that sees operators before autograd does."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    )


def needs_sums(*sides: Tensor | None) -> bool:
    """Whether a gradient of any of these is asked for, as far as can be seen: inside of a transform, always."""
    given = [x for x in sides if x is not None]
    if not given:
        return False
    return any(x.requires_grad for x in given) or (_is_eager() and _is_transformed())


def _is_transformed() -> bool:
    """Inside of a transform of torch.func, which the op's own autograd refuses."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def _is_functionalized() -> bool:
    """Whether the innermost transform is the one that custom functions have no rule for, and operators have."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.peek_interpreter_stack().key() == functorch.TransformType.Functionalize


class _Attention(torch.autograd.Function):
    """flashsigmoid::fwd and ::bwd, called directly."""

    @staticmethod
    def forward(ctx, problem, backend, scalars, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(*tensors)
        ctx.problem, ctx.backend, ctx.scalars = problem, backend, scalars
        return compute_fwd(problem, backend, *tensors)

    @staticmethod
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        # with grad enabled a second derivative may be asked for: the op says that there is none
        refuse_batches(dout)
        saved = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain((dout, *saved)) or _are_unstored((dout, *saved)):
            return None, None, None, *_autograd_fwd(ctx, dout)[:_TENSOR_COUNT]
        return None, None, None, *_given(saved, compute_bwd(ctx.problem, ctx.backend, dout, *saved))


class _Transformed(torch.autograd.Function):
    """flashsigmoid::fwd under the transforms of torch.func: differentiable once, and vmap is a loop."""

    @staticmethod
    def forward(scalars, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _fwd(*tensors, *scalars)

    @staticmethod
    def setup_context(ctx, inputs, output):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.scalars = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        return None, *_given(saved, _TransformedBackward.apply(ctx.scalars, dout, *saved))

    @staticmethod
    def vmap(info, in_dims, scalars, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.stack(_looped(_Transformed, info, in_dims, scalars, tensors)), 0


class _TransformedBackward(torch.autograd.Function):
    """flashsigmoid::bwd under the transforms of torch.func."""

    @staticmethod
    def forward(scalars, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _bwd(*tensors, *scalars)

    @staticmethod
    def setup_context(ctx, inputs, output):  # pyright: ignore[reportIncompatibleMethodOverride]
        pass

    @staticmethod
    def backward(ctx, *grads):
        return _autograd_bwd(ctx, *grads)

    @staticmethod
    def vmap(info, in_dims, scalars, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        results = _looped(_TransformedBackward, info, in_dims, scalars, tensors)
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * 5


def _looped(function, info, in_dims, scalars, tensors) -> list:
    return [
        function.apply(
            scalars, *(x if d is None else x.select(d, i) for x, d in zip(tensors, in_dims[1:], strict=True))
        )
        for i in range(info.batch_size)
    ]


def _save_fwd(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:_TENSOR_COUNT])
    ctx.scalars = inputs[_TENSOR_COUNT:]


def refuse_batches(dout: Tensor) -> None:
    """Of `is_grads_batched`, whose batches look like one tensor and have no memory."""
    if torch.compiler.is_compiling():  # it cannot trace the question
        return
    if torch._C._functorch.is_legacy_batchedtensor(dout):  # pyright: ignore[reportAttributeAccessIssue]
        raise BackendUnsupported("is_grads_batched needs backend='reference', got a fused backend")


def _autograd_fwd(ctx, dout: Tensor):
    refuse_batches(dout)
    saved = ctx.saved_tensors
    return *_given(saved, torch.ops.flashsigmoid.bwd(dout, *saved, *ctx.scalars)), *(None,) * len(SCALAR_NAMES)


def _given(tensors, grads) -> tuple[Tensor | None, ...]:
    """A gradient for each tensor of the op: of q, k, v, and of the bias and the slopes where they are given."""
    found = [None if x is None else dx for x, dx in zip(tensors[: len(grads)], grads, strict=True)]
    return *found, *(None,) * (_TENSOR_COUNT - len(grads))


def _autograd_bwd(ctx, *grads):
    raise BackendUnsupported(
        "double backward needs backend='reference', got another backend, which has no second derivative"
    )


torch.library.impl("flashsigmoid::fwd", "default", _fwd)
torch.library.impl("flashsigmoid::bwd", "default", _bwd)
torch.library.impl("flashsigmoid::fwd_fp8", "default", _fwd_fp8)
torch.library.register_autograd("flashsigmoid::fwd", _autograd_fwd, setup_context=_save_fwd)
torch.library.register_autograd("flashsigmoid::bwd", _autograd_bwd)
