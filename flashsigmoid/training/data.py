"""Text files to packed windows of tokens, in an order that is a pure function. Streams are stream.py's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ..nn.config import check_types
from ..samples import tinyshakespeare
from .baseline import Bigram, bigram_loss
from .tokenizer import ByteTokenizer, Tokenizer, train_bpe


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What text, and how it becomes tokens.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    # a text file, a folder of .txt, hf:NAME[:CONFIG], or enwik8:FILE; None: the embedded Shakespeare
    source: str | None = None
    tokenizer: Literal["bytes", "bpe"] = "bytes"  # bpe: trained on the training text, of the model's vocab_size
    val_fraction: float = 0.1  # the last part of the text, in bytes, never trained on, in (0, 1)
    val_windows: int | None = None  # validate on this many windows, evenly spread; None: on all
    text_column: str = "text"  # of a Hugging Face data set
    val_documents: int = 1000  # of a Hugging Face data set without a validation split: its first documents

    def __post_init__(self) -> None:
        check_types(self)
        if self.tokenizer not in ("bytes", "bpe"):
            raise ValueError(f"tokenizer must be 'bytes' or 'bpe', got {self.tokenizer!r}")
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"val_fraction must be in (0, 1), got {self.val_fraction}")
        if self.val_windows is not None and self.val_windows < 1:
            raise ValueError(f"val_windows must be at least 1 or None, got {self.val_windows}")
        if self.val_documents < 1:
            raise ValueError(f"val_documents must be at least 1, got {self.val_documents}")


class Batch:
    """Windows of tokens, and where the data stands once they have been used.

    Opaque to Lightning, which would otherwise look for tensors inside the position.
    """

    def __init__(self, tokens: Tensor, position: dict[str, Any]) -> None:
        self.tokens = tokens  # (batch, seqlen + 1) int64: inputs and, one further, targets
        self.position = position  # plain containers and tensors; a source's `batches` starts there


class Source(Protocol):
    """Endless training batches that can be taken up again anywhere."""

    def batches(self, batch: int, position: dict[str, Any] | None = None) -> Iterator[Batch]:
        """Batches of `batch` windows from a position on; None is the beginning."""
        ...


@dataclass(frozen=True)
class LanguageData:
    """Everything a training reads: made by `load_text`, `load_stream` or `load_enwik8`."""

    tokenizer: Tokenizer
    train: Source
    val_windows: Tensor  # (windows, seqlen + 1) int64
    fingerprint: str  # changes when the tokens do
    bigram: Bigram | None  # baseline on the same windows; None for a stream
    splits: dict[str, np.ndarray] = field(default_factory=dict)  # tokens of whole splits to evaluate on at the end


class PackedText:
    """Windows of seqlen + 1 tokens out of one array, shuffled anew in every epoch.

    Sample s is window `shuffled(index)` of epoch e, with (e, index) = divmod(s, windows); epoch e cuts its windows from
    a start of its own, so that they do not always end at the same tokens. All of it is a pure function of
    (seed, e, index): the position is one integer.

    Args:
        tokens: (ntokens,), at least 2 * seqlen of them.
        seqlen: tokens of input per window; neighbours share one token, each is predicted once per epoch.
        seed: of the order.

    Raises:
        ValueError: too few tokens.
    """

    def __init__(self, tokens: np.ndarray, seqlen: int, seed: int) -> None:
        if len(tokens) < 2 * seqlen:
            raise ValueError(f"training text must have at least 2 * seqlen = {2 * seqlen} tokens, got {len(tokens)}")
        self.tokens, self.seqlen, self.seed = tokens, seqlen, seed
        self.windows = (len(tokens) - seqlen) // seqlen

    def sample(self, s: int) -> np.ndarray:
        """Window of sample s: (seqlen + 1,)."""
        epoch, index = divmod(s, self.windows)
        start = _mix(_key(self.seed, epoch)) % self.seqlen
        start += self.seqlen * shuffled(index, self.windows, seed=self.seed, epoch=epoch)
        return self.tokens[start : start + self.seqlen + 1]

    def batches(self, batch: int, position: dict[str, Any] | None = None) -> Iterator[Batch]:
        """Batches of `batch` windows from a position on; None is the beginning."""
        s = 0 if position is None else position["sample"]
        while True:
            # (batch, seqlen + 1)
            windows = np.stack([self.sample(s + row) for row in range(batch)]).astype(np.int64)
            s += batch
            yield Batch(torch.from_numpy(windows), {"sample": s})


def shuffled(index: int, count: int, *, seed: int, epoch: int) -> int:
    """Where `index` lands in the permutation of range(count) that belongs to (seed, epoch): no table, no state.

    A Feistel network permutes the numbers of 2 h bits; a result outside range(count) goes through it again until it
    falls inside, which makes it a permutation of range(count).

    Raises:
        ValueError: index is outside range(count).
    """
    if not 0 <= index < count:
        raise ValueError(f"index must be in range({count}), got {index}")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    key = _key(seed, epoch)
    while True:
        left, right = index >> half, index & (1 << half) - 1
        # 6 rounds: even 2-bit halves mix
        for turn in range(6):
            left, right = right, left ^ _mix(_mix(key + turn) ^ right) & (1 << half) - 1
        index = left << half | right
        if index < count:
            return index


def shuffled_all(indices: Sequence[int], count: int, *, seed: int, epoch: int) -> list[int]:
    """`shuffled` of many at once: one by one, in Python, a batch would take longer than a step with it.

    Raises:
        ValueError: an index is outside range(count).
    """
    for index in (min(indices), max(indices)) if len(indices) else ():
        if not 0 <= index < count:
            raise ValueError(f"index must be in range({count}), got {index}")
    found = np.asarray(indices, dtype=np.uint64)
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    key, low = _key(seed, epoch), np.uint64((1 << half) - 1)
    rest = np.arange(len(found))  # whose numbers are not in range(count) yet
    while len(rest):
        left, right = found[rest] >> np.uint64(half), found[rest] & low
        for turn in range(6):
            left, right = right, left ^ _mix_all(np.uint64(_mix(key + turn)) ^ right) & low
        found[rest] = left << np.uint64(half) | right
        rest = rest[found[rest] >= count]
    return found.tolist()


def _key(seed: int, epoch: int) -> int:
    return _mix(_mix(seed) ^ epoch)


def _mix(x: int) -> int:
    """A well-mixed 64-bit function of x: the finaliser of splitmix64."""
    x = (x + 0x9E3779B97F4A7C15) % (1 << 64)
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    x = (x ^ x >> 27) * 0x94D049BB133111EB % (1 << 64)
    return x ^ x >> 31


def _mix_all(x: np.ndarray) -> np.ndarray:
    """`_mix` of every number, uint64, which wraps around by itself."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def read_documents(path: str | Path) -> list[bytes]:
    """One document per text file: the file itself, or every .txt in the folder and below, sorted by path.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: a folder without .txt, or no text at all.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.txt") if file.is_file())
        if not files:
            raise ValueError(f"data must be a text file or a folder with .txt files, got a folder without: {path}")
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(f"data must be an existing text file or folder, got {path}")
    documents = [file.read_bytes() for file in files]
    if not any(document.strip() for document in documents):
        raise ValueError(f"data must contain text, got nothing but white space in {path}")
    return documents


def split(documents: Sequence[bytes], val_fraction: float) -> tuple[list[bytes], list[bytes]]:
    """The first and the last part of the documents, cut at 1 - val_fraction of their bytes.

    The document in which the cut falls is divided, between two characters; both parts count as documents.
    """
    before = round(sum(map(len, documents)) * (1.0 - val_fraction))
    train, val = [], []
    for document in documents:
        cut = min(before, len(document))
        # a UTF-8 character's later bytes are 10xxxxxx
        while 0 < cut < len(document) and document[cut] & 0xC0 == 0x80:
            cut -= 1
        before -= min(before, len(document))
        train.append(document[:cut])
        val.append(document[cut:])
    return [document for document in train if document], [document for document in val if document]


def tokenize(documents: Sequence[bytes], tokenizer: Tokenizer) -> np.ndarray:
    """All documents in a row, an end of text after each: (ntokens,) of the smallest unsigned type that holds them."""
    pieces = [piece for text in documents for piece in (tokenizer.encode(text), [tokenizer.eot])]
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    return np.concatenate([np.asarray(piece, dtype=dtype) for piece in pieces]) if pieces else np.empty(0, dtype)


def fixed_windows(tokens: np.ndarray, seqlen: int, limit: int | None) -> Tensor:
    """Windows in the order of the text, each token predicted once, the rest that fills no window left out.

    Args:
        tokens: (ntokens,), more than seqlen.
        seqlen: tokens of input per window.
        limit: keep this many, evenly spread; None keeps all.

    Returns:
        (windows, seqlen + 1) int64.

    Raises:
        ValueError: too few tokens for one window.
    """
    if len(tokens) <= seqlen:
        raise ValueError(f"validation text must have more than seqlen = {seqlen} tokens, got {len(tokens)}")
    count = (len(tokens) - 1) // seqlen
    chosen = np.arange(min(limit or count, count)) * count // min(limit or count, count)
    windows = tokens[chosen[:, None] * seqlen + np.arange(seqlen + 1)]
    return torch.from_numpy(windows.astype(np.int64))


def load_text(
    config: DataConfig, *, vocab_size: int, seqlen: int, seed: int, tokenizer: Tokenizer | None = None
) -> LanguageData:
    """Read, split, tokenize and pack text files.

    Args:
        config: what to read.
        vocab_size: of the model; a BPE is trained to at most this many tokens.
        seqlen: of the model.
        seed: of the order of the windows.
        tokenizer: used instead of training one, as when a training is resumed.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: the text is empty, too short or, for BPE, not UTF-8; a vocab_size too small. Names the path.
    """
    path = Path(config.source) if config.source is not None else tinyshakespeare()
    documents = read_documents(path)
    train, val = split(documents, config.val_fraction)
    try:
        if tokenizer is None:
            tokenizer = ByteTokenizer() if config.tokenizer == "bytes" else train_bpe(train, vocab_size)
        train_tokens, val_tokens = tokenize(train, tokenizer), tokenize(val, tokenizer)
        source = PackedText(train_tokens, seqlen, seed)
        windows = fixed_windows(val_tokens, seqlen, config.val_windows)
    except ValueError as error:
        raise ValueError(f"{error}, in {path}") from error
    digest = hashlib.sha256(train_tokens.data)
    digest.update(val_tokens.data)
    bigram = bigram_loss(train_tokens, windows.numpy(), tokenizer.byte_lengths())
    return LanguageData(tokenizer, source, windows, digest.hexdigest(), bigram)
