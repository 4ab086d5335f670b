"""python -m flashsigmoid.bench.mesh_of_one [--device cuda] [--set FIELD=VALUE]...    what a mesh of one process costs.

The same run trained as it is, over a mesh of one process, and as it is once more: what two equal things differ by. Each
in a process of its own, which takes its steps while the others wait: a block of steps in turn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..recipes.fields import override
from ..recipes.language import enwik8
from ..record import RecordWriter
from ..training.data import DataConfig
from ..training.run import LanguageRun
from .timing import Sample, Times, interleaved

ARMS = {"plain": None, "mesh": "dp=1,cp=1,tp=1", "plain again": None}
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_READY_S = 600  # until everything is compiled


def run_of(block: int, rounds: int) -> LanguageRun:
    """The recipe `enwik8` on the embedded text, cut to what is timed: `interleaved` warms up once, and so does this."""
    steps = block * (rounds + 2)
    return replace(
        enwik8(),
        data=DataConfig(val_windows=32),
        steps=steps,
        val_every=steps,
        save_every=steps,
        log_every=block,
        sample_tokens=0,
        attention_snapshots=0,
    )


def train(run: LanguageRun, mesh: str | None, device: Any, out_dir: Path, port: int, pipe: Connection) -> None:
    """One process: after every log_every steps it says how long they took, each in milliseconds, and waits."""
    for name in _LAUNCHED:
        os.environ.pop(name, None)
    if mesh is not None:
        values = ("0", "0", "1", "1", "localhost", str(port))
        os.environ |= dict(zip(_LAUNCHED, values, strict=True))
    from ..training import language

    since = time.perf_counter()

    def show(progress: Any) -> None:
        """After the loss was read, for which the device has finished its work."""
        nonlocal since
        if progress.validated:
            return
        pipe.send(1e3 * (time.perf_counter() - since) / run.log_every)
        pipe.recv()
        since = time.perf_counter()

    language.train(run, out_dir, device=device, show=show, mesh=mesh)


def measure(run: LanguageRun, device: str, rounds: int, out: Path, command: str | None = None) -> dict[str, Times]:
    """Times of a step of each arm, and records of them.

    Raises:
        ValueError: steps that are not `rounds` + 2 blocks; a process that ended.
    """
    if run.steps != (rounds + 2) * run.log_every:
        raise ValueError(f"steps must be (rounds + 2) log_every = {(rounds + 2) * run.log_every}, got {run.steps}")
    context, samples = multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder, socket.socket() as listener, ExitStack() as ended:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
        listener.close()
        pipes = {}
        for arm, mesh in ARMS.items():
            pipes[arm], theirs = context.Pipe()
            given = (run, mesh, device, Path(folder) / arm, port, theirs)
            process = context.Process(target=train, args=given, daemon=True)
            process.start()
            theirs.close()
            ended.callback(process.join)
            samples[arm] = _block(arm, pipes[arm])
        for arm, pipe in pipes.items():
            _heard(arm, pipe)  # everything is compiled
        times = interleaved(samples, rounds=rounds)
        for pipe in pipes.values():
            pipe.send(None)
    with RecordWriter(out, {**run.settings(), "device": device, "rounds": rounds}, command) as writer:
        for arm, of_arm in times.items():
            for number, step_ms in enumerate(of_arm.ms):
                writer.write("step", step_ms, unit="ms", arm=arm, block=number)
            for name, q in (("p10", 0.1), ("median", 0.5), ("p90", 0.9)):
                value = of_arm.median_ms if name == "median" else of_arm.quantile_ms(q)
                writer.write(f"step/{name}", value, unit="ms", arm=arm)
            ratios = Times([x / y for x, y in zip(of_arm.ms, times["plain"].ms, strict=True)])
            if arm != "plain":
                writer.write("over_plain/p10", ratios.quantile_ms(0.1), arm=arm)
                writer.write("over_plain/median", statistics.median(ratios.ms), arm=arm)
                writer.write("over_plain/p90", ratios.quantile_ms(0.9), arm=arm)
    return times


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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="What a mesh of one process costs.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--block", type=int, default=20, help="steps between two records; default: 20")
    parser.add_argument("--rounds", type=int, default=10, help="blocks of each arm; default: 10")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the run, as of train")
    parser.add_argument("--out", type=Path, default=Path("mesh-of-one.jsonl"))
    args = parser.parse_args(arguments)
    fields = dict(text.split("=", 1) for text in args.set)
    run = override(run_of(args.block, args.rounds), fields)
    times = measure(run, args.device, args.rounds, args.out)
    for arm, of_arm in times.items():
        ratio = times["plain"].speedup_over(of_arm)
        spread = f"{of_arm.quantile_ms(0.1):.2f} to {of_arm.quantile_ms(0.9):.2f}"
        print(f"{arm:12} {of_arm.median_ms:.2f} ms a step ({spread}), {ratio:.4f} of plain")


if __name__ == "__main__":
    main()
