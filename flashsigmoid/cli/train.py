"""`flashsigmoid train`: one run of a recipe."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Device, Fields, read_assignments
from .recipes import find_recipe, find_recipes
from .root import app
from .show import train_shown

if TYPE_CHECKING:
    from ..training.run import Run


@app.command(
    epilog="Examples: flashsigmoid train demo --attention softmax --out runs/mine/softmax; "
    "flashsigmoid train demo --data my.txt --set model.dim=256 --set steps=2000"
)
def train(
    recipe: Annotated[str | None, typer.Argument(help="Name of a recipe, see --list.", show_default=False)] = None,
    attention: Annotated[str | None, typer.Option(help="sigmoid or softmax.")] = None,
    sigmoid_bias: Annotated[str | None, typer.Option(help="b of every attention; none: -log(context length).")] = None,
    steps: Annotated[str | None, typer.Option(help="Optimizer steps.")] = None,
    seed: Annotated[str | None, typer.Option(help="Of parameters, order of data and dropout.")] = None,
    data: Annotated[
        str | None, typer.Option(help="A text file, a folder of .txt, hf:NAME[:CONFIG] or enwik8:FILE.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bytes, or bpe: trained on the text.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Sequences in a micro-batch.")] = None,
    lr: Annotated[str | None, typer.Option(help="Peak learning rate.")] = None,
    assignments: Fields = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/RECIPE/ATTENTION")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
    max_minutes: Annotated[
        float | None,
        typer.Option(help="Then save and leave with exit code 75; --resume goes on.", show_default="no limit"),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="dp=N,cp=N,tp=N",
            help="Processes along each axis, started here if not by torchrun or srun.",
            show_default="one",
        ),
    ] = None,
    probe_every: Annotated[
        int, typer.Option(help="Measure norms and attention everywhere in one of so many steps; 0: never.")
    ] = 0,
    device: Device = "auto",
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
) -> None:
    """Train a model by a recipe. Ctrl-C saves a checkpoint, --resume goes on from it."""
    from ..recipes.fields import override
    from ..training.cluster import adopt_launcher

    if list_recipes:
        recipes, missing = find_recipes()
        for name, function in recipes.items():
            print(f"{name:21} {(function.__doc__ or '').strip().partition(chr(10))[0]}")
        if missing:
            print(missing)
        return
    make = find_recipe(recipe)
    flags = {
        "model.attention": attention,
        "model.sigmoid_bias": sigmoid_bias,
        "steps": steps,
        "seed": seed,
        "data.source": data,
        "data.tokenizer": tokenizer,
        "precision": precision,
        "batch": batch_size,
        "optim.lr": lr,
    }
    given = {name: text for name, text in flags.items() if text is not None}
    run = override(make(), given, read_assignments(assignments))
    if run.model.sigmoid_bias is not None and run.model.attention != "sigmoid":
        bias = run.model.sigmoid_bias
        raise ValueError(f"sigmoid_bias has no effect with attention={run.model.attention}, got {bias}")
    adopt_launcher()
    folder = out or Path("runs") / str(recipe) / run.model.attention
    if mesh is not None and _launched(mesh, device):
        return
    is_first = os.environ.get("RANK", "0") == "0"
    if resume and is_first and not _has_checkpoint(folder):
        print(f"no checkpoint in {folder} to resume from: training from the beginning", file=sys.stderr)
    results = train_shown(
        run, folder, resume=resume, device=device, max_minutes=max_minutes, mesh=mesh, probe_every=probe_every
    )
    if not is_first:
        return
    print(", ".join(f"{name} {value:.4f}" for name, value in results.items()))
    after = _next(run, folder)
    print(f"run: {folder}   next: {after}")


def _has_checkpoint(folder: Path) -> bool:
    from ..training.checkpoint import checkpoints

    return bool(checkpoints(folder))


def _launched(mesh: str, device: str) -> bool:
    """Whether this command started itself once for each rank of the mesh; False: it is one of them, to be gone on with.

    Raises:
        typer.Exit: the ranks did not end well; with the exit code of one.
    """
    from ..distributed.launch import check_devices, launch
    from ..distributed.processes import is_launched, parse_mesh

    sizes = parse_mesh(mesh)
    if is_launched():
        return False
    check_devices(sizes, device)
    if code := launch(sizes, ["-m", "flashsigmoid", *sys.argv[1:]]):
        raise typer.Exit(code)
    return True


def _next(run: Run, folder: Path) -> str:
    """What one may do with a trained model; the classes are named, since importing one may need an extra."""
    commands = {
        "LanguageRun": f"flashsigmoid generate {folder}   flashsigmoid report {folder}",
        "SpeechRun": f"flashsigmoid transcribe {folder} FILE...",
    }
    return commands.get(type(run).__name__, f"flashsigmoid report {folder}")
