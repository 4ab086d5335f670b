"""`flashsigmoid study` and `flashsigmoid theory`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import Device, read_assignments
from .recipes import remove_run
from .root import app
from .show import print_table, progress_bar


@app.command(
    epilog="Examples: flashsigmoid study diagnosis --quick; flashsigmoid study retrieval --only 'sigmoid*' --seed 0; "
    "flashsigmoid study vision-ablation --only base --only no-bias --set steps=200 --set seed=1"
)
def study(
    name: Annotated[
        str,
        typer.Argument(
            help="diagnosis: the first attention norms, and the loss at longer lengths; retrieval: recall and needles; "
            "k-summation: add k of n numbers; pair-repeat: has a pair come again; "
            "neighbours: attentions of the literature; sinks: mass on the first keys; speculative: a sigmoid "
            "draft of a softmax model; vision-ablation: what each practice is worth.",
            show_default=False,
        ),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Minutes on a CPU. Not of vision-ablation.")] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Of vision-ablation: a recipe for images, of which it trains variants.", show_default="digits"
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="An arm, or a pattern as 'rope-*'; may be repeated, all by default.", show_default=False),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="May be repeated, the study's by default. Not of vision-ablation.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study.", show_default="runs/STUDY, -quick or /RECIPE")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh/--resume", help="Train anew, or take what the folder holds.")] = False,
    device: Device = "auto",
    jobs: Annotated[
        int, typer.Option(help="Trainings at once; they share the machine, and its GPU. Not of vision-ablation.")
    ] = 1,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Of vision-ablation: any field of the run, as steps=200; may be repeated.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train the arms of a study and compare them in a table and a figure.

    What the folder holds already is taken as it is, so arms and seeds may be run side by side or on other machines.
    """
    if name == "vision-ablation":
        if quick or seed or jobs != 1:
            raise ValueError("vision-ablation has no --quick, --seed and --jobs: use --set steps=200, --set seed=1")
        _vision_ablation(recipe or "digits", only or [], out, fresh, device, assignments)
        return
    from ..report.studies import study_note, study_rows, write_study
    from ..studies import STUDIES, load

    if name not in STUDIES:
        raise ValueError(f"STUDY must be one of {', '.join(STUDIES)}, vision-ablation, got {name}")
    if recipe or assignments:
        raise ValueError(f"--recipe and --set are of vision-ablation only, got one with {name}")
    folder = out or Path("runs") / (f"{name}-quick" if quick else name)
    if fresh:
        shutil.rmtree(folder / "trials", ignore_errors=True)
    with progress_bar() as show:
        records = load(name)(
            folder, quick=quick, only=only or (), seeds=seed or (), device=device, jobs=jobs, show=show
        )
    print_table(study_rows(records))
    print(study_note(records))
    figure = records.with_suffix(".png")
    write_study(records, figure)
    print(f"records: {records}   figure: {figure}")


def _vision_ablation(
    recipe: str, only: list[str], out: Path | None, fresh: bool, device: Any, assignments: list[str] | None
) -> None:
    from ..recipes.fields import override
    from ..recipes.vision import RECIPES
    from ..report.ablation import NOTE, ablation_rows
    from ..studies.vision_ablation import chosen, vision_ablation

    if recipe not in RECIPES:
        raise ValueError(f"--recipe must be one of {', '.join(RECIPES)}, got {recipe}")
    base = override(RECIPES[recipe](), read_assignments(assignments))
    folder = out or Path("runs") / "vision-ablation" / recipe
    for variant in chosen(base, only) if fresh else ():
        remove_run(folder / variant)
    with progress_bar() as show:
        summary = vision_ablation(base, folder, only=only, device=device, show=show)
    # what a variant differs in is too wide for a terminal, and its name says it
    print_table([{key: text for key, text in row.items() if key != "differs in"} for row in ablation_rows(summary)])
    print(f"{NOTE}\nrecords: {summary}")


@app.command(epilog="Examples: flashsigmoid theory universal --quick; flashsigmoid theory regularity --out runs/mine")
def theory(
    name: Annotated[
        Literal["bias", "regularity", "tightness", "universal", "numerics"],
        typer.Argument(
            help="bias: which b is closest to softmax; regularity: how fast attention can change; "
            "tightness: a bound against 10,000 points; universal: a function approximated by weights set by hand; "
            "numerics: errors of formulas of the sigmoid against n.",
            show_default=False,
        ),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Seconds, or half a minute for regularity.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of NAME.jsonl and NAME.png.")] = Path("runs/theory"),
) -> None:
    """Run a result of the paper: its numbers as records, its figure, a table here. On the CPU, in float64."""
    from ..report.theory import theory_rows, write_theory
    from ..studies.theory import THEORIES

    records = THEORIES[name](out, quick=quick)
    figure = records.with_suffix(".png")
    write_theory(records, figure)
    print_table(theory_rows(records))
    print(f"records: {records}   figure: {figure}")
