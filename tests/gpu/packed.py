"""Packed sequences for the tests of kernels: tensors with rows of no sequence, and their check."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from gpu.cases import DEVICE, random_class
from torch import Tensor
from varlen import compute_packed, cumulated, draw_seed, oracle_and_witness, sequences

from flashsigmoid import sigmoid_attention_varlen
from flashsigmoid.testing import Options, assert_within_budget, make_qkv

LENGTHS = ((0, 1, 64, 65, 200, 0, 333, 128), (5, 1, 64, 190, 200, 0, 128, 257))


def packed_tensors(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], heads: tuple[int, int], head_dims: tuple[int, int],
    dtype: torch.dtype, spare: int = 0, seed: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """q, k, v, dout and `spare` rows of no sequence, which are NaN."""
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    made = make_qkv(1, total_q + spare, total_k + spare, *heads, *head_dims, dtype=dtype, device=DEVICE, seed=seed)
    tensors = tuple(x[0] for x in made)
    for x, used in zip(tensors, (total_q, total_k, total_k, total_q), strict=True):
        x[used:] = math.nan
    return tensors


def compute_by_hopper(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **options: Any) -> dict[str, Tensor]:
    """out, and dq, dk, dv where there is a backward."""
    bias = options.get("sigmoid_bias")
    has_rows = isinstance(bias, Tensor) and bias.shape == (q.shape[0], q.shape[1])
    has_backward = max(q.shape[-1], v.shape[-1]) <= 128 and not has_rows
    leaves = [x.detach().requires_grad_(has_backward) for x in (q, k, v)]
    out = sigmoid_attention_varlen(*leaves, **options, backend="hopper")
    results = {"out": out.detach()}
    if has_backward:
        results |= zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True)
    return results


def check_packed(
    what: object, tensors: tuple[Tensor, ...], lengths_q: tuple[int, ...], lengths_k: tuple[int, ...],
    options: Options, sigmoid: str = "auto", backend: str = "triton",
) -> None:  # fmt: skip
    """As `check`, of packed sequences; dropout's seed is drawn as the call draws it. Of hopper what it computes."""
    q, k, v, dout = tensors
    cu = {"cu_seqlens_q": cumulated(lengths_q, DEVICE), "cu_seqlens_k": cumulated(lengths_k, DEVICE)}
    if backend == "hopper":
        results = compute_by_hopper(q, k, v, dout, sigmoid=sigmoid, **cu, **options)
    else:
        results = compute_packed(q, k, v, dout, seed=5, backend=backend, sigmoid=sigmoid, **cu, **options)
    if options.get("dropout_p"):
        options = options | Options(seed=draw_seed(5, DEVICE))
    draws = 32 if min((*lengths_q, *lengths_k)) < 16 else 16
    expected, seen = oracle_and_witness(q, k, v, dout, lengths_q, lengths_k, draws, options)
    for name, result in results.items():
        assert_within_budget(f"{name} of {what}", result, expected[name], seen[name])


def packed_sides(rng: random.Random, lengths_q: tuple[int, ...], rows: int, nheads: int) -> Options:
    generator = torch.Generator().manual_seed(rng.getrandbits(20))
    batch = len(lengths_q)
    options = Options(sigmoid_bias=rng.uniform(-7.0, 0.0))
    shape = rng.choice((None, (), (nheads,), (batch, nheads), (rows, nheads)))
    if shape is not None:
        options["sigmoid_bias"] = (torch.randn(shape, generator=generator) - 4.0).to(DEVICE)
    shape = rng.choice((None, (nheads,), (batch, nheads)))
    if shape is not None:
        options["alibi_slopes"] = (torch.rand(shape, generator=generator) * 0.1).to(DEVICE)
    return options


def check_random_lengths(rng: random.Random, dtype: torch.dtype, backend: str = "triton") -> None:
    """A class of kernels, then four batches of sequences: short and long ones, empty ones, rows of none."""
    kernels = random_class(rng, dtype)
    batch, nheads_k, group = rng.randint(1, 9), rng.randint(1, 2), rng.randint(1, 3)
    head_dims = kernels["head_dims"]
    if backend == "hopper":
        head_dims = tuple(-(-dim // 8) * 8 for dim in head_dims)
    for _ in range(4):
        lengths_q, lengths_k = (
            tuple(rng.choice((0, 1, rng.randint(2, 70), rng.randint(64, 400))) for _ in range(batch)) for _ in range(2)
        )
        spare = rng.choice((0, 1, 150))
        options = packed_sides(rng, lengths_q, sum(lengths_q) + spare, nheads_k * group)
        options |= Options(causal=kernels["causal"], window_size=kernels["window_size"])
        if kernels["drop_at"] is not None and backend != "hopper":
            options["dropout_p"] = 0.2
        heads = (nheads_k * group, nheads_k)
        tensors = packed_tensors(lengths_q, lengths_k, heads, head_dims, dtype, spare, rng.getrandbits(9))
        sigmoid = "exact" if "alibi_slopes" in options and kernels["sigmoid"] == "fast" else kernels["sigmoid"]
        if sum(rows.stop - rows.start for _, rows, _ in sequences(lengths_q, lengths_k)) > 60:
            what = f"{lengths_q} by {lengths_k} and {spare}, {kernels}, {options}"
            check_packed(what, tensors, lengths_q, lengths_k, options, sigmoid, backend)
