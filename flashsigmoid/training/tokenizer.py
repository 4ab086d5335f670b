"""Text to tokens and back: bytes, or a byte-level BPE trained on the spot. Only tokenizer.json is read here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

BYTES = {"flashsigmoid": "bytes"}
END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer."""

    vocab_size: int  # tokens, the end of text included
    eot: int  # the end-of-text token, after every document

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens of `text` (int64), without an end of text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD, ends of text disappear."""
        ...

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text each token stands for, (vocab_size,) int64; 0 for the end of text."""
        ...

    def to_json(self) -> str:
        """What `load_tokenizer` reads."""
        ...

    def to_library_json(self) -> str:
        """What the library `tokenizers`, and so transformers, reads."""
        ...


class ByteTokenizer:
    """Token b is the byte b, token 256 ends a text. Any bytes are text."""

    vocab_size = 257
    eot = 256

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens of `text` (int64), without an end of text."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD, ends of text disappear."""
        # a model may have more rows than there are tokens
        return bytes(token for token in tokens if token < self.eot).decode("utf-8", errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """1 for every byte, 0 for the end of text: (257,) int64."""
        return np.array([1] * 256 + [0], dtype=np.int64)

    def to_json(self) -> str:
        """What `load_tokenizer` reads."""
        return json.dumps(BYTES)

    def to_library_json(self) -> str:
        """A byte-level BPE without merges; text that is not UTF-8 it cannot encode."""
        # the alphabet of byte-level BPE: printable bytes stand for themselves, the others for 256, 257, ...
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        spelled = {byte: chr(byte) for byte in printable}
        spelled |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - {*printable}))}
        vocab = {**{spelled[byte]: byte for byte in range(256)}, END_OF_TEXT: self.eot}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.add_special_tokens([END_OF_TEXT])
        return tokenizer.to_str(pretty=True)


class BPETokenizer:
    """A byte-level BPE of the library `tokenizers`: every text of UTF-8 has tokens and comes back as it was.

    Args:
        tokenizer: with END_OF_TEXT among its tokens, as `train_bpe` makes it.

    Raises:
        ValueError: it has no END_OF_TEXT.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        eot = tokenizer.token_to_id(END_OF_TEXT)
        if eot is None:
            raise ValueError(f"a tokenizer must have the token {END_OF_TEXT}, got one without")
        self._tokenizer = tokenizer
        self.eot: int = eot
        self.vocab_size: int = tokenizer.get_vocab_size()

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens of `text` (int64), without an end of text.

        Raises:
            ValueError: the bytes are not UTF-8.
        """
        return np.array(self._tokenizer.encode(_utf8(text)).ids, dtype=np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD, ends of text disappear."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text each token stands for, (vocab_size,) int64; 0 for the end of text."""
        # byte-level BPE spells each byte as one character
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, token in self._tokenizer.get_vocab().items():
            lengths[token] = 0 if token == self.eot else len(piece)
        return lengths

    def to_json(self) -> str:
        """What `load_tokenizer`, and the library `tokenizers` itself, reads."""
        return self._tokenizer.to_str(pretty=True)

    def to_library_json(self) -> str:
        """The same."""
        return self.to_json()


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> BPETokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, learnt from the texts: 256 bytes, the end of text, then merges.

    Args:
        texts: documents, UTF-8.
        vocab_size: the most tokens there will be; a small text gives fewer.

    Raises:
        ValueError: vocab_size has no room for bytes and end of text; a text is not UTF-8.

    Source: arXiv:1508.07909; byte-level as in GPT-2.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size of a byte-level BPE must be at least 257, got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(_utf8, texts), trainer)
    # a document that spells the special token out stays text
    tokenizer.encode_special_tokens = True
    return BPETokenizer(tokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json that `to_json` or the library `tokenizers` wrote.

    Raises:
        ValueError: the file is missing, or is no tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"a tokenizer must be an existing file, got {path}")
    try:
        text = path.read_text("utf-8")
        if json.loads(text) == BYTES:
            return ByteTokenizer()
        # `tokenizers` raises plain Exception for a JSON that is not its own
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        raise ValueError(f"a tokenizer must be the JSON of a tokenizer, got {path}: {error}") from error
    tokenizer.encode_special_tokens = True
    return BPETokenizer(tokenizer)


def _utf8(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text must be UTF-8 for a BPE tokenizer (the byte tokenizer takes any bytes), got byte "
            f"{text[error.start]:#04x} at offset {error.start}"
        ) from error
