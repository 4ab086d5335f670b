"""What a rank does in the tests of whole runs on a mesh: train, with something wrong if asked, and say what is left."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from training.tiny import tiny_run

from flashsigmoid.distributed import checkpoint as sharded
from flashsigmoid.distributed.plans import AXES, sharding_axis
from flashsigmoid.recipes.language import demo
from flashsigmoid.record import read_records
from flashsigmoid.training import language
from flashsigmoid.training.callbacks import Interrupted
from flashsigmoid.training.checkpoint import find_checkpoint, load_trainer
from flashsigmoid.training.run import LanguageRun


def mesh_run(text: Path, **changes: Any) -> LanguageRun:
    """`tiny_run` with what every mesh of 2 or 4 divides, and no dropout, whose masks depend on the mesh."""
    run = tiny_run(text, **{"batch": 4, "accumulate": 1, **changes})
    return replace(run, model=replace(run.model, vocab_size=264, nheads=4, dropout_p=0.0))


def recipe_run(steps: int) -> LanguageRun:
    """`flashsigmoid train demo`, narrower, of a vocabulary that tp divides; its loss is recorded at every step."""
    run = demo()
    model = replace(run.model, vocab_size=264, seqlen=64, nlayers=2, dim=64, nheads=4)
    return replace(
        run, model=model, data=replace(run.data, val_windows=8), batch=8, steps=steps, val_every=steps,
        save_every=steps, log_every=1, sample_tokens=0, attention_snapshots=0,
    )  # fmt: skip


@contextmanager
def doubled() -> Iterator[None]:
    """A training in float64, its logits and norms, which are float32 at least, too."""
    before, narrow = torch.get_default_dtype(), torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x)):
            yield
    finally:
        torch.set_default_dtype(before)


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def losses(out_dir: Path, name: str = "train/loss") -> list[float | None]:
    """Of every step, or of every validation."""
    return [record.value for record in read_records(out_dir / "records.jsonl").records if record.name == name]


def far(some: list, others: list) -> float:
    """Largest relative difference of losses."""
    return max(abs(x - y) / abs(y) for x, y in zip(some, others, strict=True))


def train(port: int, run: LanguageRun, out_dir: Path, fault: str = "", **options: Any) -> dict[str, Any]:
    """Train as one rank of a crew: {"results" or "error", "err": what was printed to stderr}."""
    os.environ["MASTER_PORT"] = str(port)
    err, answer = io.StringIO(), {}
    with contextlib.redirect_stderr(err), planted(fault):
        try:
            word, _, step = fault.partition(" ")
            show = stopped_at(int(step or 3)) if word == "SIGTERM" else lambda progress: None
            answer["results"] = language.train(run, out_dir, device="cpu", show=show, command="test", **options)
        except Interrupted as stop:
            answer["error"] = f"Interrupted {stop.code} {stop.step}"
        except (Exception, SystemExit) as error:
            answer["error"] = f"{type(error).__name__}: {error}"
    return {**answer, "err": err.getvalue()}


def stopped_at(step: int):
    """A `show` that sends its process, rank 0, SIGTERM."""

    def show(progress: Any) -> None:
        if progress.step == step and not progress.validated:
            os.kill(os.getpid(), signal.SIGTERM)

    return show


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """Something that goes wrong, on one rank or on all of them."""
    name, _, number = fault.partition(" ")
    module, step = language.LanguageModule, int(number or 0)
    rank = int(os.environ.get("RANK", "0"))
    patch: Any = contextlib.nullcontext()
    part = module.batch_loss

    def at_step(then, first: int = step):
        def batch_loss(self: Any, batch: Any) -> torch.Tensor:
            loss = part(self, batch)
            return then(loss) if self.trainer.global_step + 1 >= first else loss

        return mock.patch.object(module, "batch_loss", batch_loss)

    if name == "nan-once" and rank == 0:
        seen: list[int] = []
        patch = at_step(lambda loss: loss if seen or seen.append(1) else loss * torch.nan)
    elif name == "nan" and rank == 0:
        patch = at_step(lambda loss: loss * torch.nan)
    elif name == "hang" and rank == 1:
        patch = at_step(lambda loss: time.sleep(3600))
    elif name == "limits":  # nothing wrong: rank 0 says how long each group of its mesh waits
        configure = module.configure_model

        def configured(self: Any) -> None:
            configure(self)
            axes = [*(self.device_mesh[axis] for axis in AXES), sharding_axis(self.device_mesh)]
            backends = [axis.get_group()._get_backend(torch.device("cpu")) for axis in axes]
            limits = [backend.options._timeout.total_seconds() for backend in backends]
            if rank == 0:
                print(f"limits {limits}", file=sys.stderr)

        patch = mock.patch.object(module, "configure_model", configured)
    elif name == "raise" and rank == 1:

        def broken(loss: torch.Tensor) -> torch.Tensor:
            raise ValueError("batch must be whole, got half a one")

        patch = at_step(broken)
    elif name == "full-disk" and rank == 1:
        write = sharded._Writer.write_data

        def full(self: Any, *args: Any) -> Any:
            if self.target.name == f"step-{step:08d}":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(self, *args)

        patch = mock.patch.object(sharded._Writer, "write_data", full)
    elif name in ("late", "torn"):  # a checkpoint whose shards are written once the next step is done
        patch = contextlib.ExitStack()
        go_on, write = threading.Event(), sharded._Writer.write_data

        def late(self: Any, *args: Any) -> Any:
            if self.target.name == f"step-{step - 2:08d}" and not go_on.wait(30.0):
                raise AssertionError("the training must go on while a checkpoint is written")
            return write(self, *args)

        patch.enter_context(at_step(lambda loss: (go_on.set(), loss)[1]))
        patch.enter_context(mock.patch.object(sharded._Writer, "write_data", late))
        if name == "torn":  # without a copy in memory
            patch.enter_context(mock.patch.object(sharded._Writer, "stage", lambda self, state: state))
    elif name in ("kill-writing", "raise-writing") and rank == 1:
        patch = contextlib.ExitStack()
        write = sharded._Writer.write_data

        def broken_off(self: Any, *args: Any) -> Any:
            if self.target.name == f"step-{step:08d}":
                if name == "kill-writing":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(3.0)
            return write(self, *args)

        def wrong(loss: torch.Tensor) -> torch.Tensor:
            raise ValueError("batch must be whole, got half a one")

        patch.enter_context(mock.patch.object(sharded._Writer, "write_data", broken_off))
        if name == "raise-writing":
            patch.enter_context(at_step(wrong, step + 1))
    elif name == "others-part" and rank == 1:
        shard = language.shard_batch
        patch = mock.patch.object(language, "shard_batch", lambda x, mesh: shard(x.flip(0), mesh))
    elif name == "float64":  # nothing wrong
        patch = doubled()
    elif name == f"no-room-{rank}":  # the system itself refuses to write
        patch = contextlib.ExitStack()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        patch.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))

        def refused(loss: torch.Tensor) -> torch.Tensor:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            return loss

        patch.enter_context(at_step(refused))
    with patch:
        yield


def remains(out_dir: Path) -> dict[str, Any]:
    """What the newest checkpoint holds, time aside: for `training.tiny.differences`."""
    path = find_checkpoint(out_dir)
    trainer = load_trainer(path)
    del trainer["flashsigmoid"]["time_s"]
    return {"name": path.name, "tensors": sharded.load_tensors(path, ""), "trainer": trainer}


def is_one_line(text: str, pattern: str) -> bool:
    """Whether one line, and no more, says it."""
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) == 1 and re.search(pattern, lines[0]) is not None
