"""What tests ask of a GPU: graphs, that nothing waits for it, kernels under compute-sanitizer, planted faults."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from backends.test_planted_faults import assert_every_fault_is_caught, show, table
from gpu.cases import DEVICE

T = TypeVar("T")


def captured(call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of `call`, and its results' memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Each wait of the host for the GPU is an error, as far as torch sees it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype; as an error it would leave the mode on for all
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def sanitized(tool: str, *words: str, timeout_s: float) -> str:
    """What gpu/sanitize.py prints of the cases with those words, under a tool that finds nothing."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer on PATH or in /usr/local/cuda/bin, and finds none")
    script = Path(__file__).with_name("sanitize.py")
    command = [sanitizer, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    command += [sys.executable, str(script), *words]
    path = os.pathsep.join(filter(None, (str(script.parents[2]), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path}  # of a clone that is not installed
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=env, check=False)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
    return done.stdout


def assert_faults_are_caught(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None],
    label: str, **sizes: Any,
) -> None:  # fmt: skip
    """Every planted fault, in every tensor; each error over the budget becomes a record of the backend `label`."""
    rows = table(backend, dtype, monkeypatch, device=DEVICE, **sizes)
    show(backend, dtype, rows)
    for fault, row in rows.items():
        for tensor, value in row.items():
            tags = {"backend": label, "fault": fault, "tensor": tensor, "dtype": str(dtype).removeprefix("torch.")}
            record_property("error_over_budget", {"value": value, **tags})
    tensors = ("out", "dq", "dk", "dv")
    assert_every_fault_is_caught(rows, tensors if sizes.get("has_sides") is False else (*tensors, "db", "dslopes"))
