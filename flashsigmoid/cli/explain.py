"""`flashsigmoid explain`: which backend, and why."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import typer

from .options import device_type
from .root import app


@app.command(epilog="Example: flashsigmoid explain --seqlen 4096 --head-dim 128 --causal --dtype float32")
def explain(
    batch: Annotated[int, typer.Option(min=0, help="Sequences.")] = 1,
    seqlen: Annotated[int, typer.Option(min=0, help="Queries and keys.")] = 1024,
    seqlen_k: Annotated[int | None, typer.Option(min=0, help="Keys, if not as many as queries.")] = None,
    nheads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 8,
    nheads_k: Annotated[int | None, typer.Option(min=1, help="Key and value heads, if fewer.")] = None,
    head_dim: Annotated[int, typer.Option(min=1, help="Channels of a head.")] = 64,
    head_dim_v: Annotated[int | None, typer.Option(min=1, help="Channels of a value head, if others.")] = None,
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

    from .. import backends, functional
    from ..recipes.fields import parse

    if bias_per_head and sigmoid_bias is not None:
        raise ValueError("sigmoid_bias has no effect with --bias-per-head")
    if backend not in ("auto", *backends.NAMES):
        raise ValueError(f"backend must be one of auto, {', '.join(backends.NAMES)}, got {backend}")
    kind = device_type(device)
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
        window_size=parse("--window", window, tuple[int | None, int | None]) if window else (None, None),
        alibi_slopes=meta(nheads) if alibi else None,
        dropout_p=dropout_p,
        sigmoid=sigmoid,
        backend="reference",
    )
    problem = dataclasses.replace(said.problem, device=kind)
    print(backends.explain(problem, backend))
