"""How wrong a candidate is on the very problem it is timed on: part of its results against float64. No timing here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..testing import Options, errors_over_budget, oracle, witness
from .candidate import Inputs, visible
from .problems import Shape

_AREA = 2**20  # pairs of a query and a key that a float64 part has per head, about
_DRAWS = 8
_ROWS = ("out", "dq")  # tensors with a row per query; the others have one per key


@dataclass(frozen=True)
class Errors:
    """Of one candidate: relative rms error by tensor, and times over the error budget if it is a sigmoid."""

    rms: dict[str, float]
    over_budget: float | None


class Gate:
    """Checks results of one problem for one batch element (packed: the longest sequence) and the last key head.

    With all query heads of that key head, out and dq for the last queries, dk and dv for the first keys if causal
    (everybody sees those), else the last. What is checked went through whole rows and columns of the timed problem.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs, shape = inputs, inputs.shape
        longest = max(range(len(shape.lengths)), key=shape.lengths.__getitem__, default=0)
        first = sum(shape.lengths[:longest])
        self._sequence = slice(first, first + shape.lengths[longest]) if shape.lengths else None
        given = (("q", inputs.q), ("k", inputs.k), ("v", inputs.v), ("dout", inputs.dout))
        q, k, v, dout = (self._place(name, x)[None] for name, x in given)
        self._tensors = (q, k, v, dout)
        self._seqlen_q, self._seqlen_k = q.shape[1], k.shape[1]
        nrows = min(self._seqlen_q, max(64, _AREA // self._seqlen_k))
        nkeys = min(self._seqlen_k, max(64, _AREA // self._seqlen_q))
        self._rows = slice(self._seqlen_q - nrows, self._seqlen_q)
        self._keys = slice(0, nkeys) if shape.causal else slice(self._seqlen_k - nkeys, self._seqlen_k)
        self._truths: dict[str, dict[str, Tensor]] = {}

    def errors(self, results: dict[str, Tensor], kind: str) -> Errors:
        """The errors of results in the layout of the inputs: any of out, dq, dk, dv."""
        softmax = kind == "softmax"
        exact = self._truth("softmax" if softmax else "sigmoid")
        parts = {name: self._part(name, x) for name, x in results.items()}
        rms = {name: relative_rms(x, exact[name]) for name, x in parts.items()}
        if softmax:
            return Errors(rms, None)
        seen = self._truth("witness")
        over = max(max(errors_over_budget(x, exact[name], seen[name])) for name, x in parts.items())
        return Errors(rms, over)

    def _truth(self, which: str) -> dict[str, Tensor]:
        if which not in self._truths:
            if which == "softmax":
                whole = softmax_oracle(self._inputs.shape, *self._tensors, self._slopes())
                self._truths[which] = {name: x[:, self._range(name)] for name, x in whole.items()}
            else:
                self._truths[which] = dict(self._sigmoid(which))
        return self._truths[which]

    def _sigmoid(self, which: str) -> Iterator[tuple[str, Tensor]]:
        """Of the part, exactly: rows and columns of sigmoid attention are problems of their own."""
        q, k, v, dout = self._tensors
        shape, offset, slopes = self._inputs.shape, self._seqlen_k - self._seqlen_q, self._slopes()
        options = Options(sigmoid_bias=shape.bias, causal=shape.causal, window_size=shape.window_size)
        if slopes is not None:
            options["alibi_slopes"] = slopes
        rows, keys = self._rows, self._keys
        for names, tensors, q_offset in (
            (("out", "dq"), (q[:, rows], k, v, dout[:, rows]), offset + rows.start),
            (("dk", "dv"), (q, k[:, keys], v[:, keys], dout), offset - keys.start),
        ):
            options["q_offset"] = q_offset
            if which == "witness":
                results = witness(*tensors, draws=_DRAWS, **options)
            else:
                results = oracle(*tensors, **options)
            yield from ((name, results[name]) for name in names)

    def _slopes(self) -> Tensor | None:
        slopes = self._inputs.slopes
        return None if slopes is None else slopes[-self._inputs.shape.group :]

    def _part(self, name: str, x: Tensor) -> Tensor:
        return self._place(name, x).detach()[None, self._range(name)]

    def _range(self, name: str) -> slice:
        return self._rows if name in _ROWS else self._keys

    def _place(self, name: str, x: Tensor) -> Tensor:
        """(seqlen, heads, head_dim) of the batch element and heads that are checked."""
        heads = 1 if name in ("k", "v", "dk", "dv") else self._inputs.shape.group
        return (x[-1] if self._sequence is None else x[self._sequence])[:, -heads:]


def relative_rms(actual: Tensor, exact: Tensor) -> float:
    """rms(actual - exact) / rms(exact)."""
    return ((actual.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


def softmax_oracle(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, slopes: Tensor | None
) -> dict[str, Tensor]:
    """out, dq, dk, dv of softmax attention in float64, a block of queries at a time; k and v have one head.

    P = softmax(scale * Q K^T - slope * |p_i - j|),  O = P V,  dV = P^T dO,  dS = P (dP - sum_j P dP),  dP = dO V^T
    """
    q, dout = (x[0].double().transpose(0, 1) for x in (q, dout))  # (heads, seqlen_q, head_dim)
    k, v = (x[0, :, 0].double() for x in (k, v))  # (seqlen_k, head_dim)
    dk, dv, outs, dqs = torch.zeros_like(k), torch.zeros_like(v), [], []
    keys = torch.arange(k.shape[0], device=k.device)
    for rows in torch.arange(q.shape[1], device=k.device).split(max(1, 2**25 // (k.shape[0] * q.shape[0]))):
        distance = (rows + k.shape[0] - q.shape[1])[:, None] - keys
        s = shape.scale * q[:, rows] @ k.T
        if slopes is not None:
            s = s - slopes.double()[:, None, None] * distance.abs()
        p = s.masked_fill(~visible(shape, distance), float("-inf")).softmax(-1)
        dp = dout[:, rows] @ v.T
        ds = shape.scale * p * (dp - (p * dp).sum(-1, keepdim=True))
        outs.append(p @ v)
        dqs.append(ds @ k)
        dk += (ds.mT @ q[:, rows]).sum(0)
        dv += (p.mT @ dout[:, rows]).sum(0)
    out, dq = (torch.cat(x, dim=1).transpose(0, 1)[None] for x in (outs, dqs))
    return {"out": out, "dq": dq, "dk": dk[None, :, None], "dv": dv[None, :, None]}
