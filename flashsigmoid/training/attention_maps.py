"""Where a Vision Transformer looks: attention weights over the patches of a few images, in an npz beside the records.

Which images there are is the data's matter; the report draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from ..models.vision import VisionAttention
from ..nn.attention import AttentionFn, sigmoid_attention, softmax_attention
from ..record import RecordWriter
from .augment import normalised
from .callbacks import Muted
from .images import ImageData
from .snapshots import see, write_snapshot

if TYPE_CHECKING:
    from jaxtyping import Float

NAME, ARTIFACT = "attention_maps", "attention-maps.npz"
_IMAGES, _HEADS = 4, 2  # of one class each; of the first, the middle and the last block


def attention_rows(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    *,
    blocks: Sequence[int],
    heads: Sequence[int],
    query: int | None,
) -> Float[Tensor, "batch blocks heads seqlen"]:
    """Rows of the attention weights A of a Vision Transformer in eval mode, which is afterwards as it was.

        A = attention(q, k, I)

    What an attention gives for the identity as its values is its weights, whatever attention it is.

    Args:
        model: with a `VisionAttention` in every block.
        images: (batch, channels, height, width), normalised, on its device.
        blocks, heads: which, by number.
        query: row of this token; None: the mean over all rows.

    Returns:
        (batch, blocks, heads, seqlen) in float32.
    """
    attentions = vision_attentions(model)
    weights = see(lambda: model(images), [attentions[i] for i in blocks], heads).weights
    return weights.mean(-2) if query is None else weights[..., query, :]


def vision_attentions(model: nn.Module) -> list[tuple[VisionAttention, AttentionFn]]:
    """Every attention layer of a Vision Transformer, with the function that it calls."""
    own: dict[str, AttentionFn] = {"sigmoid": sigmoid_attention, "softmax": softmax_attention}
    found = [module for module in model.modules() if isinstance(module, VisionAttention)]
    return [(attention, attention.attention_fn or own[attention.kind]) for attention in found]


def write_image_snapshot(writer: RecordWriter, model: nn.Module, data: ImageData, *, step: int) -> None:
    """`write_snapshot` of the first of the validation images that `write_attention_maps` takes.

    Args:
        writer: of the run's records.
        model: a Vision Transformer of timm in eval mode, with a `VisionAttention` in every block.
        data: its images.
        step: of the record.
    """
    vit: Any = model
    images, _ = data.examples(1)
    rows, columns = vit.patch_embed.grid_size
    first = ["class token"] if vit.cls_token is not None else []
    registers = [f"register {i}" for i in range(vit.num_prefix_tokens - len(first))]
    patches = [f"row {row}, column {column}" for row in range(rows) for column in range(columns)]
    x = normalised(images.to(next(model.parameters()).device), data.mean, data.std)
    write_snapshot(
        writer, lambda: model(x), vision_attentions(model),
        nheads=vit.blocks[0].attn.num_heads, tokens=[*first, *registers, *patches], step=step, image=images[0],
        grid=(rows, columns),
    )  # fmt: skip


def write_attention_maps(writer: RecordWriter, model: nn.Module, data: ImageData, *, step: int) -> None:
    """Write where `model` looks in a few validation images, as arrays beside the records, and a record that names it.

        images (n, channels, height, width) uint8      classes (n,) their names
        maps (n, blocks, heads, rows, columns)         weights of a query to the patches
        sums (n, blocks, heads)                        of its weights to all tokens: 1 for softmax
        blocks, heads                                  their numbers
        query                                          "class token", or "mean" over all tokens where there is none

    Args:
        writer: of the run's records.
        model: a Vision Transformer of timm in eval mode, with a `VisionAttention` in every block.
        data: its images.
        step: of the record.
    """
    vit: Any = model
    images, classes = data.examples(_IMAGES)
    depth, grid, has_token = len(vit.blocks), vit.patch_embed.grid_size, vit.cls_token is not None
    blocks, heads = sorted({0, depth // 2, depth - 1}), range(min(_HEADS, vit.blocks[0].attn.num_heads))
    x = normalised(images.to(next(model.parameters()).device), data.mean, data.std)
    rows = attention_rows(model, x, blocks=blocks, heads=heads, query=0 if has_token else None)
    if isinstance(writer, Muted):  # of a rank that only helps to compute
        return
    np.savez_compressed(
        writer.path.with_name(ARTIFACT),
        images=images.numpy(),
        classes=np.array(classes),
        maps=rows[..., vit.num_prefix_tokens :].unflatten(-1, grid).cpu().numpy(),
        sums=rows.sum(-1).cpu().numpy(),
        blocks=np.array(blocks),
        heads=np.array(heads),
        query=np.array("class token" if has_token else "mean"),
    )
    writer.write(NAME, step=step, artifact=ARTIFACT)
