"""Processes that stay: started once with a group, gloo or NCCL, then given one function after the other."""

from __future__ import annotations

import importlib
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import conftest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 60


def _serve(rank: int, size: int, device: str, store: str | None, pipe: Any) -> None:
    """One rank: run what the pipe brings and answer with its result, or with what went wrong."""
    import warnings

    # as pytest has it for the tests themselves
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`torch.jit.")
    # logits split by tp are one, and nobody changes them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if device == "cuda":
        warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")  # a thread's first product finds none
    torch.set_num_threads(1)
    # what is received into is poisoned first, as every test has it
    importlib.import_module("torch._dynamo.trace_rules").get_torch_obj_rule_map()
    importlib.import_module("torch.utils._device")._device_constructors()  # else torch.device("meta") passes them over
    for owner, name in conftest.ALLOCATORS:
        setattr(owner, name, conftest.poisoned(getattr(owner, name)))
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.cuda.init()
    if store is None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost"}
    else:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
    while (job := pipe.recv()) is not None:
        module, name, args, kwargs = job
        try:
            result = getattr(importlib.import_module(module), name)(*args, **kwargs)
            pipe.send((True, result))
        except (Exception, SystemExit):
            pipe.send((False, traceback.format_exc()))
    if store is not None:
        dist.barrier(device_ids=[rank] if device == "cuda" else None)
        dist.destroy_process_group()


class Crew:
    """`size` processes of one group: gloo on a CPU, NCCL with a GPU each.

    Args:
        size: how many.
        device: "cpu" or "cuda".
        grouped: False: without a group, but with a launcher's variables, for functions that make a group themselves.
    """

    def __init__(self, size: int, device: str = "cpu", *, grouped: bool = True) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        store = str(Path(self.folder.name) / "store") if grouped else None
        self.pipes, self.processes = [], []
        os.environ["OMP_NUM_THREADS"] = "1"
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, device, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """function(*args, **kwargs) on every rank: the results, or an AssertionError with every rank's traceback."""
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, args, kwargs))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(4 * TIMEOUT_S):
                self.close(kill=True)
                raise AssertionError(f"rank {rank} of {self.size} did not answer")
            answers.append(pipe.recv())
        wrong = [f"rank {rank}: {answer}" for rank, (good, answer) in enumerate(answers) if not good]
        if wrong:
            raise AssertionError("\n".join(wrong))
        return [answer for _, answer in answers]

    def close(self, kill: bool = False) -> None:
        """End the processes."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if kill:
                process.kill()
            elif process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(TIMEOUT_S)
            assert kill or process.exitcode == 0, f"a rank ended with {process.exitcode}"
        self.folder.cleanup()
