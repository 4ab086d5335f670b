"""The launches of the Triton kernels on a GPU: memory, kernels compiled, what is known, what explain says, memcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.cases import DEVICE, DTYPES, Case, lay_out
from gpu.machine import sanitized
from gpu.packed import LENGTHS, packed_tensors
from torch import Tensor
from varlen import compute_packed, cumulated

from flashsigmoid import explain, sigmoid_attention
from flashsigmoid.testing import assert_within_budget, compute, make_qkv, oracle, witness


@pytest.mark.parametrize("seqlen", [2**14, 2**16, 2**18, pytest.param(2**20, marks=pytest.mark.large(2))])
def test_memory_is_that_of_inputs_and_results(seqlen, record_property) -> None:
    """Forward and backward of one head of 64 channels; a matrix of 2^20 x 2^20 weights would be 2 TiB."""
    q, k, v, dout = (torch.randn(1, seqlen, 1, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = sigmoid_attention(*leaves, causal=True, backend="triton")
    grads = torch.autograd.grad(out, leaves, dout)
    results = sum(x.nbytes for x in (out, *grads))
    peak = torch.cuda.max_memory_allocated() - before
    record_property("peak_bytes", {"value": peak, "seqlen": seqlen, "inputs": 4 * q.nbytes, "results": results})
    assert peak <= results + 64 * 2**20


def kernels_compiled() -> int:
    from flashsigmoid.backends.triton import launch

    kernels = (launch._fwd_kernel, launch._bwd_kernel)
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


@pytest.mark.parametrize("bias", [-9.0, "(h,)", "(b,h)", "(b,h,i)"])
@pytest.mark.parametrize(("dtype", "head_dim", "causal"), [(torch.bfloat16, 128, True), (torch.float16, 48, False)])
def test_three_kernels_are_compiled_for_a_class_of_problems(bias, dtype, head_dim, causal) -> None:
    """None for another batch, another length in the range of a tile, or another number in the range of a formula."""
    slopes = None if bias == -9.0 else "(h,)"
    before = kernels_compiled()
    seen = {}
    for batch, seqlen_q, seqlen_k, number in (
        (2, 1536, 1536, -9.0), (1, 1536, 1536, -9.0), (3, 1536, 1024, -9.5), (2, 2048, 2048, -9.0),
        (2, 1100, 1100, -9.0), (5, 1333, 777, -9.2), (1, 2999, 2000, -10.0),
    ):  # fmt: skip
        case = Case(
            batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads=(4, 2), head_dims=(head_dim, head_dim),
            dtype=dtype, causal=causal, bias=bias if isinstance(bias, str) else number, slopes=slopes,
        )  # fmt: skip
        compute(*case.tensors(0), backend="triton", **case.options(0))
        seen[batch, seqlen_q, seqlen_k] = kernels_compiled() - before
    assert set(seen.values()) <= {0, 3}, seen  # another test may have compiled them


def test_three_kernels_are_compiled_for_packed_problems() -> None:
    """Of five to eight sequences, since `locate` works on a power of two of them, and a total that takes one tile."""
    before = kernels_compiled()
    seen = {}
    for lengths in (LENGTHS[0], (150,) * 5, (1, 2, 3, 4, 500, 333), (1000, 0, 0, 0, 0, 0, 1)):
        tensors = packed_tensors(lengths, lengths, (4, 2), (64, 64), torch.bfloat16)
        cu = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), cumulated(lengths, DEVICE))
        options = {"sigmoid_bias": torch.randn(4, device=DEVICE), "window_size": (333, 3), "dropout_p": 0.1}
        options |= {"max_seqlen_q": 2000, "max_seqlen_k": 2000}
        compute_packed(*tensors, backend="triton", **cu, **options)
        seen[lengths] = kernels_compiled() - before
    assert set(seen.values()) <= {0, 3}, seen


def test_launches_that_are_known_are_told_apart() -> None:
    """One problem in other strides, from other addresses and with other dtypes beside it, three times over."""
    case = Case(batch=2, bias="(h,)", slopes="(h,)", causal=True)
    made, options = case.tensors(0), case.options(0)
    sides: list[dict[str, Any]] = [
        {name: x.to(dtype) for name, x in options.items() if isinstance(x, Tensor)} for dtype in DTYPES
    ]
    sides.append({name: x.new_empty(*x.shape, 2)[..., 0].copy_(x) for name, x in sides[-1].items()})
    sides.append({"alibi_slopes": None, "sigmoid_bias": -5.0})  # no tensors: the whole call is known
    expected = [oracle(*made, **(options | side)) for side in sides]
    seen = [witness(*made, **(options | side)) for side in sides]
    for _ in range(3):
        for layout in ("contiguous", "heads first", "off by one channel", "every other channel"):
            tensors = lay_out(layout, made)
            for side, exact, near in zip(sides, expected, seen, strict=True):
                for name, result in compute(*tensors, backend="triton", **(options | side)).items():
                    if name in ("out", "dq", "dk", "dv") or result.dtype == torch.float32:
                        assert_within_budget(f"{name} of {layout}", result, exact[name], near[name])


@pytest.mark.parametrize(
    ("dtype", "options", "formula"),
    [
        (torch.bfloat16, {}, "adaptive"),  # b = -log 1024
        (torch.bfloat16, {"sigmoid_bias": 0.0}, "adaptive: tanh.approx where a warp's scores are all within 7 of 0"),
        (torch.float16, {"sigmoid_bias": 0.0}, "exact: two weights share one reciprocal"),
        (torch.bfloat16, {"sigmoid": "exact"}, "exact: two weights share one reciprocal"),
        (torch.float16, {"sigmoid": "fast"}, "fast: tanh.approx"),
        (torch.float32, {"sigmoid": "fast"}, "exact: 1 / (1 + exp(-x)) in float32"),
    ],
)
def test_explain_names_triton_and_the_formula(dtype, options, formula) -> None:
    q, k, v, _ = make_qkv(1, 5, 1024, 2, 1, 64, dtype=dtype, device=DEVICE)
    chosen = explain(q, k, v, **options)
    assert (chosen.backend, set(chosen.reasons)) == ("triton", {"hopper", "blocked", "reference"})
    assert chosen.formula.startswith(formula)
    assert str(chosen).startswith(f"backend: triton\nformula: {formula}")


def test_explain_says_why_not_triton() -> None:
    q, k, v, _ = make_qkv(1, 5, 7, 2, 1, 64, dtype=torch.float64, device=DEVICE)
    chosen = explain(q, k, v)
    assert chosen.backend == "blocked"
    assert chosen.reasons["triton"] == "dtype must be float16, bfloat16 or float32, got float64"
    q, k, v, _ = make_qkv(1, 5, 7, 2, 1, 320, dtype=torch.bfloat16, device=DEVICE)
    assert explain(q, k, v).reasons["triton"].startswith("head_dim must be at most 256, got 320")


@pytest.mark.large(3)
def test_the_sanitizer_finds_nothing() -> None:
    """compute-sanitizer's memcheck on every kernel: no byte beyond an allocation is read or written."""
    printed = sanitized("memcheck", timeout_s=550)
    assert printed.count("\nok ") >= 12, printed
