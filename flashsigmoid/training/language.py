"""Training a language model: its module, and `train`. What all trainings share is module.py's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diagnostics.probes import probe_attention
from ..models.generation import generate
from ..models.gpt import GPT
from ..record import RECORDS_NAME, RecordWriter, read_records
from .callbacks import Show, show_line
from .checkpoint import TOKENIZER
from .data import Batch, LanguageData, load_text
from .module import Feed, Metric, RunModule, fit, resumed_from
from .run import LanguageRun as LanguageRun
from .stream import PREFIX, load_stream
from .tokenizer import Tokenizer, load_tokenizer


class LanguageModule(RunModule):
    """A GPT with its loss, its optimizer and the position of its data: what Lightning drives.

        loss = mean over tokens of -log softmax(logits)[target]       nats per token

    Args:
        run: the description.
        data: what is read.
        model: another model that gives logits of tokens. Default: a fresh GPT.
    """

    loss_unit = "nats_per_token"

    def __init__(self, run: LanguageRun, data: LanguageData, model: nn.Module | None = None) -> None:
        super().__init__(run, GPT(run.model) if model is None else model)
        self.data = data
        self.read_per_sample = ("tokens_per_s", run.model.seqlen)
        self._val = (0.0, 0, 0)  # nats, tokens, bytes
        self._byte_lengths = torch.from_numpy(data.tokenizer.byte_lengths())

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean loss of windows (batch, seqlen + 1): a scalar, float32."""
        # (batch, seqlen, vocab_size)
        logits = self.model(tokens[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def batch_loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch of windows."""
        return self.loss(batch.tokens)

    def train_dataloader(self) -> Feed:
        """Training batches without an end; where they begin is read when they do, after a checkpoint is restored."""
        return Feed(lambda: self.data.train.batches(self.run.batch, self.position))

    def val_dataloader(self) -> Feed:
        """The validation windows."""
        return Feed(lambda: (Batch(part, {}) for part in self.data.val_windows.split(self.run.batch)))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Lightning's hook: only the tokens move."""
        return Batch(batch.tokens.to(device, non_blocking=True), batch.position)

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

    def validated(self) -> Iterator[Metric]:
        """Both means."""
        per_token, per_byte = self.val_losses()
        yield "val/loss", per_token, "nats_per_token"
        yield "val/loss_bytes", per_byte, "nats_per_byte"

    def baselines(self) -> Iterator[Metric]:
        """A bigram model on the same windows, of text files."""
        bigram = self.data.bigram
        if bigram is not None:
            yield "baseline/bigram", bigram.nats_per_byte, "nats_per_byte"
            yield "baseline/bigram_floor", bigram.floor_nats_per_byte, "nats_per_byte"

    def probed(self) -> Iterator[tuple[str, float]]:
        """Attention on the first validation windows, at most a micro-batch."""
        model = self.run.model
        # the explicit weights of a layer take at most 1 GiB, unless one window needs more
        windows = max(1, min(self.run.batch, 2**28 // (model.nheads * model.seqlen**2)))
        tokens = self.data.val_windows[:windows, :-1].to(self.device)
        for i, probe in enumerate(probe_attention(self.model, tokens)):
            yield f"attn_norm/layer_{i}", probe.attention_norm
            yield f"row_mass/layer_{i}", probe.row_mass
            yield f"sink/layer_{i}", probe.sink_mass

    def finish(self, writer: RecordWriter) -> None:
        """The first validation tokens and what the model makes of them, in sample.txt."""
        run = self.run
        if not run.sample_tokens:
            return
        prompt = self.data.val_windows[:1, : min(32, run.model.seqlen)].to(self.device)
        tokens = generate(self.model, prompt, run.sample_tokens, temperature=0.8, seed=run.seed)  # pyright: ignore[reportArgumentType]
        text = self.data.tokenizer.decode(tokens[0].tolist())
        (writer.path.parent / "sample.txt").write_text(text, "utf-8")
        writer.write("sample", step=run.steps, artifact="sample.txt", temperature=0.8)


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
    start = resumed_from(out_dir, resume)
    data = load_data(run, None if start is None else load_tokenizer(start / TOKENIZER))
    fit(
        run,
        lambda: LanguageModule(run, data),
        out_dir,
        start,
        fingerprint=data.fingerprint,
        files={TOKENIZER: data.tokenizer.to_json()},
        device=device,
        show=show,
        command=command,
    )
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
