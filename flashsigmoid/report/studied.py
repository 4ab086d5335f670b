"""A page of studies and theories: of each the table, the figure, and where its records come from. No run is on it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..record import RECORDS_NAME, read_records
from .document import document, write_whole
from .studies import study_note, study_rows, write_study
from .theory import theory_rows, write_theory


def studied(paths: Sequence[str | Path]) -> list[Path]:
    """The files of records that studies and theories have left in these folders, or that the paths are, by name.

    A folder with runs in it holds runs, and none is found there. Nor are those of single trials.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_file() and any(path.rglob(RECORDS_NAME)):
            continue
        for file in [path] if path.is_file() else sorted(path.glob("*.jsonl")):
            if {"study", "theory"} & read_records(file).settings.keys():
                found[file] = None
    return list(found)


def write_studied(files: Sequence[str | Path], out: str | Path) -> Path:
    """Tables and figures of studies and theories on one page, which opens offline and runs no script.

    Args:
        files: of records, as `studied` finds them.
        out: the page, *.html, or a folder in which it becomes report.html. Missing folders are made.

    Returns:
        The path of the page.

    Raises:
        ValueError: no file; one is damaged or of another kind.
    """
    if not files:
        raise ValueError("at least one file of a study or theory must be given, got none")
    page = Path(out)
    if page.suffix.lower() not in (".html", ".htm"):
        page = page / "report.html"
    sections = "".join(map(_section, map(Path, files)))
    body = f"<main>\n<header><h1>Studies</h1></header>\n{sections}\n</main>"
    css = "\nfigure img{display:block;width:100%;background:#fff}"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, document("Studies", body, allowed="img-src data:;", css=css).encode())
    return page


def _section(path: Path) -> str:
    file = read_records(path)
    is_study = "study" in file.settings
    name = str(file.settings["study" if is_study else "theory"])
    rows, note, write = (
        (study_rows(path), study_note(path), write_study) if is_study else (theory_rows(path), "", write_theory)
    )
    drawn = io.BytesIO()
    write(path, drawn)
    picture = base64.b64encode(drawn.getvalue()).decode()
    return (
        f"<section><h2>{escape(name)}</h2><p>{escape(note)}</p>"
        f'<figure><img alt="{escape(name)}, the figure" src="data:image/png;base64,{picture}"></figure>'
        f'<div class="scroll">{_table(rows)}</div><p class="unit">{escape(_origin(path, file.header))}</p></section>'
    )


def _table(rows: Sequence[dict[str, str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row.values())}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _origin(path: Path, header: dict[str, Any]) -> str:
    commit = str(header.get("commit") or "unknown")[:12] + (", changed" if header.get("dirty") else "")
    return f"{path.name}, by {header.get('command')}; commit {commit}"
