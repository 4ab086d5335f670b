"""Tests that need a GPU: skipped elsewhere, with the reason. Where there is one, their outcomes become a record."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashsigmoid.record import RecordWriter

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# these take half a minute and more: workers begin with them (--maxschedchunk 1 gives each worker few)
LONGEST = (
    "until_the_time_is_up", "the_sanitizer_finds_nothing", "memory_is_that", "of_long_sequences", "planted_fault",
    "inductor", "opcheck", "told_apart",
)  # fmt: skip
outcomes: dict[str, str] = {}
MEASURED = ("error_over_budget", "peak_bytes")
measured: list[tuple[str, dict[str, Any]]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-record", default="gpu-tests.jsonl", help="file of benchmarks/results for the outcomes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is in this folder where torch finds no CUDA device; else the longest first."""
    if torch.cuda.is_available():
        items.sort(key=lambda item: not any(name in item.name for name in LONGEST))
    else:
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """Workers share the GPU's memory: none keeps gigabytes of its last test, nor goes on when CUDA is lost to it."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # every later test of this process would fail, whatever it tests
        os._exit(1)
    if torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember how each test ended, and what it measured: `record_property("error_over_budget", {"value": ...})`.

    A failure is told at once: a run that is cut short has no summary.
    """
    if report.failed and "gpu" in Path(report.fspath).parts and "PYTEST_XDIST_WORKER" not in os.environ:
        crash = getattr(report.longrepr, "reprcrash", None)
        told = report.longreprtext if crash is None else crash.message
        print(f"\n{report.nodeid} failed: {told.strip()[:300]}", file=sys.__stderr__)
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome
    if report.when == "call":
        measured.extend((name, tags) for name, tags in report.user_properties if name in MEASURED)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write them down, once, if the tests ran."""
    if not torch.cuda.is_available() or not outcomes or hasattr(session.config, "workerinput"):
        return
    path = RESULTS / session.config.getoption("--gpu-record", "gpu-tests.jsonl")
    command = shlex.join(["python", "-m", "pytest", *session.config.invocation_params.args])
    with RecordWriter(path, settings={"folder": "tests/gpu"}, command=command) as writer:
        for test, outcome in sorted(outcomes.items()):
            writer.write("test", test=test, outcome=outcome)
        for outcome in ("passed", "failed", "skipped"):
            writer.write(f"tests/{outcome}", sum(each == outcome for each in outcomes.values()))
        for name, tags in sorted(measured, key=lambda one: [str(x) for key, x in one[1].items() if key != "value"]):
            value, unit = tags["value"], "times" if name == "error_over_budget" else "bytes"
            writer.write(name, value, unit=unit, **{key: x for key, x in tags.items() if key != "value"})
