"""What every backend with kernels on a GPU needs: strides, alignment, a context, launches, how long a sum may be."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .problem import Problem, bias_rows

# terms of a sum from which what the matrix units truncate is more than what the dtype rounds
LONG = {torch.float16: 2**16, torch.bfloat16: 2**19, torch.float32: 0}

LARGEST = 2**30  # positions are 32-bit integers

# from loaded and other tensors: descriptors of the loaded or None, further arguments, constants; it holds no tensor
Describe = Callable[
    [tuple[Tensor, ...], tuple[Tensor | None, ...]], tuple[tuple[Any, ...] | None, tuple[Any, ...], dict[str, Any]]
]

_MOST = 4096  # launches that a plan remembers


class Threads(threading.local):
    """What a thread has of its own."""

    def __init__(self) -> None:
        self.token = object()  # to be known by; the identifier of a thread that ended may come again
        self.devices: set[int] = set()  # where it has a context


threads = Threads()
_HERE = nullcontext()


def on_device(x: Tensor):
    """Where x is, with a CUDA context that is current in this thread; the interpreter has none.

    A thread that has only met cached memory has no current context, and the driver makes no descriptors without one:
    the threads of autograd in their first backward.
    """
    if not x.is_cuda:
        return _HERE
    index = x.device.index
    if index not in threads.devices:
        torch.zeros(1, device=x.device)  # a launch of the runtime makes the context current
        threads.devices.add(index)
    return _HERE if torch.cuda.current_device() == index else torch.cuda.device(index)


def are_aligned(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can load them: 16-byte rows, dense channels, no broadcast dimension."""
    for x in tensors:
        size = x.element_size()
        if x.data_ptr() % 16 or x.stride(-1) != 1:
            return False
        for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if n > 1 and (s <= 0 or s * size % 16):
                return False
    return True


def allows_tf32() -> bool:
    """Whether torch may multiply float32 as tf32, by whichever of its switches.

    Where one of the new ones was used, `torch.get_float32_matmul_precision` raises.
    """
    return torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"


def too_long(problem: Problem) -> str | None:
    """Why positions do not fit the kernels' integers, None if they do."""
    if max(problem.seqlen_q, problem.seqlen_k, abs(problem.q_offset)) <= LARGEST:
        return None
    sizes = f"{problem.seqlen_q}, {problem.seqlen_k}, {problem.q_offset}"
    return f"seqlen and q_offset must be at most 2**30, got {sizes}"


def bias_strides(problem: Problem, bias: Tensor | None) -> tuple[int, ...]:
    """Of (batch, nheads, rows), 0 where there is one value for all."""
    if bias is None:
        return (0, 0, 0)
    is_packed_rows = problem.is_packed and problem.has_row_bias
    rows = bias.t()[None] if is_packed_rows else bias_rows(bias, problem.batch, problem.nheads)
    return tuple(s if n > 1 else 0 for s, n in zip(rows.stride(), rows.shape, strict=True))


def slopes_strides(problem: Problem, slopes: Tensor | None) -> tuple[int, ...]:
    """Of (batch, nheads)."""
    return (0, 0) if slopes is None else slopes.expand(problem.batch, problem.nheads).stride()


def launch(
    triton: Any,
    launches: dict[Any, Launch],
    key: Sequence[Any],
    kernel: Any,
    programs: int,
    loaded: tuple[Tensor, ...],
    tensors: tuple[Tensor | None, ...],
    describe: Describe,
) -> None:
    """Run kernel[(programs,)] on descriptors of `loaded`, or on them, then `tensors`, then what `describe` says."""
    find_launch(triton, launches, key, kernel, loaded, describe).run(programs, loaded, tensors)


def find_launch(
    triton: Any,
    launches: dict[Any, Launch],
    key: Sequence[Any],
    kernel: Any,
    loaded: tuple[Tensor, ...],
    describe: Describe,
) -> Launch:
    """The kernel's launch on tensors laid out like `loaded` and of the same key, in this thread.

    `triton` is the module, which is imported by who has kernels only.
    """
    described = [(x.stride(), x.dtype, x.data_ptr() % 16) for x in loaded]
    where = (threads.token, loaded[0].device, *described, *key)
    known = launches.get(where)
    if known is None or known.kernel is not kernel:
        if len(launches) >= _MOST:
            launches.clear()
        known = launches[where] = Launch(triton, kernel, describe)
    return known


class Launch:
    """A kernel on tensors of one layout in one thread; it holds none of them.

    Of Triton's way to a kernel most is finding it, some 50 us: only the first run goes that way.
    """

    def __init__(self, triton: Any, kernel: Any, describe: Describe):
        self.kernel, self._triton, self._describe = kernel, triton, describe
        self._compiled: Any = None

    def run(self, programs: int, loaded: tuple[Tensor, ...], tensors: tuple[Tensor | None, ...]) -> None:
        """Launch the kernel where the tensors are; `loaded` may be passed in descriptors."""
        if self._compiled is None:
            with on_device(loaded[0]):
                return self._compile(programs, loaded, tensors)
        if self._index != torch._C._cuda_getDevice():
            with torch.cuda.device(self._index):
                return self.run(programs, loaded, tensors)
        knobs, descriptors = self._knobs, self._descriptors
        if descriptors:
            self._put(loaded)
        try:
            enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
            if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler, say, has hooked in
                self._compiled[(programs, 1, 1)](*(descriptors or loaded), *tensors, *self._rest)
                return
            # the same without what only hooks read, and by addresses, which Triton need not ask the driver about
            first = descriptors or [x.data_ptr() for x in loaded]
            others = [None if x is None else x.data_ptr() for x in tensors]
            stream = self._get_stream(self._index)
            self._run(programs, 1, 1, stream, *self._handles, None, None, None, *first, *others, *self._rest)
        finally:
            if descriptors:
                self._put(())

    def _compile(self, programs: int, loaded: tuple[Tensor, ...], tensors: tuple[Tensor | None, ...]) -> None:
        descriptors, rest, constants = self._describe(loaded, tensors)
        compiled = self.kernel[(programs,)](*(descriptors or loaded), *tensors, *rest, **constants)
        if compiled is None:  # the interpreter compiles nothing
            return
        names = self.kernel.arg_names[len(loaded) + len(tensors) + len(rest) :]
        self._rest = (*rest, *(constants[name] for name in names))
        self._descriptors = descriptors  # checked now; later ones differ in their tensors only
        self._put(())
        self._index = loaded[0].device.index
        self._knobs = self._triton.knobs.runtime
        self._get_stream = self._triton.runtime.driver.active.get_current_stream
        self._compiled, self._run = compiled, compiled.run
        self._handles = (compiled.function, compiled.packed_metadata)

    def _put(self, loaded: tuple[Tensor, ...]) -> None:
        for descriptor, x in itertools.zip_longest(self._descriptors or (), loaded):
            descriptor.base = x
