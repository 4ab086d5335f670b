"""`flashsigmoid steps`: what a step of each arm of a recipe takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Fields, Recipe, read_assignments, read_named_fields
from .recipes import find_recipe
from .root import app


@app.command(
    epilog="Examples: flashsigmoid steps digits; "
    "flashsigmoid steps an4 --set data.root=an4/manifest.tsv --set compile=true; "
    "flashsigmoid steps enwik8 --set data.source=enwik8:enwik8.zip --arm softmax:attention=softmax --arm sigmoid "
    "--arm rope:position=rope,alibi_bias=none"
)
def steps(
    recipe: Recipe,
    assignments: Fields = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:FIELD=VALUE,...",
            help="An arm, and in what it differs from the recipe; may be repeated. Others are compared with the first.",
            show_default="softmax:attention=softmax and sigmoid:attention=sigmoid",
        ),
    ] = None,
    block: Annotated[int, typer.Option(min=1, help="Steps that an arm takes in its turn.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each arm.")] = 10,
    out: Annotated[Path, typer.Option(help="Records file to write.")] = Path("steps.jsonl"),
    device: Device = "auto",
) -> None:
    """Time the steps of sigmoid and softmax, or arms of your own, in turns. Nothing that was trained is kept.

    The first arm trains twice, as two of them: what equal things differ by.
    """
    from ..bench.steps import AGAIN, cut, measure, print_times
    from ..recipes.fields import override

    given = read_named_fields("--arm", arm) if arm else {name: {"attention": name} for name in ("softmax", "sigmoid")}
    base, own = next(iter(given.items()))
    run, fields = cut(find_recipe(recipe)(), block, rounds), read_assignments(assignments)
    arms = {name: (override(run, fields, changes), None) for name, changes in {**given, base + AGAIN: own}.items()}
    print_times(measure(arms, base, device, rounds, out), base)
