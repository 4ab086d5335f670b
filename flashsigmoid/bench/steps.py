"""What an optimizer step of several trainings takes, in turns: `flashsigmoid steps`, and mesh_of_one.py.

Each trains in a process of its own, which takes a block of steps while the others wait, in shuffled turns: noise falls
on all of them, as on the calls of `flashsigmoid bench`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ..record import RecordWriter
from ..training.run import Run
from .timing import Sample, Times, interleaved

Arms = Mapping[str, tuple[Run, str | None]]  # by name a training and the mesh it lies over
AGAIN = " again"  # behind the name of the base
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_READY_S = 600  # until everything is compiled


def cut(run: Run, block: int, rounds: int) -> Run:
    """As many blocks of a run as `interleaved` takes, with one to compile: validated and saved only at the ends."""
    steps = block * (rounds + 2)
    own: dict[str, Any] = {
        name: 0 for name in ("sample_tokens", "attention_snapshots") if hasattr(run, name)
    }  # what language models and images do besides
    warmup = min(run.optim.warmup, steps - 1)
    lengths: dict[str, Any] = {"steps": steps, "val_every": steps, "save_every": steps, "log_every": block}
    return replace(run, **lengths, optim=replace(run.optim, warmup=warmup), **own)


def measure(arms: Arms, base: str, device: str, rounds: int, out: Path, command: str | None = None) -> dict[str, Times]:
    """Times of a step of each arm, and records of them; the records' settings are the base's.

    Raises:
        ValueError: steps that are not `rounds` + 2 blocks; a process that ended.
    """
    for run, _ in arms.values():
        if run.steps != (rounds + 2) * run.log_every:
            raise ValueError(f"steps must be (rounds + 2) log_every = {(rounds + 2) * run.log_every}, got {run.steps}")
    context, samples = multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder, socket.socket() as listener, ExitStack() as ended:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
        listener.close()
        pipes = {}
        for arm, (run, mesh) in arms.items():
            pipes[arm], theirs = context.Pipe()
            given = (run, mesh, device, Path(folder) / arm, port, theirs)
            process = context.Process(target=_train, args=given, daemon=True)
            process.start()
            theirs.close()
            ended.push(partial(_end, process))
            samples[arm] = _block(arm, pipes[arm])
        for arm, pipe in pipes.items():
            _heard(arm, pipe)  # everything is compiled
        times = interleaved(samples, rounds=rounds)
        for pipe in pipes.values():
            pipe.send(None)
    with RecordWriter(out, {**arms[base][0].settings(), "device": device, "rounds": rounds}, command) as writer:
        for arm, of_arm in times.items():
            for number, step_ms in enumerate(of_arm.ms):
                writer.write("step", step_ms, unit="ms", arm=arm, block=number)
            for name, q in (("p10", 0.1), ("median", 0.5), ("p90", 0.9)):
                value = of_arm.median_ms if name == "median" else of_arm.quantile_ms(q)
                writer.write(f"step/{name}", value, unit="ms", arm=arm)
            ratios = Times([x / y for x, y in zip(of_arm.ms, times[base].ms, strict=True)])
            if arm != base:
                writer.write(f"over_{base}/p10", ratios.quantile_ms(0.1), arm=arm)
                writer.write(f"over_{base}/median", statistics.median(ratios.ms), arm=arm)
                writer.write(f"over_{base}/p90", ratios.quantile_ms(0.9), arm=arm)
    return times


def print_times(times: Mapping[str, Times], base: str) -> None:
    """A line for each arm."""
    for arm, of_arm in times.items():
        ratio = times[base].speedup_over(of_arm)
        spread = f"{of_arm.quantile_ms(0.1):.2f} to {of_arm.quantile_ms(0.9):.2f}"
        print(f"{arm:14} {of_arm.median_ms:.2f} ms a step ({spread}), {ratio:.4f} of {base}")


def _train(run: Run, mesh: str | None, device: Any, out_dir: Path, port: int, pipe: Connection) -> None:
    """One process: after every log_every steps it says how long they took, each in milliseconds, and waits."""
    for name in _LAUNCHED:
        os.environ.pop(name, None)
    if mesh is not None:
        values = ("0", "0", "1", "1", "localhost", str(port))
        os.environ |= dict(zip(_LAUNCHED, values, strict=True))
    since = time.perf_counter()

    def show(progress: Any) -> None:
        """After the loss was read, for which the device has finished its work."""
        nonlocal since
        if progress.validated:
            return
        pipe.send(1e3 * (time.perf_counter() - since) / run.log_every)
        pipe.recv()
        since = time.perf_counter()

    run.train(out_dir, device=device, show=show, mesh=mesh)


def _end(process: BaseProcess, error: type[BaseException] | None, *_: object) -> None:
    """Its end; after an error of another it would wait for its turn for ever, and a run takes a signal for a pause."""
    if error is not None:
        process.kill()
    process.join()


def _block(arm: str, pipe: Connection) -> Sample:
    def sample() -> float:
        pipe.send(None)
        return _heard(arm, pipe)

    return sample


def _heard(arm: str, pipe: Connection) -> float:
    if not pipe.poll(_READY_S):
        raise ValueError(f"{arm} must answer within {_READY_S} s, got nothing")
    try:
        return pipe.recv()
    except EOFError:
        raise ValueError(f"{arm} must train to the end, got an error") from None
