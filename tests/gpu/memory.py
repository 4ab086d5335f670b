"""Memory of one GPU that the workers of a test run share: a test marked `large(gigabytes)` waits until that is free."""

from __future__ import annotations

import fcntl
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

ORDINARY_GIB = 2.5  # of a worker: its CUDA context and the largest of the tests without the mark
KEPT_BYTES = 2**28  # what a worker may keep for its next test
FOLDER = Path(tempfile.gettempdir()) / f"flashsigmoid-gpu-{os.getuid()}"


def budget_gib() -> int:
    """What all workers together have for large tests."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return max(1, int(torch.cuda.mem_get_info()[1] / 2**30 - ORDINARY_GIB * workers))


@contextmanager
def reserved(gigabytes: int, budget: int, folder: Path = FOLDER) -> Iterator[None]:
    """Hold as many of the budget's locks, at most all of them. A process that dies gives its locks back."""
    folder.mkdir(exist_ok=True)
    with ExitStack() as held:
        # one gathers at a time, in turn: two with half of the locks each would wait for ever
        with ExitStack() as turn:
            while not _take(folder / "turn", turn):
                time.sleep(0.05)
            missing = list(range(budget))
            while budget - len(missing) < min(gigabytes, budget):
                index = next((index for index in missing if _take(folder / str(index), held)), None)
                if index is None:
                    time.sleep(0.05)
                else:
                    missing.remove(index)
        yield


def _take(path: Path, held: ExitStack) -> bool:
    """Whether the lock was free; then it is until `held` ends."""
    with ExitStack() as opened:
        file = opened.enter_context(path.open("a"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        held.push(opened.pop_all())
    held.callback(fcntl.flock, file, fcntl.LOCK_UN)  # a child forked meanwhile has the file open too
    return True


def release() -> None:
    """Give cached memory back, and what the frames of a failed test hold."""
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):  # pytest's, for debuggers
        if hasattr(sys, name):
            delattr(sys, name)
    if torch.cuda.memory_allocated() > KEPT_BYTES:
        gc.collect()
    if torch.cuda.memory_reserved() > KEPT_BYTES:
        torch.cuda.empty_cache()
