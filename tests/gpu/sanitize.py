"""compute-sanitizer --tool memcheck python tests/gpu/sanitize.py: every Triton kernel, small and odd; or racecheck.

torch's caching allocator is off, so that a byte beyond a tensor is a byte beyond an allocation. Results are compared
with the oracle only loosely, to be sure that the kernels ran: accuracy is not checked here. Words behind the command
select the cases whose names have them all; those of the Hopper kernels are taken by the word hopper only.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read when torch is imported

import torch
from torch import Tensor

from flashsigmoid import sigmoid_attention, sigmoid_attention_varlen
from flashsigmoid.testing import Options, compute, make_qkv, oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU needs TRITON_INTERPRET=1
LOOSE = 0.05  # of the oracle's rms: a wrong index is off by its whole size


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes below, at and above a block; `is_aligned` tensors are loaded by descriptors where the GPU has them."""

    name: str
    dtype: torch.dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    seqlen_q: int = 67
    seqlen_k: int = 131
    head_dim: int = 64
    is_aligned: bool = True
    causal: bool = False
    window_size: tuple[int | None, int | None] = (None, None)
    has_slopes: bool = False
    has_row_bias: bool = False
    dropout_p: float = 0.0


ALL = {
    "causal": True, "window_size": (50, None), "has_slopes": True, "has_row_bias": True, "dropout_p": 0.2,
}  # fmt: skip
CASES = (
    Case(name="descriptors"),
    Case(name="descriptors, causal", causal=True, seqlen_q=131, seqlen_k=67),
    Case(name="descriptors, all options", **ALL),
    Case(name="descriptors, head_dim 40", head_dim=40, window_size=(20, 9)),
    Case(name="descriptors, head_dim 256", head_dim=256, causal=True),
    Case(name="descriptors, float32", dtype=torch.float32, seqlen_q=35, seqlen_k=43, has_row_bias=True),
    Case(name="pointers", is_aligned=False),
    Case(name="pointers, all options", is_aligned=False, **ALL),
    Case(name="pointers, head_dim 59", head_dim=59, window_size=(20, 9)),
    Case(name="pointers, one query", seqlen_q=1, is_aligned=False, causal=True),
)
HOPPER = (
    Case(name="hopper", seqlen_q=300, seqlen_k=200),
    Case(name="hopper, causal", causal=True, seqlen_q=200, seqlen_k=300),
    Case(name="hopper, head_dim 96, window", head_dim=96, window_size=(20, 9)),
    Case(name="hopper, head_dim 128", head_dim=128, causal=True),
    Case(name="hopper, head_dim 256", head_dim=256, causal=True),
    Case(name="hopper, all options", **(ALL | {"dropout_p": 0.0})),
)
PACKED = (
    Case(name="packed"),
    Case(name="packed, all options", **ALL),
    Case(name="packed, head_dim 59", head_dim=59, window_size=(20, 9)),
)
PACKED_HOPPER = (
    Case(name="hopper, packed"),
    Case(name="hopper, packed, head_dim 96, causal", head_dim=96, causal=True),
    Case(name="hopper, packed, head_dim 128, window", head_dim=128, window_size=(20, 9)),
    Case(name="hopper, packed, head_dim 256", head_dim=256, causal=True),
    Case(name="hopper, packed, all options", **(ALL | {"dropout_p": 0.0})),
)
LENGTHS_Q, LENGTHS_K = (1, 0, 67, 64, 5), (7, 9, 131, 0, 3)
SPARE = 3  # rows of no sequence at the end


def misaligned(x: Tensor) -> Tensor:
    """The same values, from an address that is no multiple of 16 bytes; nothing of the allocation lies behind them."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def options_of(case: Case, rows: tuple[int, ...]) -> Options:
    options = Options(sigmoid_bias=-math.log(case.seqlen_k), causal=case.causal, window_size=case.window_size)
    if case.has_row_bias:
        options["sigmoid_bias"] = torch.randn(rows) - 3.0
    if case.has_slopes:
        options["alibi_slopes"] = torch.rand(4) * 0.1
    if case.dropout_p:
        options |= Options(dropout_p=case.dropout_p, seed=torch.tensor([2**40 + 3]))
    return options


def on_device(options: Options) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}


def run_dense(case: Case) -> float:
    """The largest of the results' rms errors over the oracle's rms."""
    shape = (2, case.seqlen_q, case.seqlen_k, 4, 2, case.head_dim)
    tensors = make_qkv(*shape, dtype=case.dtype)
    options = options_of(case, (2, 4, case.seqlen_q))
    expected = oracle(*tensors, **options)
    given = [x.to(DEVICE) for x in tensors]
    if not case.is_aligned:
        given = [misaligned(x) for x in given]
    return worst(compute(*given, backend="triton", **on_device(options)), expected)


def run_hopper(case: Case) -> float:
    """The same of the Hopper kernels, whose backward takes no tensors but q, k, v."""
    tensors = make_qkv(2, case.seqlen_q, case.seqlen_k, 4, 2, case.head_dim, dtype=case.dtype)
    options = options_of(case, (2, 4, case.seqlen_q))
    expected = oracle(*tensors, **options)
    has_backward = not case.has_row_bias
    leaves = [x.to(DEVICE).requires_grad_(has_backward) for x in tensors[:3]]
    out = sigmoid_attention(*leaves, **on_device(options), backend="hopper")
    results = {"out": out.detach()}
    if has_backward:
        results |= zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, tensors[3].to(DEVICE)), strict=True)
    return worst(results, expected)


def run_packed(case: Case) -> float:
    """The same of packed sequences; with dropout, whose seed a packed call draws, only that all is finite."""
    total_q, total_k = sum(LENGTHS_Q) + SPARE, sum(LENGTHS_K) + SPARE
    tensors = [x[0] for x in make_qkv(1, total_q, total_k, 4, 2, case.head_dim, dtype=case.dtype)]
    options = options_of(replace(case, dropout_p=0.0), (total_q, 4))
    is_hopper = "hopper" in case.name
    has_backward = not is_hopper or (case.head_dim <= 128 and not case.has_row_bias)
    leaves = [x.to(DEVICE).requires_grad_(has_backward) for x in tensors[:3]]
    ends = [torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) for lengths in (LENGTHS_Q, LENGTHS_K)]
    call = {"cu_seqlens_q": ends[0].to(DEVICE), "cu_seqlens_k": ends[1].to(DEVICE)}
    call["backend"] = "hopper" if is_hopper else "triton"
    call |= on_device(options) | {"dropout_p": case.dropout_p}
    if case.has_row_bias and not is_hopper:
        call["sigmoid_bias"].requires_grad_()
        leaves.append(call["sigmoid_bias"])
    out = sigmoid_attention_varlen(*leaves[:3], **call)
    results = {"out": out.detach()}
    if has_backward:
        grads = torch.autograd.grad(out, leaves, tensors[3].to(DEVICE))
        results |= zip(("dq", "dk", "dv", "db"), grads, strict=False)
    if case.dropout_p:
        assert all(x.isfinite().all() for x in results.values()), case
        return 0.0
    expected = {name: torch.zeros(x.shape, dtype=torch.float64) for name, x in results.items()}
    for index in range(len(LENGTHS_Q)):
        rows, keys = (slice(int(cu[index]), int(cu[index + 1])) for cu in ends)
        if rows.start < rows.stop and keys.start < keys.stop:
            q, k, v, dout = tensors
            given = Options(**options)
            if case.has_row_bias:
                given["sigmoid_bias"] = options["sigmoid_bias"][rows].t()[None]
            exact = oracle(q[None, rows], k[None, keys], v[None, keys], dout[None, rows], **given)
            for name, where in (("out", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
                if name in expected:
                    expected[name][where] = exact[name][0]
    return worst(results, expected)


def worst(results: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    def rms(x: Tensor) -> float:
        return x.double().square().mean().sqrt().item()

    return max(rms(x.cpu().double() - expected[name]) / rms(expected[name]) for name, x in results.items())


def main() -> None:
    words = sys.argv[1:]
    failed = False
    runs = [(CASES, run_dense), (PACKED, run_packed)]
    if "hopper" in words:
        runs = [(HOPPER, run_hopper), (PACKED_HOPPER, run_packed)]
    for case, run in ((case, run) for cases, run in runs for case in cases):
        if not all(word in case.name for word in words):
            continue
        error = run(case)
        ok = error < LOOSE  # False for NaN
        failed |= not ok
        print(f"{'ok' if ok else 'WRONG'} {case.name}: relative rms error {error:.2g}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
