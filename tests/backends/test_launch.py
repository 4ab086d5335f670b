"""What a known launch passes to its kernel, and what it keeps."""

from __future__ import annotations

import gc
import importlib.util
import weakref

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


class Kernel:
    """A compiled kernel that remembers its calls, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple] = []
        self.error = error

    def __getitem__(self, grid: tuple[int, ...]):
        def run(*args: object) -> None:
            self.calls.append((grid, *(getattr(x, "base", x) for x in args)))
            if self.error is not None:
                raise self.error

        return run


def rows() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 64, 4, 16, dtype=torch.float16) for _ in range(2))


def test_descriptors_are_of_this_calls_tensors_and_hold_none_afterwards() -> None:
    from flashsigmoid.backends.gpu import Launch
    from flashsigmoid.backends.triton.launch import _descriptor

    kernel, first, out = Kernel(), rows(), torch.empty(3)
    launch = Launch(kernel, tuple(_descriptor(x, 16, 16) for x in first), ("rest",))
    for _ in range(2):
        other = rows()
        launch.run(7, other, (out, None))
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
        launch.run(7, rows(), ())
    assert [x.base for x in launch.descriptors] == [None, None]


def test_pointers_are_passed_as_they_are() -> None:
    from flashsigmoid.backends.gpu import Launch

    kernel, loaded = Kernel(), rows()
    Launch(kernel, None, ("rest",)).run(3, loaded, ())
    assert kernel.calls == [((3, 1, 1), *loaded, "rest")]
