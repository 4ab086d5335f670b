"""The commands of `flashsigmoid`: words from a terminal to calls of the rooms, imported when needed.

No training, no measuring and no drawing happens here; exit codes and errors are __main__'s.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from . import __version__

if TYPE_CHECKING:
    from .record import Record
    from .training.callbacks import Progress, Show
    from .training.module import Options
    from .training.run import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: flashsigmoid demo",
    rich_markup_mode="rich",
)

Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"], typer.Option("--device", "--accelerator", help="Where to train.")
]
Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Any field of the run, as model.dim=256; may be repeated.",
        show_default=False,
    ),
]
NO_BIAS = "sigmoid-no-bias"
TRY_AGAIN = 75  # an exit code: EX_TEMPFAIL of sysexits.h


def _version(wanted: bool) -> None:
    if wanted:
        print(f"flashsigmoid {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; also after a command.")
    ] = False,
) -> None:
    """Sigmoid attention: train it, look at it, ask why."""


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
    from .recipes.fields import override
    from .report import accuracy_statement, summary_rows, write_report
    from .training.checkpoint import checkpoints

    if kind == "language":
        from .recipes.language import demo as recipe
    elif kind == "speech":
        from .recipes.speech import an4_sample as recipe
    else:
        from .recipes.vision import demo as recipe
    out = out or Path("runs", "demo" if kind == "language" else f"demo-{kind}")
    run = override(recipe(), {"seed": str(seed)}, _assignments(assignments))
    if run.model.attention != "sigmoid":
        raise ValueError(f"model.attention has no effect: the demo trains both arms, got {run.model.attention}")
    arms = {"sigmoid": run, "softmax": run.with_attention("softmax")}
    if no_bias_arm:
        arms[NO_BIAS] = override(run, {"model.sigmoid_bias": "0"})
    results = {}
    for name, arm in arms.items():
        folder = out / name
        if fresh:
            _remove_run(folder)
        trained = checkpoints(folder)
        if trained and trained[-1].name == f"step-{arm.steps:08d}":
            print(f"{name}: trained already in {folder}, taken as it is (--fresh trains anew)")
        try:
            results[name] = _train(arm, folder, resume=True, device=device)
        except ValueError as error:
            if not trained:
                raise
            raise ValueError(f"{error}; --fresh trains anew, --out names another folder") from error
    folders = [out / name for name in arms]
    page = write_report(folders, out)
    _print_rows(summary_rows(folders))
    if "baseline/bigram_floor" in results["sigmoid"]:
        bigram, floor = (results["sigmoid"][f"baseline/{name}"] for name in ("bigram", "bigram_floor"))
        print(f"nats per byte of a bigram model of the same text: {bigram:.3f}, of the best there can be: {floor:.3f}")
    for sentence in accuracy_statement(folders):
        print(sentence)
    print(f"report: {page.absolute()}")


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
    device: Device = "auto",
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
) -> None:
    """Train a model by a recipe. Ctrl-C saves a checkpoint, --resume goes on from it."""
    from .recipes.fields import override

    recipes, missing = _recipes()
    if list_recipes:
        for name, function in recipes.items():
            print(f"{name:21} {(function.__doc__ or '').strip().partition(chr(10))[0]}")
        if missing:
            print(missing)
        return
    if recipe not in recipes:
        raise ValueError(f"RECIPE must be one of {', '.join(recipes)}, got {recipe}" + (missing and f"; {missing}"))
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
    run = override(recipes[recipe](), given, _assignments(assignments))
    if run.model.sigmoid_bias is not None and run.model.attention != "sigmoid":
        bias = run.model.sigmoid_bias
        raise ValueError(f"sigmoid_bias has no effect with attention={run.model.attention}, got {bias}")
    folder = out or Path("runs") / recipe / run.model.attention
    results = _train(run, folder, resume=resume, device=device, max_minutes=max_minutes)
    print(", ".join(f"{name} {value:.4f}" for name, value in results.items()))
    after = _next(run, folder)
    print(f"run: {folder}" + (after and f"   next: {after}"))


@app.command(
    epilog="Examples: flashsigmoid pair digits; flashsigmoid pair enwik8 --jobs 2 --max-minutes 9 "
    "--arm rope:position=rope --arm softmax-rope:attention=softmax,position=rope; "
    "flashsigmoid pair simclr_digits --then probe_digits --then finetune_digits:steps=600"
)
def pair(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, see flashsigmoid train --list.", show_default=False)],
    seeds: Annotated[int, typer.Option(help="Of each arm: the recipe's, and the next ones.")] = 3,
    jobs: Annotated[int, typer.Option(help="Trainings at once; they share the machine, and its GPU.")] = 1,
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
    from .report import difference_statement, summary_rows, write_report
    from .studies.pair import ARMS, compared, plan, train_trials

    recipes, missing = _recipes()
    if recipe not in recipes and missing:
        raise ValueError(f"RECIPE must be one of {', '.join(recipes)}, got {recipe}; {missing}")
    folder = out or Path("runs") / recipe
    trials = plan(
        recipes,
        recipe,
        folder,
        seeds=seeds,
        arms=_named_fields("--arm", arm) if arm else ARMS,
        fields=_assignments(assignments),
        then=_named_fields("--then", then),
    )
    go_on = "the same command goes on"
    try:
        with _progress() as show:
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
        _print_rows(summary_rows(folders))
        for sentence in difference_statement(folders):
            print(sentence)
        print(f"report: {page.absolute()}")
    if failed:
        raise ValueError(f"all trainings must end, got {len(failed)} of {len(trials)} that failed: {', '.join(failed)}")


def _print_aside(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _named_fields(option: str, texts: list[str] | None) -> dict[str, dict[str, str]]:
    """{"wide": {"dim": "256", "betas": "0.9,0.95"}} of ["wide:dim=256,betas=0.9,0.95"]."""
    found: dict[str, dict[str, str]] = {}
    for text in texts or ():
        name, _, rest = text.partition(":")
        if name in found:
            raise ValueError(f"{option} must be given once for each name, got {name} twice")
        pieces: list[str] = []
        for piece in rest.split(",") if rest else ():
            if pieces and "=" not in piece:  # of a value with commas
                pieces[-1] += f",{piece}"
            else:
                pieces.append(piece)
        found[name] = _assignments(pieces, option)
    return found


def _recipes() -> tuple[dict[str, Callable[[], Run]], str]:
    """All recipes by name, and which are not here and why."""
    from .recipes import language

    recipes: dict[str, Callable[[], Run]] = dict(language.RECIPES)
    missing = []
    for room, what in (("vision", "images"), ("speech", "speech")):
        try:
            recipes |= importlib.import_module(f".recipes.{room}", __package__).RECIPES
        except ModuleNotFoundError as error:
            missing.append(f"recipes for {what} need {error.name}: pip install 'flashsigmoid[{room}]'")
    return recipes, "; ".join(missing)


def _next(run: Run, folder: Path) -> str:
    """What one may do with a trained model; the classes are named, since importing one may need an extra."""
    commands = {
        "LanguageRun": f"flashsigmoid generate {folder}   flashsigmoid report {folder}",
        "SpeechRun": f"flashsigmoid transcribe {folder} FILE...",
    }
    return commands.get(type(run).__name__, "")


def _train(run: Run, folder: Path, **options: Unpack[Options]) -> dict[str, float]:
    with _progress() as show:
        return run.train(folder, **{**options, "show": show})


@contextmanager
def _progress() -> Iterator[Show]:
    """A function that shows where a training stands: a bar on a terminal, else a line per validation."""
    from .training.callbacks import show_line

    console = Console(stderr=True)
    if not console.is_terminal:
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


def _remove_run(folder: Path) -> None:
    """Remove a folder if it holds a run, and nothing else by accident."""
    from .record import RECORDS_NAME

    if (folder / RECORDS_NAME).exists():
        shutil.rmtree(folder)


def _print_rows(rows: list[dict[str, str]]) -> None:
    """One column per arm: there are few of them and many numbers."""
    label, *names = rows[0]
    table = Table()
    for heading in (label, *(row[label] for row in rows)):
        table.add_column(heading, overflow="fold")
    for name in names:
        table.add_row(name, *(row[name] for row in rows))
    Console().print(table)


def _print_table(rows: list[dict[str, str]]) -> None:
    """One line per row, under the names of its columns."""
    table = Table()
    for name in rows[0]:
        table.add_column(name, no_wrap=name == next(iter(rows[0])), overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


@app.command(epilog='Example: flashsigmoid generate runs/demo/sigmoid --prompt "ROMEO:" --temperature 0.7')
def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint, or a run: its newest checkpoint.", show_default=False)
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "\n",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to draw; an end of text stops earlier.")] = 500,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k most likely tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the fewest tokens of this probability together.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws; a fresh one each time by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, ...")] = "cpu",
) -> None:
    """Continue a text with a trained model, as it comes."""
    from .training.checkpoint import load_model

    model, tokenizer = load_model(checkpoint, device)
    for text in _continuation(model, tokenizer, prompt, max_new_tokens, temperature, top_k, top_p, seed):
        sys.stdout.write(text)
        sys.stdout.flush()
    print()


def _continuation(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> Iterator[str]:
    """The prompt, then new text as soon as its bytes make whole characters."""
    import torch

    from .models.generation import stream

    if not prompt:
        raise ValueError("prompt must have at least one character, got none")
    tokens = torch.from_numpy(tokenizer.encode(prompt.encode()))[None].to(next(model.parameters()).device)
    new = stream(model, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    yield prompt
    pending: list[int] = []
    for token in new:
        if token.item() == tokenizer.eot:
            break
        pending.append(int(token))
        text = tokenizer.decode(pending)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(pending) == 4:  # UTF-8 has at most 4 bytes
            yield text
            pending = []
    if pending:
        yield tokenizer.decode(pending)


@app.command(epilog="Example: flashsigmoid export runs/demo/sigmoid exported")
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint, or a run: its newest checkpoint.", show_default=False)
    ],
    out_dir: Annotated[Path, typer.Argument(help="A new directory.", show_default=False)],
) -> None:
    """Write a trained language model as a directory of Hugging Face transformers."""
    from .integrations.sigmoid_gpt import export as write
    from .training.checkpoint import load_model

    model, tokenizer = load_model(checkpoint)
    print(f"exported: {write(model, tokenizer.to_library_json(), out_dir).absolute()}")


@app.command(
    epilog="Examples: flashsigmoid convert a-llama --seqlen 2048 --data my.txt --steps 1000; "
    "flashsigmoid convert a-llama --set optim.lr=3e-4 --out runs/converted"
)
def convert(
    checkpoint: Annotated[
        str, typer.Argument(help="Of transformers, in Llama's layout, trained with softmax.", show_default=False)
    ],
    seqlen: Annotated[int, typer.Option(help="Tokens of a window, and n of b = -log(n).")] = 128,
    sigmoid_bias: Annotated[str | None, typer.Option(help="b; none: -log(seqlen).")] = None,
    steps: Annotated[str | None, typer.Option(help="Optimizer steps of the recovery.")] = None,
    seed: Annotated[str | None, typer.Option(help="Of the order of data.")] = None,
    data: Annotated[str | None, typer.Option(help="A text file, or a folder of .txt.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Windows in a micro-batch.")] = None,
    lr: Annotated[str | None, typer.Option(help="Peak learning rate.")] = None,
    assignments: Fields = None,
    out: Annotated[Path, typer.Option(help="Folder of both arms.")] = Path("runs/converted"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoints in the folder.")] = False,
    device: Device = "auto",
) -> None:
    """Give a softmax model sigmoid attention, train it a little, and the softmax original in the same way as control.

    All weights are kept; the loss is told before and after.
    """
    from .recipes.conversion import MODEL, llama_recovery
    from .recipes.conversion import convert as train_both
    from .recipes.fields import override
    from .report.conversion import NOTE, conversion_rows

    flags = {
        "model.sigmoid_bias": sigmoid_bias,
        "steps": steps,
        "seed": seed,
        "data.source": data,
        "precision": precision,
        "batch": batch_size,
        "optim.lr": lr,
    }
    given = {name: text for name, text in flags.items() if text is not None}
    run = override(llama_recovery(checkpoint, seqlen), given, _assignments(assignments))
    with _progress() as show:
        folders = train_both(run, out, resume=resume, device=device, show=show)
    _print_table(conversion_rows(out))
    print(f"{NOTE}\nmodel: {folders['sigmoid'] / MODEL}")


@app.command(epilog="Example: flashsigmoid transcribe runs/an4_sample/sigmoid one.wav two.flac --beam 16")
def transcribe(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint, or a run: its newest checkpoint.", show_default=False)
    ],
    files: Annotated[list[Path], typer.Argument(help="WAV, FLAC, ... of one utterance each.", show_default=False)],
    beam: Annotated[int, typer.Option(help="Prefixes that a beam search keeps; 1 takes the best path.")] = 1,
    skip: Annotated[bool, typer.Option("--skip", help="Name a file that cannot be used on stderr, and go on.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, ...")] = "cpu",
) -> None:
    """Write down what is said in audio files: one line each, after the name if there are several."""
    from .training.ctc import load_recogniser
    from .training.ctc import transcribe as text_of

    if beam < 1:
        raise ValueError(f"--beam must be at least 1, got {beam}")
    model, audio = load_recogniser(checkpoint, device)
    left_out = 0
    for file in files:
        try:
            text = text_of(model, audio, file, beam=beam)
        except ValueError as error:
            if not skip:
                raise
            left_out += 1
            print(f"left out, {error}", file=sys.stderr, flush=True)
            continue
        print(f"{file}\t{text}" if len(files) > 1 else text, flush=True)
    if left_out:
        print(f"{left_out} of {len(files)} files left out", file=sys.stderr)


@app.command(epilog="Example: flashsigmoid long-audio runs/an4/sigmoid runs/an4/softmax; flashsigmoid report runs/an4")
def long_audio(
    runs: Annotated[list[Path], typer.Argument(help="Runs on speech, finished or not.", show_default=False)],
    factors: Annotated[str, typer.Option(help="Utterances joined at a time, with commas.")] = "1,2,4,8",
    root: Annotated[
        str | None, typer.Option(help="The manifest, or the folder, of the data.", show_default="where they were")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, ...")] = "cpu",
) -> None:
    """Join validation utterances of one speaker and count errors: does a recogniser work on longer audio?

    Records go to long-audio.jsonl of each run, where the report finds them.
    """
    from .recipes.fields import parse
    from .training.long_audio import long_audio as measure

    chosen = parse("factors", factors, tuple[int, ...])
    for run in runs:
        print(run)
        measure(run, factors=chosen, device=device, root=root)


@app.command(epilog="Example: flashsigmoid report runs/demo runs/demo-seed-1 --out report.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of them; seeds of one arm are joined.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The page, or its folder.", show_default="report.html in the folder that holds all runs"),
    ] = None,
) -> None:
    """Compare runs: one HTML page that opens offline, figures beside it, a table here."""
    from .report import summary_rows, write_report

    page = write_report(runs, out or Path(os.path.commonpath([run.absolute() for run in runs])))
    _print_rows(summary_rows(runs))
    print(f"report: {page.absolute()}")


@app.command(
    epilog="Examples: flashsigmoid study diagnosis --quick; flashsigmoid study retrieval --only 'sigmoid*' --seed 0; "
    "flashsigmoid study vision-ablation --only base --only no-bias --set steps=200 --set seed=1"
)
def study(
    name: Annotated[
        str,
        typer.Argument(
            help="diagnosis: the first attention norms, and the loss at longer lengths; retrieval: recall and needles; "
            "neighbours: attentions of the literature; sinks: mass on the first keys; vision-ablation: what each "
            "practice is worth.",
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
    assignments: Fields = None,
) -> None:
    """Train the arms of a study and compare them in a table and, where there is something to draw, a figure.

    What the folder holds already is taken as it is, so arms and seeds may be run side by side or on other machines.
    """
    if name == "vision-ablation":
        if quick or seed:
            raise ValueError("vision-ablation has neither --quick nor --seed: use --set steps=200, --set seed=1")
        _vision_ablation(recipe or "digits", only or [], out, fresh, device, assignments)
        return
    from .report.studies import has_figure, study_note, study_rows, write_study
    from .studies import STUDIES, load

    if name not in STUDIES:
        raise ValueError(f"STUDY must be one of {', '.join(STUDIES)}, vision-ablation, got {name}")
    if recipe or assignments:
        raise ValueError(f"--recipe and --set are of vision-ablation only, got one with {name}")
    folder = out or Path("runs") / (f"{name}-quick" if quick else name)
    if fresh:
        shutil.rmtree(folder / "trials", ignore_errors=True)
    with _progress() as show:
        records = load(name)(folder, quick=quick, only=only or (), seeds=seed or (), device=device, show=show)
    _print_table(study_rows(records))
    print(study_note(records))
    drawn = ""
    if has_figure(records):
        write_study(records, records.with_suffix(".png"))
        drawn = f"   figure: {records.with_suffix('.png')}"
    print(f"records: {records}{drawn}")


def _vision_ablation(
    recipe: str, only: list[str], out: Path | None, fresh: bool, device: Any, assignments: list[str] | None
) -> None:
    from .recipes.fields import override
    from .recipes.vision import RECIPES
    from .report.ablation import NOTE, ablation_rows
    from .studies.vision_ablation import chosen, vision_ablation
    from .training.classification import ImageRun

    classifiers = {key: run for key, make in RECIPES.items() if isinstance(run := make(), ImageRun)}
    if recipe not in classifiers:
        raise ValueError(f"--recipe must be one of {', '.join(classifiers)}, got {recipe}")
    base = override(classifiers[recipe], _assignments(assignments))
    folder = out or Path("runs") / "vision-ablation" / recipe
    for variant in chosen(base, only) if fresh else ():
        _remove_run(folder / variant)
    with _progress() as show:
        summary = vision_ablation(base, folder, only=only, device=device, show=show)
    # what a variant differs in is too wide for a terminal, and its name says it
    _print_table([{key: text for key, text in row.items() if key != "differs in"} for row in ablation_rows(summary)])
    print(f"{NOTE}\nrecords: {summary}")


@app.command(epilog="Examples: flashsigmoid theory universal --quick; flashsigmoid theory regularity --out runs/mine")
def theory(
    name: Annotated[
        Literal["bias", "regularity", "universal"],
        typer.Argument(
            help="bias: which b is closest to softmax; regularity: how fast attention can change; "
            "universal: a function approximated by weights set by hand.",
            show_default=False,
        ),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Seconds, or half a minute for regularity.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of NAME.jsonl and NAME.png.")] = Path("runs/theory"),
) -> None:
    """Run a result of the paper: its numbers as records, its figure, a table here. On the CPU, in float64."""
    from .report.theory import theory_rows, write_theory
    from .studies.theory import THEORIES

    records = THEORIES[name](out, quick=quick)
    figure = records.with_suffix(".png")
    write_theory(records, figure)
    _print_table(theory_rows(records))
    print(f"records: {records}   figure: {figure}")


@app.command(epilog="Example: flashsigmoid pack imagenet imagenet-tar --shard-size 5000")
def pack(
    folder: Annotated[Path, typer.Argument(help="Images: train/CLASS/* and val/CLASS/*.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder of the shards, not there yet.", show_default=False)],
    shard_size: Annotated[int, typer.Option(help="Images in a shard.")] = 10_000,
) -> None:
    """Put a folder of images into tar files, as webdataset reads them, and trainings with data.source=tar."""
    from .training.pack import pack_images

    pack_images(folder, out, shard_size=shard_size)
    print(f"shards: {out}   next: flashsigmoid train RECIPE --set data.source=tar --set data.root={out}")


@app.command(epilog="Example: flashsigmoid explain --seqlen 4096 --head-dim 128 --causal --dtype float32")
def explain(
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    seqlen: Annotated[int, typer.Option(help="Queries and keys.")] = 1024,
    seqlen_k: Annotated[int | None, typer.Option(help="Keys, if not as many as queries.")] = None,
    nheads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    nheads_k: Annotated[int | None, typer.Option(help="Key and value heads, if fewer.")] = None,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 64,
    head_dim_v: Annotated[int | None, typer.Option(help="Channels of a value head, if others.")] = None,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32", "float64"], typer.Option(help="Of q, k, v.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, ...")] = "cpu",
    causal: Annotated[bool, typer.Option("--causal", help="Bottom-right causal mask.")] = False,
    window: Annotated[
        str | None, typer.Option(help="LEFT,RIGHT in keys; none is unlimited.", metavar="LEFT,RIGHT")
    ] = None,
    alibi: Annotated[bool, typer.Option("--alibi", help="With a slope per head.")] = False,
    sigmoid_bias: Annotated[float | None, typer.Option(help="b; -log(keys) by default.")] = None,
    bias_per_head: Annotated[bool, typer.Option("--bias-per-head", help="b is a tensor (nheads,).")] = False,
    dropout_p: Annotated[float, typer.Option(help="Dropout of attention weights.")] = 0.0,
    sigmoid: Annotated[Literal["auto", "exact", "fast"], typer.Option(help="Formula of the sigmoid.")] = "auto",
    backend: Annotated[str, typer.Option(help="Ask for one by name.")] = "auto",
) -> None:
    """Which backend a call of sigmoid_attention takes, by which formula, and why not the others.

    Nothing is computed, and the device need not be there.
    """
    import torch

    from . import backends, functional
    from .recipes.fields import parse

    if bias_per_head and sigmoid_bias is not None:
        raise ValueError("sigmoid_bias has no effect with --bias-per-head")
    if backend not in ("auto", *backends.NAMES):
        raise ValueError(f"backend must be one of auto, {', '.join(backends.NAMES)}, got {backend}")
    kind = torch.device(device).type
    numbers = getattr(torch, dtype)

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=numbers, device="meta")

    heads_k, keys = nheads_k or nheads, seqlen if seqlen_k is None else seqlen_k
    said = functional.explain(
        meta(batch, seqlen, nheads, head_dim),
        meta(batch, keys, heads_k, head_dim),
        meta(batch, keys, heads_k, head_dim_v or head_dim),
        sigmoid_bias=meta(nheads) if bias_per_head else sigmoid_bias,
        causal=causal,
        window_size=parse("window", window, tuple[int | None, int | None]) if window else (None, None),
        alibi_slopes=meta(nheads) if alibi else None,
        dropout_p=dropout_p,
        sigmoid=sigmoid,
        backend="reference",
    )
    problem = dataclasses.replace(said.problem, device=kind)
    print(backends.explain(problem, backend))


@app.command(
    epilog="Examples: flashsigmoid bench cpu-2k-d64 --work forward; "
    "flashsigmoid bench 'lm-4k-*' --device cuda --peer triton --peer fa3 --out runs/bench.jsonl --plot runs/bench.png"
)
def bench(
    problems: Annotated[
        list[str] | None,
        typer.Argument(help="Names, globs or beginnings, see --list; default: the device's.", show_default=False),
    ] = None,
    work: Annotated[
        list[str] | None,
        typer.Option(help="forward, backward, or both; may be repeated, each by default.", show_default=False),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="A candidate to time, see --list; may be repeated, all by default.", show_default=False),
    ] = None,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None,
        typer.Option(help="Of q, k, v.", show_default="float32 on the CPU, else bfloat16"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which every candidate is timed once.")] = 15,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    graphs: Annotated[bool, typer.Option("--graphs/--no-graphs", help="On CUDA, all as CUDA graphs or none.")] = True,
    libraries: Annotated[
        list[Path] | None,
        typer.Option(
            "--load-library",
            help="Shared library of a peer's operators, or the libcudart it needs before it; may be repeated.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Records file to write too.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="Figure to draw, PNG or SVG.", show_default=False)] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure tiles of the Triton kernels instead, and print a better table.")
    ] = False,
    list_problems: Annotated[bool, typer.Option("--list", help="List the problems and the candidates.")] = False,
) -> None:
    """Time sigmoid attention beside everybody else's, with its error beside its speed. It must be right to be timed."""
    import torch

    from .bench import decode
    from .bench.peers import candidates, load_library
    from .bench.problems import PROBLEMS, WORKS
    from .bench.run import run
    from .record import read_records

    if list_problems:
        _print_table([shape.row() for shape in (*PROBLEMS.values(), *decode.PROBLEMS.values())])
        print(f"peers: {', '.join(candidates())}")
        print(f"peers of decode problems: {', '.join(decode.PEERS)}")
        return
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot must end in .png or .svg, got {plot}")
    for library in libraries or ():
        load_library(library)
    numbers = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    if tune:
        from .bench.tune import tune as measure_tiles

        measure_tiles(problems or (), dtype=numbers, rounds=rounds, show=print)
        return
    if steps := decode.choose(problems or ()):
        if len(steps) < len(problems or ()) or work or plot or not graphs:
            raise ValueError(f"decode problems are run by themselves, without --work and --plot, got {problems}")
        decode.run(steps, dtype=numbers, rounds=rounds, names=peer or (), out=out, show=print)
        return
    records = run(
        problems or (),
        works=work or WORKS,
        dtype=numbers,
        rounds=rounds,
        names=peer or (),
        device=device,
        graphs=graphs,
        out=out,
        show=_print_speeds,
    )
    print("x: speed over the best softmax; error: relative rms against float64, of the worst tensor;")
    print("budget: error over what is allowed; MiB: most memory in use beyond the inputs")
    if out is not None and read_records(out).header["dirty"]:
        print(f"{out} is not of a clean commit: not to be published")
    if plot is not None:
        from .report.speed import write_plot

        write_plot(records, plot)


def _print_speeds(records: list[Record]) -> None:
    """Of one problem: a table per work; then the ceilings, and who was not measured, and why."""
    from .bench.joined import joined, reasons

    form = "{:17}{:>9}{:>17}{:>9}{:>7}{:>9}{:>8}{:>9}"
    last = None
    for row in joined(records):
        if last != (row.problem, row.work):
            last = row.problem, row.work
            print(f"{row.problem}, {row.work}")
            print(form.format("", "ms", "p10 to p90", "TFLOP/s", "x", "error", "budget", "MiB"))
        cells = (
            f"{row.ms:.4g}",
            f"{row.p10_ms:.4g} to {row.p90_ms:.4g}",
            f"{row.tflops:.3g}",
            _or_blank(row.over_softmax, ".2f"),
            _or_blank(row.error_rms, ".1e"),
            _or_blank(row.over_budget, ".2f"),
            _or_blank(row.peak_mib, ".0f"),
        )
        print(form.format(row.peer, *cells))
    for record in records:
        if record.name.startswith("ceiling_"):
            print(f"ceiling: {record.tags['peer']} {record.value:.4g} {record.unit}")
    for line in reasons(records):
        print(line)
    print(flush=True)


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _assignments(texts: list[str] | None, option: str = "--set") -> dict[str, str]:
    """{"model.dim": "256"} of ["model.dim=256"]."""
    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{option} must be FIELD=VALUE, got {text}")
        if name in found:
            raise ValueError(f"{name} must be set once, got it twice")
        found[name] = value
    return found
