"""The torch.library ops flashsigmoid::decode and ::append, a cache's: schema and fake, forward only, by `triton`.

Nothing is computed here. `attend` and `append` are the ops, or the same past the dispatcher where nothing listens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton
from .gpu import too_long
from .op import is_plain
from .problem import Problem, _gpu_arch, make_problem

# queries that "auto" takes it for: those that are no chunk of prefill, which dense kernels compute in larger blocks
MOST_QUERIES = 16

torch.library.define(
    "flashsigmoid::decode",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seqlens, Tensor? page_table, Tensor? bias, Tensor? slopes, "
    "float? sigmoid_bias, float? scale, bool causal, SymInt? window_left, SymInt? window_right, SymInt new, "
    "SymInt num_splits, bool is_shared, ScalarType out_dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "flashsigmoid::append",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor seqlens, Tensor? page_table, Tensor? q, "
    "Tensor? cos, Tensor? sin, bool interleaved, SymInt behind) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def problem_of(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor | None, bias: Tensor | None,
    slopes: Tensor | None, sigmoid_bias: float | None, scale: float | None, causal: bool, left: int | None,
    right: int | None,
) -> Problem:  # fmt: skip
    """The problem of a call in which every sequence has all the keys that there is room for."""
    k, v = k_cache, v_cache
    if page_table is not None:
        capacity = page_table.shape[1] * k.shape[1]
        k, v = (x.new_empty(()).expand(q.shape[0], capacity, *x.shape[2:]) for x in (k, v))
    return make_problem(
        q, k, v, bias=bias, slopes=slopes, sigmoid_bias=sigmoid_bias, scale=scale, causal=causal, window_left=left,
        window_right=right,
    )  # fmt: skip


def unsupported(problem: Problem, backend: str, device: torch.device) -> str | None:
    """Why a call against a cache is not computed by the decode kernel, None if it is; backend "auto" or "triton"."""
    if backend == "auto":
        if problem.device == "cpu":
            return "device must be a GPU, got cpu"  # the interpreter runs only when asked for
        if problem.seqlen_q > MOST_QUERIES:
            return f"seqlen_q must be at most {MOST_QUERIES} for the decode kernel, got {problem.seqlen_q}"
    if not torch.compiler.is_compiling():
        return triton.unsupported(problem)
    return _unsupported(problem.dtype, problem.head_dim, problem.head_dim_v, device) or too_long(problem)


def _unsupported(dtype: torch.dtype, head_dim: int, head_dim_v: int, device: torch.device) -> str | None:
    """The reason of one query and one key, for a compiler, which cannot ask for the GPU."""
    heads = {"nheads": 1, "nheads_k": 1, "head_dim": head_dim, "head_dim_v": head_dim_v}
    arch = "cpu" if device.type == "cpu" else _gpu_arch(device.index) if device.type == "cuda" else None
    options = {"scale": 1.0, "sigmoid_bias": 0.0, "dtype": dtype, "device": device.type, "arch": arch}
    return triton.unsupported(Problem(batch=1, seqlen_q=1, seqlen_k=1, **heads, **options))


# all that torch.compiler.assume_constant_result does, except to import the compiler
_unsupported._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def attend(*inputs) -> Tensor:
    """flashsigmoid::decode."""
    return _decode(*inputs) if is_plain(inputs[:7]) else torch.ops.flashsigmoid.decode(*inputs)


def append(*inputs) -> Tensor:
    """flashsigmoid::append."""
    return _append(*inputs) if is_plain(inputs[:9]) else torch.ops.flashsigmoid.append(*inputs)


def _decode(
    q, k_cache, v_cache, seqlens, page_table, bias, slopes, sigmoid_bias, scale, causal, left, right, new, num_splits,
    is_shared, out_dtype,
) -> Tensor:  # fmt: skip
    if 0 in (q.shape[0], q.shape[1], k_cache.shape[0], k_cache.shape[1]) or (
        page_table is not None and page_table.shape[1] == 0
    ):
        return q.new_zeros(*q.shape[:3], v_cache.shape[3], dtype=out_dtype)
    problem = problem_of(q, k_cache, v_cache, page_table, bias, slopes, sigmoid_bias, scale, causal, left, right)
    return triton.attend_to_cache(
        problem, q, k_cache, v_cache, seqlens, page_table, bias, slopes, new, num_splits, is_shared, out_dtype
    )


def _append(k, v, k_cache, v_cache, seqlens, page_table, q, cos, sin, interleaved, behind) -> Tensor:
    if 0 in (k.shape[0], k.shape[1]):
        return _fake_append(k, v, k_cache, v_cache, seqlens, page_table, q)
    return triton.append_to_cache(k, v, k_cache, v_cache, seqlens, page_table, q, cos, sin, interleaved, behind)


@torch.library.register_fake("flashsigmoid::decode")
def _fake_decode(q, k_cache, v_cache, *rest) -> Tensor:
    return q.new_empty(*q.shape[:3], v_cache.shape[3], dtype=rest[-1])


@torch.library.register_fake("flashsigmoid::append")
def _fake_append(k, v, k_cache, v_cache, seqlens, page_table, q, *rest) -> Tensor:
    return k.new_empty(0) if q is None else q.new_empty(q.shape)


torch.library.impl("flashsigmoid::decode", "default", _decode)
torch.library.impl("flashsigmoid::append", "default", _append)
