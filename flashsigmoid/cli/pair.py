"""`flashsigmoid pair`: arms of a recipe over several seeds, compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Fields, Recipe, read_assignments, read_named_fields
from .recipes import find_recipe
from .root import app
from .show import print_arms, progress_bar

TRY_AGAIN = 75  # an exit code: EX_TEMPFAIL of sysexits.h


@app.command(
    epilog="Examples: flashsigmoid pair digits; flashsigmoid pair enwik8 --jobs 2 --max-minutes 9 "
    "--arm rope:position=rope,alibi_bias=none --arm softmax:attention=softmax; "
    "flashsigmoid pair simclr_digits --then probe_digits --then finetune_digits:steps=600"
)
def pair(
    recipe: Recipe,
    seeds: Annotated[int, typer.Option(help="Of each arm: the recipe's, and the next ones.")] = 3,
    jobs: Annotated[int, typer.Option(help="Trainings at once; they share the machine, and its GPUs.")] = 1,
    assignments: Fields = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:FIELD=VALUE,...",
            help="An arm, and in what it differs from the recipe; may be repeated.",
            show_default="sigmoid:attention=sigmoid and softmax:attention=softmax",
        ),
    ] = None,
    then: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE:FIELD=VALUE,...",
            help="A probe or a fine-tuning of every encoder that RECIPE trains; may be repeated.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of all of it.", show_default="runs/RECIPE")] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            help="Of all together; then save and leave with code 75; the same command goes on.", show_default="no limit"
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Train sigmoid and softmax, or arms of your own, over several seeds, and compare them.

    What is trained already is taken as it is, and what was stopped, by Ctrl-C too, goes on from its checkpoint.
    """
    from ..report import difference_statement, summary_rows, write_report
    from ..studies.pair import ARMS, compared, plan, train_trials

    after = read_named_fields("--then", then)
    folder = out or Path("runs") / recipe
    trials = plan(
        {name: find_recipe(name) for name in (recipe, *after)},
        recipe,
        folder,
        seeds=seeds,
        arms=read_named_fields("--arm", arm) if arm else ARMS,
        fields=read_assignments(assignments),
        then=after,
    )
    go_on = "the same command goes on"
    try:
        with progress_bar() as show:
            schedule = train_trials(
                trials, jobs=jobs, device=device, max_minutes=max_minutes, show=show, say=_print_aside
            )
    except KeyboardInterrupt:
        _print_aside(f"stopped, what ran has saved a checkpoint: {go_on}")
        raise
    failed, done = schedule.named("failed"), schedule.named("finished")
    if not failed and len(done) < len(trials):
        _print_aside(f"{len(done)} of {len(trials)} trainings are finished, checkpoints of the others saved: {go_on}")
        raise typer.Exit(TRY_AGAIN)
    for stage, folders in compared(trials, schedule).items():
        page = write_report(folders, stage)
        print_arms(summary_rows(folders))
        for sentence in difference_statement(folders):
            print(sentence)
        print(f"report: {page.absolute()}")
    if failed:
        raise ValueError(f"all trainings must end, got {len(failed)} of {len(trials)} that failed: {', '.join(failed)}")


def _print_aside(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
