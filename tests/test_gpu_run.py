"""What tests/gpu runs by, without a GPU: shares of its memory among processes, and the record of a run that is cut."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu.memory import reserved
from gpu.outcomes import Outcomes

from flashsigmoid.record import read_records

SPAWN = multiprocessing.get_context("spawn")


def worker(folder: Path, budget: int, sizes: list[int]) -> None:
    """Each size in turn: its share is held, told in a file, given back."""
    for size in sizes:
        with reserved(size, budget, folder / "locks"):
            told = folder / f"{os.getpid()}"
            told.write_text(str(min(size, budget)))
            time.sleep(0.02)
            total = sum(int(path.read_text() or 0) for path in folder.iterdir() if path.is_file())
            (folder / "seen").mkdir(exist_ok=True)
            (folder / "seen" / f"{os.getpid()}-{time.monotonic_ns()}").write_text(str(total))
            told.write_text("0")


def test_processes_share_a_budget(tmp_path: Path) -> None:
    """Of all sizes, one beyond the budget too: never more than there is, and none waits for ever."""
    sizes = [[1, 4, 9, 2], [3, 3, 1, 5], [5, 2, 2, 4]]
    processes = [SPAWN.Process(target=worker, args=(tmp_path, 5, some)) for some in sizes]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    totals = [int(path.read_text()) for path in (tmp_path / "seen").iterdir()]
    assert len(totals) == 12
    assert max(totals) == 5


def hold_and_die(folder: Path) -> None:
    with reserved(2, 2, folder):
        os._exit(7)


def test_a_process_that_dies_gives_its_share_back(tmp_path: Path) -> None:
    process = SPAWN.Process(target=hold_and_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 7
    with reserved(2, 2, tmp_path):
        pass


def test_a_child_that_was_forked_keeps_no_share(tmp_path: Path) -> None:
    with reserved(1, 1, tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with reserved(1, 1, tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


SLOW = """
import time
import pytest

@pytest.mark.parametrize("index", range(4))
def test_passes(index, record_property):
    record_property("error_over_budget", {"value": 0.25, "tensor": f"dq {index}"})

def test_fails():
    assert 1 + 1 == 3

def test_skips():
    pytest.skip("no reason")

@pytest.fixture
def broken():
    yield
    raise RuntimeError("after all")

def test_is_broken_at_its_end(broken):
    pass

def test_dies():
    import os
    os._exit(1)

@pytest.mark.parametrize("index", range(2))
def test_takes_long(index):
    time.sleep(LONG)
"""
CONFTEST = """
from pathlib import Path
from gpu.outcomes import Outcomes

def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Path("record.jsonl"), "python -m pytest"))
"""
ENDS = {
    **{f"test_passes[{index}]": "passed" for index in range(4)},
    "test_fails": "failed", "test_skips": "skipped", "test_is_broken_at_its_end": "failed", "test_dies": "failed",
}  # fmt: skip


def started(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A run of two workers as `python -m pytest tests/gpu -n 2`."""
    tests = folder / "tests" / "gpu"
    tests.mkdir(parents=True)
    (tests / "conftest.py").write_text(CONFTEST)
    (tests / "test_slow.py").write_text(SLOW.replace("LONG", str(seconds)))
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests")))}
    for name in [name for name in env if name.startswith("PYTEST_")]:
        del env[name]  # of the run that this test belongs to
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-n", "2", "--maxschedchunk", "1", "-p", "no:cacheprovider"]
    command += ["--import-mode", "importlib", "-p", "no:benchmark"]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ends(path: Path) -> dict[str, str]:
    tests = [record.tags for record in read_records(path).records if record.name == "test"]
    assert len({tags["test"] for tags in tests}) == len(tests)
    return {str(tags["test"]).partition("::")[2]: str(tags["outcome"]) for tags in tests}


@pytest.mark.long
def test_the_record_of_a_run(tmp_path: Path) -> None:
    printed, _ = started(tmp_path, 0.0).communicate(timeout=120)
    expected = ENDS | {f"test_takes_long[{index}]": "passed" for index in range(2)}
    assert ends(tmp_path / "record.jsonl") == expected, printed
    records = read_records(tmp_path / "record.jsonl").records
    assert [r.tags["test"] for r in records[:10]] == sorted(f"tests/gpu/test_slow.py::{name}" for name in expected)
    assert {r.name: r.value for r in records[10:13]} == {"tests/passed": 6, "tests/failed": 3, "tests/skipped": 1}
    assert [(r.name, r.value, r.tags["tensor"]) for r in records[13:]] == [
        ("error_over_budget", 0.25, f"dq {index}") for index in range(4)
    ]
    told = {str(r.tags["test"]).partition("::")[2]: str(r.tags["told"]) for r in records if "told" in r.tags}
    assert "assert (1 + 1) == 3" in told["test_fails"]
    assert "after all" in told["test_is_broken_at_its_end"]
    assert "crashed" in told["test_dies"]
    assert "tests/gpu/test_slow.py::test_fails failed: assert (1 + 1) == 3" in printed


@pytest.mark.long
def test_a_run_that_is_cut_leaves_every_end_so_far(tmp_path: Path) -> None:
    path, run = tmp_path / "record.jsonl", started(tmp_path, 300.0)
    try:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not (path.exists() and ends(path) == ENDS):
            time.sleep(0.1)
    finally:
        run.terminate()
        run.communicate(timeout=60)
    assert run.returncode == -signal.SIGTERM
    assert ends(path) == ENDS
    assert not any(r.name.startswith("tests/") for r in read_records(path).records)  # cut: no totals


def test_nothing_is_written_without_an_end(tmp_path: Path) -> None:
    plugin = Outcomes(tmp_path / "record.jsonl", "python -m pytest --collect-only")
    plugin.pytest_sessionfinish()
    assert not (tmp_path / "record.jsonl").exists()
