"""`flashsigmoid report`: runs compared on a page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .root import app
from .show import print_arms


@app.command(epilog="Example: flashsigmoid report runs/demo runs/demo-seed-1 --out report.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of them; seeds of one arm are joined.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The page, or its folder.", show_default="report.html in the folder that holds all runs"),
    ] = None,
) -> None:
    """Compare runs: one HTML page that opens offline, figures beside it, a table here."""
    from ..report import summary_rows, write_report

    page = write_report(runs, out or Path(os.path.commonpath([run.absolute() for run in runs])))
    print_arms(summary_rows(runs))
    print(f"report: {page.absolute()}")
