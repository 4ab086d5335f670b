"""The interface of what is measured: the tensors of a problem, and a candidate that computes on them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..testing import make_qkv
from .problems import Shape

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], tuple[Tensor, ...]]

RESULTS = {"forward": ("out",), "backward": ("dq", "dk", "dv"), "both": ("out", "dq", "dk", "dv")}


@dataclass(frozen=True)
class Inputs:
    """The tensors of a problem, (batch, seqlen, nheads, head_dim) or packed (total, nheads, head_dim)."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @property
    def device(self) -> torch.device:
        """Of all of them."""
        return self.q.device

    @property
    def slopes(self) -> Tensor | None:
        """ALiBi's slopes (nheads,) in float32, None without ALiBi."""
        return torch.tensor(self.shape.slopes, device=self.device) if self.shape.alibi else None

    @property
    def cu_seqlens(self) -> Tensor:
        """Where each packed sequence begins, int32 (sequences + 1,)."""
        return torch.tensor([0, *itertools.accumulate(self.shape.lengths)], dtype=torch.int32, device=self.device)

    @property
    def packed(self) -> dict[str, Any]:
        """Keywords of a call on packed sequences, as flash-attn names them."""
        cu, longest = self.cu_seqlens, max(self.shape.lengths)
        return {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}

    def distance(self) -> Tensor:
        """p_i - j of every query and key, int64 (seqlen_q, seqlen_k)."""
        p = torch.arange(self.shape.seqlen_q, device=self.device) + self.shape.seqlen_k - self.shape.seqlen_q
        return p[:, None] - torch.arange(self.shape.seqlen_k, device=self.device)


def visible(shape: Shape, distance: Tensor) -> Tensor:
    """Whether a key at this distance before the query is seen; sequences of a packed problem are another matter."""
    beyond = shape.seqlen_q + shape.seqlen_k
    left, right = (beyond if side is None else side for side in shape.band)
    return (distance <= left) & (distance >= -right)


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Independent normals, the same for every candidate."""
    sizes = (shape.batch, shape.seqlen_q, shape.seqlen_k, shape.nheads, shape.nheads_k, shape.head_dim)
    tensors = make_qkv(*sizes, dtype=dtype, device=device, score_std=shape.score_std)
    return Inputs(shape, *(x[0] if shape.lengths else x for x in tensors))


class Candidate:
    """Somebody's attention at its best setting. What it needs made, compiled or laid out is so before it is timed.

    Attributes:
        name: in tables and on the command line.
        kind: "ours", "sigmoid" or "softmax"; "bare" is no attention, and nothing checks it.
        heads_first: it takes contiguous (batch, nheads, seqlen, head_dim).
    """

    name: str
    kind: Literal["ours", "sigmoid", "softmax", "bare"]
    heads_first: bool = False
    _made: tuple[weakref.ref[Inputs], Attention] | None = None

    def unavailable(self, shape: Shape, dtype: torch.dtype, device: str) -> str | None:
        """Why it cannot compute this problem here; None: it should."""
        raise NotImplementedError

    def attention(self, inputs: Inputs) -> Attention:
        """A differentiable function of q, k, v in its layout; masks and the like are made now."""
        raise NotImplementedError

    def prepare(self, inputs: Inputs, work: str) -> Step:
        """What is timed: a call without arguments that returns `RESULTS[work]` in its layout."""
        tensors = (inputs.q, inputs.k, inputs.v, inputs.dout)
        q, k, v, dout = map(self._laid_out, tensors) if self.heads_first else tensors
        return differentiated(self._attention_once(inputs), q, k, v, dout, work)

    def dense(self, x: Tensor, inputs: Inputs) -> Tensor:
        """A result in the layout of the inputs."""
        if not self.heads_first:
            return x
        x = x.transpose(1, 2)
        return x[0] if inputs.shape.lengths else x

    def _attention_once(self, inputs: Inputs) -> Attention:
        """`attention`, the same for every work on the same inputs: compiling takes seconds."""
        if self._made is None or self._made[0]() is not inputs:
            self._made = weakref.ref(inputs), self.attention(inputs)
        return self._made[1]

    def _laid_out(self, x: Tensor) -> Tensor:
        return (x if x.dim() == 4 else x[None]).transpose(1, 2).contiguous()


def differentiated(attend: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, work: str) -> Step:
    """A work of a differentiable function; for "backward" the forward has run, and only the backward is left."""
    if work == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(q, k, v),)

        return forward
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    if out.stride() != dout.stride():  # else some backwards copy dout first, and that would be timed
        dout = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device).copy_(dout)
    if work == "backward":
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
    del out

    def both() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    return both
