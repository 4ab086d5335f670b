"""What one does with recognisers: `transcribe`, `long-audio`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import AnyDevice
from .root import app


@app.command(epilog="Example: flashsigmoid transcribe runs/an4_sample/sigmoid one.wav two.flac --beam 16")
def transcribe(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint, or a run: its newest checkpoint.", show_default=False)
    ],
    files: Annotated[list[Path], typer.Argument(help="WAV, FLAC, ... of one utterance each.", show_default=False)],
    beam: Annotated[int, typer.Option(help="Prefixes that a beam search keeps; 1 takes the best path.")] = 1,
    skip: Annotated[bool, typer.Option("--skip", help="Name a file that cannot be used on stderr, and go on.")] = False,
    device: AnyDevice = "cpu",
) -> None:
    """Write down what is said in audio files: one line each, after the name if there are several."""
    from ..training.ctc import load_recogniser
    from ..training.ctc import transcribe as text_of

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
    if left_out == len(files):
        raise ValueError(f"files must have one that can be used, got {left_out} that cannot")
    if left_out:
        print(f"{left_out} of {len(files)} files left out", file=sys.stderr)


@app.command(epilog="Example: flashsigmoid long-audio runs/an4/sigmoid runs/an4/softmax; flashsigmoid report runs/an4")
def long_audio(
    runs: Annotated[list[Path], typer.Argument(help="Runs on speech, finished or not.", show_default=False)],
    factors: Annotated[str, typer.Option(help="Utterances joined at a time, with commas.")] = "1,2,4,8",
    root: Annotated[
        str | None, typer.Option(help="The manifest, or the folder, of the data.", show_default="where they were")
    ] = None,
    device: AnyDevice = "cpu",
) -> None:
    """Join validation utterances of one speaker and count errors: does a recogniser work on longer audio?

    Records go to long-audio.jsonl of each run, where the report finds them.
    """
    from ..recipes.fields import parse
    from ..training.long_audio import long_audio as measure

    chosen = parse("factors", factors, tuple[int, ...])
    for run in runs:
        print(run)
        measure(run, factors=chosen, device=device, root=root)
