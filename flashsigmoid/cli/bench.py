"""`flashsigmoid bench`: speeds and errors of named problems."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .root import app

if TYPE_CHECKING:
    from ..record import Record


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
        typer.Option(help="Of q, k, v.", show_default="float32 on the CPU, else and for --tune bfloat16"),
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
        bool, typer.Option("--tune", help="Measure tiles of the fused kernels instead, and print a better table.")
    ] = False,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Kernel that --tune measures; again for more.", show_default="all")
    ] = None,
    list_problems: Annotated[bool, typer.Option("--list", help="List the problems and the candidates.")] = False,
) -> None:
    """Time sigmoid attention beside everybody else's, with its error beside its speed. It must be right to be timed."""
    import torch

    from ..bench import decode
    from ..bench.peers import candidates, load_library
    from ..bench.problems import PROBLEMS, WORKS
    from ..bench.run import run
    from ..record import read_records

    if list_problems:
        for shape in (*PROBLEMS.values(), *decode.PROBLEMS.values()):
            row = shape.row()
            name, options = row.pop("problem"), row.pop("options")
            print(f"{name:24}" + ", ".join([f"{key} {text}" for key, text in row.items()] + [options] * bool(options)))
        print(f"peers: {', '.join(candidates())}")
        print(f"peers of decode problems: {', '.join(decode.PEERS)}")
        return
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot must end in .png or .svg, got {plot}")
    for library in libraries or ():
        load_library(library)
    numbers = getattr(torch, dtype or ("float32" if device == "cpu" and not tune else "bfloat16"))
    if kernel and not tune:
        raise ValueError(f"--kernel goes with --tune, got {', '.join(kernel)} without it")
    if tune:
        if work or peer or out or plot or not graphs:
            raise ValueError("--tune takes problems, --kernel, --dtype and --rounds, got another option beside it")
        from ..bench.tune import tune as measure_tiles

        measure_tiles(problems or (), dtype=numbers, kernels=kernel or (), rounds=rounds, show=print)
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
        from ..report.speed import write_plot

        write_plot(records, plot)


def _print_speeds(records: list[Record]) -> None:
    """Of one problem: a table per work; then the ceilings, and who was not measured, and why."""
    from ..bench.joined import joined, reasons

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
