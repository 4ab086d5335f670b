"""What happens around the steps: records, checkpoints, signals, a line of progress. The steps are module.py's."""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

import pytorch_lightning as pl
import torch

from ..record import Record, RecordWriter
from .checkpoint import checkpoint_path, keep_last
from .optim import lr_at

if TYPE_CHECKING:
    from ..distributed.processes import Processes
    from .module import RunModule

OUT_OF_TIME = 75  # an exit code: EX_TEMPFAIL of sysexits.h


class Stopwatch:
    """Seconds of training: what earlier processes spent, and this one while it runs."""

    def __init__(self) -> None:
        self._before_s, self._since = 0.0, None

    def start(self, before_s: float | None = None) -> None:
        """Run from now on, having read `before_s` already (default: what it reads)."""
        self._before_s, self._since = self.read() if before_s is None else before_s, time.monotonic()

    def stop(self) -> None:
        """Stand still until the next start."""
        self._before_s, self._since = self.read(), None

    def read(self) -> float:
        """Seconds so far."""
        return self._before_s + (0.0 if self._since is None else time.monotonic() - self._since)


@dataclass(frozen=True)
class Progress:
    """Where a training stands: given to the function that shows it, at every record and validation."""

    name: str  # recipe and attention, and b where it is not the recipe's
    step: int
    steps: int
    time_s: float  # of training, validation not counted
    metrics: dict[str, float]  # the latest train/loss, those of the validation, and samples, or tokens, per second
    validated: bool  # whether this step was validated just now


Show = Callable[[Progress], None]


def show_line(progress: Progress) -> None:
    """One line on stderr: rewritten in place on a terminal, else printed at each validation."""
    terminal = sys.stderr.isatty()
    if not terminal and not progress.validated:
        return
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in progress.metrics.items())
    line = f"{progress.name}  {progress.step}/{progress.steps}  {numbers}"
    if progress.step:
        line += f"  {progress.time_s / progress.step * (progress.steps - progress.step):.0f} s left"
    done = not terminal or progress.step == progress.steps
    print(f"\r\033[K{line}" if terminal else line, end="\n" if done else "", file=sys.stderr, flush=True)


class Muted(RecordWriter):
    """A writer of records that writes none: of a rank that is not the first.

    Args:
        path: where the first rank writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, value: SupportsFloat | None = None, **others: Any) -> Record:
        """Nothing."""
        return Record(name=name)

    def close(self) -> None:
        """Nothing was opened."""


class Recorder(pl.Callback):
    """Writes losses, rates and what the module says of itself to the records, and the numbers to TensorBoard.

    Args:
        writer: of the run's records.jsonl.
        show: told about every record.
        world: the ranks, all of which call it; only rank 0's writer writes.
    """

    def __init__(self, writer: RecordWriter, show: Show, world: Processes | None = None) -> None:
        self.writer, self.show, self.world = writer, show, world
        self.latest: dict[str, float] = {}
        self._last = (0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting what is read per second."""
        self._last = (trainer.global_step, _ours(pl_module).clock.read())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the step, every log_every steps."""
        module, step = _ours(pl_module), trainer.global_step
        run = module.run
        if (batch_idx + 1) % run.accumulate or step % run.log_every:
            return
        module.check_skipped()
        (past_step, past_s), now_s = self._last, module.clock.read()
        self._last = (step, now_s)
        rate, count = module.read_per_sample
        count *= (step - past_step) * run.accumulate * run.batch
        loss = float(module.step_loss) if self.world is None else self.world.mean(module.step_loss)
        self._write(trainer, "train/loss", loss, module.loss_unit, step, now_s, shown=True)
        self._write(trainer, "grad_norm", float(module.grad_norm), "", step, now_s)
        self._write(trainer, "lr", lr_at(step - 1, run.steps, run.optim), "", step, now_s)
        if skipped := module.skipped:
            self._write(trainer, "skipped_steps", skipped, "", step, now_s)
        self._write(trainer, rate, count / max(1e-9, now_s - past_s), rate, step, now_s, shown=True)
        self._tell(trainer, module, validated=False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is not training time, nor is its memory training's."""
        module = _ours(pl_module)
        module.clock.stop()
        if module.device.type == "cuda" and not trainer.sanity_checking:
            peak_mib = torch.cuda.max_memory_allocated(module.device) / 2**20
            self.writer.write("peak_memory", peak_mib, unit="MiB", step=trainer.global_step)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the validation, also the one before the first step."""
        module, step = _ours(pl_module), trainer.global_step
        now_s = module.clock.read()
        for name, value, unit in module.validated():
            self._write(trainer, name, value, unit, step, now_s, shown=True)
        if step == 0:
            if (kernel := module.kernel()) is not None:
                self.writer.write("attention_kernel", step=0, kernel=kernel)
            for name, value, unit in module.baselines():
                self.writer.write(name, value, unit=unit, step=0)
        for name, value in module.probed():
            self._write(trainer, name, value, "", step, now_s)
        module.snapshot(self.writer, step)
        if step == module.run.steps:
            module.finish(self.writer)
        self._tell(trainer, module, validated=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training goes on."""
        module = _ours(pl_module)
        module.clock.start()
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)

    def _write(
        self, trainer: pl.Trainer, name: str, value: float, unit: str, step: int, time_s: float, shown: bool = False
    ) -> None:
        self.writer.write(name, value, unit=unit, step=step, time_s=time_s)
        if trainer.logger is not None:
            trainer.logger.log_metrics({name: value}, step=step)
        if shown:
            self.latest[name] = value

    def _tell(self, trainer: pl.Trainer, module: RunModule, *, validated: bool) -> None:
        run, now_s = module.run, module.clock.read()
        self.show(Progress(run.title, trainer.global_step, run.steps, now_s, dict(self.latest), validated))


class Interrupted(SystemExit):
    """A signal, or the time given, ended the training after a checkpoint.

    As an exit its code is 128 + the signal's number, 130 or 143, and 75, "try again", where the time was over.
    """

    def __init__(self, signum: int | None, step: int, checkpoint: Path) -> None:
        super().__init__(OUT_OF_TIME if signum is None else 128 + signum)
        self.step, self.checkpoint = step, checkpoint
        self.reason = "max_minutes" if signum is None else signal.Signals(signum).name


class Saver(pl.Callback):
    """Saves a checkpoint when one is due, and when SIGINT, SIGTERM or the time asks to stop; then raises `Interrupted`.

    A step is finished when its validation is, so a checkpoint never stands between the two. A second signal
    ends the process at once, with the same exit code and without a checkpoint.

    Args:
        run_dir: of the run.
        max_minutes: from now on; None: no limit.
        world: the ranks, which stop together where one is asked to.
    """

    def __init__(self, run_dir: Path, max_minutes: float | None = None, world: Processes | None = None) -> None:
        self.run_dir, self.world = run_dir, world
        self._deadline_s = math.inf if max_minutes is None else time.monotonic() + 60.0 * max_minutes
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the two signals; they can be taken in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before.setdefault(signum, signal.getsignal(signum))
                signal.signal(signum, self._receive)

    def close(self) -> None:
        """Give the signals back to who had them; Lightning, too, may have put ours back meanwhile."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: Any) -> None:
        if self._received is not None:
            raise SystemExit(128 + signum)
        self._received = signum

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has just put its own SIGTERM handler in place, which would stop inside a step."""
        self.listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step without validation has ended."""
        run = _ours(pl_module).run
        if (batch_idx + 1) % run.accumulate == 0 and trainer.global_step % run.val_interval:
            self._step_end(trainer, _ours(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A step with validation has ended."""
        if not trainer.sanity_checking:
            self._step_end(trainer, _ours(pl_module))

    def _step_end(self, trainer: pl.Trainer, module: RunModule) -> None:
        step = trainer.global_step
        path = checkpoint_path(self.run_dir, step)
        signum, late = self._received or 0, time.monotonic() >= self._deadline_s
        if self.world is not None:
            self.world.step = step
            signum, late = self.world.largest(signum, late)
        must_stop = bool(signum or late)
        if step % module.run.save_every == 0 or step == module.run.steps or must_stop:
            trainer.save_checkpoint(path, weights_only=False)
            if self.world is None:
                keep_last(path, module.run.keep_last)
        if must_stop and step < module.run.steps:
            raise Interrupted(signum or None, step, path)


def _ours(module: pl.LightningModule) -> RunModule:
    """The module as what it is."""
    return module  # pyright: ignore[reportReturnType]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's announcements, without two warnings of its own making, and without one of FSDP2.

    One says that a GPU stays unused although the CPU was asked for, one that Lightning still uses torch's LeafSpec, and
    one that logits, which no loss of ours changes in place, must not be changed in place.
    """
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="GPU available but not used")
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
