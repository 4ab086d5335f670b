"""The error budget catches faults: each is planted into each backend at n = 4096 and b = -log n: outputs are small.

`python -m pytest tests/backends/test_planted_faults.py -s` prints the table of fault x tensor; with `-m long` it covers
bfloat16 too and writes benchmarks/results/planted-faults.jsonl.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backends.here import FUSED, interpret_in_tiles
from torch import Tensor

from flashsigmoid import backends
from flashsigmoid.backends import Problem
from flashsigmoid.backends.reference import attention_weights
from flashsigmoid.diagnostics.mass import top_weights
from flashsigmoid.record import RecordWriter
from flashsigmoid.testing import Options, compute, errors_over_budget, make_qkv, oracle, witness

SEQLEN, DROPPED, WINDOW = 4096, 16, 500
RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "planted-faults.jsonl"


def drop_last_keys(problem: Problem, call: Callable, *tensors: Tensor | None):
    """The tail of the keys is never read, and its gradients are never written."""
    *dout, q, k, v, bias, slopes, seed = tensors
    results = call(
        replace(problem, seqlen_k=SEQLEN - DROPPED), *dout, q, k[:, :-DROPPED], v[:, :-DROPPED], bias, slopes, seed
    )
    if not dout:
        return results
    dq, dk, dv, *rest = results
    return dq, *(F.pad(x, (0, 0, 0, 0, 0, DROPPED)) for x in (dk, dv)), *rest


def zeros(problem: Problem, call: Callable, *tensors: Tensor | None):
    """Nothing is computed."""
    results = call(problem, *tensors)
    return results * 0.0 if isinstance(results, Tensor) else tuple(x if x is None else x * 0.0 for x in results)


def mask_off_by_one(problem: Problem, call: Callable, *tensors: Tensor | None):
    """Both edges: one key of the future, at distance 1, and one beyond the window, which the slopes' gradient sees."""
    return call(replace(problem, causal=False, window_right=1, window_left=WINDOW + 1), *tensors)


def scaled_bias(problem: Problem, call: Callable, *tensors: Tensor | None):
    """A tensor, or else the number."""
    *front, bias, slopes, seed = tensors
    if bias is None:
        return call(replace(problem, sigmoid_bias=1.02 * (problem.sigmoid_bias or 0.0)), *tensors)
    return call(problem, *front, bias * 1.02, slopes, seed)


FAULTS: dict[str, Callable] = {
    "mask off by one": mask_off_by_one,
    "last 16 keys dropped": drop_last_keys,
    "scale off by 1 %": lambda problem, call, *tensors: call(replace(problem, scale=problem.scale * 1.01), *tensors),
    "bias off by 2 %": scaled_bias,
    "zeros": zeros,
}


@functools.cache
def problem(
    dtype: torch.dtype, seqlen_q: int, causal: bool, device: str, head_dim: int, has_sides: bool
) -> tuple[tuple[Tensor, ...], Options, dict, dict]:
    """(q, k, v, dout), options, and what the oracle and the witness say of them: the same for every backend."""
    tensors = make_qkv(1, seqlen_q, SEQLEN, 1, 1, head_dim, dtype=dtype, device=device)
    options = Options(causal=causal, window_size=(WINDOW if causal else None, None), sigmoid_bias=-math.log(SEQLEN))
    if has_sides:
        options["sigmoid_bias"] = torch.full((1,), -math.log(SEQLEN), device=device)
        options["alibi_slopes"] = torch.tensor([2e-3], device=device)
    return tensors, options, oracle(*tensors, **options), witness(*tensors, draws=2, **options)


def table(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seqlen_q: int = SEQLEN, *,
    device: str = "cpu", head_dim: int = 64, has_sides: bool = True,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """{fault: {tensor: times over budget}}, the row "none" first; without sides b is a number and slopes are none."""
    module = backends.load(backend)
    rows: dict[str, dict[str, float]] = {}
    for causal in (False, True):
        tensors, options, expected, seen = problem(dtype, seqlen_q, causal, device, head_dim, has_sides)

        def over_budget(tensors=tensors, options=options, expected=expected, seen=seen) -> dict[str, float]:
            actual = compute(*tensors, backend=backend, **options)
            return {name: max(errors_over_budget(x, expected[name], seen[name])) for name, x in actual.items()}

        rows["none, masked" if causal else "none"] = over_budget()
        for name, fault in FAULTS.items():
            if causal != (name == "mask off by one"):
                continue
            with monkeypatch.context() as patch:
                for method in {"forward", "backward"} & set(dir(module)):
                    call = getattr(module, method)
                    planted = lambda problem, *args, fault=fault, call=call: fault(problem, call, *args)  # noqa: E731
                    patch.setattr(module, method, planted)
                rows[name] = over_budget()
    return rows


def table_of_largest(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, *, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """The same of the 64 largest weights of the last 64 rows, found by Triton's kernel."""
    module, count, rows = backends.load("triton"), 64, {}
    for causal in (False, True):
        q, k, _, _ = make_qkv(1, 64, SEQLEN, 1, 1, 64, dtype=dtype, device=device)
        options = {"causal": causal, "window_size": (WINDOW if causal else None, None)}

        def largest(q: Tensor, k: Tensor, options=options, count=count) -> Tensor:
            return attention_weights(q, k, **options).topk(count).values

        orders = [torch.randperm(64, device=device) for _ in range(4)]
        seen = torch.stack([largest(q[..., order].float(), k[..., order].float()) for order in orders])
        expected, call = largest(q.double(), k.double()), module.top_weights

        def over_budget(q=q, k=k, options=options, expected=expected, seen=seen, count=count) -> dict[str, float]:
            found = top_weights(q, k, count, backend="triton", **options)[0]
            return {"weights": max(errors_over_budget(found, expected, seen))}

        rows["none, masked" if causal else "none"] = over_budget()
        for name, fault in FAULTS.items():
            if causal != (name == "mask off by one"):
                continue

            def planted(problem, q, k, count, bias, slopes, fault=fault, call=call):
                def forward(problem, q, k, v, bias, slopes, seed):
                    return call(problem, q, k, count, bias, slopes)[0]

                return fault(problem, forward, q, k, k, bias, slopes, None), None

            with monkeypatch.context() as patch:
                patch.setattr(module, "top_weights", planted)
                rows[name] = over_budget()
    return rows


def show(backend: str, dtype: torch.dtype, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{backend}, {dtype}, n = {SEQLEN}, b = -log n: error over budget, caught above 1")
    print(f"{'':22}" + "".join(f"{tensor:>10}" for tensor in rows["none"]))
    for fault, row in rows.items():
        print(f"{fault:22}" + "".join(f"{value:10.3g}" for value in row.values()))


def assert_every_fault_is_caught(
    rows: dict[str, dict[str, float]], tensors: tuple[str, ...] = ("out", "dq", "dk", "dv", "db", "dslopes")
) -> None:
    assert set(rows) == {"none", "none, masked", *FAULTS}
    for fault, row in rows.items():
        assert row.keys() == set(tensors)
        for tensor, value in row.items():
            if fault.startswith("none"):
                assert value <= 1.0, f"{tensor} is outside the budget without a fault: {value:.3g}"
            else:
                assert value > 1.0, f"{fault}: not caught in {tensor}: {value:.3g}"


@pytest.mark.parametrize("backend", FUSED)
def test_every_fault_is_caught_in_every_tensor(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_in_tiles(monkeypatch, 512, 512)
    rows = table(backend, torch.float32, monkeypatch, seqlen_q=512)  # the last ones; all in make test-long
    show(backend, torch.float32, rows)
    assert_every_fault_is_caught(rows)


@pytest.mark.skipif("triton" not in FUSED, reason="needs Triton's interpreter")
@pytest.mark.long
def test_every_fault_is_caught_in_the_largest_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table_of_largest(monkeypatch, torch.float32)
    show("triton", torch.float32, rows)
    assert_every_fault_is_caught(rows, ("weights",))


@pytest.mark.long
def test_table_of_every_backend_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "python -m pytest tests/backends/test_planted_faults.py -m long"
    with RecordWriter(RECORD, settings={"seqlen": SEQLEN, "head_dim": 64, "bias": "-log n"}, command=command) as writer:
        for backend in ("blocked", "reference"):  # the others have theirs from tests/gpu
            for dtype in (torch.float32, torch.bfloat16):
                rows = table(backend, dtype, monkeypatch)
                show(backend, dtype, rows)
                for fault, row in rows.items():
                    for tensor, value in row.items():
                        writer.write(
                            "error_over_budget",
                            value,
                            unit="times",
                            backend=backend,
                            dtype=str(dtype).removeprefix("torch."),
                            fault=fault,
                            tensor=tensor,
                        )
                assert_every_fault_is_caught(rows)
