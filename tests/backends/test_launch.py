"""What a known launch passes to its kernel, and what it keeps."""

from __future__ import annotations

import gc
import importlib.util
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashsigmoid.backends import gpu

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


class Compiled:
    """A compiled kernel that remembers its calls, or fails."""

    function = "handle"
    packed_metadata = "metadata"

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.watched = 0  # calls by the way that hooks see
        self.error: Exception | None = None

    def run(self, x: int, y: int, z: int, stream: int, *args: object) -> None:
        assert (stream, *args[:5]) == (5, "handle", "metadata", None, None, None)
        self._remember((x, y, z), args[5:])

    def __getitem__(self, grid: tuple[int, ...]):
        def run(*args: object) -> None:
            self.watched += 1
            self._remember(grid, args)

        return run

    def _remember(self, grid: tuple[int, ...], args: tuple[object, ...]) -> None:
        bases: list[Any] = [getattr(x, "base", None) for x in args]
        addresses = [x if base is None else base.data_ptr() for x, base in zip(args, bases, strict=True)]
        self.calls.append((grid, *addresses))
        if self.error is not None:
            raise self.error


class Kernel:
    """Compiles at every launch, as Triton's own way would if it remembered nothing."""

    arg_names = ("k", "v", "out", "bias", "rest", "BLOCK")

    def __init__(self) -> None:
        self.compiled = Compiled()
        self.first: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]):
        def run(*args: object, **constants: object) -> Compiled:
            self.first.append((grid, *args, constants))
            return self.compiled

        return run


def triton_with(*hooks: object) -> SimpleNamespace:
    """As much of Triton as a launch asks for; Triton's own hook is a chain, and always there."""
    runtime = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=list(hooks)), launch_exit_hook=None)
    active = SimpleNamespace(get_current_stream=lambda device: 5)
    driver = SimpleNamespace(active=active)
    return SimpleNamespace(knobs=SimpleNamespace(runtime=runtime), runtime=SimpleNamespace(driver=driver))


def rows(n: int = 64) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, n, 4, 16, dtype=torch.float16) for _ in range(2))


def by_descriptors(loaded, tensors):
    from flashsigmoid.backends.triton.launch import _descriptor

    return tuple(_descriptor(x, 16, 16) for x in loaded), ("rest",), {"BLOCK": 16, "num_warps": 4}


def by_pointers(loaded, tensors):
    return None, ("rest",), {"BLOCK": 16, "num_warps": 4}


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is current is where tensors of the CPU are."""
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)


def started(describe, *hooks: object) -> tuple[gpu.Launch, Kernel]:
    """A launch after its first run."""
    kernel = Kernel()
    launch = gpu.Launch(triton_with(*hooks), kernel, describe)
    loaded, out = rows(), torch.empty(3)
    launch.run(7, loaded, (out, None))
    ((grid, *args, constants),) = kernel.first
    assert grid == (7,)
    assert constants == {"BLOCK": 16, "num_warps": 4}
    assert args[3:] == [None, "rest"]
    assert args[2] is out
    assert not kernel.compiled.calls
    return launch, kernel


def test_descriptors_are_of_this_calls_tensors_and_hold_none_afterwards() -> None:
    launch, kernel = started(by_descriptors)
    out = torch.empty(3)
    for _ in range(2):
        other = rows()
        launch.run(7, other, (out, None))
        addresses = [x.data_ptr() for x in (*other, out)]
        assert kernel.compiled.calls.pop() == ((7, 1, 1), *addresses, None, "rest", 16)
        gone = [weakref.ref(x) for x in other]
        del other
        kernel.first.clear()
        gc.collect()
        assert [x() for x in gone] == [None, None]
    assert not kernel.first


def test_nothing_is_held_after_a_launch_that_fails() -> None:
    launch, kernel = started(by_descriptors)
    kernel.compiled.error = RuntimeError("no")
    with pytest.raises(RuntimeError, match="no"):
        launch.run(7, rows(), (torch.empty(3), None))
    assert [x.base for x in launch._descriptors or ()] == [None, None]


def test_pointers_are_passed_as_addresses() -> None:
    launch, kernel = started(by_pointers)
    loaded, out = rows(), torch.empty(3)
    launch.run(3, loaded, (out, None))
    assert kernel.compiled.calls == [((3, 1, 1), *(x.data_ptr() for x in (*loaded, out)), None, "rest", 16)]


@pytest.mark.parametrize("describe", [by_pointers, by_descriptors])
def test_who_watches_launches_sees_them_and_the_tensors(describe) -> None:
    launch, kernel = started(describe, "somebody")
    loaded, out = rows(), torch.empty(3)
    launch.run(3, loaded, (out, None))
    ((grid, *args),) = kernel.compiled.calls
    first = loaded if describe is by_pointers else tuple(x.data_ptr() for x in loaded)
    assert (grid, *args[:2]) == ((3, 1, 1), *first)
    assert args[2] is out
    assert kernel.compiled.watched == 1


def test_another_device_is_made_current_for_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, kernel = started(by_pointers)
    here: list[int | None] = [3]
    seen: list[int] = []

    class Device:
        def __init__(self, index: int) -> None:
            seen.append(index)

        def __enter__(self) -> None:
            here.append(None)

        def __exit__(self, *error: object) -> None:
            here.pop()

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: here[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    launch.run(3, rows(), (torch.empty(3), None))
    assert seen == [launch._index]
    assert here == [3]
    assert len(kernel.compiled.calls) == 1


def test_a_launch_is_on_the_stream_that_is_current_then(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, _ = started(by_pointers)
    streams = iter((5, 9))
    monkeypatch.setattr(launch, "_get_stream", lambda index: next(streams))
    seen: list[int] = []
    monkeypatch.setattr(launch, "_run", lambda x, y, z, stream, *args: seen.append(stream))
    for _ in range(2):
        launch.run(3, rows(), (torch.empty(3), None))
    assert seen == [5, 9]


def test_a_launch_is_known_by_layout_alignment_thread_and_key() -> None:
    launches: dict = {}
    kernel = Kernel()

    def find(loaded, key=("key",), kernel=kernel):
        return gpu.find_launch(triton_with(), launches, key, kernel, loaded, by_pointers)

    k, v = rows()
    base = find((k, v))
    assert find(rows()) is base
    off = torch.randn(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape)
    others = [
        find((k, v.transpose(1, 2).contiguous().transpose(1, 2))), find((k, off)), find((k, v), ("other",)),
        find((k, v.bfloat16())), find((k.to("meta"), v.to("meta"))),
    ]  # fmt: skip
    found: list[gpu.Launch] = []
    for _ in range(2):  # a thread may have the identifier of the one before
        thread = threading.Thread(target=lambda: found.append(find((k, v))))
        thread.start()
        thread.join()
    assert len({id(x) for x in (base, *others, *found)}) == 8
    assert find((k, v), kernel=Kernel()) is not base


def test_products_of_float32_by_each_of_torchs_switches() -> None:
    """Where one of the new ones allows tf32, the older question raises."""
    from flashsigmoid.backends.problem import make_problem
    from flashsigmoid.backends.triton.launch import _precision

    q = torch.zeros(1, 1, 1, 16)
    problem = replace(make_problem(q, q, q, sigmoid_bias=0.0), arch="sm_90", device="cuda")
    try:
        for precision, expected in (("highest", "bf16x6"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(precision)
            assert _precision(problem) == expected
            assert _precision(replace(problem, dtype=torch.bfloat16)) == "ieee"
        for precision, expected in (("ieee", "bf16x6"), ("tf32", "tf32"), ("none", "bf16x6")):
            setattr(torch.backends.cuda.matmul, "fp32_precision", precision)  # noqa: B010
            assert _precision(problem) == expected
    finally:
        setattr(torch.backends.cuda.matmul, "fp32_precision", "none")  # noqa: B010
        torch.set_float32_matmul_precision("highest")
