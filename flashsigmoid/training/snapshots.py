"""Attention weights of one validation text or image through training, as arrays beside the records.

Which text or image, and of which model, is a module's matter; the report shows them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..nn.attention import AttentionFn
from ..record import RecordWriter
from .callbacks import Muted
from .run import Run

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

NAME = "attention_snapshot"
TOKENS = 64  # of a text: its first
_LAYERS, _HEADS, _NUMBERS = 8, 8, 2**18  # at most, in a file; more numbers only where one map needs them


@dataclass(frozen=True)
class Seen:
    """What some attention layers did in one forward, in float32."""

    weights: Float[Tensor, "batch layers heads seqlen seqlen"]  # A
    norms: Float[Tensor, "batch layers heads seqlen"]  # |A v| of each head


def see(forward: Callable[[], Any], attentions: Sequence[tuple[Any, AttentionFn]], heads: Sequence[int]) -> Seen:
    """Weights of attention layers that run once each, in this order, while `forward` runs without gradients.

        A = attention(q, k, I)

    What an attention gives for the identity as its values is its weights, whatever attention it is. The layers are
    afterwards as they were, also if the forward fails.

    Args:
        forward: runs the model, in eval mode; what it returns is not looked at.
        attentions: modules with an attribute `attention_fn`, each with the function to use for it.
        heads: which, by number.
    """
    weights: list[Tensor] = []
    norms: list[Tensor] = []
    chosen = list(heads)

    def watched(attend: AttentionFn) -> AttentionFn:
        def watch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            seqlen = v.shape[1]
            identity = torch.eye(seqlen, dtype=v.dtype, device=v.device)[None, :, None]
            a = attend(q, k, identity.expand(*v.shape[:3], seqlen).contiguous(), **options)
            out = attend(q, k, v, **options)
            # (batch, heads, seqlen, seqlen), (batch, heads, seqlen)
            weights.append(a[:, :, chosen].transpose(1, 2).float())
            norms.append(out[:, :, chosen].transpose(1, 2).float().norm(dim=-1))
            return out

        return watch

    before = [module.attention_fn for module, _ in attentions]
    try:
        for module, attend in attentions:
            module.attention_fn = watched(attend)
        with torch.no_grad():
            forward()
    finally:
        for (module, _), attention_fn in zip(attentions, before, strict=True):
            module.attention_fn = attention_fn
    return Seen(torch.stack(weights, dim=1), torch.stack(norms, dim=1))


def is_due(run: Run, count: int, step: int) -> bool:
    """Whether a snapshot is taken at the validation after `step` steps.

    `count` of them are spread evenly over the validations, the first and the last among them; a single one is taken at
    the last. Where validations are fewer, at each.
    """
    last = run.steps // run.val_interval
    numbers = {last} if count == 1 else {round(i * last / (count - 1)) for i in range(count)}
    return step % run.val_interval == 0 and step // run.val_interval in numbers


def write_snapshot(
    writer: RecordWriter,
    forward: Callable[[], Any],
    attentions: Sequence[tuple[Any, AttentionFn]],
    *,
    nheads: int,
    tokens: Sequence[str],
    step: int,
    image: UInt8[Tensor, "channels height width"] | None = None,
    grid: tuple[int, int] = (0, 0),
) -> None:
    """Write what attention does with one text or image as arrays beside the records, and a record that names the file.

        weights (layers, heads, n, n) float16      a row for each query
        norms (layers, heads, n)                   |A v| of each head and token
        layers, heads                              their numbers
        tokens (n,)                                their names
        image (channels, height, width) uint8      empty for a text
        grid (2,)                                  rows and columns of patches, the last tokens; 0, 0 for a text

    Layers are spread evenly, heads are the first; there are at most 8 of each, and so many that the file stays below
    half a MiB, if one map does.

    Args:
        writer: of the run's records.
        forward, attentions: as in `see`, of a batch of one, every layer of the model.
        nheads: how many each layer has.
        tokens: names of what is attended to.
        step: of the record.
        image, grid: of a Vision Transformer.
    """
    maps = max(1, _NUMBERS // len(tokens) ** 2)
    heads = range(min(nheads, _HEADS, max(1, math.isqrt(maps))))
    layers = _spread(len(attentions), min(_LAYERS, max(1, maps // len(heads))))
    seen = see(forward, [attentions[i] for i in layers], heads)
    if isinstance(writer, Muted):  # a rank that is not the first helps to compute, no more
        return
    artifact = f"attention-{step:08d}.npz"
    np.savez_compressed(
        writer.path.with_name(artifact),
        weights=seen.weights[0].cpu().numpy().astype(np.float16),
        norms=seen.norms[0].cpu().numpy(),
        layers=np.array(layers),
        heads=np.array(heads),
        tokens=np.array(tokens),
        image=np.zeros((0, 0, 0), np.uint8) if image is None else image.numpy(),
        grid=np.array(grid),
    )
    writer.write(NAME, step=step, artifact=artifact)


def _spread(count: int, most: int) -> list[int]:
    """Numbers below `count`, evenly spaced, the last among them, and the first if there are two."""
    if most == 1 or count == 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
