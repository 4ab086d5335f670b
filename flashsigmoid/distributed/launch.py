"""Starts the processes of a mesh on this machine by torch's elastic agent, and starts them again if one is lost.

Those of several machines are torchrun's business.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .processes import LOST, MeshSizes, worker_environment


def launch(
    sizes: MeshSizes, words: Sequence[str], *, resume: Sequence[str] = ("--resume",), max_restarts: int = 3
) -> int:
    """Run `python WORDS` once for each rank until it is done: the exit code.

    If a rank was killed, or the others lost it, all are started again with `resume` at the end of the words. Any
    other error ends them, since it would come again.

    Args:
        sizes: of the mesh; as many processes.
        words: after the name of the interpreter.
        resume: words that make them go on.
        max_restarts: how often they are started again.
    """
    os.environ.update(worker_environment(os.environ, sizes.size))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for attempt in range(max_restarts + 1):
        try:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=sizes.size,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="localhost",
                max_restarts=0,
            )
            elastic_launch(config, sys.executable)(*words, *(resume if attempt else ()))
            return 0
        except SignalException as error:
            return 128 + error.sigval
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
            # SIGTERM is how the agent ends those who are left
            lost = [str(rank) for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM]
            if not lost and LOST not in codes.values():
                return max(codes.values())
            what = f"lost rank {', '.join(lost)}" if lost else "lost a rank"
            if attempt == max_restarts:
                print(f"error: {what}, and no restart is left of {max_restarts}", file=sys.stderr)
                return LOST
            print(f"{what}: starting again, restart {attempt + 1} of {max_restarts}", file=sys.stderr, flush=True)
    raise AssertionError("the loop returns")


def check_devices(sizes: MeshSizes, device: str) -> None:
    """Whether this machine has a device for each rank; a CPU has one for any number.

    Raises:
        ValueError: it has too few GPUs.
    """
    count = torch.cuda.device_count()
    if (device == "cuda" or (device == "auto" and count)) and sizes.size > count:
        raise ValueError(
            f"mesh must have at most as many ranks as this machine has GPUs, {count}, got {sizes}; on several machines "
            f"start torchrun --nnodes N --nproc-per-node {max(1, count)} -m flashsigmoid ... on each"
        )
