"""What happens around the steps: records, checkpoints, signals, a line of progress. The steps are language.py's."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from ..diagnostics.probes import probe_attention
from ..models.generation import generate
from ..record import RecordWriter
from .checkpoint import checkpoint_path, keep_last
from .data import LanguageData
from .optim import lr_at

if TYPE_CHECKING:
    from .language import LanguageModule


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
    metrics: dict[str, float]  # the latest train/loss, val/loss, val/loss_bytes, tokens_per_s
    validated: bool  # whether this step was validated just now


Show = Callable[[Progress], None]


def show_line(progress: Progress) -> None:
    """One line on stderr: rewritten in place on a terminal, else printed at each validation."""
    terminal = sys.stderr.isatty()
    if not terminal and not progress.validated:
        return
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in progress.metrics.items())
    left_s = progress.time_s / progress.step * (progress.steps - progress.step) if progress.step else 0.0
    line = f"{progress.name}  {progress.step}/{progress.steps}  {numbers}  {left_s:.0f} s left"
    done = not terminal or progress.step == progress.steps
    print(f"\r\033[K{line}" if terminal else line, end="\n" if done else "", file=sys.stderr, flush=True)


class Recorder(pl.Callback):
    """Writes losses, rates, attention probes and the sample to the records, and the numbers to TensorBoard.

    Args:
        writer: of the run's records.jsonl.
        data: for the sample and the probes, which read the first validation windows, at most a micro-batch.
        show: told about every record.
    """

    def __init__(self, writer: RecordWriter, data: LanguageData, show: Show) -> None:
        self.writer, self.data, self.show = writer, data, show
        self.latest: dict[str, float] = {}
        self._last = (0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting tokens per second."""
        self._last = (trainer.global_step, _language(pl_module).clock.read())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the step, every log_every steps."""
        module, step = _language(pl_module), trainer.global_step
        run = module.run
        if (batch_idx + 1) % run.accumulate or step % run.log_every:
            return
        (past_step, past_s), now_s = self._last, module.clock.read()
        self._last = (step, now_s)
        tokens = (step - past_step) * run.accumulate * run.batch * run.model.seqlen
        self._write(trainer, "train/loss", float(module.step_loss), "nats_per_token", step, now_s)
        self._write(trainer, "grad_norm", float(module.grad_norm), "", step, now_s)
        self._write(trainer, "lr", lr_at(step - 1, run.steps, run.optim), "", step, now_s)
        self._write(trainer, "tokens_per_s", tokens / max(1e-9, now_s - past_s), "tokens_per_s", step, now_s)
        self._tell(trainer, module, validated=False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is not training time."""
        _language(pl_module).clock.stop()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the validation, also the one before the first step."""
        module, step = _language(pl_module), trainer.global_step
        now_s = module.clock.read()
        per_token, per_byte = module.val_losses()
        self._write(trainer, "val/loss", per_token, "nats_per_token", step, now_s)
        self._write(trainer, "val/loss_bytes", per_byte, "nats_per_byte", step, now_s)
        if self.data.bigram is not None and step == 0:
            bigram = self.data.bigram
            self.writer.write("baseline/bigram", bigram.nats_per_byte, unit="nats_per_byte", step=0)
            self.writer.write("baseline/bigram_floor", bigram.floor_nats_per_byte, unit="nats_per_byte", step=0)
        model = module.run.model
        # the explicit weights of a layer take at most 1 GiB, unless one window needs more
        windows = max(1, min(module.run.batch, 2**28 // (model.nheads * model.seqlen**2)))
        tokens = self.data.val_windows[:windows, :-1].to(pl_module.device)
        for i, probe in enumerate(probe_attention(module.model, tokens)):
            self._write(trainer, f"attn_norm/layer_{i}", probe.attention_norm, "", step, now_s)
            self._write(trainer, f"row_mass/layer_{i}", probe.row_mass, "", step, now_s)
            self._write(trainer, f"sink/layer_{i}", probe.sink_mass, "", step, now_s)
        if step == module.run.steps and module.run.sample_tokens:
            self._sample(module, step)
        self._tell(trainer, module, validated=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training goes on."""
        _language(pl_module).clock.start()

    def _write(self, trainer: pl.Trainer, name: str, value: float, unit: str, step: int, time_s: float) -> None:
        self.writer.write(name, value, unit=unit, step=step, time_s=time_s)
        if trainer.logger is not None:
            trainer.logger.log_metrics({name: value}, step=step)
        if name in ("train/loss", "val/loss", "val/loss_bytes", "tokens_per_s"):
            self.latest[name] = value

    def _tell(self, trainer: pl.Trainer, module: LanguageModule, *, validated: bool) -> None:
        run = module.run
        own_bias = run.model.attention == "sigmoid" and run.model.sigmoid_bias is not None
        name = f"{run.name} {run.model.attention}" + (f" b={run.model.sigmoid_bias:g}" if own_bias else "")
        now_s = module.clock.read()
        self.show(Progress(name, trainer.global_step, run.steps, now_s, dict(self.latest), validated))

    def _sample(self, module: LanguageModule, step: int) -> None:
        """The first validation tokens and what the model makes of them, in sample.txt."""
        prompt = self.data.val_windows[:1, : min(32, module.run.model.seqlen)].to(module.device)
        tokens = generate(module.model, prompt, module.run.sample_tokens, temperature=0.8, seed=module.run.seed)
        text = self.data.tokenizer.decode(tokens[0].tolist())
        (self.writer.path.parent / "sample.txt").write_text(text, "utf-8")
        self.writer.write("sample", step=step, artifact="sample.txt", temperature=0.8)


class Interrupted(SystemExit):
    """A signal ended the training after a checkpoint; as an exit its code is 128 + the signal's number: 130, 143."""

    def __init__(self, signum: int, step: int, checkpoint: Path) -> None:
        super().__init__(128 + signum)
        self.step, self.checkpoint = step, checkpoint
        self.signal_name = signal.Signals(signum).name


class Saver(pl.Callback):
    """Saves a checkpoint when one is due, and when SIGINT or SIGTERM asks to stop; then raises `Interrupted`.

    A step is finished when its validation is, so a checkpoint never stands between the two. A second signal
    ends the process at once, with the same exit code and without a checkpoint.

    Args:
        run_dir: of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
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
        run = _language(pl_module).run
        if (batch_idx + 1) % run.accumulate == 0 and trainer.global_step % run.val_interval:
            self._step_end(trainer, _language(pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A step with validation has ended."""
        if not trainer.sanity_checking:
            self._step_end(trainer, _language(pl_module))

    def _step_end(self, trainer: pl.Trainer, module: LanguageModule) -> None:
        step = trainer.global_step
        path = checkpoint_path(self.run_dir, step)
        if step % module.run.save_every == 0 or step == module.run.steps or self._received is not None:
            trainer.save_checkpoint(path, weights_only=False)
            keep_last(self.run_dir, module.run.keep_last)
        if self._received is not None and step < module.run.steps:
            raise Interrupted(self._received, step, path)


def _language(module: pl.LightningModule) -> LanguageModule:
    """The module as what it is."""
    return module  # pyright: ignore[reportReturnType]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's announcements, and without two warnings of its own making.

    One says that a GPU stays unused although the CPU was asked for, one that Lightning still uses torch's LeafSpec.
    """
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="GPU available but not used")
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
