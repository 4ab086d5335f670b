"""enwik8: the first 100,000,000 bytes of a dump of the English Wikipedia, and its usual split. Other text is data.py's.

Every byte is a token; no document ends anywhere.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np

from .baseline import bigram_loss
from .data import DataConfig, LanguageData, PackedText, fixed_windows
from .tokenizer import ByteTokenizer

PREFIX = "enwik8:"
SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
SPLIT = {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000}  # bytes, in the order of the file
_ORIGIN = "http://mattmahoney.net/dc/enwik8.zip"


def read_enwik8(path: str | Path) -> np.ndarray:
    """All of it, (100,000,000,) uint8: mapped from the file `enwik8`, or unpacked from a zip that holds it.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is not enwik8, by its length or SHA-256, or is a damaged zip.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"enwik8 must be the file or its zip, as from {_ORIGIN}, got none at {path}")
    size = sum(SPLIT.values())
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive, archive.open("enwik8") as member:
                content = np.frombuffer(member.read(size + 1), np.uint8)  # no more, whatever the archive holds
        else:
            content = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    except (zipfile.BadZipFile, KeyError, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"enwik8 must be the file or a zip that holds it, got {path}: {error}") from error
    if len(content) != size:
        raise ValueError(f"enwik8 must have {size:,} bytes, got {len(content):,} in {path}")
    if (digest := hashlib.sha256(content.data).hexdigest()) != SHA256:
        raise ValueError(f"enwik8 must have the SHA-256 {SHA256}, got {digest} of {path}")
    return content


def load_enwik8(config: DataConfig, *, seqlen: int, seed: int) -> LanguageData:
    """Train on the first 90 million bytes, validate on windows of the next 5; whole splits "val" and "test" at the end.

    Args:
        config: with source="enwik8:FILE"; val_windows of them are looked at while training.
        seqlen: of the model.
        seed: of the order of the windows.

    Raises:
        FileNotFoundError, ValueError: as `read_enwik8`; a tokenizer other than bytes; a context longer than a split.
    """
    if config.tokenizer != "bytes":
        raise ValueError(f"tokenizer must be 'bytes' for enwik8, got {config.tokenizer!r}")
    content = read_enwik8((config.source or "").removeprefix(PREFIX))
    ends = np.cumsum(list(SPLIT.values()))
    train, val, test = (content[end - size : end] for end, size in zip(ends, SPLIT.values(), strict=True))
    tokenizer = ByteTokenizer()
    windows = fixed_windows(val, seqlen, config.val_windows)
    return LanguageData(
        tokenizer,
        PackedText(train, seqlen, seed),
        windows,
        SHA256,
        bigram_loss(train, windows.numpy(), tokenizer.byte_lengths()),
        splits={"val": val, "test": test},
    )
