"""What a terminal shows: bars of trainings, tables of arms and of rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

if TYPE_CHECKING:
    from ..training.callbacks import Progress, Show
    from ..training.module import Options
    from ..training.run import Run


def train_shown(run: Run, folder: Path, **options: Unpack[Options]) -> dict[str, float]:
    with progress_bar() as show:
        return run.train(folder, **{**options, "show": show})


@contextmanager
def progress_bar() -> Iterator[Show]:
    """A function that shows where a training stands: a bar on a terminal, else a line per validation."""
    from ..training.callbacks import show_line

    console = Console(stderr=True)
    if not console.is_terminal or os.environ.get("RANK", "0") != "0":
        yield show_line
        return
    columns = (
        "{task.description}",
        BarColumn(bar_width=20),  # the line fits a terminal of 80 columns
        MofNCompleteColumn(),
        "{task.fields[numbers]}",
        TimeRemainingColumn(),
    )
    with ProgressBar(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def show(progress: Progress) -> None:
            if progress.name not in tasks:
                tasks[progress.name] = bar.add_task(progress.name, total=progress.steps, numbers="")
            shown = {"val": "val/loss", "train": "train/loss", "accuracy": "val/accuracy", "CER": "val/cer"}
            latest = {name: progress.metrics.get(metric) for name, metric in shown.items()}
            numbers = "  ".join(f"{name} {value:.3f}" for name, value in latest.items() if value is not None)
            bar.update(tasks[progress.name], completed=progress.step, numbers=numbers)

        yield show


def print_arms(rows: list[dict[str, str]]) -> None:
    """One column per arm: there are few of them and many numbers."""
    label, *names = rows[0]
    table = Table()
    for heading in (label, *(row[label] for row in rows)):
        table.add_column(heading, overflow="fold")
    for name in names:
        table.add_row(name, *(row[name] for row in rows))
    Console().print(table)


def print_table(rows: list[dict[str, str]]) -> None:
    """One line per row, under the names of its columns; one column per row where words would not fit the terminal."""
    table = Table()
    for name in rows[0]:
        table.add_column(name, no_wrap=name == next(iter(rows[0])), overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    words = (" ".join([name, *(row[name] for row in rows)]).split() for name in rows[0])
    narrowest = 1 + sum(3 + max(map(len, each)) for each in words)  # with the lines between columns
    if len(rows) < len(rows[0]) and narrowest > console.width:
        print_arms(rows)
    else:
        console.print(table)
