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
from torch.autograd.graph import saved_tensors_hooks

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
def test_calls_without_elements_are_not_known(empty, taken) -> None:
    call = base()
    names, dim = {"batch": ("qkv", 0), "seqlen_q": ("q", 1), "seqlen_k": ("kv", 1)}[empty]
    call |= {name: call[name].narrow(dim, 0, 0) for name in names}
    if empty != "seqlen_k":
        call["dout"] = call["dout"].narrow(dim, 0, 0)
    first = make(call)
    assert_same(make(call), first)
    assert not taken
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
