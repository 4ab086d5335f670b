"""Training a speech recogniser with CTC: its description, its module, word and character errors; and using it.

Steps, optimizer and resume are module.py's, audio is audio.py's.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.text import char_error_rate, word_error_rate

from ..distributed.plans import parallelize_data
from ..distributed.processes import MeshSizes, is_first
from ..models.ctc_decode import greedy, prefix_beam
from ..models.speech import SpeechConfig, SpeechEncoder
from ..record import RecordWriter
from .audio import (
    AudioBatch,
    AudioConfig,
    AudioData,
    SpecAugmentConfig,
    collate,
    load_audio,
    log_mel,
    read_audio,
    spec_augment,
)
from .baseline import best_constant
from .checkpoint import check_kind, find_checkpoint, load_config, load_weights
from .hearing import write_hearing
from .module import Feed, Metric, Options, Prepared, RunModule, train_run
from .part import (
    Order,
    Part,
    agree_on_skipped,
    check_data_parallel,
    first_left,
    own_draws,
    part_of,
    val_numbers,
    what_is_left,
)
from .run import Run, check_cuda_graphs

FINAL = ("val/cer", "val/cer_se", "val/wer", "val/wer_se", "val/loss", "baseline/constant_cer")


@dataclass(frozen=True, kw_only=True)
class SpeechRun(Run):
    """A complete description of one training of a speech recogniser: on the same machine with the same versions it
    gives the same model. A sample of its batches is an utterance.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    model: SpeechConfig
    data: AudioConfig = field(default_factory=AudioConfig)
    augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)
    workers: int = 0  # processes that read audio; 0: this one
    pad_frames: int | None = None  # to which a shorter training batch is padded; None: its longest utterance's
    compile: bool = False  # torch.compile what trains on batches of pad_frames: a minute at most, then faster steps
    cuda_graphs: bool = False  # of what is compiled: a step of a small model no longer waits for Python

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.vocab_size != self.data.vocab_size:
            raise ValueError(
                f"model.vocab_size must be the number of data.characters and the blank, {self.data.vocab_size}, "
                f"got {self.model.vocab_size}"
            )
        if self.model.mels != self.data.mels:
            raise ValueError(f"model.mels must be data.mels={self.data.mels}, got {self.model.mels}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        if self.pad_frames is not None and self.pad_frames < 1:
            raise ValueError(f"pad_frames must be positive or None, got {self.pad_frames}")
        if self.compile and (self.pad_frames is None or self.model.packing):  # batches must be of one shape
            raise ValueError(
                f"compile needs pad_frames and model.packing=False, got {self.pad_frames}, {self.model.packing}"
            )
        check_cuda_graphs(self.cuda_graphs, self.compile, self.accumulate)

    def build(self) -> nn.Module:
        """The model to train."""
        return SpeechEncoder(self.model)

    def settings(self) -> dict[str, Any]:
        """The description in one flat dict for the records; sigmoid_bias is the number that is used."""
        return {**super().settings(), "sigmoid_bias": self.model.bias}

    def train(self, out_dir: Path, **options: Any) -> dict[str, float]:
        """`train_speech`."""
        return train_speech(self, out_dir, **options)


class SpeechBatch(NamedTuple):
    """Utterances, their lengths where nobody waits for a device to know them, and where the data stand after them."""

    audio: AudioBatch
    frames: Tensor  # (batch,) int64, on the CPU, of each utterance
    characters: Tensor  # (batch,) int64, on the CPU
    position: dict[str, Any]


class SpeechModule(RunModule):
    """A speech encoder with its loss: what Lightning drives.

        loss = -sum over utterances of log sum over paths of prod_t y_t(path_t) / characters        nats per character

    On a mesh along dp each rank has its utterances of every micro-batch, and the mean over ranks is the loss of one
    process, since each divides by the characters of all: SpecAugment and CAPE draw for all utterances, by all ranks
    alike. Dropout does not: with dropout_p above 0 what a rank's model draws, CAPE included, is its own, a function of
    the seed, the position of the data and the rank.

    Args:
        run: the description.
        data: what is read.
    """

    loss_unit = "nats_per_character"
    read_per_sample = ("utterances_per_s", 1)

    def __init__(self, run: SpeechRun, data: AudioData) -> None:
        super().__init__(run, run.build())
        self.data = data
        mode, encode = "reduce-overhead" if run.cuda_graphs else None, self.model.__call__
        self._encode = torch.compile(encode, dynamic=False, mode=mode) if run.compile else encode
        self._nats, self._texts = 0.0, ([], [])  # of a validation: loss, what was heard and what was said
        self._is_whole = False  # whether the model is called with a batch that it is compiled for
        self._part, self._longest = Part(0, run.batch, run.batch), 0  # of a micro-batch: whose, and positions of all

    def check_mesh(self, sizes: MeshSizes) -> None:
        """Whether it can be trained on a mesh.

        Raises:
            ValueError: as `check_data_parallel`.
        """
        check_data_parallel(self.run, sizes)

    def configure_model(self) -> None:
        """Lightning's hook: over the mesh, where there is one."""
        if self.device_mesh is None:
            return
        model: Any = self.model
        if self.mesh is not None and model.cape is not None:
            model.cape.place = lambda: (self._part.start, self._part.total, self._longest)
        compiled = (lambda: self._is_whole) if self.run.compile else None
        parallelize_data(model, self.device_mesh, compiled=compiled)

    def train_dataloader(self) -> Feed:
        """Training batches without an end; where they begin is read when they do, after a checkpoint is restored."""
        return Feed(self._train_batches)

    def _train_batches(self) -> Iterator[SpeechBatch]:
        start = 0 if self.position is None else self.position["sample"]
        order = Order(self.run, self.data.train, start, *self.place)
        loader = self._loader(self.data.train, batches=order, frames=self.run.pad_frames or 0)
        for number, audio in what_is_left(self, loader, self.data.train, self._nothing(1)):
            position = {"sample": start + number * self.run.batch}
            yield SpeechBatch(audio, audio.lengths, audio.token_lengths, position)

    def val_dataloader(self) -> Feed:
        """The validation utterances, on a mesh this rank's."""
        rank, ranks = self.place
        mine, further = val_numbers(len(self.data.val), self.run.batch // ranks, rank, ranks)
        loader = self._loader(self.data.val, None if ranks == 1 else mine)
        nothing = self._nothing(100)

        def batches() -> Iterator[SpeechBatch]:
            for _, audio in what_is_left(self, itertools.chain(loader, [nothing] * further), self.data.val, nothing):
                yield SpeechBatch(audio, audio.lengths, audio.token_lengths, {})

        return Feed(batches)

    def _nothing(self, frames: int) -> AudioBatch:
        """An utterance of silence and no character."""
        silence, tokens = torch.zeros(1, frames, self.run.data.mels), torch.zeros(1, 1, dtype=torch.int64)
        return AudioBatch(silence, torch.tensor([frames]), tokens, torch.tensor([0]))

    def _loader(self, dataset: Any, order: Any = None, batches: Any = None, frames: int = 0) -> DataLoader:
        """Batches of an order of the utterances, all by default, or batches that are given as their numbers."""
        return DataLoader(
            dataset,
            batch_size=1 if batches else self.run.batch // self.place[1],
            sampler=order,
            batch_sampler=batches,
            num_workers=self.run.workers,
            collate_fn=functools.partial(collate, frames=frames),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.run.seed),  # else a draw of the training's
        )

    def transfer_batch_to_device(self, batch: SpeechBatch, device: torch.device, dataloader_idx: int) -> SpeechBatch:
        """Lightning's hook: only the audio and its text move."""
        return batch._replace(audio=AudioBatch(*(x.to(device, non_blocking=True) for x in batch.audio)))

    def _nats_of(self, batch: SpeechBatch, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each utterance, log-probabilities, and their lengths on the CPU, where torch's loss reads them."""
        # a longer batch, or one that lacks an utterance left out, would be compiled anew
        shape = self.run.batch // self.place[1], self.run.pad_frames
        self._is_whole = self.training and features.shape[:2] == shape
        encode = self._encode if self._is_whole and self.mesh is None else self.model  # on a mesh blocks are compiled
        logits, _ = encode(features, batch.audio.lengths)
        log_probs = logits.float().log_softmax(-1)
        lengths = torch.tensor([self.run.model.positions(frames) for frames in batch.frames.tolist()])
        nats = F.ctc_loss(
            log_probs.transpose(0, 1), batch.audio.tokens, lengths, batch.characters, reduction="none"
        )  # fmt: skip
        return nats, log_probs, lengths

    def batch_loss(self, batch: SpeechBatch) -> Tensor:
        """Mean loss of a batch after SpecAugment."""
        characters = self._share(batch)
        features = spec_augment(batch.audio.features, batch.audio.lengths, self.run.augment, self._part)
        if self.mesh is None:
            return self._nats_of(batch, features)[0].sum() / batch.audio.token_lengths.sum()
        rank, ranks = self.place
        key = self.run.seed, batch.position["sample"], rank
        # masks are as large as a rank's utterances are long, after which its draws would no longer be the others'
        alone = own_draws(self.device, *key) if self.run.model.dropout_p else nullcontext()
        with alone:
            nats, _, _ = self._nats_of(batch, features)
        return nats.sum() * (0.0 if self._part.spare else ranks / characters)

    def _share(self, batch: SpeechBatch) -> int:
        """Note which part of a micro-batch a batch is, and how long all are: the characters of all."""
        of_mine = int(batch.characters.sum())  # 0: of no utterance
        mine = len(batch.frames) if of_mine else 0, of_mine, batch.audio.features.shape[1]
        counts, characters, frames = zip(*self.of_all(mine), strict=True)
        self._part = part_of(mine[0], counts, None if self.mesh is None else self.mesh["dp"])
        self._longest = self.run.model.positions(max(frames))
        return sum(characters)

    def on_validation_epoch_start(self) -> None:
        """Start anew."""
        self._nats, self._texts = 0.0, ([], [])

    def validation_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        """Add what was heard in a batch, by the best path."""
        nats, log_probs, lengths = self._nats_of(batch, batch.audio.features)
        if not int(batch.characters.sum()):  # of no utterance: other ranks have one more batch
            return
        self._nats += float(nats.sum())
        heard, said = self._texts
        heard += map(self.run.data.decode, greedy(log_probs, lengths))
        ends = batch.characters.tolist()
        said += [self.run.data.decode(row[:end]) for row, end in zip(batch.audio.tokens.tolist(), ends, strict=True)]

    def validated(self) -> Iterator[Metric]:
        """Character and word error rate of the best path, each with its standard error, and the loss."""
        nats, texts = zip(*self.of_all((self._nats, self._texts)), strict=True)
        heard, said = (_in_turn(of_ranks) for of_ranks in zip(*texts, strict=True))
        self._nats, self._texts = sum(nats), (heard, said)
        for name, value in error_rates(*self._texts).items():
            yield f"val/{name}", value, ""
        yield "val/loss", self._nats / sum(map(len, self._texts[1])), "nats_per_character"

    def baselines(self) -> Iterator[Metric]:
        """The character error rate of the best answer that does not listen."""
        train = [utterance.text for utterance in self.data.train.utterances]
        answer = best_constant(self._texts[1], train, self.run.data.characters)
        yield "baseline/constant_cer", error_rates([answer] * len(self._texts[1]), self._texts[1])["cer"], ""

    def probed(self) -> Iterator[tuple[str, float]]:
        """Mean norm of A v of a position, before the output projection, of each block, on some utterances."""
        norms: list[float] = []
        model: Any = self.model
        batch = collate(first_left(self.data.val, min(self.run.batch, 16)))
        assert batch is not None
        audio = AudioBatch(*(x.to(self.device) for x in batch))

        def watch(_: nn.Module, inputs: tuple[Tensor]) -> None:
            longest = inputs[0].shape[1]
            lengths = torch.tensor([self.run.model.positions(n) for n in audio.lengths.tolist()], device=self.device)
            within = torch.arange(longest, device=self.device) < lengths[:, None]
            of_positions = inputs[0].float().norm(dim=-1)
            norms.append(float((of_positions if self.run.model.packing else of_positions[within]).mean()))

        hooks = [block.attention.out_proj.register_forward_pre_hook(watch) for block in model.blocks]
        try:
            with torch.no_grad():
                model(audio.features, audio.lengths)
        finally:
            for hook in hooks:
                hook.remove()
        yield from ((f"attn_norm/layer_{i}", norm) for i, norm in enumerate(norms))

    def finish(self, writer: RecordWriter) -> None:
        """How many utterances were left out, and pictures of a validation utterance."""
        agree_on_skipped(self)
        writer.write("data/skipped", sum(map(len, self.data.skipped)), unit="utterances", step=self.run.steps)
        model: Any = self.model
        if self.mesh is not None:
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(self.model, options=whole)
            if not is_first():
                return
            model = self.run.build().to(self.device).eval()
            model.load_state_dict(weights)
        write_hearing(writer, model, self.data.val, step=self.run.steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add which utterances were left out."""
        super().on_save_checkpoint(checkpoint)
        agree_on_skipped(self)
        checkpoint["flashsigmoid"]["skipped"] = self.data.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        super().on_load_checkpoint(checkpoint)
        self.data.skip(checkpoint["flashsigmoid"]["skipped"])


def _in_turn(of_ranks: Sequence[list[str]]) -> list[str]:
    """Texts in their order, of which rank r has every N-th from the r-th on."""
    return [text for row in itertools.zip_longest(*of_ranks) for text in row if text is not None]


def error_rates(heard: Sequence[str], said: Sequence[str]) -> dict[str, float]:
    """Errors of characters and of words, over what was said, and their standard errors over utterances.

        rate = sum_i e_i / sum_i n_i          e_i = fewest insertions, deletions and substitutions, n_i = length
        se = sqrt(N / (N - 1) sum_i (e_i - rate n_i)^2) / sum_i n_i         of N utterances; 0 of one

    Args:
        heard: what the model answers.
        said: the text, not empty, of each.

    Returns:
        "cer", "cer_se", "wer", "wer_se".
    """
    found: dict[str, float] = {}
    for name, rate_of, length in (("cer", char_error_rate, len), ("wer", word_error_rate, lambda s: len(s.split()))):
        n = torch.tensor([length(text) for text in said], dtype=torch.float64)
        rates = [float(rate_of([answer], [text])) for answer, text in zip(heard, said, strict=True)]
        e = (torch.tensor(rates, dtype=torch.float64) * n).round()  # torchmetrics gives float32
        rate, count = float(e.sum() / n.sum()), len(said)
        variance = float((e - rate * n).square().sum()) * count / max(1, count - 1)
        found |= {name: rate, f"{name}_se": math.sqrt(variance) / float(n.sum())}
    return found


def train_speech(run: SpeechRun, out_dir: str | Path, **options: Unpack[Options]) -> dict[str, float]:
    """Train a speech recogniser; everything it leaves is in `out_dir`: records.jsonl, checkpoints/, tb/.

    On the CPU a run that was killed and resumed, however often, ends with the same bits as one that was not. Ctrl-C or
    SIGTERM finishes the step, saves a checkpoint, prints one line and raises `Interrupted`. The random states of
    python, numpy and torch are set.

    Args:
        run: what to train.
        out_dir, options: as `language.train`.

    Returns:
        The last validation and the baseline: `FINAL`.

    Raises:
        FileNotFoundError: there is no data where it should be.
        ValueError: bad data; a run in `out_dir` already; resuming with another description or other data.
        Interrupted: a signal, or max_minutes, ended it.
    """

    def prepare(start: Path | None) -> Prepared:
        data = load_audio(run.data, run.model.positions)
        return Prepared(lambda: SpeechModule(run, data), data.fingerprint)

    return train_run(run, out_dir, prepare, FINAL, **options)


def load_recogniser(path: str | Path, device: str | torch.device = "cpu") -> tuple[SpeechEncoder, AudioConfig]:
    """The encoder, in eval mode, of a checkpoint or of a run's newest checkpoint, and how its audio is read.

    Raises:
        ValueError: there is none, it is of another kind of model, or it is damaged.
    """
    path = find_checkpoint(path)
    config = load_config(path)
    check_kind(path, config, "a speech recogniser")
    try:
        model = SpeechEncoder(SpeechConfig(**config["model"]))
        model.load_state_dict(load_weights(path))
        audio = AudioConfig(**config["data"])
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"a checkpoint must hold a speech encoder and its weights, got {path}: {reason}") from error
    return model.to(device).eval(), audio


def transcribe(model: SpeechEncoder, audio: AudioConfig, path: str | Path, *, beam: int = 1) -> str:
    """Text of an audio file.

    Args:
        model: in eval mode.
        audio: how it is read.
        path: of the file.
        beam: prefixes that a beam search keeps; 1: the best path. Default: 1.

    Raises:
        ValueError: the file cannot be read, or beam is not positive.
    """
    if beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    try:
        features = log_mel(read_audio(path, audio.rate), audio.rate, audio.mels)
    except ValueError as error:
        raise ValueError(f"audio must be usable, got {path}: {error}") from error
    device = next(model.parameters()).device
    with torch.no_grad():
        logits, lengths = model(features[None].to(device), torch.tensor([len(features)], device=device))
        log_probs = logits.float().log_softmax(-1)
    tokens = greedy(log_probs, lengths)[0] if beam == 1 else prefix_beam(log_probs[0], beam=beam)[0][0]
    return audio.decode(tokens)
