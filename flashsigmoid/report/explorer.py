"""The explorer: a page of its own on which attention weights are picked by step, layer, head and token.

plotly draws it and is within the page, 4.8 MB, which is why it is no part of the report itself. What is drawn is
decided by explorer.js from the snapshots that runs have left beside their records.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.image
import numpy as np

from .arms import Arm, Run, show, value_of
from .document import document
from .figures import colour_variable
from .maps import COLOURS, pixels
from .summary import title

RECORD = "attention_snapshot"
_STATISTICS = ("attn_norm", "row_mass", "sink")  # as recorded of whole layers
NO_PLOTLY = "Not shown: any weight by step, layer, head and token. It needs plotly: pip install 'flashsigmoid[report]'."
NO_SNAPSHOTS = (
    "Not recorded: snapshots of attention weights, so that there is no view of them by step, layer, head and token."
)


@dataclass(frozen=True)
class Snapshot:
    """Attention weights on one text or image after some steps, as `training.snapshots` writes them."""

    weights: np.ndarray  # (layers, heads, n, n), a row for each query
    norms: np.ndarray  # (layers, heads, n), |A v| of each head and token
    layers: np.ndarray
    heads: np.ndarray
    tokens: np.ndarray  # (n,) names
    image: np.ndarray  # (channels, height, width) uint8, empty for a text
    grid: np.ndarray  # (2,) rows and columns of patches, which are the last tokens


def read_snapshots(run: Run) -> dict[int, Snapshot]:
    """The snapshots of a run whose files are there, by step.

    Raises:
        ValueError: a file is damaged, or is not of the sample that the others are of.
    """
    found: dict[int, Snapshot] = {}
    for record in run.file.records:
        if record.name == RECORD and record.artifact and record.step is not None:
            path = run.path / record.artifact
            if path.is_file():
                found[record.step] = _read(path)
    first = next(iter(found.values()), None)
    for snapshot in found.values():
        same = [np.array_equal(getattr(snapshot, name), getattr(first, name)) for name in ("layers", "heads", "tokens")]
        if not all(same):
            raise ValueError(f"attention snapshots of a run must be of one sample, got several in {run.path}")
    return dict(sorted(found.items()))


def _read(path: Path) -> Snapshot:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            snapshot = Snapshot(**{name: file[name] for name in Snapshot.__dataclass_fields__})
        n, (rows, columns) = len(snapshot.tokens), snapshot.grid
        shape = (len(snapshot.layers), len(snapshot.heads), n, n)
        if (snapshot.weights.shape, snapshot.norms.shape) != (shape, shape[:3]) or rows * columns > n:
            raise ValueError("the shapes do not fit")
        if snapshot.image.ndim != 3 or (snapshot.image.size == 0) != (rows * columns == 0):
            raise ValueError("the image does not fit")
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"an attention snapshot must be whole arrays that fit, got {path}: {error}") from error
    return snapshot


def explorer_page(arms: Sequence[Arm]) -> tuple[str, str]:
    """The page, or "" and why there is none; of each arm the first run that has snapshots.

    Raises:
        ValueError: a snapshot is damaged.
    """
    found = [next(((run, s) for run in arm.runs if (s := read_snapshots(run))), None) for arm in arms]
    shown = [_data(arm, *each) for arm, each in zip(arms, found, strict=True) if each is not None]
    if not shown:
        return "", NO_SNAPSHOTS
    if importlib.util.find_spec("plotly") is None:
        return "", NO_PLOTLY
    from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingImports]

    missing = [arm.label for arm, each in zip(arms, found, strict=True) if each is None]
    note = f" No snapshots: {'; '.join(missing)}." if missing else ""
    heading = escape(f"Attention, weight by weight: {title(arms)}")
    # the end of a script element, or the beginning of a comment, must not stand in the data
    colours = [(i / 16, matplotlib.colors.to_hex(matplotlib.colormaps[COLOURS](i / 16))) for i in range(17)]
    data = json.dumps({"arms": shown, "colours": colours}, allow_nan=False).replace("<", "\\u003c")
    code = Path(__file__).with_name("explorer.js").read_text("utf-8")
    # nothing may be loaded; plotly draws heat maps into images of its own
    allowed = "img-src data:; script-src 'unsafe-inline';"
    body = f"""<main>
<header><h1>{heading}</h1>
<p class="lead">The same validation sample at several steps of the training. A row of a map is a query, a column a key;
its number is the weight A<sub>ij</sub>. Softmax makes each row add up to 1, sigmoid leaves that free.{escape(note)}</p>
</header>
<noscript><p class="missing">This page is drawn by a script, which is off here.</p></noscript>
<form class="controls" onsubmit="return false">
<label class="wide">step <output id="at"></output><input type="range" id="step" min="0" value="0"></label>
<label>layer <select id="layer"></select></label>
<label>head <select id="head"></select></label>
<label>token, as query <select id="token"></select></label>
<label>colours <select id="scale"><option value="own">each map's own</option>
<option value="same">the same for all</option></select></label>
</form>
<section id="arms"></section>
<section><h2>Through training</h2>
<p class="unit">Lines: the layer, mean over heads and many tokens, as recorded. Dots: the head and the token picked
above. Dotted: the step picked above.</p>
<p class="legend" id="legend"></p>
<div class="panels"><figure><h3>Attention norm |A V|</h3><div class="curve" id="attn_norm"></div></figure>
<figure><h3>Row mass</h3><div class="curve" id="row_mass"></div></figure>
<figure><h3>Share of the first token</h3><div class="curve" id="sink"></div></figure></div></section>
</main>
<script type="application/json" id="data">{data}</script>
<script>{get_plotlyjs()}</script>
<script>{code}</script>"""
    return document(heading, body, allowed=allowed, css=_CSS), ""


def _data(arm: Arm, run: Run, snapshots: dict[int, Snapshot]) -> dict[str, Any]:
    """What explorer.js reads of an arm."""
    first = next(iter(snapshots.values()))
    return {
        "label": arm.label,
        "colour": colour_variable(arm),
        "seed": show(run.seed),
        "layers": first.layers.tolist(),
        "heads": first.heads.tolist(),
        "tokens": first.tokens.tolist(),
        "grid": first.grid.tolist(),
        "image": _png(first.image),
        "steps": list(snapshots),
        "weights": [_base64(each.weights.astype("<f2")) for each in snapshots.values()],
        "norms": [_base64(each.norms.astype("<f2")) for each in snapshots.values()],
        "recorded": {name: [_series(run, f"{name}/layer_{layer}") for layer in first.layers] for name in _STATISTICS},
    }


def _series(run: Run, name: str) -> list[tuple[int | None, float]]:
    return [(record.step, value) for record in run.series(name) if np.isfinite(value := value_of(record))]


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _png(image: np.ndarray) -> str | None:
    """As an address that holds the picture; None of a text."""
    if not image.size:
        return None
    file = io.BytesIO()
    matplotlib.image.imsave(file, pixels(image), format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


_CSS = """
.controls{display:flex;flex-wrap:wrap;gap:.7rem 1.4rem;align-items:end;margin:1.5rem 0;padding:.8rem 1.1rem;
background:var(--card);border:1px solid var(--line);border-radius:10px}
.controls label{display:flex;flex-direction:column;gap:.25rem;color:var(--soft);font-size:.88rem;min-width:0}
.controls .wide{flex:1 1 16rem}
.controls output{color:var(--ink);font-weight:650}
.controls .wide{display:block}
input[type=range]{display:block;width:100%;margin:.55rem 0 .35rem;accent-color:var(--arm-0)}
select{font:inherit;font-size:.95rem;color:var(--ink);background:var(--page);border:1px solid var(--line);
border-radius:6px;padding:.3rem .5rem;max-width:100%}
#arms{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr))}
#arms article{border-top:5px solid;overflow:hidden}
.map{width:100%;max-width:42rem;margin:auto;aspect-ratio:1/.9}
.patches{width:100%;max-width:42rem;margin:auto;aspect-ratio:2/1.05}
.curve{width:100%;height:15rem}
.panels figure{margin:0}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.4rem 0 .8rem}
.strip{display:flex;flex-wrap:wrap;gap:2px;margin:.7rem 0 .3rem}
.strip button{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.82rem;line-height:1.5;
color:var(--ink);background:none;border:1px solid var(--line);border-radius:3px;padding:0 .3em;min-width:1.5em;
white-space:pre;cursor:pointer}
.strip button[aria-pressed=true]{outline:2px solid var(--ink);outline-offset:-1px}
"""
