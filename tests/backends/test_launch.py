"""What a known launch passes to its kernel, and what it keeps."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


class Kernel:
    """A compiled kernel that remembers its calls, or fails."""

    function = "handle"
    packed_metadata = "metadata"

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple] = []
        self.watched = 0  # calls by the way that hooks see
        self.error = error

    def run(self, x: int, y: int, z: int, stream: int, *args: object) -> None:
        assert (stream, *args[:5]) == (5, "handle", "metadata", None, None, None)
        self._remember((x, y, z), args[5:])

    def __getitem__(self, grid: tuple[int, ...]):
        def run(*args: object) -> None:
            self.watched += 1
            self._remember(grid, args)

        return run

    def _remember(self, grid: tuple[int, ...], args: tuple[object, ...]) -> None:
        self.calls.append((grid, *(getattr(x, "base", x) for x in args)))
        if self.error is not None:
            raise self.error


def triton_with(*hooks: object) -> SimpleNamespace:
    """As much of Triton as a launch asks for; Triton's own hook is a chain, and always there."""
    runtime = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=list(hooks)), launch_exit_hook=None)
    active = SimpleNamespace(get_current_stream=lambda device: 5)
    driver = SimpleNamespace(active=active)
    return SimpleNamespace(knobs=SimpleNamespace(runtime=runtime), runtime=SimpleNamespace(driver=driver))


def rows() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 64, 4, 16, dtype=torch.float16) for _ in range(2))


def test_descriptors_are_of_this_calls_tensors_and_hold_none_afterwards() -> None:
    from flashsigmoid.backends.gpu import Launch
    from flashsigmoid.backends.triton.launch import _descriptor

    kernel, first, out = Kernel(), rows(), torch.empty(3)
    launch = Launch(kernel, tuple(_descriptor(x, 16, 16) for x in first), ("rest",))
    for _ in range(2):
        other = rows()
        launch.run(triton_with(), 7, other, (out, None))
        assert kernel.calls.pop() == ((7, 1, 1), *other, out, None, "rest")
        gone = [weakref.ref(x) for x in other]
        del other
        gc.collect()
        assert [x() for x in gone] == [None, None]


def test_nothing_is_held_after_a_launch_that_fails() -> None:
    from flashsigmoid.backends.gpu import Launch
    from flashsigmoid.backends.triton.launch import _descriptor

    launch = Launch(Kernel(RuntimeError("no")), tuple(_descriptor(x, 16, 16) for x in rows()), ())
    assert launch.descriptors is not None
    with pytest.raises(RuntimeError, match="no"):
        launch.run(triton_with(), 7, rows(), ())
    assert [x.base for x in launch.descriptors] == [None, None]


def test_pointers_are_passed_as_they_are() -> None:
    from flashsigmoid.backends.gpu import Launch

    kernel, loaded = Kernel(), rows()
    Launch(kernel, None, ("rest",)).run(triton_with(), 3, loaded, ())
    assert kernel.calls == [((3, 1, 1), *loaded, "rest")]


@pytest.mark.parametrize("hooks", [(), ("somebody",)])
def test_who_watches_launches_sees_them(hooks) -> None:
    from flashsigmoid.backends.gpu import Launch

    kernel, loaded = Kernel(), rows()
    Launch(kernel, None, ()).run(triton_with(*hooks), 3, loaded, ())
    assert kernel.calls == [((3, 1, 1), *loaded)]
    assert kernel.watched == len(hooks)
