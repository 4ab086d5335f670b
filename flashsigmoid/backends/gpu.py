"""What every backend with kernels on a GPU needs: strides, alignment, a current context, how long a sum may be."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import torch
from torch import Tensor

from .problem import Problem, bias_rows

# terms of a sum from which what the matrix units truncate is more than what the dtype rounds
LONG = {torch.float16: 2**16, torch.bfloat16: 2**19, torch.float32: 0}

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
