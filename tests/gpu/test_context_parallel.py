"""Context parallel over two GPUs by NCCL, kernels and all, against the whole problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from distributed import cases
from distributed.cases import Case, layout_of, sizes_of
from distributed.crew import Crew
from distributed.expected import over_budget

from flashsigmoid.distributed.cost import SCHEMES, cost
from flashsigmoid.distributed.layout import ORDERS

BASE = Case(n=1024, head_dim=64, head_dim_v=64, dtype="bfloat16", backend="auto")
CASES = {
    "full": BASE,
    "causal": Case(**{**vars(BASE), "causal": True, "nheads_k": 4}),
    "window": Case(**{**vars(BASE), "causal": True, "window_size": (100, None)}),
    "ALiBi, b of rows": Case(**{**vars(BASE), "causal": True, "slopes": "heads", "bias": "rows"}),
    "dropout": Case(**{**vars(BASE), "causal": True, "dropout_p": 0.2}),
    "packed": Case(**{**vars(BASE), "batch": 1, "causal": True, "cu_seqlens": (0, 100, 700, 1000)}),
    "float32": Case(**{**vars(BASE), "causal": True, "dtype": "float32", "backend": "blocked"}),
}


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, and torch finds {torch.cuda.device_count()}")
    crew = Crew(2, "cuda")
    yield crew
    crew.run(cases.release)
    crew.close()


@pytest.mark.parametrize("name", CASES)
def test_two_gpus_are_one(crew: Crew, name: str, record_property: Callable[..., None]) -> None:
    case = CASES[name]
    if case.dropout_p:
        case = replace(case, drawn=crew.run(cases.seed_drawn, "cuda")[0])
    worst = {}
    for scheme in SCHEMES:
        for order in ORDERS:
            results = crew.run(cases.compute, case, scheme, order, 2)
            ratios = over_budget(case, results[0])
            worst[scheme, order] = max(ratios.values())
            tags = {"case": name, "scheme": scheme, "order": order}
            record_property("error_over_budget", {"value": worst[scheme, order], **tags})
            sizes = sizes_of(case)
            for rank, result in enumerate(results):
                formula = cost(layout_of(case, order, 2), sizes, scheme, rank)
                assert result["sent"] == (formula.forward_bytes, formula.backward_bytes)
    assert max(worst.values()) <= 1.0, worst
