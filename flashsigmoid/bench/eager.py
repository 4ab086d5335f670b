"""Attention written out in a few lines of torch, as one does first: sigmoid, compiled or not, and the bare products."""

from __future__ import annotations

import torch
from torch import Tensor

from .candidate import Attention, Candidate, Inputs, visible
from .problems import Shape

PRODUCTS = "bare products"
_MATRICES = 6  # of (seqlen_q, seqlen_k) alive at once in forward and backward
_SHARE = 1 / 3  # of the device's memory: several candidates are alive at once


class Eager(Candidate):
    """sigmoid(Q K^T + b) V with the whole matrix of scores, in the dtype of the inputs."""

    kind = "sigmoid"
    heads_first = True

    def __init__(self, compiled: bool) -> None:
        self.name, self.compiled = ("compiled sigmoid" if compiled else "eager sigmoid"), compiled

    def unavailable(self, shape: Shape, dtype: torch.dtype, device: str) -> str | None:
        if self.compiled and device != "cuda":
            return f"needs CUDA, got {device}"
        return no_room(shape, dtype, device)

    def attention(self, inputs: Inputs) -> Attention:
        shape, b = inputs.shape, _additive(inputs)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if shape.group > 1:
                k, v = (x.repeat_interleave(shape.group, dim=1) for x in (k, v))
            return torch.sigmoid((shape.scale * q) @ k.mT + b) @ v

        return torch.compile(attend, dynamic=False) if self.compiled else attend


class Products(Candidate):
    """(Q K^T) V, with the whole matrix between: not attention, the two matrix products alone, mask or not."""

    name, kind = PRODUCTS, "bare"
    heads_first = True

    def unavailable(self, shape: Shape, dtype: torch.dtype, device: str) -> str | None:
        if device == "cuda":
            return "on CUDA the ceiling is a plain matrix product"
        return "heads of keys are shared" if shape.group > 1 else no_room(shape, dtype, device)

    def attention(self, inputs: Inputs) -> Attention:
        return lambda q, k, v: torch.matmul(torch.matmul(q, k.mT), v)


def no_room(shape: Shape, dtype: torch.dtype, device: str) -> str | None:
    """Why the matrices of scores do not fit on a CUDA device."""
    if device != "cuda":
        return None
    matrix = shape.batch * shape.nheads * shape.seqlen_q * shape.seqlen_k * dtype.itemsize
    if _MATRICES * matrix > _SHARE * torch.cuda.get_device_properties().total_memory:
        return f"a matrix of scores takes {matrix / 2**30:.3g} GiB, and it needs several"
    return None


def _additive(inputs: Inputs) -> float | Tensor:
    """b, and where the scores need more than a number: b - slope * distance, -inf where not visible."""
    shape = inputs.shape
    if not (shape.causal or shape.has_window or shape.alibi or shape.lengths):
        return shape.bias
    distance = inputs.distance()
    b = torch.full(distance.shape, shape.bias, device=inputs.device)
    if inputs.slopes is not None:
        b = b - inputs.slopes[:, None, None] * distance.abs()
    b = b.masked_fill(~visible(shape, distance), float("-inf"))
    if shape.lengths:
        sequence = torch.repeat_interleave(torch.tensor(shape.lengths, device=inputs.device))  # its number, of each row
        b = b.masked_fill(sequence[:, None] != sequence, float("-inf"))
    return b.to(inputs.q.dtype)
