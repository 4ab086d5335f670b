"""How recognisers hear one utterance: the arrays that a run on speech leaves beside its records, and their figure."""

from __future__ import annotations

import itertools
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from .arms import Arm, Run
from .figures import Drawing, Panel

RECORD = "hearing"
_SIDE, _GAP, _LINE, _HEIGHT = 1.0, 0.12, 0.24, 1.5  # of a map, between maps, of a text, of the spectrogram
_TEXT = {"ha": "center", "va": "center", "fontsize": 7.5}


@dataclass(frozen=True)
class Hearing:
    """One utterance, as `training.hearing` writes it."""

    features: np.ndarray  # (frames, mels)
    path: np.ndarray  # (positions,) the character that each position says, -1 none
    said: np.ndarray  # () the text
    heard: np.ndarray  # () what the best path says
    maps: np.ndarray  # (blocks, heads, positions, positions)
    blocks: np.ndarray
    heads: np.ndarray


def read_hearing(run: Run) -> Hearing | None:
    """The last picture of a run whose file is there.

    Raises:
        ValueError: the file is damaged.
    """
    for record in reversed(run.file.records):
        if record.name == RECORD and record.artifact is not None and (run.path / record.artifact).is_file():
            path = run.path / record.artifact
            try:
                with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                    hearing = Hearing(**{name: file[name] for name in Hearing.__dataclass_fields__})
                positions = len(hearing.path)
                if hearing.maps.shape != (len(hearing.blocks), len(hearing.heads), positions, positions):
                    raise ValueError("the shapes do not fit")
                if hearing.features.ndim != 2 or hearing.path.max(initial=-1) >= len(str(hearing.said)):
                    raise ValueError("the alignment does not fit the text")
            except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"a picture of hearing must be whole arrays that fit, got {path}: {error}") from error
            return hearing
    return None


def hearing_drawing(arms: Sequence[Arm]) -> Drawing:
    """A panel for each arm: the spectrogram under the aligned text, and below it attention weights."""
    found = {arm.label: next((h for run in arm.runs if (h := read_hearing(run)) is not None), None) for arm in arms}
    shown = {label: hearing for label, hearing in found.items() if hearing is not None}
    caption = (
        "One validation utterance. Above, its spectrogram, the low channels below, and each character of what was said "
        "at the positions that the most likely path of this text gives it. Below, attention weights of two heads of "
        "the first, the middle and the last layer, a row for each query, from 0, dark, to the largest of each map."
    )
    panels = tuple(Panel(_title(label, each), lambda axes, h=each: _draw(axes, h)) for label, each in shown.items())
    return Drawing("hearing", "What is heard", caption, panels, height=2.9)


def _title(label: str, hearing: Hearing) -> str:
    heard = str(hearing.heard)
    return f"{label} hears “{heard if len(heard) <= 40 else heard[:39] + '…'}”"


def spans(path: np.ndarray) -> list[tuple[int, int, int]]:
    """(character, first position, last position) of every run of equal ones, blanks left out."""
    groups = itertools.groupby(range(len(path)), key=lambda i: int(path[i]))
    found = [(character, list(places)) for character, places in groups if character >= 0]
    return [(character, places[0], places[-1]) for character, places in found]


def _draw(axes: Axes, hearing: Hearing) -> None:
    blocks, heads, positions, _ = hearing.maps.shape
    count = blocks * heads
    width = count * _SIDE + (count - 1) * _GAP
    bottom = _SIDE + 2 * _LINE
    low, high = np.percentile(hearing.features.astype(np.float32), (2, 98))
    scaled = np.clip((hearing.features.astype(np.float32).T[::-1] - low) / max(1e-6, high - low), 0, 1)
    _image(axes, scaled, 0, bottom, width, _HEIGHT, "spectrogram")
    said = str(hearing.said)
    for character, first, last in spans(hearing.path):
        middle = (first + last + 1) / 2 / positions * width
        axes.text(middle, bottom + _HEIGHT + _LINE / 2, said[character].replace(" ", "·"), **_TEXT)
        for edge in (first, last + 1):
            x = edge / positions * width
            axes.plot([x, x], [bottom, bottom + _HEIGHT], color="white", linewidth=0.4, alpha=0.6)
    for i, (block, head) in enumerate(itertools.product(range(blocks), range(heads))):
        x, weights = i * (_SIDE + _GAP), hearing.maps[block, head].astype(np.float32)
        _image(axes, weights / max(float(weights.max()), 1e-30), x, 0, _SIDE, _SIDE, f"map-{i}")
        name = f"layer {hearing.blocks[block]}, head {hearing.heads[head]}"
        axes.text(x + _SIDE / 2, _SIDE + _LINE / 2, name, ha="center", va="center", fontsize=6)
    axes.set_xlim(0, width)
    axes.set_ylim(0, bottom + _HEIGHT + _LINE)
    axes.axis("off")


def _image(axes: Axes, values: np.ndarray, x: float, y: float, width: float, height: float, gid: str) -> None:
    """Values from 0 to 1 in colours; without an id of its own, two equal pictures would share one."""
    rgb = (255 * matplotlib.colormaps["inferno"](values)[..., :3]).astype(np.uint8)
    axes.imshow(rgb, extent=(x, x + width, y, y + height), interpolation="none", aspect="auto", gid=gid)
