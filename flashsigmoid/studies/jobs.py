"""Processes side by side on one machine: which is next, how each ended, and stopping all of them in good order.

What the processes do is a caller's: pair.py.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from ..training.callbacks import OUT_OF_TIME

State = Literal["waiting", "running", "finished", "stopped", "failed"]
# of a training that saved a checkpoint and left, and of a process that a signal met before it could listen
_STOPPED = {OUT_OF_TIME, *(128 + number for number in (signal.SIGINT, signal.SIGTERM)), -signal.SIGINT, -signal.SIGTERM}
_POLL_S = 0.5
_THREADS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")


class Process(Protocol):
    """What is asked of a process: `subprocess.Popen` has it."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        ...

    def terminate(self) -> None:
        """Ask it to stop, with SIGTERM."""
        ...


@dataclass(frozen=True)
class Job:
    """One process to run."""

    name: str
    command: tuple[str, ...]
    log: Path  # what it prints is added there
    after: str | None = None  # name of the job that must have finished before


class Schedule:
    """Which job is next, in the order given, at most `at_once` of them running. It starts nothing itself.

    Args:
        jobs: with names of their own; a job stands behind the one that it waits for.
        at_once: how many may run.
        finished: names of those that need not run again.

    Raises:
        ValueError: fewer than one at once; two jobs of one name; a job after one that does not stand before it.
    """

    def __init__(self, jobs: Sequence[Job], at_once: int, finished: Sequence[str] = ()) -> None:
        if at_once < 1:
            raise ValueError(f"jobs must be at least 1, got {at_once}")
        self.jobs: dict[str, Job] = {}
        for job in jobs:
            if job.name in self.jobs or (job.after is not None and job.after not in self.jobs):
                raise ValueError(f"a job must have a name of its own and stand behind what it waits for, got {job}")
            self.jobs[job.name] = job
        self.at_once = at_once
        self.states: dict[str, State] = {name: "finished" if name in finished else "waiting" for name in self.jobs}

    def next(self) -> Job | None:
        """The first job that may start now."""
        if len(self.named("running")) >= self.at_once:
            return None
        for job in map(self.jobs.__getitem__, self.named("waiting")):
            if job.after is None or self.states[job.after] == "finished":
                return job
        return None

    def ended(self, name: str, code: int) -> State:
        """What an exit code says: 0 finished; 75, 130, 143 or the signals themselves stopped; any other failed."""
        self.states[name] = "finished" if code == 0 else "stopped" if code in _STOPPED else "failed"
        return self.states[name]

    def named(self, state: State) -> list[str]:
        """Names of the jobs in a state."""
        return [name for name, each in self.states.items() if each == state]


def run_jobs(
    schedule: Schedule,
    start: Callable[[Job, float | None], Process],
    *,
    max_minutes: float | None = None,
    watch: Callable[[], None] = lambda: None,
    ended: Callable[[Job, State], None] = lambda job, state: None,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Run all jobs that can run; a failed one keeps only those back that wait for it.

    When the time is over, or this process is interrupted, no other job starts and those that run are asked to stop,
    once; it returns, or raises on, when all of them have. A second interrupt asks again, which ends a training at once.

    Args:
        schedule: the jobs; how they ended is in its `states`.
        start: starts a job, given the minutes that are left for it, None without a limit.
        max_minutes: for all of it. Default: no limit.
        watch: called about twice a second.
        ended: told how a job ended.
        now, sleep: seconds; a test's own.

    Raises:
        KeyboardInterrupt: this process was interrupted.
    """
    deadline_s = math.inf if max_minutes is None else now() + 60.0 * max_minutes
    running: dict[str, Process] = {}

    def collect() -> None:
        for name, code in {name: process.poll() for name, process in running.items()}.items():
            if code is not None:
                del running[name]
                ended(schedule.jobs[name], schedule.ended(name, code))

    def stop() -> None:
        for process in running.values():
            process.terminate()
        while running:
            try:
                sleep(_POLL_S)
                watch()
                collect()
            except KeyboardInterrupt:
                for process in running.values():
                    process.terminate()

    try:
        while now() < deadline_s:
            while (job := schedule.next()) is not None:
                running[job.name] = start(job, None if max_minutes is None else (deadline_s - now()) / 60.0)
                schedule.states[job.name] = "running"
            if not running:
                return
            sleep(_POLL_S)
            watch()
            collect()
    finally:
        stop()


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(count)] if named is None else named.split(",")[:count]


def least_busy(gpus: Sequence[str], taken: Iterable[str]) -> str | None:
    """The GPU that the fewest processes have, of those the first; None where there is no choice."""
    counts = Counter(taken)
    return min(gpus, key=lambda gpu: counts[gpu]) if len(gpus) > 1 else None


def start_process(job: Job, at_once: int, gpu: str | None = None) -> subprocess.Popen[bytes]:
    """Start a job that prints to its log, in a session of its own, so that Ctrl-C reaches this process only.

    Of several at once each gets its share of the cores, where the environment does not say how many threads.

    Args:
        job: what to start.
        at_once: how many run beside each other.
        gpu: the only one that it sees, one of `visible_gpus`. Default: all that this process sees.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = {name: str(max(1, cores // at_once)) for name in _THREADS} if at_once > 1 else {}
    own = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    with job.log.open("ab") as log:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**share, **os.environ, **own},
            start_new_session=True,
        )
