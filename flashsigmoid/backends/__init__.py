"""How the op is computed: one module per backend, loaded when it is first chosen. No backend imports another."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .gpu import are_aligned
from .problem import BackendUnsupported as BackendUnsupported
from .problem import Problem as Problem

# fastest first: "auto" takes the first that supports the call. "reference" is never chosen, only asked for.
AUTO = ("hopper", "triton", "blocked")
NAMES = (*AUTO, "reference")


class Backend(Protocol):
    """The names every backend module shows; whose launches can be prepared also shows `prepare`, as `triton` does."""

    NAME: str
    PACKED: bool  # forward and backward take cu_seqlens=(cu_seqlens_q, cu_seqlens_k) and packed rows
    ALIGNED: bool  # takes only tensors as `gpu.are_aligned` has them

    def unsupported(self, problem: Problem, direction: str = "forward") -> str | None:
        """None if this backend can compute the problem in the direction, or "backward", else the reason why not."""
        ...

    def formula(self, problem: Problem) -> str:
        """How the sigmoid will be evaluated, in words."""
        ...

    def forward(
        self,
        problem: Problem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        slopes: Tensor | None,
        seed: Tensor | None,
    ) -> Tensor:
        """out, contiguous (batch, seqlen_q, nheads, head_dim_v)."""
        ...

    def backward(
        self,
        problem: Problem,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        slopes: Tensor | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """dq, dk, dv; if bias, sums of dS; if slopes, sums of -dS |p - j|: float32, (batch, nheads, parts).

        The parts of a head add up to its sum; they are its rows where the bias has one value for every row. Packed, the
        sums are those of every row, (total_q, nheads).
        """
        ...


@functools.cache
def load(name: str) -> Backend:
    """The backend module of that name."""
    return cast(Backend, importlib.import_module(f".{name}", __package__))


def select(problem: Problem, backend: str, direction: str = "forward", tensors: Sequence[Tensor] = ()) -> Backend:
    """The module that will compute the problem in the direction, or "backward", of these tensors: q, k, v, dout.

    Raises:
        BackendUnsupported: an explicitly named backend cannot, with its reason.
    """
    # sizes that a compiler traces are no keys
    able = _able if torch.compiler.is_compiling() else _remembered
    for module in able(problem, backend, direction, torch.are_deterministic_algorithms_enabled()):
        if not module.ALIGNED or are_aligned(*tensors):
            return module
    modules = [load(name) for name in (AUTO if backend == "auto" else (backend,))]
    reasons = [f"{module.NAME}: {_against(module, problem, backend, direction, tensors)}" for module in modules]
    raise BackendUnsupported("; ".join(reasons))


def _able(problem: Problem, backend: str, direction: str, is_deterministic: bool) -> tuple[Backend, ...]:
    """Who `select` may take, fastest first: the tensors decide between them."""
    modules = map(load, AUTO if backend == "auto" else (backend,))
    return tuple(module for module in modules if _against(module, problem, backend, direction) is None)


_remembered = functools.lru_cache(maxsize=4096)(_able)


def _against(
    module: Backend, problem: Problem, backend: str, direction: str = "forward", tensors: Sequence[Tensor] = ()
) -> str | None:
    """Why `select` does not take this backend, itself."""
    if backend == "auto" and module.NAME == "triton":
        if problem.device == "cpu":
            return "device must be a GPU, got cpu"  # the interpreter runs only when asked for
        largest = max(problem.head_dim, problem.head_dim_v)
        if problem.dtype == torch.float32 and largest > 64:
            return f"float32 spills registers beyond head_dim 64 and runs only when asked for, got {largest}"
    reason = module.unsupported(problem, direction)
    if reason is None and backend == "auto" and module.NAME == "hopper":
        reason = cast(Any, module).slower(problem, direction)
    if reason is None and module.ALIGNED and not are_aligned(*tensors):
        strides = ", ".join(str(x.stride()) for x in tensors)
        return f"rows must begin at multiples of 16 bytes and have dense channels, got strides {strides}"
    return reason


@dataclass(frozen=True)
class Explanation:
    """Which backend a call takes, how it evaluates the sigmoid, and why each other backend is not taken."""

    backend: str
    formula: str
    reasons: dict[str, str]
    problem: Problem
    backward: str = ""  # who computes the backward; empty: nobody can, and `reasons` of the direction say why
    backward_reasons: dict[str, str] = field(default_factory=dict)

    @property
    def both(self) -> str:
        """The backend and, if another, that of the backward."""
        return ", ".join(dict.fromkeys(name for name in (self.backend, self.backward) if name))

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}", f"formula: {self.formula}"]
        lines += [f"not {name}: {reason}" for name, reason in self.reasons.items()]
        if self.backward != self.backend:
            lines.append(f"backward: {self.backward or 'none'}")
            lines += [f"not {name}: {reason}" for name, reason in self.backward_reasons.items()]
        return "\n".join(lines)


def explain(problem: Problem, backend: str = "auto", tensors: Sequence[Tensor] = ()) -> Explanation:
    """The choice `select` makes for the problem and q, k, v, and the reasons against the others."""
    chosen = select(problem, backend, "forward", tensors)
    try:
        backward = select(problem, backend, "backward", tensors)
    except BackendUnsupported:
        backward = None
    return Explanation(
        chosen.NAME,
        chosen.formula(problem),
        _reasons(chosen, problem, backend, "forward", tensors),
        problem,
        "" if backward is None else backward.NAME,
        _reasons(backward, problem, backend, "backward", tensors),
    )


def _reasons(
    chosen: Backend | None, problem: Problem, backend: str, direction: str, tensors: Sequence[Tensor]
) -> dict[str, str]:
    reasons = {}
    for name in NAMES:
        if chosen is not None and name == chosen.NAME:
            continue
        reason = _against(load(name), problem, backend, direction, tensors)
        if reason is None and backend != "auto":
            reason = f"backend={backend!r} was asked for"
        elif reason is None and name == "reference":
            reason = "O(seqlen_q * seqlen_k) memory: it runs only when asked for, backend='reference'"
        elif reason is None:
            assert chosen is not None
            reason = f"{chosen.NAME} comes first"
        reasons[name] = reason
    return reasons
