"""Fused kernels in Triton, forward and backward, for NVIDIA GPUs from sm_80 and AMD GPUs: fwd.py and bwd.py.

Nothing here imports triton: the kernels are loaded at the first call that takes them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formula import in_words
from ..gpu import are_aligned, too_long
from ..problem import BackendUnsupported, Problem

NAME = "triton"
PACKED = True  # takes cu_seqlens itself, without a host synchronisation
ALIGNED = False

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported(problem: Problem, direction: str = "forward") -> str | None:
    """None where the kernels can compute the problem, else the reason."""
    if problem.dtype not in _DTYPES:
        return f"dtype must be float16, bfloat16 or float32, got {str(problem.dtype).removeprefix('torch.')}"
    if max(problem.head_dim, problem.head_dim_v) > 256:
        return f"head_dim must be at most 256, got {problem.head_dim} and {problem.head_dim_v}"
    if reason := too_long(problem):
        return reason
    if problem.device == "cpu" and not is_interpreted():
        return "device must be a GPU, got cpu"
    if problem.device == "cpu" and problem.dtype == torch.bfloat16:
        return "dtype must not be bfloat16 in Triton's interpreter, which multiplies its bits as integers"
    if problem.device not in ("cpu", "cuda"):
        return f"device must be a GPU of NVIDIA or AMD, got {problem.device}"
    if problem.arch is not None and problem.arch.startswith("sm_") and int(problem.arch[3:]) < 80:
        return f"compute capability must be at least 8.0, got {problem.arch}"
    if not _is_installed():
        return "the package triton is not installed"
    return None


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

    return forward(problem, q, k, v, bias, slopes, seed, cu_seqlens)


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
    """dQ, dK, dV and the partial sums of dS and of -dS |p - j|: one kernel, or two."""
    from .launch import backward

    return backward(problem, dout, q, k, v, bias, slopes, seed, cu_seqlens)


def prepare(problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None = None) -> Callable[..., Any]:
    """`forward`, or with dout `backward`, of other tensors of these layouts, which come without the problem:

    prepare(problem, q, k, v)(q, k, v, bias, slopes, seed, cu_seqlens_q, cu_seqlens_k)    likewise with dout in front
    """
    from .launch import prepare

    return prepare(problem, q, k, v, dout)


def top_weights(
    problem: Problem, q: Tensor, k: Tensor, count: int, bias: Tensor | None, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The `count` largest weights of every row, falling, and their keys, -1 where the weight is 0.

    Of equal weights the earlier key comes first. Dense, without dropout; whatever `unsupported` lets pass is computed.
    """
    from .top import top_weights

    return top_weights(problem, q, k, count, bias, slopes)


def unsupported_fp8(problem: Problem) -> str | None:
    """None where the float8 kernel can compute the problem, else the reason."""
    if max(problem.head_dim, problem.head_dim_v) > 256:
        return f"head_dim must be at most 256, got {problem.head_dim} and {problem.head_dim_v}"
    if problem.head_dim % 16 or problem.head_dim_v % 16:
        return f"head_dim must be a multiple of 16, got {problem.head_dim} and {problem.head_dim_v}"
    if problem.arch == "cpu" and is_interpreted():
        return None
    if problem.arch not in ("sm_90", "sm_100", "sm_103", "sm_120"):
        return f"the device must be of compute capability 9.0 or later, got {problem.arch or problem.device}"
    return None if _is_installed() else "the package triton is not installed"


def unaligned_fp8(q: Tensor, k: Tensor) -> str | None:
    """None where the float8 kernel can load q and k, else the reason; v is copied."""
    if are_aligned(q, k):
        return None
    got = f"strides {q.stride()}, {k.stride()} from addresses {q.data_ptr() % 16}, {k.data_ptr() % 16} modulo 16"
    return f"rows of q and k must begin at multiples of 16 bytes and have dense channels, got {got}"


def forward_fp8(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    slopes: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """O of float8_e4m3fn q, k and v; the factors of their heads in float32, (batch, nheads) or (batch, nheads_k).

    Raises:
        BackendUnsupported: q or k has rows that cannot be loaded; a compiler that traces a call does not see them.
    """
    from .fp8 import forward

    if reason := unaligned_fp8(q, k):
        raise BackendUnsupported(f"triton: {reason}")
    return forward(problem, q, k, v, scales, bias, slopes, out_dtype)


def attend_to_cache(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: Tensor,
    pages: Tensor | None,
    bias: Tensor | None,
    slopes: Tensor | None,
    new: int,
    num_splits: int,
    is_shared: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """O of the seqlens + new keys that each sequence has in a cache, or of the keys that all sequences share.

    problem.seqlen_k is the capacity. Whatever `unsupported` lets pass is computed.
    """
    from .decode_launch import attend

    return attend(problem, q, k, v, seqlens, pages, bias, slopes, new, num_splits, is_shared, out_dtype)


def append_to_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens: Tensor,
    pages: Tensor | None,
    q: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    behind: int,
) -> Tensor:
    """Writes k and v at seqlens onwards, k turned by the tables' rows from seqlens + behind; returns q turned."""
    from .decode_launch import append

    return append(k, v, k_cache, v_cache, seqlens, pages, q, cos, sin, interleaved, behind)


def is_interpreted() -> bool:
    """Triton's interpreter runs the kernels on the CPU: slow, for tests and debugging."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
