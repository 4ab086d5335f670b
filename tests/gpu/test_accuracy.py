"""Errors of the Triton kernels up to a million keys, by an oracle that works in blocks; each becomes a record."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashsigmoid import explain, sigmoid_attention
from flashsigmoid.testing import Options, compute, errors_over_budget, make_qkv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.float16, torch.bfloat16)
SCORES = ("N(0,1)", "N(-4,1)", "N(0,9)", "N(0,1) and ALiBi")


def long_qkv(scores: str, rows: int, seqlen_k: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, dout of one head of 64 channels."""
    generator = torch.Generator(DEVICE).manual_seed(seqlen_k)
    q, k, v, dout = (
        torch.randn(1, n, 1, 64, generator=generator, device=DEVICE) for n in (rows, seqlen_k, seqlen_k, rows)
    )
    if scores == "N(-4,1)":
        q[..., 0], k[..., 0] = 4.0, -8.0  # both are numbers of every dtype: their product over 8 is -4
    return [x.to(dtype) for x in ((3.0 if scores == "N(0,9)" else 1.0) * q, k, v, dout)]


def in_blocks(
    tensors: list[Tensor], bias: float, slope: float, compute_dtype: torch.dtype, is_rounded: bool
) -> dict[str, Tensor]:
    """out and dq, a block of keys at a time: with weights and dS rounded to the input dtype, the witness's."""
    dtype = tensors[0].dtype
    q, k, v, dout = (x[0, :, 0].to(compute_dtype) for x in tensors)

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(compute_dtype) if is_rounded else x

    rows, keys = q.shape[0], k.shape[0]
    p = torch.arange(rows, device=q.device)[:, None] + keys - rows
    out, dq = torch.zeros_like(dout), torch.zeros_like(q)
    for start in range(0, keys, 2**16):
        part = slice(start, min(start + 2**16, keys))
        distance = (p - torch.arange(part.start, part.stop, device=q.device)).abs()
        a = torch.sigmoid(q @ k[part].T / 8.0 + bias - slope * distance)
        out += rounded(a) @ v[part]
        dq += rounded((dout @ v[part].T) * a * (1.0 - a)) @ k[part] / 8.0
    return {name: rounded(x)[None, :, None] for name, x in (("out", out), ("dq", dq))}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("seqlen_k", [
    2**7, 2**9, 2**10, 2**12, 2**14, 2**16, 2**18, pytest.param(2**20, marks=pytest.mark.large(2)),
])  # fmt: skip
def test_accuracy_of_the_default_formula(dtype, scores, seqlen_k, record_property) -> None:
    """64 rows of one head, b = 0, -log n and a tensor of it; dq up to 65,536 keys. Every error becomes a record."""
    q, k, v, dout = tensors = long_qkv(scores, 64, seqlen_k, dtype)
    slope = 2.0**-10 if "ALiBi" in scores else 0.0
    slopes = torch.tensor([slope], device=DEVICE) if slope else None
    over: dict[str, float] = {}
    for bias, kind in ((0.0, "0"), (-math.log(seqlen_k), "-log n"), (-math.log(seqlen_k), "-log n, a tensor")):
        expected = in_blocks(tensors, bias, slope, torch.float64, is_rounded=False)
        seen = in_blocks(tensors, bias, slope, torch.float32, is_rounded=True)
        q = q.detach().requires_grad_()
        call: dict[str, Any] = {"sigmoid_bias": bias, "alibi_slopes": slopes, "backend": "triton"}
        if kind == "-log n, a tensor":
            call["sigmoid_bias"] = torch.tensor(bias, dtype=torch.float64, device=DEVICE)
        results = {"out": sigmoid_attention(q, k, v, **call)}
        if seqlen_k <= 2**16:
            (results["dq"],) = torch.autograd.grad(results["out"], q, dout)
        for name, result in results.items():
            value = max(errors_over_budget(result.detach(), expected[name], seen[name]))
            over[f"{name}, b = {kind}"] = value
            tags = {"scores": scores, "bias": kind, "tensor": name, "seqlen_k": seqlen_k}
            tags |= {"dtype": str(dtype).removeprefix("torch."), "formula": explain(q, k, v, **call).formula}
            record_property("error_over_budget", {"value": value, **tags})
    assert max(over.values()) <= 1.0, over


def in_rows(
    tensors: tuple[Tensor, ...], bias: float, causal: bool, compute_dtype: torch.dtype, is_rounded: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({out, dq, dk, dv}, {db, dslopes} of every row) of one head, a block of rows at a time; rounded as a kernel's."""
    dtype = tensors[0].dtype
    q, k, v, dout = (x[0, :, 0].to(compute_dtype) for x in tensors)

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(compute_dtype) if is_rounded else x

    whole = {
        "out": torch.empty_like(q),
        "dq": torch.empty_like(q),
        "dk": torch.zeros_like(k),
        "dv": torch.zeros_like(v),
    }
    sums = {"db": q.new_empty(q.shape[0]), "dslopes": q.new_empty(q.shape[0])}
    keys = torch.arange(k.shape[0], device=q.device)
    for rows in torch.arange(q.shape[0], device=q.device).split(max(16, 2**26 // k.shape[0])):
        distance = rows[:, None] - keys
        a = torch.sigmoid(q[rows] @ k.T / 8.0 + bias)
        if causal:
            a = a * (distance >= 0)
        a, ds = rounded(a), rounded((dout[rows] @ v.T) * a * (1.0 - a))
        sums["db"][rows], sums["dslopes"][rows] = ds.sum(-1), -(ds * distance.abs()).sum(-1)
        whole["out"][rows], whole["dq"][rows] = a @ v, ds @ k / 8.0
        whole["dk"] += ds.T @ q[rows] / 8.0
        whole["dv"] += a.T @ dout[rows]
    return {name: rounded(x)[None, :, None] for name, x in whole.items()}, sums


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("causal", [False, True])
# float64 blocks of 2^26 scores, 53 bytes for each
@pytest.mark.parametrize("seqlen", [2**10, *(pytest.param(n, marks=pytest.mark.large(4)) for n in (2**14, 2**17))])
def test_every_tensor_of_long_sequences(seqlen, causal, dtype, record_property) -> None:
    """Scores N(0, 1), b = -log n as a tensor, slopes of 0, which have a gradient too. Errors become records."""
    tensors = make_qkv(1, seqlen, seqlen, 1, 1, 64, dtype=dtype, device=DEVICE)
    bias = -math.log(seqlen)
    exact, exact_rows = in_rows(tensors, bias, causal, torch.float64, is_rounded=False)
    seen, seen_rows = in_rows(tensors, bias, causal, torch.float32, is_rounded=True)
    for name, rows in exact_rows.items():  # as flashsigmoid.testing.witness does
        exact[name] = rows.sum()[None]
        seen[name] = (rows.sum() + 3.0 * (seen_rows[name].double() - rows).square().sum().sqrt())[None]
    sides = [torch.tensor([x], dtype=torch.float64, device=DEVICE) for x in (bias, 0.0)]
    options = Options(causal=causal, sigmoid_bias=sides[0], alibi_slopes=sides[1])
    over = {}
    for name, result in compute(*tensors, backend="triton", **options).items():
        over[name] = max(errors_over_budget(result, exact[name], seen[name]))
        tags = {"seqlen": seqlen, "tensor": name, "dtype": str(dtype).removeprefix("torch."), "causal": causal}
        record_property("error_over_budget", {"value": over[name], **tags})
    assert max(over.values()) <= 1.0, over
