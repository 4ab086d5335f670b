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

_threads = threading.local()
_HERE = nullcontext()


def on_device(x: Tensor):
    """Where x is, with a CUDA context that is current in this thread; the interpreter has none.

    A thread that has only met cached memory has no current context, and the driver makes no descriptors without one:
    the threads of autograd in their first backward.
    """
    if not x.is_cuda:
        return _HERE
    index = x.device.index
    ready = _threads.__dict__.setdefault("devices", set())
    if index not in ready:
        torch.zeros(1, device=x.device)  # a launch of the runtime makes the context current
        ready.add(index)
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
    describe: Callable[[], tuple[tuple[Any, ...] | None, tuple[Any, ...], dict[str, Any]]],
) -> None:
    """Run kernel[(programs,)] on descriptors of `loaded`, or on them, then `tensors`, then what `describe` says.

    Of Triton's way to a kernel most is finding it, some 50 us: a launch that is known goes straight to it. `describe`
    gives (descriptors or None, further arguments, constants), which `key` and the strides of `loaded` decide; `triton`
    is the module, which is imported by who has kernels only.
    """
    described = [(x.stride(), x.data_ptr() % 16) for x in loaded]
    where = (threading.get_ident(), loaded[0].device, *described, *key)
    known = launches.get(where)
    if known is not None:
        known.run(triton, programs, loaded, tensors)
        return
    descriptors, rest, constants = describe()
    compiled = kernel[(programs,)](*(descriptors or loaded), *tensors, *rest, **constants)
    if compiled is not None:  # the interpreter compiles nothing
        names = kernel.arg_names[len(loaded) + len(tensors) + len(rest) :]
        launches[where] = Launch(compiled, descriptors, (*rest, *(constants[name] for name in names)))


class Launch:
    """A compiled kernel and its arguments after the tensors, of one thread."""

    def __init__(self, compiled: Any, descriptors: tuple[Any, ...] | None, rest: tuple[Any, ...]):
        self.compiled = compiled
        self.descriptors = descriptors  # those of the first launch, checked then
        self.rest = rest
        self._put(())

    def run(self, triton: Any, programs: int, loaded: tuple[Tensor, ...], tensors: tuple[Tensor | None, ...]) -> None:
        """The same on other tensors of the same strides; none of them is held afterwards."""
        args = (*(self.descriptors or loaded), *tensors, *self.rest)
        compiled, knobs = self.compiled, triton.knobs.runtime
        self._put(loaded)
        try:
            if _is_watched(knobs.launch_enter_hook) or _is_watched(knobs.launch_exit_hook):
                compiled[(programs, 1, 1)](*args)
            else:  # the same without what only hooks read, another 6 us
                stream = triton.runtime.driver.active.get_current_stream(loaded[0].device.index)
                run, handle = compiled.run, compiled.function
                run(programs, 1, 1, stream, handle, compiled.packed_metadata, None, None, None, *args)
        finally:
            self._put(())

    def _put(self, loaded: tuple[Tensor, ...]) -> None:
        for descriptor, x in itertools.zip_longest(self.descriptors or (), loaded if self.descriptors else ()):
            descriptor.base = x


def _is_watched(hook: Any) -> bool:
    """Whether somebody, a profiler say, has hooked into Triton's launches."""
    return bool(getattr(hook, "calls", hook))
