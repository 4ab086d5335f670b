"""`flashsigmoid demo`: both arms on embedded data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Device, Fields, read_assignments
from .recipes import remove_run
from .root import app
from .show import print_arms, train_shown

NO_BIAS = "sigmoid-no-bias"


@app.command(
    epilog="Examples: flashsigmoid demo --no-bias-arm; flashsigmoid demo vision; "
    "flashsigmoid demo --seed 1 --out runs/demo-1; flashsigmoid report runs/demo runs/demo-1"
)
def demo(
    kind: Annotated[
        Literal["language", "vision", "speech"],
        typer.Argument(help="Shakespeare, handwritten digits, or spoken ones."),
    ] = "language",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the arms and the report.", show_default="runs/demo, runs/demo-KIND"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of parameters and order of data, in both arms.")] = 0,
    no_bias_arm: Annotated[bool, typer.Option("--no-bias-arm", help="A third arm: sigmoid with b = 0.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh/--resume", help="Train anew, or take what the folder holds.")] = False,
    device: Device = "cpu",
    assignments: Fields = None,
) -> None:
    """Train a sigmoid and a softmax transformer on text, images or speech, side by side, and report what happened.

    A few minutes on two CPU cores. A second time it takes what is trained, and goes on where it was stopped.
    """
    from ..recipes.fields import override
    from ..report import accuracy_statement, summary_rows, write_report
    from ..training.checkpoint import checkpoints

    if kind == "language":
        from ..recipes.language import demo as recipe
    elif kind == "speech":
        from ..recipes.speech import an4_sample as recipe
    else:
        from ..recipes.vision import demo as recipe
    out = out or Path("runs", "demo" if kind == "language" else f"demo-{kind}")
    run = override(recipe(), {"seed": str(seed)}, read_assignments(assignments))
    if run.model.attention != "sigmoid":
        raise ValueError(f"model.attention has no effect: the demo trains both arms, got {run.model.attention}")
    arms = {"sigmoid": run, "softmax": run.with_attention("softmax")}
    if no_bias_arm:
        arms[NO_BIAS] = override(run, {"model.sigmoid_bias": "0"})
    results = {}
    for name, arm in arms.items():
        folder = out / name
        if fresh:
            remove_run(folder)
        trained = checkpoints(folder)
        if trained and trained[-1].name == f"step-{arm.steps:08d}":
            print(f"{name}: trained already in {folder}, taken as it is (--fresh trains anew)")
        try:
            results[name] = train_shown(arm, folder, resume=True, device=device)
        except ValueError as error:
            if not trained:
                raise
            raise ValueError(f"{error}; --fresh trains anew, --out names another folder") from error
    folders = [out / name for name in arms]
    page = write_report(folders, out)
    print_arms(summary_rows(folders))
    if "baseline/bigram_floor" in results["sigmoid"]:
        bigram, floor = (results["sigmoid"][f"baseline/{name}"] for name in ("bigram", "bigram_floor"))
        print(f"nats per byte of a bigram model of the same text: {bigram:.3f}, of the best there can be: {floor:.3f}")
    for sentence in accuracy_statement(folders):
        print(sentence)
    print(f"report: {page.absolute()}")
