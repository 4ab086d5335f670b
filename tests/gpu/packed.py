"""Packed sequences for the tests of kernels: tensors with rows of no sequence, and their check."""

from __future__ import annotations

import math

import torch
from gpu.cases import DEVICE
from torch import Tensor
from varlen import compute_packed, cumulated, draw_seed, oracle_and_witness

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


def check_packed(
    what: object, tensors: tuple[Tensor, ...], lengths_q: tuple[int, ...], lengths_k: tuple[int, ...],
    options: Options, sigmoid: str = "auto",
) -> None:  # fmt: skip
    """As `check`, of packed sequences; dropout's seed is drawn as the call draws it."""
    q, k, v, dout = tensors
    cu = {"cu_seqlens_q": cumulated(lengths_q, DEVICE), "cu_seqlens_k": cumulated(lengths_k, DEVICE)}
    results = compute_packed(q, k, v, dout, seed=5, backend="triton", sigmoid=sigmoid, **cu, **options)
    if options.get("dropout_p"):
        options = options | Options(seed=draw_seed(5, DEVICE))
    draws = 32 if min((*lengths_q, *lengths_k)) < 16 else 16
    expected, seen = oracle_and_witness(q, k, v, dout, lengths_q, lengths_k, draws, options)
    for name, result in results.items():
        assert_within_budget(f"{name} of {what}", result, expected[name], seen[name])
