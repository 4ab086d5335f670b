"""What a call computes, as plain data: everything about an attention problem that is not a tensor.

No tensor and no computation lives here; a backend reads a `Problem` to say whether it can and how it will.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

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
    origin: tuple[int, int, int, int] = (0, 0, 0, 0)  # global (batch, head, query, key) index of the first element
    sigmoid: str = "auto"
    total_q: int | None = None  # packed rows of all sequences: batch sequences, seqlen_q and seqlen_k the longest
    total_k: int | None = None
    is_partial: bool = False  # results are summands of a larger problem's, and stay in `compute_dtype`
    needs_sums: bool = False  # a backward sums dS: for the gradient of a tensor bias or of slopes
    arch: str | None = None  # "sm_90", "gfx942", ...: of a GPU, where it is there

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

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
    def result_dtype(self) -> torch.dtype:
        """The dtype of out, dq, dk, dv: that of the inputs, unless they will be added to others."""
        return self.compute_dtype if self.is_partial else self.dtype

    @property
    def is_packed(self) -> bool:
        """Sequences of different lengths lie one after the other; each has its own bottom-right q_offset."""
        return self.total_q is not None

    @property
    def has_row_bias(self) -> bool:
        """A tensor bias with a value for every row: (batch, nheads, seqlen_q), or packed (total_q, nheads)."""
        if self.is_packed:
            return self.bias_shape == (self.total_q, self.nheads)
        return self.bias_shape is not None and len(self.bias_shape) == 3

    @property
    def is_empty(self) -> bool:
        """No element of the output depends on any input."""
        return 0 in (self.batch, self.seqlen_q, self.seqlen_k)


def make_problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    sigmoid_bias: float | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    q_offset: int | None = None,
    dropout_p: float = 0.0,
    origin: Sequence[int] = (0, 0, 0, 0),
    sigmoid: str = "auto",
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    needs_sums: bool = False,
) -> Problem:
    """Fill in what sizes decide by default: scale = head_dim ** -0.5, b = -log(seqlen_k), bottom-right q_offset.

    With `cu_seqlens_q` q, k and v are packed, (total, nheads, head_dim), and the longest sequence defaults to all rows.
    """
    # sizes that a compiler traces are no keys
    make = _make_problem if torch.compiler.is_compiling() else _remembered
    return make(
        tuple(q.shape), tuple(v.shape), q.dtype, q.device, None if bias is None else tuple(bias.shape),
        None if slopes is None else tuple(slopes.shape), sigmoid_bias, scale, causal, window_left, window_right,
        q_offset, dropout_p, tuple(origin), sigmoid, None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
        max_seqlen_q, max_seqlen_k, needs_sums,
    )  # fmt: skip


def _make_problem(
    q_shape, v_shape, dtype, device, bias_shape, slopes_shape, sigmoid_bias, scale, causal, window_left, window_right,
    q_offset, dropout_p, origin, sigmoid, sequences, max_seqlen_q, max_seqlen_k, needs_sums,
) -> Problem:  # fmt: skip
    total_q = total_k = None
    seqlen_q, nheads, head_dim = q_shape[-3:]
    seqlen_k, nheads_k, head_dim_v = v_shape[-3:]
    if sequences is None:
        batch = q_shape[0]
    else:
        batch, total_q, total_k = sequences, seqlen_q, seqlen_k
        # hints: what they leave out is computed all the same
        seqlen_q, seqlen_k = (min(hint or n, n) for hint, n in ((max_seqlen_q, seqlen_q), (max_seqlen_k, seqlen_k)))
        q_offset = 0
    if sigmoid_bias is None and bias_shape is None:
        sigmoid_bias = -math.log(seqlen_k) if seqlen_k else 0.0
    return Problem(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        nheads=nheads,
        nheads_k=nheads_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        device=device.type,
        scale=head_dim**-0.5 if scale is None else scale,
        sigmoid_bias=sigmoid_bias,
        bias_shape=bias_shape,
        slopes_shape=slopes_shape,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        q_offset=seqlen_k - seqlen_q if q_offset is None else q_offset,
        dropout_p=dropout_p,
        origin=origin,
        sigmoid=sigmoid,
        total_q=total_q,
        total_k=total_k,
        needs_sums=needs_sums,
        arch=_arch(device),
    )


_remembered = functools.lru_cache(maxsize=4096)(_make_problem)


def _arch(device: torch.device) -> str | None:
    if device.type == "cpu":
        return "cpu"
    if torch.compiler.is_compiling():  # only the reference is traced, and it does not ask
        return None
    return _gpu_arch(device.index) if device.type == "cuda" and torch.cuda.is_available() else None


@functools.cache
def _gpu_arch(index: int | None) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def bias_rows(bias: torch.Tensor, batch: int, nheads: int) -> torch.Tensor:
    """A bias of shape (), (nheads,), (batch, nheads) or (batch, nheads, seqlen_q) as (batch, nheads, seqlen_q or 1)."""
    if bias.dim() < 3:
        bias = bias.unsqueeze(-1)
    return bias.expand(batch, nheads, bias.shape[-1])
