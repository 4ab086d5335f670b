"""Tests that need a GPU: skipped elsewhere, with the reason. Where there is one, their outcomes become a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flashsigmoid.record import RecordWriter

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu-tests.jsonl"
outcomes: dict[str, str] = {}
errors: list[dict[str, Any]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is in this folder where torch finds no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember how each test ended, and the errors it measured: `record_property("error_over_budget", {...})`."""
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome
    if report.when == "call":
        errors.extend(tags for name, tags in report.user_properties if name == "error_over_budget")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write them down, once, if the tests ran."""
    if not torch.cuda.is_available() or not outcomes or hasattr(session.config, "workerinput"):
        return
    with RecordWriter(RECORD, settings={"folder": "tests/gpu"}, command="python -m pytest tests/gpu") as writer:
        for test, outcome in sorted(outcomes.items()):
            writer.write("test", test=test, outcome=outcome)
        for outcome in ("passed", "failed", "skipped"):
            writer.write(f"tests/{outcome}", sum(each == outcome for each in outcomes.values()))
        for tags in sorted(errors, key=lambda tags: [str(tag) for key, tag in tags.items() if key != "value"]):
            value = tags["value"]
            writer.write("error_over_budget", value, unit="times", **{k: x for k, x in tags.items() if k != "value"})
