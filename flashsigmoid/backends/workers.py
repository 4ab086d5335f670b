"""One thread per core, each running whole work items single-threaded: CPU parallelism without a barrier after every op.

Torch's own parallelism splits every operation over all cores and waits; on tiles that fit a core's cache the waiting
costs a quarter of the time (docs/log.md, 2026-11-23).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Item = TypeVar("Item")


def parallel(function: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Call function on every item, on as many threads as torch.get_num_threads() says, in the order given.

    Items must be independent. With one thread, with fewer items than threads or without OpenMP they run one after the
    other on this thread, with torch's own parallelism inside.
    """
    items = list(items)
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < threads or not torch.backends.openmp.is_available():
        for item in items:
            function(item)
        return
    # list() re-raises the first exception of any item
    list(_pool(threads).map(torch.no_grad()(function), items))


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    ready = threading.Barrier(threads + 1)

    def one_core() -> None:
        torch.get_num_threads()  # a thread's first call adopts the process's count, so it comes before setting ours
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, "flashsigmoid", initializer=one_core)
    for _ in range(threads):
        pool.submit(int)
    ready.wait()
    # set_num_threads is per thread, but it also sets what later threads start with: put that back
    torch.set_num_threads(threads)
    return pool


# threads do not survive a fork: a child makes its own pool
os.register_at_fork(after_in_child=_pool.cache_clear) if hasattr(os, "register_at_fork") else None
