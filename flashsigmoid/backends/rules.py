"""What a call must be: the checks of shapes, dtypes and options that every entry to the op makes, and autocast."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import NAMES

Window = tuple[int | None, int | None]
_SIGMOIDS = ("auto", "exact", "fast")
# asked once: the compiler of torch 2.11 cannot trace the question
AUTOCAST = {
    device for device in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia") if torch.amp.is_autocast_available(device)
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = torch.finfo(torch.float32).max


def split_bias(sigmoid_bias: float | Tensor | None) -> tuple[Tensor | None, float | None]:
    """b as (tensor, None), (None, number), or (None, None) for its default."""
    if isinstance(sigmoid_bias, Tensor):
        return sigmoid_bias, None
    return None, None if sigmoid_bias is None else float(sigmoid_bias)


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in autocast's dtype where autocast is on; it leaves float64 alone, and what is no float."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return q, k, v
    if not all(isinstance(x, Tensor) for x in (q, k, v)):  # validation says so
        return q, k, v
    device = q.device.type
    if device not in AUTOCAST or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (x.to(dtype) if x.dtype in _DTYPES and x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v


def validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sigmoid_bias: float | Tensor | None,
    scale: float | None,
    causal: bool,
    window_size: Window,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    sigmoid: str,
    backend: str,
    *,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Nothing, or a ValueError with the rule, then the value: dense calls, or packed ones with `cu_seqlens`."""
    is_packed = cu_seqlens is not None
    layout = "(total, nheads, head_dim)" if is_packed else "(batch, seqlen, nheads, head_dim)"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.is_nested or x.dim() != (3 if is_packed else 4):
            got = tuple(x.shape) if isinstance(x, Tensor) and not x.is_nested else type(x).__name__
            raise ValueError(f"{name} must be a dense tensor {layout}, got {got}")
        if x.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor {layout}, got {x.layout}")
        if x.dtype not in _DTYPES or x.dtype != q.dtype:
            raise ValueError(
                "q, k, v must share one dtype of float16, bfloat16, float32, float64, "
                f"got {q.dtype}, {k.dtype}, {v.dtype}"
            )
        if x.device != q.device:
            raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
    seqlen_q, nheads, head_dim = q.shape[-3:]
    nheads_k = k.shape[-2]
    if head_dim == 0 or v.shape[-1] == 0:
        raise ValueError(f"head_dim and head_dim_v must be at least 1, got {head_dim} and {v.shape[-1]}")
    if k.shape[:-3] != q.shape[:-3] or k.shape[-1] != head_dim:
        shared = "head_dim" if is_packed else "batch and head_dim"
        raise ValueError(f"k must share {shared} of q, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        shared = "total and nheads" if is_packed else "batch, seqlen and nheads"
        raise ValueError(f"v must share {shared} of k, got k {tuple(k.shape)} and v {tuple(v.shape)}")
    if nheads == 0 or nheads_k == 0 or nheads % nheads_k:
        raise ValueError(f"nheads must be a positive multiple of nheads_k, got nheads={nheads}, nheads_k={nheads_k}")
    batch = q.shape[0] if cu_seqlens is None else _validate_cu_seqlens(q, *cu_seqlens)

    legal = ((), (nheads,), (batch, nheads), (seqlen_q, nheads) if is_packed else (batch, nheads, seqlen_q))
    last = "(total_q, nheads)" if is_packed else "(batch, nheads, seqlen_q)"
    if isinstance(sigmoid_bias, Tensor):
        _validate_side(
            "sigmoid_bias",
            sigmoid_bias,
            q,
            legal,
            f"(), (nheads,), (batch, nheads) or {last}",
        )
    elif sigmoid_bias is not None:
        validate_number("sigmoid_bias", sigmoid_bias)
        if not sigmoid_bias < math.inf:  # NaN too; a compiler that has met two biases traces a symbol, not a number
            raise ValueError(f"sigmoid_bias must be a number below +inf, got {sigmoid_bias}")
    if alibi_slopes is not None:
        if not isinstance(alibi_slopes, Tensor):
            raise ValueError(f"alibi_slopes must be a tensor, got {type(alibi_slopes).__name__}")
        _validate_side("alibi_slopes", alibi_slopes, q, legal[1:3], "(nheads,) or (batch, nheads)")
    if scale is not None:
        validate_number("scale", scale)
        if not -math.inf < scale < math.inf:
            raise ValueError(f"scale must be finite, got {scale}")
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be True or False, got {causal!r}")
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {window_size!r}")
    for side in window_size:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int | torch.SymInt) or side < 0):
            raise ValueError(f"window_size must be non-negative integers, None for unlimited, got {window_size!r}")
        if isinstance(side, int) and side >= 2**63:  # the op's schema has no larger ones
            raise ValueError(f"window_size must be below 2**63, got {window_size!r}")
    validate_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if sigmoid not in _SIGMOIDS:
        raise ValueError(f"sigmoid must be one of {', '.join(_SIGMOIDS)}, got {sigmoid!r}")
    if backend != "auto" and backend not in NAMES:
        raise ValueError(f"backend must be one of auto, {', '.join(NAMES)}, got {backend!r}")


def _validate_cu_seqlens(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> int:
    """The number of sequences. The lengths themselves are read only where that costs no synchronisation, when used."""
    shapes = []
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu, Tensor) or cu.dim() != 1 or cu.dtype != torch.int32 or cu.shape[0] < 1:
            got = f"{tuple(cu.shape)} {cu.dtype}" if isinstance(cu, Tensor) else repr(cu)
            raise ValueError(f"{name} must be an int32 tensor (batch + 1,), got {got}")
        if cu.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {cu.device}")
        shapes.append(cu.shape[0])
    if shapes[0] != shapes[1]:
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must have one length, got {shapes[0]} and {shapes[1]}")
    return shapes[0] - 1


def validate_number(name: str, value: object) -> None:
    """A number, which a bool is not, that float32 does not make infinite; +inf, -inf and NaN are the caller's."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if _LARGEST < abs(value) < math.inf:
        raise ValueError(f"{name} must be within float32's {_LARGEST:.4g}, got {value}")


def _validate_side(name: str, x: Tensor, q: Tensor, legal: tuple[tuple[int, ...], ...], words: str) -> None:
    if tuple(x.shape) not in legal:
        raise ValueError(f"{name} must have shape {words}, got {tuple(x.shape)} for q {tuple(q.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
