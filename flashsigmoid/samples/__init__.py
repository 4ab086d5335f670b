"""The small data in the wheel. Origin and licence of each file stand beside it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def tinyshakespeare() -> Path:
    """Path of the embedded text: 1,115,394 bytes of Shakespeare, public domain.

    Raises:
        FileNotFoundError: the installation lacks it.
    """
    path = Path(str(files(__name__) / "tinyshakespeare.txt"))
    if not path.is_file():
        raise FileNotFoundError(f"the embedded text must be part of the installation, got none at {path}")
    return path
