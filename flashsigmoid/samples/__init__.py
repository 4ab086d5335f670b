"""The small data in the wheel. Origin and licence of each file stand beside it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def tinyshakespeare() -> Path:
    """Path of the embedded text: 1,115,394 bytes of Shakespeare, public domain.

    Raises:
        FileNotFoundError: the installation lacks it.
    """
    return _embedded("tinyshakespeare.txt")


def mnist(split: str) -> tuple[Path, Path]:
    """Paths of the embedded images of handwritten digits and of their labels: IDX files, gzipped, CC BY-SA 3.0.

    Args:
        split: "train", 8,000 of them, or "test", 2,000.

    Raises:
        FileNotFoundError: the installation lacks them.
    """
    return _embedded(f"mnist-{split}-images.gz"), _embedded(f"mnist-{split}-labels.gz")


def an4() -> Path:
    """Path of the manifest of the embedded speech: 127 utterances of CMU AN4, free for any use.

    Digits and commands; 102 of 51 speakers are its split "train", 25 of 14 others "val".

    Raises:
        FileNotFoundError: the installation lacks them.
    """
    for split in ("train", "val"):
        _embedded(f"an4-{split}.flac")
    return _embedded("an4.tsv")


def _embedded(name: str) -> Path:
    path = Path(str(files(__name__) / name))
    if not path.is_file():
        raise FileNotFoundError(f"the embedded {name} must be part of the installation, got none at {path}")
    return path
