"""Parts of a sum over keys or queries come unrounded from a backend that can, and from no other.

The backends are chosen as context parallel does; what ranks make of it is tests/distributed's.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashsigmoid import backends
from flashsigmoid.backends import op
from flashsigmoid.backends.problem import Problem
from flashsigmoid.testing import errors_over_budget, make_qkv, oracle, witness

N, SHARDS = 64, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # kernels are interpreted there
BIAS = -math.log(N)


def tensors(dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout whose halves give large parts that nearly cancel: of out and dv, of dk, or of dq."""
    q, k, v, dout = (x.float() for x in make_qkv(1, N, N, 2, 1, 16, 16, dtype=dtype, seed=3))
    sign = torch.where(torch.arange(N) < N // 2, 4.0, -4.0)[None, :, None, None]
    if kind == "values":
        v, dout = v + sign, dout + sign
    else:
        # dS of one sign, weights all alike
        v, dout = v + 2.0, dout + 2.0
        q, k = (q + sign, 0.1 * k) if kind == "queries" else (0.1 * q, k + sign)
    return q.to(dtype), k.to(dtype), v.to(dtype), dout.to(dtype)


def summed(backend: str, dtype: torch.dtype, kind: str, *, rounded: bool = False) -> dict[str, Tensor]:
    """out, dq, dk, dv of halves of the queries and halves of the keys, added in float32."""
    q, k, v, dout = (x.to(DEVICE) for x in tensors(dtype, kind))
    results = {
        name: torch.zeros(x.shape, device=DEVICE) for name, x in (("out", dout), ("dq", q), ("dk", k), ("dv", v))
    }
    size = N // SHARDS
    halves = [slice(i * size, (i + 1) * size) for i in range(SHARDS)]
    for rows in halves:
        for keys in halves:
            rest = (
                None, None, None, None, None, BIAS, None, False, None, None, rows.start - keys.start, 0.0, (0, 0, 0, 0),
                "auto", None, None, False, backend,
            )  # fmt: skip
            given = (q[:, rows], k[:, keys], v[:, keys], *rest)
            grads = op.backward_part(dout[:, rows], *given)
            found = {"out": op.forward_part(*given), "dq": grads[0], "dk": grads[1], "dv": grads[2]}
            for name, part in found.items():
                assert part.dtype == torch.float32
                assert part.is_contiguous()
                results[name][:, rows if name in ("out", "dq") else keys] += part.to(dtype) if rounded else part
    return {name: x.to(dtype).cpu() for name, x in results.items()}


def over_budget(results: dict[str, Tensor], dtype: torch.dtype, kind: str) -> dict[str, float]:
    """Of each tensor the larger of its two errors, as a part of what the budget allows."""
    exact, drawn = (function(*tensors(dtype, kind), sigmoid_bias=BIAS) for function in (oracle, witness))
    return {name: max(errors_over_budget(results[name], exact[name], drawn[name])) for name in results}


@pytest.mark.parametrize(("backend", "dtype"), [("triton", "float16"), ("blocked", "float16"), ("blocked", "bfloat16")])
def test_parts_add_up_to_the_whole(backend: str, dtype: str) -> None:
    """And a planted fault, parts rounded to 16 bits before they are added, is seen in every tensor."""
    given = getattr(torch, dtype)
    for kind, names in (("values", ("out", "dv")), ("queries", ("dk",)), ("keys", ("dq",))):
        ratios = over_budget(summed(backend, given, kind), given, kind)
        assert max(ratios.values()) <= 1.0, ratios
        faulty = over_budget(summed(backend, given, kind, rounded=True), given, kind)
        print(backend, dtype, kind, faulty)
        assert min(faulty[name] for name in names) > 1.0, faulty


def test_hopper_gives_way_to_triton_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(
        batch=1, seqlen_q=4096, seqlen_k=4096, nheads=8, nheads_k=8, head_dim=128, head_dim_v=128,
        dtype=torch.bfloat16, device="cuda", arch="sm_90", scale=128**-0.5, sigmoid_bias=-8.0,
    )  # fmt: skip
    assert backends.explain(problem).backend == "hopper"
    part = replace(problem, is_partial=True)
    said = backends.explain(part)
    assert (said.backend, said.backward) == ("triton", "triton")
    reason = "results must be rounded to the dtype of q, and parts of a sum must not be"
    assert said.reasons["hopper"] == said.backward_reasons["hopper"] == reason
    assert (part.result_dtype, problem.result_dtype) == (torch.float32, torch.bfloat16)
