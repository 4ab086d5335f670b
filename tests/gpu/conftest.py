"""Tests that need a GPU: skipped elsewhere, with the reason. Where there is one, their outcomes become a record."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from gpu.memory import budget_gib, release, reserved
from gpu.outcomes import Outcomes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# these take half a minute and more: workers begin with them (--maxschedchunk 1 gives each worker few)
LONGEST = (
    "until_the_time_is_up", "the_sanitizer_finds_nothing", "memory_is_that", "of_long_sequences", "planted_fault",
    "inductor", "opcheck", "told_apart",
)  # fmt: skip
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: inductor would start 32 compilers in each
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-record", default="gpu-tests.jsonl", help="file of benchmarks/results for the outcomes")


def pytest_configure(config: pytest.Config) -> None:
    if torch.cuda.is_available() and not hasattr(config, "workerinput"):
        path = RESULTS / str(config.getoption("--gpu-record", "gpu-tests.jsonl"))
        command = shlex.join(["python", "-m", "pytest", *config.invocation_params.args])
        config.pluginmanager.register(Outcomes(path, command))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is in this folder where torch finds no CUDA device; else the longest first."""
    if torch.cuda.is_available():
        items.sort(key=lambda item: not any(name in item.name for name in LONGEST))
    else:
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))


@pytest.fixture(autouse=True)
def freed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Workers share the GPU's memory: a large test waits for its part, none keeps what its last test had.

    Nor does a worker go on when CUDA is lost to it.
    """
    large = request.node.get_closest_marker("large")
    with reserved(large.args[0], budget_gib()) if large else nullcontext():
        yield
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # every later test of this process would fail, whatever it tests
            os._exit(1)
        release()
