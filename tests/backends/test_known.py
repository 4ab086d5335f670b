"""Calls that were made before: taken where only the tensors' elements differ, and nowhere else."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends.here import FUSED, IS_INTERPRETED
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flashsigmoid import BackendUnsupported, sigmoid_attention
from flashsigmoid.backends import known, triton
from flashsigmoid.functional import attend
from flashsigmoid.testing import make_qkv

OPTIONS: dict[str, Any] = {
    "sigmoid_bias": None, "scale": None, "causal": False, "window_size": (None, None), "alibi_slopes": None,
    "dropout_p": 0.0, "sigmoid": "auto", "backend": FUSED[0],
}  # fmt: skip
NAMES = ("q", "k", "v", "dout")
MORE = {"q_offset", "origin"}  # of a block
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="needs Triton's interpreter")


def base(**options: Any) -> dict[str, Any]:
    """A call that is known after its first time."""
    q, k, v, dout = make_qkv(1, 9, 11, 2, 2, 16, dtype=torch.float16)
    return dict(zip(NAMES, (q, k, v, dout), strict=True)) | OPTIONS | options


def make(call: dict[str, Any], wanted: str = "qkv") -> list[Tensor]:
    """out, and the gradients of the tensors that are `wanted`."""
    torch.manual_seed(0)
    q, k, v = (call[name].detach().requires_grad_(name in wanted) for name in NAMES[:3])
    more = {name: call[name] for name in MORE & call.keys()}
    out = attend(q, k, v, *(call[name] for name in OPTIONS), **more)
    leaves = [x for x in (q, k, v) if x.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out, leaves, call["dout"]) if leaves else ())]


def find(call: dict[str, Any]) -> known.Known | None:
    q, k, v = (call[name] for name in NAMES[:3])
    options = [*(call[name] for name in OPTIONS), call.get("q_offset"), call.get("origin", (0, 0, 0, 0))]
    return known.find(q, k, v, *options)[1]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def the_long_way(call: dict[str, Any], **given: Any) -> list[Tensor]:
    known.forget()
    return make(call, **given)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[known.Known]:
    """The known calls that were taken."""
    seen: list[known.Known] = []
    take = known.Known.__call__
    monkeypatch.setattr(known.Known, "__call__", lambda self, *args: seen.append(self) or take(self, *args))
    return seen


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directions that Triton's backend was asked for the long way."""
    seen: list[str] = []
    for name in ("forward", "backward"):
        function = getattr(triton, name)
        watched = lambda *args, name=name, function=function: seen.append(name) or function(*args)  # noqa: E731
        monkeypatch.setattr(triton, name, watched)
    return seen


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("options", [{}, {"causal": True, "sigmoid_bias": -2}, {"window_size": (3, 2), "scale": 0.5}])
def test_the_second_call_is_taken_and_computes_the_same(backend, options, taken) -> None:
    call = base(backend=backend, **options)
    first = make(call)
    assert not taken
    assert_same(make(call), first)
    assert taken == [find(call)]
    other = base(backend=backend, **options)
    other |= {name: other[name].flip(1) for name in NAMES}
    found = make(other)
    assert len(taken) == 2
    assert_same(found, the_long_way(other))
    assert not torch.equal(found[0], first[0])


@interpreted
def test_kernels_are_launched_without_the_long_way(long_ways) -> None:
    call = base()
    for _ in range(3):
        make(call)
    assert long_ways == ["forward", "backward", "backward"]  # the first is not a known call's


def moved(x: Tensor) -> Tensor:
    """The same, not at a multiple of 16 bytes."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return memory.view(x.shape).copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sparse(x: Tensor) -> Tensor:
    """The same with a gap behind every channel."""
    return x.repeat_interleave(2, -1)[..., ::2]


def of(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda call: call | {name: change(call[name])}


def shorter(call: dict[str, Any]) -> dict[str, Any]:
    return call | {name: call[name][:, :10].contiguous() for name in "kv"}


# what decides how a call is computed, each alone
KEYED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "seqlen_k": shorter,
    "batch": lambda call: call | {name: torch.cat([call[name]] * 2) for name in NAMES},
    "nheads_k": lambda call: call | {name: call[name][:, :, :1].contiguous() for name in "kv"},
    "head_dim_v": lambda call: call | {name: call[name][..., :8].contiguous() for name in ("v", "dout")},
    "dtype": lambda call: call | {name: call[name].float() for name in NAMES},
    "strides of q": of("q", transposed),
    "strides of k": of("k", transposed),
    "strides of v": of("v", sparse),
    "address of q": of("q", moved),
    "address of k": of("k", moved),
    "address of v": of("v", moved),
    "sigmoid_bias": lambda call: call | {"sigmoid_bias": -1.0},
    "scale": lambda call: call | {"scale": 0.5},
    "causal": lambda call: call | {"causal": True},
    "left": lambda call: call | {"window_size": (2, None)},
    "right": lambda call: call | {"window_size": (None, 1)},
    "sigmoid": lambda call: call | {"sigmoid": "fast"},
    "backend": lambda call: call | {"backend": "blocked" if call["backend"] != "blocked" else "auto"},
    "q_offset": lambda call: call | {"q_offset": 0, "causal": True},
    "origin": lambda call: call | {"origin": (0, 0, 0, 1)},
    "tensor b": lambda call: call | {"sigmoid_bias": torch.tensor([-1.0, 0.5])},
    "alibi_slopes": lambda call: call | {"alibi_slopes": torch.tensor([0.5, 0.1])},
    "dropout_p": lambda call: call | {"dropout_p": 0.5},
    "reference": lambda call: call | {"backend": "reference"},
}


@pytest.mark.parametrize("name", KEYED)
def test_a_change_makes_another_call(name, taken) -> None:
    call = base()
    make(call)
    changed = KEYED[name](call)
    assert find(call) is not None
    assert find(changed) is not find(call)
    found = make(changed)
    again = make(changed)
    assert not taken or taken == [find(changed)]
    expected = the_long_way(changed)
    assert_same(found, expected)
    assert_same(again, expected)


def test_a_key_that_forgets_would_be_caught(monkeypatch) -> None:
    """Planted: a key without tensors and options. What `find` itself sends the long way is not taken even then."""
    call = base()
    monkeypatch.setattr(known, "_key", lambda *described: ())
    make(call)
    wrong = {name for name, change in KEYED.items() if find(change(call)) is find(call)}
    assert wrong == KEYED.keys() - {"tensor b", "alibi_slopes", "dropout_p"}


def test_another_thread_makes_another_call(taken) -> None:
    """A descriptor is filled in place, and a context is current in a thread."""
    call = base()
    make(call)
    found: list[Any] = []
    for _ in range(2):  # which may have the identifier of the one before
        thread = threading.Thread(target=lambda: found.extend((find(call), make(call))))
        thread.start()
        thread.join()
    assert not taken
    assert found[0] is None
    assert found[2] is None
    assert_same(found[1], make(call))


def test_determinism_and_precision_make_another_call() -> None:
    call = base(q=torch.randn(1, 9, 2, 16), k=torch.randn(1, 9, 2, 16), v=torch.randn(1, 9, 2, 16))
    call["dout"] = torch.randn(1, 9, 2, 16)
    make(call)
    torch.set_float32_matmul_precision("high")
    try:
        assert find(call) is None
    finally:
        torch.set_float32_matmul_precision("highest")
    assert find(call) is not None
    plain = find(call)
    for switch in (torch.backends.cuda.matmul, torch.backends):  # the new ones, of which the first goes before
        setattr(switch, "fp32_precision", "tf32")  # noqa: B010
        try:
            assert find(call) is not plain
            make(call)
            assert find(call) not in (None, plain)
        finally:
            setattr(switch, "fp32_precision", "none")  # noqa: B010
    assert find(call) is plain
    torch.use_deterministic_algorithms(True)
    try:
        assert find(call) is None
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "bad",
    [
        {"causal": 0}, {"scale": True}, {"sigmoid_bias": True}, {"window_size": (True, None)},
        {"window_size": (1, False)}, {"dropout_p": False}, {"window_size": (1.0, None)}, {"q": None}, {"v": 3},
    ],
)  # fmt: skip
def test_what_is_equal_to_a_good_option_is_still_refused(bad) -> None:
    """True is 1, and their hashes are equal."""
    for good in ({}, {"scale": 1.0}, {"sigmoid_bias": 1.0}, {"window_size": (1, None)}, {"window_size": (1, 0)}):
        call = base(backend="blocked", **good)
        make(call, "")
        assert find(call) is not None
    q, k, v = (bad.get(name, call[name]) for name in NAMES[:3])
    options = {name: value for name, value in bad.items() if name in OPTIONS}
    with pytest.raises(ValueError, match="must be"):
        sigmoid_attention(q, k, v, backend="blocked", **options)


@pytest.mark.parametrize("wanted", ["", "q", "k", "v", "qv", "kv", "qkv"])
def test_gradients_are_of_those_that_ask(wanted, taken) -> None:
    call = base()
    make(call, "" if wanted else "qkv")
    found = make(call, wanted)
    assert len(taken) == 1
    assert_same(found, the_long_way(call, wanted=wanted))


def test_without_grad_mode_there_is_no_graph(taken) -> None:
    call = base()
    q = call["q"].requires_grad_()
    make(call)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = sigmoid_attention(q, call["k"], call["v"], backend=call["backend"])
        assert not out.requires_grad
        assert out.is_inference() == (mode is torch.inference_mode)
    assert sigmoid_attention(q, call["k"], call["v"], backend=call["backend"]).requires_grad
    assert len(taken) == 3


@pytest.mark.parametrize("backend", FUSED)
def test_autocast_makes_the_call_of_its_dtype(backend, taken) -> None:
    call = base(backend=backend)
    wide = {name: call[name].float() for name in NAMES[:3]}
    first = sigmoid_attention(**wide, backend=backend)
    with torch.autocast("cpu", dtype=torch.float16):
        found = [sigmoid_attention(**wide, backend=backend) for _ in range(2)]
    assert first.dtype == torch.float32
    assert len(taken) == 1
    for out in found:
        assert torch.equal(out, make(call)[0])


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


@contextlib.contextmanager
def unpacked_as(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    with saved_tensors_hooks(lambda x: x, change):
        yield


DOUTS = {
    "expanded": lambda x: x[:, :, :1, :1].expand(x.shape),
    "transposed": transposed,
    "sparse": sparse,
    "moved": moved,
    "plain": lambda x: x.clone(),
}
SAVED = {
    "as they were": lambda x: x,
    "other strides": transposed,
    "other addresses": moved,
}


@pytest.mark.parametrize(
    ("of_dout", "of_saved", "is_deterministic"),
    [(of_dout, "as they were", False) for of_dout in DOUTS]
    + [("plain", of_saved, False) for of_saved in SAVED]
    + [("plain", "as they were", True)],
)
def test_a_backward_is_known_by_dout_and_what_was_saved(of_dout, of_saved, is_deterministic, long_ways) -> None:
    call = base(backend=FUSED[0])
    for _ in range(2):
        make(call)
    long_ways.clear()
    plain = {name: x.clone() for name, x in zip(NAMES, (call[name] for name in NAMES), strict=True)}

    def change() -> list[Tensor]:
        q, k, v = (plain[name].clone().requires_grad_() for name in NAMES[:3])
        with unpacked_as(SAVED[of_saved]):
            out = attend(q, k, v, *(call[name] for name in OPTIONS))
        torch.use_deterministic_algorithms(is_deterministic)
        try:
            grads = torch.autograd.grad(out, (q, k, v), DOUTS[of_dout](plain["dout"]), retain_graph=True)
            again = torch.autograd.grad(out, (q, k, v), DOUTS[of_dout](plain["dout"]))
        finally:
            torch.use_deterministic_algorithms(False)
        assert_same(list(grads), list(again))
        return [out.detach(), *grads]

    found = change()
    if IS_INTERPRETED:
        is_known = of_dout == "plain" and of_saved == "as they were" and not is_deterministic
        assert ("backward" in long_ways) == (not is_known)
    known.forget()
    assert_same(found, change())


def test_a_known_call_is_differentiable_once(taken) -> None:
    call = base()
    make(call)
    q, k, v = (call[name].detach().requires_grad_() for name in NAMES[:3])
    out = attend(q, k, v, *(call[name] for name in OPTIONS))
    assert len(taken) == 1
    (dq,) = torch.autograd.grad(out, q, call["dout"], create_graph=True)
    with pytest.raises(BackendUnsupported, match="double backward needs backend='reference'"):
        dq.sum().backward()


def test_an_input_changed_before_the_backward_of_a_known_call_is_an_error(taken) -> None:
    call = base()
    make(call)
    q, k, v = (call[name].detach().requires_grad_() for name in NAMES[:3])
    other = k * 1.0
    out = attend(q, other, v, *(call[name] for name in OPTIONS))
    assert len(taken) == 1
    other.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_k"])
def test_calls_without_elements_are_known_too(empty, taken) -> None:
    call = base()
    names, dim = {"batch": ("qkv", 0), "seqlen_q": ("q", 1), "seqlen_k": ("kv", 1)}[empty]
    call |= {name: call[name].narrow(dim, 0, 0) for name in names}
    if empty != "seqlen_k":
        call["dout"] = call["dout"].narrow(dim, 0, 0)
    first = make(call)
    assert_same(make(call), first)
    assert len(taken) == 1
    assert not any(x.any() for x in first)


@pytest.mark.parametrize("backend", FUSED)
def test_strides_of_one_element_do_not_matter(backend) -> None:
    """A dimension of one element may have any stride, and the key has it: another call with the same values."""
    call = base(backend=backend)
    call |= {name: call[name][:1, :1, :1] for name in NAMES}
    expected = make({**call, **{name: call[name].contiguous() for name in NAMES}})
    for stride in (0, 1, 3, 16, 2**33):
        odd = {name: call[name].as_strided((1, 1, 1, 16), (stride, stride, stride, 1)) for name in NAMES}
        for _ in range(2):
            assert_same(make(call | odd), expected)


def test_inference_tensors_are_refused_in_a_graph_as_the_op_refuses_them(taken) -> None:
    call = base()
    make(call)
    with torch.inference_mode():
        call["q"] = call["q"].clone()
    k = call["k"].requires_grad_()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            sigmoid_attention(call["q"], k, call["v"], backend=call["backend"])
    with torch.no_grad():
        assert torch.equal(sigmoid_attention(call["q"], k, call["v"], backend=call["backend"]), make(call, "")[0])
    assert taken


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


def test_no_tensor_is_held_and_what_is_known_is_bounded(monkeypatch) -> None:
    import gc
    import weakref

    call = base()
    gone = [weakref.ref(call[name]) for name in NAMES]
    for _ in range(2):
        make(call)
    del call
    gc.collect()
    assert [x() for x in gone] == [None] * 4
    monkeypatch.setattr(known, "_MOST", 3)
    for n in range(5):
        make(base(sigmoid_bias=float(-n), backend="blocked"))
        assert len(known._calls) <= 3
