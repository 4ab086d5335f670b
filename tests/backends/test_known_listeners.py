"""Calls that were made before, where something listens to the op, or tensors are of another kind: the op is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends.here import FUSED
from backends.test_known import assert_same
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flashsigmoid import BackendUnsupported, sigmoid_attention
from flashsigmoid.backends import known
from flashsigmoid.testing import make_qkv


class Seen(TorchDispatchMode):
    """Hears of every operator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Doubled(Tensor):
    """Tells that it is another kind of tensor."""


class Named(TorchFunctionMode):
    """Hears of torch's functions."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def primed() -> dict[str, Any]:
    """A call of float32 tensors that is known, by keywords of `sigmoid_attention`."""
    q, k, v, _ = make_qkv(2, 9, 11, 2, 2, 16)
    call = {"q": q, "k": k, "v": v, "backend": FUSED[0]}
    sigmoid_attention(**call)
    return call


def test_a_mode_that_sees_operators_sees_the_op(primed, taken) -> None:
    expected = sigmoid_attention(**primed)
    taken.clear()
    with Seen():
        assert torch.equal(sigmoid_attention(**primed), expected)
    assert not taken
    with Named():  # hears of functions only, and the op is none
        assert torch.equal(sigmoid_attention(**primed), expected)


def test_other_kinds_of_tensors_are_not_taken(primed, taken) -> None:
    expected = the_op(primed)
    q = primed["q"]
    out = sigmoid_attention(**primed | {"q": q.as_subclass(Doubled)})
    assert torch.equal(out.as_subclass(Tensor), expected)
    tensors = {name: x for name, x in primed.items() if name != "backend"}
    with FakeTensorMode() as mode:
        fake: dict[str, Any] = {name: mode.from_tensor(x) for name, x in tensors.items()}
        assert sigmoid_attention(**fake).shape == expected.shape
    assert sigmoid_attention(**fake).shape == expected.shape
    meta: dict[str, Any] = {name: x.to("meta") for name, x in tensors.items()}
    assert sigmoid_attention(**meta).is_meta
    assert not taken


def test_elements_negated_by_a_bit_are_read_right(primed, taken) -> None:
    """A view of a conjugate's imaginary part has the other sign in memory; the same of dout."""
    q, k, v = (x.requires_grad_() for x in (primed["q"], primed["k"], primed["v"]))
    z = torch.complex(torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16))
    negated = z.conj().imag
    assert negated.is_neg()
    assert negated.stride() != q.stride()

    def call(q, dout):
        out = sigmoid_attention(q, k, v, backend=primed["backend"])
        return [out.detach(), *torch.autograd.grad(out, (k, v), dout)]

    for given in ((negated, q.detach()), (q.detach(), negated)):
        for _ in range(2):
            assert_same(call(*given), call(*(x.resolve_neg().clone() for x in given)))


@pytest.mark.parametrize("backend", FUSED)
def test_zeros_without_memory_are_zeros(backend, primed) -> None:
    """Of forward-mode derivatives: a kernel would read the address 0."""
    q, k, v = (primed[name].requires_grad_() for name in "qkv")
    none = torch._efficientzerotensor(q.shape)  # pyright: ignore[reportPrivateImportUsage]

    def call(q, dout):
        out = sigmoid_attention(q, k, v, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, (k, v), dout)]

    for given in ((none, q.detach()), (q.detach(), none)):
        for _ in range(2):
            assert_same(call(*given), call(*(torch.zeros(q.shape) if x is none else x for x in given)))


def the_op(call: dict[str, Any]) -> Tensor:
    """The same past what is known."""
    with Seen():
        return sigmoid_attention(**call)


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python")  # tracing's own
def test_transforms_and_tracers_are_not_taken(primed, taken) -> None:
    expected = the_op(primed)
    q, k, v, backend = primed.values()

    def call(q: Tensor) -> Tensor:
        return sigmoid_attention(q, k, v, backend=backend)

    (grad,) = torch.autograd.grad(the_op(primed | {"q": q.requires_grad_()}).sum(), q)
    q = q.detach()
    assert torch.equal(torch.func.grad(lambda q: call(q).sum())(q), grad)
    assert torch.equal(torch.vmap(call)(q[None])[0], expected)
    with forward_ad.dual_level(), pytest.raises(BackendUnsupported, match="forward-mode"):
        call(forward_ad.make_dual(q, torch.ones_like(q)))
    with forward_ad.dual_level():
        assert torch.equal(call(q), expected)
    traced: Any = torch.jit.trace(call, (q,), check_trace=False)
    assert torch.equal(traced(q), expected)
    torch.compiler.reset()
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(q), expected)
    assert not taken
    assert torch.equal(call(q), expected)
    assert len(taken) == 1


def test_a_checkpoint_may_first_meet_the_call_and_then_know_it(primed, taken) -> None:
    """What is saved in its forward and in its recomputation must be as many tensors, of the same sizes."""
    q, k, v = (primed[name].requires_grad_() for name in "qkv")
    call = lambda *tensors: sigmoid_attention(*tensors, backend=primed["backend"])  # noqa: E731
    known.forget()
    grads = []
    for _ in range(2):
        out = checkpoint(call, q, k, v, use_reentrant=False)
        grads.append(torch.autograd.grad(out.sum(), (q, k, v)))
    assert len(taken) == 3
    assert_same(list(grads[0]), list(grads[1]))


def test_tracers_before_autograd_see_the_op(primed, taken) -> None:
    q, k, v, backend = primed.values()
    call = lambda q: sigmoid_attention(q, k, v, backend=backend)  # noqa: E731
    for is_before in (False, True):
        graph = make_fx(call, pre_dispatch=is_before)(q)
        assert "flashsigmoid.fwd.default" in [str(node.target) for node in graph.graph.nodes]
        assert torch.equal(graph(q), the_op(primed))
    assert not taken


def test_functionalize_sees_the_op(primed, taken) -> None:
    q, k, v, backend = primed.values()

    def call(q: Tensor) -> Tensor:
        return sigmoid_attention(q, k, v, backend=backend).add_(1.0)

    functional = torch.func.functionalize(call)
    assert torch.equal(functional(q), the_op(primed) + 1.0)
    assert "flashsigmoid.fwd.default" in [str(node.target) for node in make_fx(functional)(q).graph.nodes]
    assert not taken


def test_a_known_backward_may_be_compiled(primed) -> None:
    q, k, v = (primed[name].requires_grad_() for name in "qkv")
    expected = torch.autograd.grad(sigmoid_attention(**primed).sum(), (q, k, v))
    torch.compiler.reset()
    out = sigmoid_attention(**primed)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        out.sum().backward()
    for x, grad in zip((q, k, v), expected, strict=True):
        assert x.grad is not None
        assert torch.equal(x.grad, grad)


def test_batches_of_gradients_are_refused(primed) -> None:
    """By torch's older vmap, whose tensors look plain; `torch.vmap` of a gradient is a loop."""
    q = primed["q"].requires_grad_()
    for way in ("op", "first", "known"):
        if way == "first":
            known.forget()
        out = the_op(primed) if way == "op" else sigmoid_attention(**primed)
        with pytest.raises(BackendUnsupported, match="is_grads_batched needs backend='reference'"):
            torch.autograd.grad(out, q, torch.ones(2, *out.shape), is_grads_batched=True)


@pytest.mark.parametrize("change", [Tensor.to_sparse, lambda x: x.to_mkldnn()], ids=["sparse", "mkldnn"])
def test_other_layouts_are_refused(change, primed) -> None:
    call = primed | {"q": change(primed["q"])}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"q must be a dense tensor .*, got torch"):
            sigmoid_attention(**call)


def test_dead_wrappers_of_a_transform_are_computed(primed) -> None:
    """A tensor that left its transform is still wrapped."""
    left: list[Tensor] = []
    torch.func.grad(lambda q: left.append(q) or q.sum())(primed["q"])
    expected = sigmoid_attention(**primed)
    assert torch.equal(sigmoid_attention(**primed | {"q": left[0]}), expected)
