"""Kernels for Hopper (sm_90) in Gluon, which comes with Triton 3.6 and later: fwd.py; bwd.py; beyond head_dim 128
grad.py and dqdk.py; what packed sequences add is in sequences.py.

Nothing here imports triton: the kernels are loaded at the first call that takes them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from ..formula import in_words
from ..gpu import LARGEST, LONG, too_long
from ..problem import Problem
from .tiles import LARGEST_HEAD_DIM
from .tiles import slower as slower

NAME = "hopper"
PACKED = True  # takes cu_seqlens itself, without a host synchronisation
ALIGNED = True  # the tensor memory accelerator loads rows


def unsupported(problem: Problem, direction: str = "forward") -> str | None:
    """None where these kernels can compute the problem, else the reason."""
    if problem.arch != "sm_90":
        return f"the device must be of compute capability 9.0, got {problem.arch or problem.device}"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype must be float16 or bfloat16, got {str(problem.dtype).removeprefix('torch.')}"
    dims, largest = (problem.head_dim, problem.head_dim_v), LARGEST_HEAD_DIM[direction]
    if max(dims) > largest or dims[0] % 8 or dims[1] % 8:
        return f"{direction} must have a head_dim of a multiple of 8 up to {largest}, got {dims[0]} and {dims[1]}"
    if reason := too_long(problem):
        return reason
    if problem.dropout_p > 0:
        return f"dropout_p must be 0, got {problem.dropout_p}"
    if problem.total_q is not None and problem.total_k is not None:
        if direction == "backward" and max(dims) > 128:
            return f"backward of packed sequences must have a head_dim of at most 128, got {max(dims)}"
        if max(problem.total_q, problem.total_k) > LARGEST:
            return f"packed rows must be at most 2**30, got {problem.total_q} and {problem.total_k}"
    if problem.is_partial:
        return "results must be rounded to the dtype of q, and parts of a sum must not be"
    terms = problem.seqlen_k if direction == "forward" else problem.seqlen_q * problem.group
    if direction == "backward" and max(dims) > 128:
        terms = max(terms, problem.seqlen_k)
    if terms > LONG[problem.dtype]:
        return f"a float32 sum of products must have at most {LONG[problem.dtype]} terms, got {terms}"
    if direction == "backward":
        # who adds dQ in no order has no row to sum dS over
        if problem.needs_sums:
            return "sigmoid_bias and alibi_slopes must not require a gradient"
        if problem.has_row_bias:
            return f"sigmoid_bias must not have a value for every row, got {problem.bias_shape}"
        has_sides = problem.bias_shape is not None or problem.slopes_shape is not None
        if max(dims) > 128 and has_sides:
            return f"beyond head_dim 128 there must be neither a tensor b nor alibi_slopes, got head_dim {max(dims)}"
        if torch.are_deterministic_algorithms_enabled() and max(dims) <= 128:
            return "torch.use_deterministic_algorithms must be off: dQ is added in no order"
    return _without_gluon()


def formula(problem: Problem) -> str:
    """How the sigmoid is evaluated, in words."""
    return in_words(problem)


def forward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """O = sigmoid(scale Q K^T + b - slope |p - j|) V, one kernel."""
    from .launch import forward

    return forward(problem, q, k, v, bias, slopes, cu_seqlens)


def backward(
    problem: Problem,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dQ, dK, dV, in one kernel and one that rounds dQ; beyond head_dim 128 in a kernel each."""
    from .launch import backward

    return *backward(problem, dout, q, k, v, bias, slopes, cu_seqlens), None, None


@functools.cache
def _without_gluon() -> str | None:
    """Why the kernels cannot be loaded, None if they can. Without a GPU to run them they are only looked for."""
    triton = importlib.util.find_spec("triton")
    homes = [] if triton is None else list(triton.submodule_search_locations or [])
    if not any((Path(home) / "experimental/gluon/language/nvidia/hopper").is_dir() for home in homes):
        return "the package triton, from 3.6 on, must be installed with its gluon"
    if torch.cuda.is_available():
        try:
            importlib.import_module(".launch", __package__)
        except (ImportError, AttributeError, AssertionError, TypeError) as error:
            return f"triton's gluon must be as it is from 3.6 to 3.9, got {type(error).__name__}: {error}"
    return None
