"""Speech and its text: the sample, a folder, a manifest, LibriSpeech as downloaded; log-mel features and SpecAugment.

What cannot be read is named in one line, and ends the run or is left out and counted: `AudioConfig.on_corrupt`. The
features are kaldi-native-fbank's: the window, the pre-emphasis and the filters that speech recognition has used since
Kaldi, maintained by its people, where torch.stft would leave all of them to us.
"""

from __future__ import annotations

import csv
import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import kaldi_native_fbank as knf
import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..nn.config import check_types
from ..samples import an4
from .part import Part

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CHARACTERS = " 'ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_AUDIO = (".wav", ".flac", ".ogg")  # what is looked for in a folder
_SCALE = 32768.0  # samples as Kaldi takes them
_FLOOR = 1e-3  # least deviation of a channel that is divided by: silence stays silence


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """Which speech a training reads, and as what.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    # "sample": embedded; "manifest": a file of tab-separated lines with the columns path (absolute, or from its folder)
    # and text, and where there are any split, speaker, start and frames (a part of a file, in samples);
    # "folder": root/train/**/NAME.wav, or .flac or .ogg, each beside its text, NAME.txt; its folder is its speaker
    # "librispeech": root/train-clean-100/SPEAKER/CHAPTER/*.flac and *.trans.txt
    source: Literal["sample", "folder", "manifest", "librispeech"] = "sample"
    root: str | None = None  # the manifest, or the folder; None for the sample only
    train: str = "train"  # splits of the manifest, or folders in the folder, with commas
    val: str = "val"
    hold_out: int = 0  # every so many-th speaker of `train` is validated on, in place of `val`; 0: none
    characters: str = CHARACTERS  # of the text, in upper case; token 0 is the blank, token i the i-th of them
    rate: int = 16_000  # samples a second
    mels: int = 80  # channels of the features
    in_memory: bool = True  # keep features once they are computed: 115 MB an hour
    on_corrupt: Literal["fail", "skip"] = "fail"  # at audio that cannot be used: end, or leave it out and count it

    def __post_init__(self) -> None:
        check_types(self)
        if self.source not in ("sample", "folder", "manifest", "librispeech"):
            raise ValueError(f"source must be sample, folder, manifest or librispeech, got {self.source!r}")
        if self.source != "sample" and self.root is None:
            raise ValueError(f"root must be where the data are for source={self.source!r}, got None")
        if self.on_corrupt not in ("fail", "skip"):
            raise ValueError(f"on_corrupt must be 'fail' or 'skip', got {self.on_corrupt!r}")
        if not self.characters or len(set(self.characters)) != len(self.characters):
            raise ValueError(f"characters must be different ones, at least one, got {self.characters!r}")
        if self.characters != self.characters.upper():
            raise ValueError(f"characters must be in upper case, as the text becomes, got {self.characters!r}")
        for name, least in (("rate", 1000), ("mels", 1), ("hold_out", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        try:
            _bank(self.rate, self.mels)
        except ValueError as error:  # of a band without a frequency
            raise ValueError(f"mels must be as few as rate={self.rate} has bands for, got {self.mels}") from error
        if self.hold_out == 1:
            raise ValueError("hold_out must be 0 or at least 2, so that a speaker is left to train on, got 1")

    @property
    def vocab_size(self) -> int:
        """The characters and the blank."""
        return len(self.characters) + 1

    def encode(self, text: str) -> Int[Tensor, " length"]:
        """Tokens of a text.

        Raises:
            ValueError: a character is none of `characters`.
        """
        found = [self.characters.find(character) + 1 for character in text]
        if 0 in found:
            raise ValueError(f"text must consist of {self.characters!r}, got {text[found.index(0)]!r} in {text!r}")
        return torch.tensor(found)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens without blanks."""
        return "".join(self.characters[token - 1] for token in tokens)


@dataclass(frozen=True)
class Utterance:
    """Where a stretch of speech is, and what was said."""

    path: Path
    text: str  # upper case, single spaces
    speaker: str = ""
    start: int = 0  # in samples
    frames: int = -1  # samples; -1: to the end

    def __str__(self) -> str:
        return str(self.path) if self.frames < 0 else f"{self.path} at sample {self.start}"


class AudioBatch(NamedTuple):
    """A batch, padded with zeros; `collate`'s."""

    features: Tensor  # (batch, frames, mels) float32
    lengths: Tensor  # (batch,) int64, frames of each
    tokens: Tensor  # (batch, characters) int64
    token_lengths: Tensor  # (batch,) int64


Sample = tuple[Tensor, Tensor]  # ((frames, mels) float32, (characters,) int64)


class Utterances(Dataset["Sample | None"]):
    """Features and tokens of utterances; None where one cannot be used and is left out.

    Args:
        utterances: what there is.
        config: how it is read.
        positions: how many the model has for a number of frames; CTC needs one for each character of the text, and
            one more between two that are alike.
    """

    def __init__(self, utterances: Sequence[Utterance], config: AudioConfig, positions: Callable[[int], int]) -> None:
        self.utterances, self.config, self.positions = utterances, config, positions
        self.tokens = [config.encode(utterance.text) for utterance in utterances]
        # shared by the workers of a DataLoader
        self.skipped = torch.zeros(len(utterances), dtype=torch.bool).share_memory_()
        self._features: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> Sample | None:
        tokens = self.tokens[index]
        if index in self._features:
            return self._features[index], tokens
        utterance = self.utterances[index]
        try:
            samples = read_audio(utterance.path, self.config.rate, utterance.start, utterance.frames)
            features = log_mel(samples, self.config.rate, self.config.mels)
            there, needed = self.positions(len(features)), len(tokens) + int((tokens[1:] == tokens[:-1]).sum())
            if there < needed:
                raise ValueError(f"{there} positions for a text that needs {needed}, {utterance.text!r}")
        except ValueError as error:
            if self.config.on_corrupt == "fail":
                raise ValueError(f"audio must be usable, got {utterance}: {error}") from error
            if not self.skipped[index]:
                self.skipped[index] = True
                print(f"left out, not usable audio: {utterance}: {error}", file=sys.stderr, flush=True)
            return None
        if self.config.in_memory:
            self._features[index] = features
        return features, tokens


@dataclass(frozen=True)
class AudioData:
    """Everything a training reads: made by `load_audio`."""

    train: Utterances
    val: Utterances
    fingerprint: str  # changes when the files, their sizes, their text or the features do

    @property
    def skipped(self) -> list[list[int]]:
        """Numbers of the utterances of `train`, and of `val`, that were found unusable and left out so far."""
        return [part.skipped.nonzero().flatten().tolist() for part in (self.train, self.val)]

    def skip(self, numbers: list[list[int]]) -> None:
        """Take as found what `skipped` said in an earlier process."""
        for part, found in zip((self.train, self.val), numbers, strict=True):
            part.skipped[found] = True


def read_audio(path: str | Path, rate: int, start: int = 0, frames: int = -1) -> np.ndarray:
    """Samples of a WAV, FLAC or other file that soundfile reads, channels averaged: (samples,) float32 in [-1, 1].

    Args:
        path: of the file.
        rate: samples a second that it must have.
        start, frames: the part of it, in samples; -1: to the end.

    Raises:
        ValueError: the file is not there, empty, damaged or cut short, of another rate, or holds what is no number.
    """
    if not Path(path).is_file():
        raise ValueError("it is a folder" if Path(path).is_dir() else "there is no such file")
    try:
        with soundfile.SoundFile(path) as file:
            if file.samplerate != rate:
                raise ValueError(f"its rate is {file.samplerate} Hz where data.rate is {rate}")
            wanted = file.frames - start if frames < 0 else frames
            if not 0 <= start <= start + wanted <= file.frames:
                raise ValueError(f"it has {file.frames} samples, the part ends at {start + wanted}")
            file.seek(start)
            samples = file.read(wanted, dtype="float32", always_2d=True).mean(1)
    # soundfile's own are RuntimeErrors, and name the file first; a damaged header may promise terabytes
    except (OSError, RuntimeError, MemoryError) as error:
        text = str(error).partition(": ")[2] or str(error) or type(error).__name__
        raise ValueError(text.splitlines()[0]) from error
    if len(samples) < wanted:
        raise ValueError(f"it ends after {len(samples)} of {wanted} samples")
    if len(samples) < rate // 40:
        raise ValueError(f"it has {len(samples)} samples, less than the 25 ms of a window")
    if not np.isfinite(samples).all():
        raise ValueError("a sample is no finite number")
    return samples


def log_mel(samples: np.ndarray, rate: int, mels: int) -> Float[Tensor, "frames mels"]:
    """Logarithms of the energies in mel bands, 25 ms windows every 10 ms, each channel normalised over the utterance.

        x <- (x - mean(x)) / max(std(x), 1e-3)         over time, for each channel

    Without dither, so that they are the same every time.

    Args:
        samples: (samples,) float32 in [-1, 1], at least one window.
        rate: samples a second.
        mels: bands, from 20 Hz to half the rate.

    Returns:
        (frames, mels) float32, frames = 1 + (samples - window) // shift.
    """
    bank = _bank(rate, mels)
    bank.accept_waveform(rate, (samples * _SCALE).tolist())
    bank.input_finished()
    x = torch.from_numpy(np.stack([bank.get_frame(i) for i in range(bank.num_frames_ready)])).double()
    return ((x - x.mean(0)) / x.std(0, correction=0).clamp(min=_FLOOR)).float()


def _bank(rate: int, mels: int) -> knf.OnlineFbank:
    options = knf.FbankOptions()
    options.frame_opts.samp_freq, options.frame_opts.dither = rate, 0.0
    options.mel_opts.num_bins = mels
    return knf.OnlineFbank(options)


def collate(samples: Sequence[Sample | None], frames: int = 0) -> AudioBatch | None:
    """What is left, padded; for a DataLoader. None if nothing is left; `part.what_is_left` passes over it.

    Args:
        samples: features and tokens, None for what is left out.
        frames: of the batch, unless an utterance has more. Default: 0.
    """
    kept = [sample for sample in samples if sample is not None]
    if not kept:
        return None
    features, tokens = [x for x, _ in kept], [x for _, x in kept]
    pad = torch.nn.utils.rnn.pad_sequence
    padded = pad(features, batch_first=True)
    return AudioBatch(
        F.pad(padded, (0, 0, 0, max(0, frames - padded.shape[1]))),
        torch.tensor([len(x) for x in features]),
        pad(tokens, batch_first=True),
        torch.tensor([len(x) for x in tokens]),
    )


@dataclass(frozen=True, kw_only=True)
class SpecAugmentConfig:
    """Stripes of an utterance that a training batch does not see.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    channel_masks: int = 2  # stripes of channels; 0: none
    channel_width: int = 27  # a stripe's width is uniform from 0 to this many of 80 channels
    time_masks: int = 2  # stripes of frames; 0: none
    time_width: int = 100  # a stripe's width is uniform from 0 to this many frames,
    time_share: float = 0.2  # or to this share of the utterance if that is less, in [0, 1]

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("channel_masks", "channel_width", "time_masks", "time_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0.0 <= self.time_share <= 1.0:
            raise ValueError(f"time_share must be in [0, 1], got {self.time_share}")


def spec_augment(
    features: Float[Tensor, "batch frames mels"],
    lengths: Int[Tensor, " batch"],
    config: SpecAugmentConfig,
    part: Part | None = None,
) -> Float[Tensor, "batch frames mels"]:
    """Features with stripes of zeros, which is their mean; drawn for each utterance, on its device. No time warping.

        width ~ U(0, most),   start ~ U(0, size - width)

    Args:
        features: normalised.
        lengths: frames of each utterance; stripes of time are within.
        config: how many and how wide.
        part: of a micro-batch, for all of which is drawn. Default: all of it.

    Source: arXiv:1904.08779, section 2; the share of the utterance arXiv:1912.05533.
    """
    batch, frames, mels = features.shape
    device, part = features.device, part or Part(0, batch, batch)

    def uniform(masks: int) -> Tensor:
        return part.of(torch.rand(part.total, masks, 1, device=device))

    def hidden(size: int, of: Tensor, most: Tensor, masks: int) -> Tensor:
        """(batch, size), True in a stripe."""
        width = uniform(masks) * most[:, None, None]
        start = uniform(masks) * (of[:, None, None] - width)
        place = torch.arange(size, device=device) + 0.5  # the middle of a frame, so that both ends are as the rest
        return ((place >= start) & (place < start + width)).any(1)

    of_time, of_channel = lengths.float(), torch.full((batch,), float(mels), device=device)
    time = hidden(frames, of_time, (of_time * config.time_share).clamp(max=config.time_width), config.time_masks)
    channel = hidden(mels, of_channel, (of_channel * config.channel_width / 80).clamp(max=mels), config.channel_masks)
    return features.masked_fill(time[:, :, None] | channel[:, None, :], 0.0)


def load_audio(config: AudioConfig, positions: Callable[[int], int]) -> AudioData:
    """Find the training and the validation utterances; audio is read later.

    Args:
        config: where they are.
        positions: as in `Utterances`.

    Raises:
        FileNotFoundError: there is nothing where the data should be.
        ValueError: a part without utterances, or with those of the other; a line without text; a character that the
            configuration lacks.
    """
    root = an4() if config.source == "sample" else Path(config.root or "")
    read = {"folder": _folder, "librispeech": _librispeech}.get(config.source, _manifest)
    train = read(root, config.train)
    if config.hold_out:
        speakers = sorted({utterance.speaker for utterance in train})
        held = set(speakers[:: config.hold_out])
        if len(speakers) < 2:
            raise ValueError(f"hold_out must be 0 where there are not two speakers, got {config.hold_out}")
        val = [utterance for utterance in train if utterance.speaker in held]
        train = [utterance for utterance in train if utterance.speaker not in held]
    else:
        val = read(root, config.val)
        if both := set(train) & set(val):
            raise ValueError(f"validation must be on other utterances than training, got {min(map(str, both))} in both")
    digest = hashlib.sha256(repr((config.characters, config.rate, config.mels)).encode())
    sizes: dict[Path, int] = {}
    for name, part in (("train", train), ("val", val)):
        for each in part:
            if each.path not in sizes:
                sizes[each.path] = each.path.stat().st_size if each.path.is_file() else -1
            line = (name, each.path.name, sizes[each.path], each.start, each.frames, each.text)
            digest.update(repr(line).encode())
    return AudioData(Utterances(train, config, positions), Utterances(val, config, positions), digest.hexdigest())


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")  # spreadsheets put a byte order mark before the first column
    except UnicodeDecodeError as error:
        raise ValueError(f"a text must be UTF-8, got {path}: {error}") from error


def _manifest(path: Path, splits: str) -> list[Utterance]:
    if not path.is_file():
        raise FileNotFoundError(f"root must be a manifest, a file of tab-separated lines, got none at {path}")
    with io.StringIO(_text_of(path), newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        columns = reader.fieldnames or []
        for name in ("path", "text"):
            if name not in columns:
                raise ValueError(
                    f"a manifest must have the columns path and text, got {', '.join(columns) or 'none'} in {path}"
                )
        found = []
        for number, row in enumerate(reader, 2):
            if "split" in columns and row["split"] not in splits.split(","):
                continue
            text = " ".join((row["text"] or "").upper().split())
            for name, given in (("path", row["path"]), ("text", text)):
                if not given:
                    raise ValueError(f"a line of a manifest must have a {name}, got none in line {number} of {path}")
            try:
                start, frames = (int(row.get(name) or default) for name, default in (("start", 0), ("frames", -1)))
            except ValueError as error:
                raise ValueError(f"start and frames must be whole numbers, got line {number} of {path}") from error
            found.append(Utterance(path.parent / row["path"], text, row.get("speaker") or "", start, frames))
    if not found:
        raise ValueError(f"a manifest must have utterances of the split {splits}, got none in {path}")
    return found


def _folders(root: Path, parts: str, of: str = "") -> Iterator[Path]:
    for part in parts.split(","):
        if not (root / part).is_dir():
            raise FileNotFoundError(f"root must hold the folder {part}{of}, got none in {root}")
        yield root / part


def _folder(root: Path, parts: str) -> list[Utterance]:
    found = []
    for folder in _folders(root, parts):
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in _AUDIO:
                continue
            if not (text := path.with_suffix(".txt")).is_file():
                raise FileNotFoundError(f"audio must have its text beside it, got no {text.name} for {path}")
            if not (said := " ".join(_text_of(text).upper().split())):
                raise ValueError(f"a text must have a character, got none in {text}")
            found.append(Utterance(path, said, path.parent.name))
    if not found:
        raise ValueError(f"{root} must hold audio, {', '.join(_AUDIO)}, in {parts}, got none")
    return found


def _librispeech(root: Path, parts: str) -> list[Utterance]:
    found = []
    for folder in _folders(root, parts, " of LibriSpeech"):
        for transcript in sorted(folder.glob("*/*/*.trans.txt")):
            for line in _text_of(transcript).splitlines():
                name, _, text = line.partition(" ")
                if not text.strip():
                    raise ValueError(f"a line of a transcript must have a text, got {line!r} in {transcript}")
                text = " ".join(text.upper().split())
                found.append(Utterance(transcript.with_name(f"{name}.flac"), text, transcript.parent.parent.name))
    if not found:
        raise ValueError(f"{root} must hold {parts}/SPEAKER/CHAPTER/*.trans.txt, got none")
    return found
