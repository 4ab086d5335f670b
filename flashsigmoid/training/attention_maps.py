"""Where a Vision Transformer looks: attention weights over the patches of a few images, in an npz beside the records.

Which images there are is the data's matter; the report draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.vision import VisionAttention
from ..nn.attention import AttentionFn, sigmoid_attention, softmax_attention
from ..record import RecordWriter
from .augment import normalised
from .images import ImageData

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
    attentions = [module for module in model.modules() if isinstance(module, VisionAttention)]
    functions = [attention.attention_fn for attention in attentions]
    rows: list[Tensor] = []

    def watched(attention: VisionAttention) -> AttentionFn:
        own = sigmoid_attention if attention.kind == "sigmoid" else softmax_attention
        attend = attention.attention_fn or own

        def watch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            seqlen = v.shape[1]
            identity = torch.eye(seqlen, dtype=v.dtype, device=v.device)[None, :, None]
            # (batch, seqlen, nheads, seqlen)
            weights = attend(q, k, identity.expand(*v.shape[:3], seqlen).contiguous(), **options).float()
            row = weights.mean(1) if query is None else weights[:, query]
            rows.append(row[:, list(heads)])
            return attend(q, k, v, **options)

        return watch

    try:
        for attention in (attentions[i] for i in blocks):
            attention.attention_fn = watched(attention)
        with torch.no_grad():
            model(images)
    finally:
        for attention, function in zip(attentions, functions, strict=True):
            attention.attention_fn = function
    return torch.stack(rows, dim=1)


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
