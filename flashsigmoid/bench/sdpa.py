"""torch's own softmax attention, kernel by kernel. Sigmoid has no part here."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .candidate import Attention, Candidate, Inputs, Step, differentiated
from .problems import Shape

SOFTMAX = "softmax sdpa"
_HALF_ONLY = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


class Sdpa(Candidate):
    """scaled_dot_product_attention by one of its kernels, or, on a processor, by whichever it takes."""

    kind = "softmax"
    heads_first = True

    def __init__(self, name: str, kernel: SDPBackend | None) -> None:
        self.name, self.kernel = name, kernel

    def unavailable(self, shape: Shape, dtype: torch.dtype, device: str) -> str | None:
        if device == "cuda" and self.kernel is None:
            return "on CUDA its kernels are measured one by one"
        if device != "cuda" and self.kernel is not None:
            return f"needs CUDA, got {device}"
        if self.kernel in _HALF_ONLY and dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16 and bfloat16, not {dtype}"
        if shape.alibi:
            return "no ALiBi"
        if shape.lengths:
            return "no packed sequences"
        if shape.has_window:
            return "no window"
        if shape.causal and shape.seqlen_q != shape.seqlen_k:
            return "its causal mask is top-left aligned"
        return None

    def attention(self, inputs: Inputs) -> Attention:
        causal, gqa, kernel = inputs.shape.causal, inputs.shape.group > 1, self.kernel

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

        if kernel is None:
            return attend

        def by_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return attend(q, k, v)

        return by_kernel


class SdpaFlash(Sdpa):
    """FlashAttention-2 in torch: dense through SDPA, windows and packed sequences through varlen_attn."""

    def __init__(self) -> None:
        super().__init__("sdpa flash", SDPBackend.FLASH_ATTENTION)

    def unavailable(self, shape: Shape, dtype: torch.dtype, device: str) -> str | None:
        if device != "cuda" or shape.alibi or not (shape.lengths or shape.has_window):
            return super().unavailable(shape, dtype, device)
        known = _varlen_parameters()
        if shape.has_window and "window_size" not in known:
            return f"no window in torch {torch.__version__}"
        return None if known else f"no packed sequences in torch {torch.__version__}"

    def prepare(self, inputs: Inputs, work: str) -> Step:
        if not (inputs.shape.lengths or inputs.shape.has_window):
            return super().prepare(inputs, work)
        q, k, v, dout = (x.flatten(0, -3) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
        return differentiated(self._packed(inputs), q, k, v, dout, work)

    def dense(self, x: Tensor, inputs: Inputs) -> Tensor:
        if inputs.shape.lengths:
            return x
        if inputs.shape.has_window:
            return x.unflatten(0, (inputs.shape.batch, -1))
        return super().dense(x, inputs)

    def _packed(self, inputs: Inputs) -> Attention:
        from torch.nn.attention.varlen import varlen_attn

        shape = inputs.shape
        keywords: dict[str, Any] = {}
        if "window_size" in _varlen_parameters():
            keywords["window_size"] = tuple(-1 if side is None else side for side in shape.band)
        else:
            keywords["is_causal"] = shape.causal
        if shape.group > 1 and "enable_gqa" in _varlen_parameters():
            keywords["enable_gqa"] = True
        if shape.lengths:
            cu_q = cu_k = inputs.cu_seqlens
            longest_q = longest_k = max(shape.lengths)
        else:
            steps = torch.arange(shape.batch + 1, dtype=torch.int32, device=inputs.device)
            cu_q, cu_k = steps * shape.seqlen_q, steps * shape.seqlen_k
            longest_q, longest_k = shape.seqlen_q, shape.seqlen_k

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = varlen_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, **keywords)
            assert isinstance(out, Tensor)
            return out

        return attend


def _varlen_parameters() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


SDPA = (
    Sdpa(SOFTMAX, None),
    SdpaFlash(),
    Sdpa("sdpa cudnn", SDPBackend.CUDNN_ATTENTION),
    Sdpa("sdpa efficient", SDPBackend.EFFICIENT_ATTENTION),
)
