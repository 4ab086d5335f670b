"""`flashsigmoid pack`: images into shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .root import app


@app.command(epilog="Example: flashsigmoid pack imagenet imagenet-tar --shard-size 5000")
def pack(
    folder: Annotated[Path, typer.Argument(help="Images: train/CLASS/* and val/CLASS/*.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder of the shards, not there yet.", show_default=False)],
    shard_size: Annotated[int, typer.Option(help="Images in a shard.")] = 10_000,
) -> None:
    """Put a folder of images into tar files, as webdataset reads them, and trainings with data.source=tar."""
    from ..training.pack import pack_images

    pack_images(folder, out, shard_size=shard_size)
    print(f"shards: {out}   next: flashsigmoid train RECIPE --set data.source=tar --set data.root={out}")
