"""Images inside of tar files, opened like files: an index of shards as webdataset writes them. pack.py writes them.

A sample is what shares a name up to its first dot, as webdataset has it: KEY.jpg, or any other image, and KEY.cls, its
label as a number. Everything else is passed over.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, overload

import torch
from torch import Tensor
from webdataset.tariterators import base_plus_ext


class Member(NamedTuple):
    """One file inside of a tar file, which is opened, and named in a message, like a path."""

    shard: Path
    offset: int  # bytes
    size: int  # bytes

    def open(self, mode: str = "rb") -> BinaryIO:
        """Its bytes."""
        assert mode == "rb"
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))

    def __str__(self) -> str:
        with tarfile.open(self.shard, "r:") as tar:
            name = next((member.name for member in tar if member.offset_data == self.offset), self.offset)
        return f"{self.shard}:{name}"


class Shards(Sequence[tuple[Member, int]]):
    """The images of tar files and their labels, in the order in which they stand there.

    Every shard is read through once, header by header. What is kept are numbers in one tensor, which the workers of a
    DataLoader share.

    Args:
        paths: of the tar files.
        suffixes: of images, lower case, with the dot.

    Raises:
        ValueError: a shard is cut short, compressed, or no tar file; a sample without one image and one label.
    """

    def __init__(self, paths: Sequence[Path], suffixes: Collection[str]) -> None:
        self.paths = list(paths)
        # (images, 4): number of the shard, offset, size, label
        self.rows = torch.cat([_indexed(path, number, suffixes) for number, path in enumerate(self.paths)])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> tuple[Member, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Member, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Member, int] | list[tuple[Member, int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, offset, size, label = self.rows[index].tolist()
        return Member(self.paths[number], offset, size), label

    @property
    def labels(self) -> Tensor:
        """(images,) int64."""
        return self.rows[:, 3]


def _indexed(path: Path, number: int, suffixes: Collection[str]) -> Tensor:
    """Rows of the images in one shard."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if not member.isfile() or key is None or extension is None:
                    continue
                extension = extension.lower()
                if f".{extension}" in suffixes:
                    if key in images:
                        raise ValueError(f"a sample must have one image, got {path}:{member.name} beside another")
                    images[key] = member
                elif extension == "cls":
                    file = tar.extractfile(member)
                    labels[key] = _label(b"" if file is None else file.read(), f"{path}:{member.name}")
            # Python's reader takes an archive that ends, or breaks, between two members for a whole one
            tar.fileobj.seek(tar.offset)  # pyright: ignore[reportOptionalMemberAccess]
            if tar.fileobj.read(512) != bytes(512):  # pyright: ignore[reportOptionalMemberAccess]
                raise tarfile.ReadError("it has no end")
    except tarfile.TarError as error:
        raise ValueError(f"a shard must be a whole tar file, not compressed, got {path}: {error}") from error
    alone = sorted(images.keys() ^ labels.keys())
    if alone:
        raise ValueError(f"a sample must have an image and a .cls, got one without the other, {path}:{alone[0]}")
    rows = [(number, member.offset_data, member.size, labels[key]) for key, member in images.items()]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)


def _label(text: bytes, name: str) -> int:
    try:
        label = int(text)
    except ValueError:
        label = -1
    if label < 0:
        raise ValueError(f"a label must be a number, 0 or more, got {text[:20]!r} in {name}")
    return label
