"""Who is measured: our backends, and everybody else's attention as far as it is found on this machine."""

from __future__ import annotations

import ctypes
import importlib.util
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import backends, functional
from ..backends import BackendUnsupported
from .candidate import Attention, Candidate, Inputs, Step, differentiated
from .eager import Eager, Products
from .flex import Flex
from .problems import Shape
from .sdpa import SDPA


class Ours(Candidate):
    """sigmoid_attention by one of our backends, with b as a number."""

    kind = "ours"

    def __init__(self, backend: str, sigmoid: Literal["auto", "exact"] = "auto") -> None:
        self.name = backend if sigmoid == "auto" else f"{backend} {sigmoid}"
        self.backend, self.sigmoid = backend, sigmoid

    def unavailable(self, shape: Shape, dtype: torch.dtype, device: str) -> str | None:
        if device == "cpu" and self.backend == "triton":
            return "needs a GPU: here it would be interpreted"
        if shape.lengths:
            return None  # its own call says
        one = torch.empty((), dtype=dtype, device=device)
        q = one.expand(shape.batch, shape.seqlen_q, shape.nheads, shape.head_dim)
        k = one.expand(shape.batch, shape.seqlen_k, shape.nheads_k, shape.head_dim)
        slopes = one.float().expand(shape.nheads) if shape.alibi else None
        options: dict[str, Any] = self._options(shape, slopes) | {"backend": "reference"}
        told = functional.explain(q, k, k, **options)
        try:
            backends.select(told.problem, self.backend)
        except BackendUnsupported as error:
            return str(error).removeprefix(f"{self.backend}: ")
        return None

    def attention(self, inputs: Inputs) -> Attention:
        shape = inputs.shape
        options = self._options(shape, inputs.slopes)
        if not shape.lengths:
            return lambda q, k, v: functional.sigmoid_attention(q, k, v, **options)
        varlen = functional.sigmoid_attention_varlen
        options |= inputs.packed
        return lambda q, k, v: varlen(q, k, v, **options)

    def _options(self, shape: Shape, slopes: Tensor | None) -> dict[str, Any]:
        return {
            "sigmoid_bias": shape.bias,
            "causal": shape.causal,
            "window_size": shape.window_size,
            "alibi_slopes": slopes,
            "backend": self.backend,
            "sigmoid": self.sigmoid,
        }


class OursFp8(Candidate):
    """sigmoid_attention_fp8, forward: q, k, v are rounded to e4m3 with a factor for every head before it is timed."""

    name, kind = "triton fp8", "sigmoid"

    def unavailable(self, shape: Shape, dtype: torch.dtype, device: str) -> str | None:
        if device != "cuda" or torch.cuda.get_device_capability() < (9, 0):
            return "needs CUDA and compute capability 9.0"
        return "no packed sequences" if shape.lengths else None

    def prepare(self, inputs: Inputs, work: str) -> Step:
        if work != "forward":
            raise BackendUnsupported("forward only")
        shape, tensors, factors = inputs.shape, [], []
        for x in (inputs.q, inputs.k, inputs.v):
            largest = x.abs().amax((1, 3), keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
            tensors.append((x.float() / largest).to(torch.float8_e4m3fn))
            factors.append(largest[:, 0, :, 0].contiguous())
        options = {"causal": shape.causal, "window_size": shape.window_size, "alibi_slopes": inputs.slopes}
        fp8 = functional.sigmoid_attention_fp8
        return lambda: (fp8(*tensors, *factors, sigmoid_bias=shape.bias, **options),)


class FlashAttention3(Candidate):
    """Its operators in an autograd function, as its package has them: (batch, seqlen, nheads, head_dim)."""

    name, kind = "fa3", "softmax"

    def unavailable(self, shape: Shape, dtype: torch.dtype, device: str) -> str | None:
        if device != "cuda":
            return f"needs CUDA, got {device}"
        if not hasattr(torch.ops.flash_attn_3, "fwd"):
            return "torch.ops.flash_attn_3.fwd is not loaded, see --load-library"
        if torch.cuda.get_device_capability() != (9, 0):
            return "kernels for sm_90 only"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16 and bfloat16, not {dtype}"
        if shape.has_window and "window_size_left" not in _arguments(torch.ops.flash_attn_3.bwd):
            return "this build has no window"
        return "no ALiBi" if shape.alibi else None

    def attention(self, inputs: Inputs) -> Attention:
        shape = inputs.shape
        options: dict[str, Any] = {"softmax_scale": shape.scale, "is_causal": shape.causal}
        if shape.has_window:
            # is_causal beside a window on the left may drop the window: causal is a window of 0 on the right
            left, right = (-1 if side is None else side for side in shape.band)
            options |= {"is_causal": False, "window_size_left": left, "window_size_right": right}
        if shape.lengths:
            options |= inputs.packed
        return lambda q, k, v: _FlashAttention3.apply(q, k, v, options)  # pyright: ignore[reportReturnType]


class _FlashAttention3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, options):  # pyright: ignore[reportIncompatibleMethodOverride]
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, num_splits=1, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *torch.ops.flash_attn_3.bwd(dout, *ctx.saved_tensors, **ctx.options)[:3], None


class TritonSigmoid(Candidate):
    """The package triton-sigmoid, through its operators: its function copies a number to the device at every call."""

    name, kind = "triton-sigmoid", "sigmoid"

    def unavailable(self, shape: Shape, dtype: torch.dtype, device: str) -> str | None:
        if device != "cuda":
            return f"needs CUDA, got {device}"
        if importlib.util.find_spec("triton_sigmoid") is None:
            return "the package triton_sigmoid is not installed"
        if shape.group > 1:
            return "no shared heads of keys"
        if shape.has_window or shape.alibi:
            return "no window and no ALiBi"
        if shape.seqlen_q != shape.seqlen_k or shape.lengths:
            return "as many queries as keys, and padding instead of packed sequences"
        if shape.head_dim & (shape.head_dim - 1):
            return f"head_dim is a power of two, not {shape.head_dim}"
        return None

    def prepare(self, inputs: Inputs, work: str) -> Step:
        import_module("triton_sigmoid")
        shape, device = inputs.shape, inputs.device
        b = torch.full((shape.batch,), shape.bias, dtype=torch.float32, device=device)
        scale = torch.tensor(shape.scale, dtype=torch.float32, device=device)
        fwd: Any = torch.ops.myops.sigmoid_attention_fwd

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fwd(q, k, v, b, None, scale, shape.causal)

        return differentiated(attend, inputs.q, inputs.k, inputs.v, inputs.dout, work)


def candidates() -> dict[str, Candidate]:
    """Everybody by name, ours first."""
    everybody = (
        *map(Ours, backends.NAMES),
        Ours("triton", "exact"),
        Ours("hopper", "exact"),
        OursFp8(),
        *SDPA,
        FlashAttention3(),
        Flex("softmax"),
        Flex("sigmoid"),
        TritonSigmoid(),
        Eager(compiled=True),
        Eager(compiled=False),
        Products(),
    )
    return {candidate.name: candidate for candidate in everybody}


def _arguments(operator: Any) -> frozenset[str]:
    return frozenset(argument.name for argument in operator.default._schema.arguments)


def load_library(path: Path) -> None:
    """Make the operators of a shared library known to torch; a CUDA runtime is loaded for others to find.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        if path.name.startswith("libcudart"):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        else:
            torch.ops.load_library(str(path))
    except OSError as error:
        raise ValueError(f"--load-library must be a shared library that loads here, got {path}: {error}") from error
