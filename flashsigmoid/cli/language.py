"""What one does with language models: `generate`, `export`, `convert`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AnyDevice, Device, Fields, read_assignments
from .root import app
from .show import print_table, progress_bar


@app.command(epilog='Example: flashsigmoid generate runs/demo/sigmoid --prompt "ROMEO:" --temperature 0.7')
def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint, or a run: its newest checkpoint.", show_default=False)
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default="a line's end")] = "\n",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to draw; an end of text stops earlier.")] = 500,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k most likely tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the fewest tokens of this probability together.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws; a fresh one each time by default.")] = None,
    device: AnyDevice = "cpu",
) -> None:
    """Continue a text with a trained model, as it comes."""
    from ..training.checkpoint import load_model

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

    from ..models.generation import stream

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
    from ..integrations.sigmoid_gpt import export as write
    from ..training.checkpoint import load_model

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
    from ..recipes.conversion import MODEL, llama_recovery
    from ..recipes.conversion import convert as train_both
    from ..recipes.fields import override
    from ..report.conversion import NOTE, conversion_rows

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
    run = override(llama_recovery(checkpoint, seqlen), given, read_assignments(assignments))
    with progress_bar() as show:
        folders = train_both(run, out, resume=resume, device=device, show=show)
    print_table(conversion_rows(out))
    print(f"{NOTE}\nmodel: {folders['sigmoid'] / MODEL}")
