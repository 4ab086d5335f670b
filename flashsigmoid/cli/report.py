"""`flashsigmoid report`: runs compared on a page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .root import app
from .show import print_arms


@app.command(
    epilog="Examples: flashsigmoid report runs/demo runs/demo-seed-1 --out report.html; "
    "flashsigmoid report runs/theory runs/sinks-quick --out studies.html"
)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, or folders of them; seeds of one arm are joined. Or folders of studies and theories."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The page, or its folder.", show_default="report.html in the folder that holds all runs"),
    ] = None,
) -> None:
    """Compare runs: one HTML page that opens offline, figures beside it, a table here. Of studies, a page of theirs."""
    from ..report import summary_rows, write_report
    from ..report.studied import studied, write_studied

    target = out or Path(
        os.path.commonpath([run.absolute().parent if run.is_file() else run.absolute() for run in runs])
    )
    if files := studied(runs):
        if others := [run for run in runs if not studied([run])]:
            if not others[0].exists():
                raise ValueError(f"a run or a study must be at the path, got {others[0]}")
            raise ValueError(f"a report must be of runs or of studies, got {files[0]} and {others[0]}")
        print(f"report: {write_studied(files, target).absolute()}")
        return
    page = write_report(runs, target)
    print_arms(summary_rows(runs))
    print(f"report: {page.absolute()}")
