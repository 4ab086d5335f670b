"""Attention maps: the arrays that a run on images leaves beside its records, and their figure."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from .arms import Arm, Run
from .figures import Drawing, Panel
from .words import join

RECORD = "attention_maps"
COLOURS, _IMAGE = "inferno", 0.35  # of a map, and how much of the image shows through
_PIXELS = 112  # a side of a tile at most: twice what a page shows
_GAP, _LINE = 0.12, 0.3  # between tiles of side 1, and a line of text


@dataclass(frozen=True)
class Maps:
    """Attention weights over the patches of n images, as `training.attention_maps` writes them."""

    images: np.ndarray  # (n, channels, height, width) uint8
    classes: np.ndarray  # (n,) names
    maps: np.ndarray  # (n, blocks, heads, rows, columns)
    sums: np.ndarray  # (n, blocks, heads), over all tokens
    blocks: np.ndarray
    heads: np.ndarray
    query: np.ndarray  # (), "class token" or "mean"


def read_maps(run: Run) -> Maps | None:
    """The last attention maps of a run whose file is there.

    Raises:
        ValueError: the file is damaged.
    """
    for record in reversed(run.file.records):
        if record.name == RECORD and record.artifact is not None and (run.path / record.artifact).is_file():
            return _read(run.path / record.artifact)
    return None


def _read(path: Path) -> Maps:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            maps = Maps(**{name: file[name] for name in Maps.__dataclass_fields__})
        n, blocks, heads, _, _ = maps.maps.shape
        shapes = (maps.classes.shape, maps.sums.shape, maps.blocks.shape, maps.heads.shape)
        pictures, channels, _, _ = maps.images.shape
        if shapes != ((n,), (n, blocks, heads), (blocks,), (heads,)) or pictures != n or channels not in (1, 3):
            raise ValueError("the shapes do not fit")
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"attention maps must be whole arrays that fit, got {path}: {error}") from error
    return maps


def maps_drawing(arms: Sequence[Arm]) -> Drawing:
    """A panel for each arm: an image a row, then the map of each block and head, and under it what its row sums to."""
    found = {arm.label: next((maps for run in arm.runs if (maps := read_maps(run)) is not None), None) for arm in arms}
    shown = {label: maps for label, maps in found.items() if maps is not None}
    whose = ["the class token" if maps.query == "class token" else "all tokens, their mean" for maps in shown.values()]
    caption = (
        "Attention weights over the patches of validation images after training, of "
        f"{join(list(dict.fromkeys(whose)))}: two heads of the first, the middle and the last layer, over the image. "
        "Colours go from 0, dark, to the largest weight of each map, bright. The number below a map is what its row of "
        "weights adds up to over all tokens: 1 for softmax, free for sigmoid."
    )
    missing = [label for label, maps in found.items() if maps is None]
    if shown and missing:
        caption += f" Not recorded: {'; '.join(missing)}."
    panels = tuple(Panel(label, lambda axes, maps=maps: _draw(axes, maps)) for label, maps in shown.items())
    rows, columns = max((_size(maps) for maps in shown.values()), default=(1.0, 1.0))
    return Drawing("attention-maps", "Attention maps", caption, panels, height=4.9 * rows / columns + 0.35)


def _size(maps: Maps) -> tuple[float, float]:
    """Height and width of a panel in tiles."""
    n, blocks, heads = maps.sums.shape
    return 2 * _LINE + n * (1 + _LINE + _GAP), 1 + blocks * (heads + _GAP * heads + 2 * _GAP)


def _draw(axes: Axes, maps: Maps) -> None:
    height, width = _size(maps)
    text = {"ha": "center", "va": "center", "fontsize": 7.5}
    n, blocks, heads = maps.sums.shape

    def left(block: int, head: int) -> float:
        return 1 + block * (heads + _GAP * heads + 2 * _GAP) + 3 * _GAP + head * (1 + _GAP)

    for block in range(blocks):
        middle = (left(block, 0) + left(block, heads - 1) + 1) / 2
        axes.text(middle, height - _LINE / 2, f"layer {maps.blocks[block]}", **text)
        for head in range(heads):
            axes.text(left(block, head) + 0.5, height - 1.5 * _LINE, f"head {maps.heads[head]}", **text)
    for i in range(n):
        bottom = height - 2 * _LINE - i * (1 + _LINE + _GAP) - 1
        _tile(axes, pixels(maps.images[i]), 0, bottom)
        name = str(maps.classes[i])
        axes.text(0.5, bottom - _LINE / 2, name if len(name) <= 12 else f"{name[:11]}…", **text)
        for block in range(blocks):
            for head in range(heads):
                x, weights = left(block, head), maps.maps[i, block, head]
                _tile(axes, _over(pixels(maps.images[i]), weights), x, bottom)
                axes.text(x + 0.5, bottom - _LINE / 2, f"{maps.sums[i, block, head]:.2f}", **text)
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_aspect("equal")
    axes.axis("off")


def _tile(axes: Axes, rgb: np.ndarray, x: float, y: float) -> None:
    # without an id of its own, two equal pictures would share one
    gid = f"tile-{len(axes.images)}"
    axes.imshow(rgb, extent=(x, x + 1, y, y + 1), interpolation="none", aspect="auto", gid=gid)


def _over(rgb: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """An image (height, width, 3) under the colours of a map (rows, columns), each over its patch."""
    rows, columns = (np.arange(rgb.shape[axis]) * weights.shape[axis] // rgb.shape[axis] for axis in (0, 1))
    colours = matplotlib.colormaps[COLOURS](weights / max(float(weights.max()), 1e-30))[rows][:, columns, :3]
    return (255 * (1 - _IMAGE) * colours + _IMAGE * rgb).astype(np.uint8)


def pixels(image: np.ndarray) -> np.ndarray:
    """(height, width, 3) of (channels, height, width), every so many pixels of a large one."""
    stride = -(-max(image.shape[1:]) // _PIXELS)
    rgb = np.moveaxis(image, 0, -1)[::stride, ::stride]
    return np.repeat(rgb, 3, axis=-1) if rgb.shape[-1] == 1 else rgb
