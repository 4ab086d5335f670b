"""Training a language model on Lightning: the LightningModule and `train`. Descriptions of runs are run.py's."""

from __future__ import annotations

import importlib.util
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import LightningEnvironment  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from torch.nn import functional as F

from ..models.gpt import GPT
from ..record import RECORDS_NAME, RecordWriter, read_records
from .callbacks import Interrupted, Recorder, Saver, Show, Stopwatch, quiet_lightning, show_line
from .checkpoint import (
    FOLDER,
    TOKENIZER,
    DirectoryCheckpoint,
    checkpoints,
    clean,
    load_config,
    rng_state,
    set_rng_state,
)
from .data import Batch, LanguageData, load_text
from .optim import adamw, lr_at
from .run import LanguageRun as LanguageRun
from .run import check_unchanged
from .stream import PREFIX, load_stream
from .tokenizer import Tokenizer, load_tokenizer


class LanguageModule(pl.LightningModule):
    """A GPT with its loss, its optimizer and the position of its data: what Lightning drives.

        loss = mean over tokens of -log softmax(logits)[target]       nats per token

    Args:
        run: the description.
        data: what is read.
    """

    def __init__(self, run: LanguageRun, data: LanguageData) -> None:
        super().__init__()
        self.run, self.data = run, data
        self.model = GPT(run.model)
        self.position: dict[str, Any] | None = None  # of the data after the last batch used
        self.clock = Stopwatch()
        self.grad_norm = torch.tensor(torch.nan)  # of the last optimizer step, before clipping
        self.step_loss = torch.zeros(())  # mean over the micro-batches of the current step
        self._resumed: dict[str, Any] | None = None
        self._val = (0.0, 0, 0)  # nats, tokens, bytes
        self._byte_lengths = torch.from_numpy(data.tokenizer.byte_lengths())

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean loss of windows (batch, seqlen + 1): a scalar, float32."""
        # (batch, seqlen, vocab_size)
        logits = self.model(tokens[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def train_dataloader(self) -> Feed:
        """Training batches without an end; where they begin is read when they do, after a checkpoint is restored."""
        return Feed(lambda: self.data.train.batches(self.run.batch, self.position))

    def val_dataloader(self) -> Feed:
        """The validation windows."""
        return Feed(lambda: (Batch(part, {}) for part in self.data.val_windows.split(self.run.batch)))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Lightning's hook: only the tokens move."""
        return Batch(batch.tokens.to(device, non_blocking=True), batch.position)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a micro-batch; Lightning divides it by their number."""
        loss = self.loss(batch.tokens)
        if batch_idx % self.run.accumulate == 0:
            self.step_loss = torch.zeros((), device=loss.device)
        self.step_loss += loss.detach() / self.run.accumulate
        self.position = batch.position
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self._val = (0.0, 0, 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch of windows to the sums."""
        targets, (nats, tokens, size) = batch.tokens[:, 1:], self._val
        nats += float(self.loss(batch.tokens)) * targets.numel()
        size += int(self._byte_lengths[targets.cpu()].sum())
        self._val = nats, tokens + targets.numel(), size

    def val_losses(self) -> tuple[float, float]:
        """Means of the last validation: nats per token and nats per byte."""
        nats, tokens, size = self._val
        return nats / tokens, nats / max(1, size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; its learning rate is set before each step."""
        return adamw(self.model, self.run.optim)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate of this step: a pure function of its number."""
        for group in optimizer.param_groups:
            group["lr"] = lr_at(self.trainer.global_step, self.run.steps, self.run.optim)

    def configure_gradient_clipping(self, optimizer: Any, *limits: Any, **options: Any) -> None:
        """Clip the norm of the whole gradient, and keep it for the records."""
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.optim.clip)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not store: the position of the data, the random states, the time."""
        time_s = self.clock.read()
        checkpoint["flashsigmoid"] = {"position": self.position, "rng": rng_state(), "time_s": time_s}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back; the random states wait until nothing else draws before the first batch."""
        ours: dict[str, Any] = checkpoint["flashsigmoid"]
        self._resumed, self.position = ours, ours["position"]

    def on_train_start(self) -> None:
        """Random states and time go on where they stood."""
        if self._resumed is not None:
            set_rng_state(self._resumed["rng"])
        self.clock.start(0.0 if self._resumed is None else self._resumed["time_s"])


class Feed:
    """Batches as Lightning wants them: what can be iterated again and again.

    Args:
        begin: called for the batches of one iteration.
    """

    def __init__(self, begin: Callable[[], Iterator[Batch]]) -> None:
        self.begin = begin

    def __iter__(self) -> Iterator[Batch]:
        return self.begin()


def train(
    run: LanguageRun,
    out_dir: str | Path,
    *,
    resume: bool = False,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    show: Show = show_line,
    command: str | None = None,
) -> dict[str, float]:
    """Train a language model; everything it leaves is in `out_dir`: records.jsonl, checkpoints/, sample.txt, tb/.

    On the CPU a run that was killed and resumed, however often, ends with the same bits as one that was not. Ctrl-C or
    SIGTERM finishes the step, saves a checkpoint, prints one line and raises `Interrupted` (exit code 130, 143).
    The random states of python, numpy and torch are set.

    Args:
        run: what to train.
        out_dir: folder of this one run.
        resume: go on from the newest checkpoint in `out_dir`, from the beginning if there is none. Default: False,
            begin anew, in a folder without a run.
        device: "auto" is the accelerator of the machine, else the CPU.
        show: told where the training stands. Default: one line on stderr.
        command: how the run was started, for the records. Default: this process's command line.

    Returns:
        The last validation and, of text files, the baselines: "val/loss", "val/loss_bytes", "baseline/bigram",
        "baseline/bigram_floor".

    Raises:
        FileNotFoundError: there is no data at the path.
        ValueError: bad data; a run in `out_dir` already; resuming with another description or other data.
        Interrupted: a signal ended it.
    """
    out_dir = Path(out_dir)
    found = checkpoints(out_dir)
    if not resume and (found or (out_dir / RECORDS_NAME).exists()):
        raise ValueError(f"out_dir must not hold a run unless it is resumed, got {out_dir}")
    clean(out_dir)
    start = found[-1] if found else None
    data = load_data(run, None if start is None else load_tokenizer(start / TOKENIZER))
    config = {**run.sections(), "fingerprint": data.fingerprint}
    if start is not None:
        check_unchanged(load_config(start), config)
    step = 0 if start is None else int(start.name.removeprefix("step-"))
    if step < run.steps:
        _fit(run, data, config, out_dir, start, step, device, show, command)
    final = ("val/loss", "val/loss_bytes", "baseline/bigram", "baseline/bigram_floor")
    return {
        r.name: r.value for r in read_records(out_dir / RECORDS_NAME).records if r.name in final and r.value is not None
    }


def load_data(run: LanguageRun, tokenizer: Tokenizer | None = None) -> LanguageData:
    """The data of a run; `tokenizer` instead of training one.

    Raises:
        FileNotFoundError, ValueError: as `load_text` and `load_stream`; the tokenizer has more tokens than the model.
    """
    sizes = {"vocab_size": run.model.vocab_size, "seqlen": run.model.seqlen, "tokenizer": tokenizer}
    streamed = (run.data.source or "").startswith(PREFIX)
    data = load_stream(run.data, **sizes) if streamed else load_text(run.data, seed=run.seed, **sizes)
    if data.tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"model.vocab_size must be at least the tokenizer's {data.tokenizer.vocab_size}, got {run.model.vocab_size}"
        )
    return data


def _fit(
    run: LanguageRun,
    data: LanguageData,
    config: dict[str, Any],
    out_dir: Path,
    start: Path | None,
    step: int,
    device: str,
    show: Show,
    command: str | None,
) -> None:
    """From the checkpoint `start`, or the beginning, to the end."""
    if start is None:
        for leftover in (out_dir / FOLDER, out_dir / "tb"):
            shutil.rmtree(leftover, ignore_errors=True)
        (out_dir / RECORDS_NAME).unlink(missing_ok=True)
    torch.manual_seed(run.seed)
    random.seed(run.seed)
    np.random.seed(run.seed)
    saver = Saver(out_dir)
    with (
        RecordWriter(out_dir / RECORDS_NAME, run.settings(), command, None if start is None else step) as writer,
        quiet_lightning(),
    ):
        trainer = pl.Trainer(
            default_root_dir=out_dir,
            accelerator={"cuda": "gpu"}.get(device, device),
            devices=1,
            precision="bf16-mixed" if run.precision == "bf16" else "32-true",
            logger=_tensorboard(out_dir, step),
            callbacks=[Recorder(writer, data, show), saver],
            max_epochs=-1,
            max_steps=run.steps,
            accumulate_grad_batches=run.accumulate,
            check_val_every_n_epoch=None,
            val_check_interval=run.val_interval * run.accumulate,
            # Lightning's check before training, over all windows, is the validation of step 0
            num_sanity_val_steps=-1 if start is None else 0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            # one process, wherever it runs: a cluster's variables are not read
            plugins=[DirectoryCheckpoint(config, data.tokenizer), LightningEnvironment()],
        )
        saver.listen()
        try:
            trainer.fit(LanguageModule(run, data), ckpt_path=start, weights_only=True)
        except Interrupted as stop:
            print(
                f"\nstopped by {stop.signal_name} after step {stop.step}, saved {stop.checkpoint}: "
                "the same command with --resume goes on",
                file=sys.stderr,
            )
            raise
        finally:
            saver.close()


def _tensorboard(out_dir: Path, step: int) -> TensorBoardLogger | Literal[False]:
    """TensorBoard in tb/, without what lies after `step`; False where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return False
    return TensorBoardLogger(out_dir, name="tb", version="", purge_step=step + 1 if step else None)
