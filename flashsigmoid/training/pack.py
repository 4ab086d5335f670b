"""A folder of images into tar files for webdataset and for ImageConfig(source="tar"). Reading them is shards.py's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from webdataset.writer import TarWriter

from .data import shuffled
from .images import ImageConfig, load_images


def pack_images(
    folder: str | Path, out: str | Path, *, shard_size: int = 10_000, show: Callable[[str], None] = print
) -> None:
    """Write the images of folder/train/CLASS/* and folder/val/CLASS/* to shards, their bytes as they are.

        out/train-0000.tar, train-0001.tar, ..., val-0000.tar, ...      NUMBER_NAME.jpg or .png ..., NUMBER_NAME.cls
        out/classes.txt                                                 a name a line: label 0, 1, ...

    The order is shuffled, the same each time, so that each shard has something of every class. All is written to
    OUT.tmp, and renamed when it is whole: a crash leaves no set that lacks images.

    Args:
        folder: as for ImageConfig(source="folder").
        out: a folder that is not there yet.
        shard_size: images in a shard, the last has what is left. Default: 10,000.
        show: told about every shard.

    Raises:
        FileNotFoundError: there are no images.
        ValueError: out is there; shard_size below 1; as `load_images`.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"out must not exist yet, got {out}")
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    data = load_images(ImageConfig(source="folder", root=str(folder)))
    draft = out.with_name(out.name + ".tmp")
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir(parents=True)
    for split, part in (("train", data.train), ("val", data.val)):
        files: list[tuple[Path, int]] = cast(Any, part).files
        for number, start in enumerate(range(0, len(files), shard_size)):
            path = draft / f"{split}-{number:04d}.tar"
            stop = min(len(files), start + shard_size)
            with path.open("wb") as file:
                with TarWriter(file, encoder=False, mtime=0) as tar:
                    for i in range(start, stop):
                        tar.write(_sample(i, *files[shuffled(i, len(files), seed=0, epoch=0)]))
                file.flush()
                os.fsync(file.fileno())
            show(f"{path.name}: {stop - start:,} images")
    (draft / "classes.txt").write_text("".join(f"{name}\n" for name in data.classes), "utf-8")
    draft.rename(out)


def _sample(number: int, path: Path, label: int) -> dict[str, Any]:
    """As webdataset writes it; the number makes the key unique, and no dot ends it early."""
    key = f"{number:08d}_{path.stem.replace('.', '_')}"
    return {"__key__": key, path.suffix.lower().removeprefix("."): path.read_bytes(), "cls": str(label).encode()}
