"""What a call computes, as plain data: everything about an attention problem that is not a tensor.

No tensor and no computation lives here; a backend reads a `Problem` to say whether it can and how it will.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


class BackendUnsupported(ValueError):
    """A backend that was asked for by name cannot compute this call; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes, dtype, device and options of one call of the op (docs/semantics.md has the equations)."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    nheads: int
    nheads_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: str  # torch device type: "cpu", "cuda", ...
    scale: float
    sigmoid_bias: float | None  # None: a tensor of shape bias_shape
    bias_shape: tuple[int, ...] | None = None
    slopes_shape: tuple[int, ...] | None = None  # None: no ALiBi
    causal: bool = False
    window_left: int | None = None  # None: unlimited
    window_right: int | None = None
    q_offset: int = 0  # position of query 0 relative to key 0
    dropout_p: float = 0.0
    origin: tuple[int, int, int, int] = (
        0,
        0,
        0,
        0,
    )  # global (batch, head, query, key) index of the first element
    sigmoid: str = "auto"

    @property
    def band(self) -> tuple[int | None, int | None]:
        """(left, right) such that key j is visible to position p exactly if p - left <= j <= p + right."""
        if not self.causal:
            return self.window_left, self.window_right
        return self.window_left, 0 if self.window_right is None else min(0, self.window_right)

    @property
    def group(self) -> int:
        """Query heads that read one key head."""
        return self.nheads // self.nheads_k

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of scores and accumulators: float64 for float64 inputs, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def is_empty(self) -> bool:
        """No element of the output depends on any input."""
        return 0 in (self.batch, self.seqlen_q, self.seqlen_k)


def make_problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sigmoid_bias: float | None,
    scale: float | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    q_offset: int | None,
    dropout_p: float,
    origin: tuple[int, int, int, int],
    sigmoid: str,
) -> Problem:
    """Fill in what sizes decide by default: scale = head_dim ** -0.5, b = -log(seqlen_k), bottom-right q_offset."""
    batch, seqlen_q, nheads, head_dim = q.shape
    seqlen_k, nheads_k, head_dim_v = v.shape[1:]
    if sigmoid_bias is None and bias is None:
        sigmoid_bias = -math.log(seqlen_k) if seqlen_k else 0.0
    return Problem(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        nheads=nheads,
        nheads_k=nheads_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=q.dtype,
        device=q.device.type,
        scale=head_dim**-0.5 if scale is None else scale,
        sigmoid_bias=sigmoid_bias,
        bias_shape=None if bias is None else tuple(bias.shape),
        slopes_shape=None if slopes is None else tuple(slopes.shape),
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        q_offset=seqlen_k - seqlen_q if q_offset is None else q_offset,
        dropout_p=dropout_p,
        origin=origin,
        sigmoid=sigmoid,
    )


def bias_rows(bias: torch.Tensor, batch: int, nheads: int) -> torch.Tensor:
    """A bias of shape (), (nheads,), (batch, nheads) or (batch, nheads, seqlen_q) as (batch, nheads, seqlen_q or 1)."""
    if bias.dim() < 3:
        bias = bias.unsqueeze(-1)
    return bias.expand(batch, nheads, bias.shape[-1])
