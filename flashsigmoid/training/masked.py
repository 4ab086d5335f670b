"""Masked autoencoders: learning to draw what was covered. The mask and the frame of the decoder are lightly's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
from lightly.models.utils import (
    get_at_index,
    normalize_mean_var,
    patchify,
    random_token_mask,
    repeat_token,
    set_at_index,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.vision import VisionAttention, build_vit, tokens
from .augment import Augment, AugmentConfig, normalised
from .classification import ImageBatch
from .images import ImageData
from .part import Part
from .pretraining import PretrainingModule, PretrainingRun


@dataclass(frozen=True, kw_only=True)
class MaskedRun(PretrainingRun):
    """A complete description of one pretraining by drawing masked patches.

    Which n: with model.sigmoid_bias=None the encoder's b is -log of the tokens that it sees, which are the visible
    patches and the class token in training and all of them when its features are judged; a quarter of the keys with
    four times their weight give about the same sum. The decoder sees, and a classifier that begins with the encoder
    has, b = -log of all tokens. A learnable b is one number for both and begins with that too.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(crop=(0.2, 1.0), flip=True))
    mask_ratio: float = 0.75  # share of the patches that are hidden, in (0, 1)
    decoder_dim: int = 512  # channels, a multiple of decoder_nheads and of 4
    decoder_depth: int = 8  # blocks
    decoder_nheads: int = 16
    norm_pixels: bool = True  # targets are pixels of mean 0 and variance 1 within each patch

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.mask_ratio < 1.0:
            raise ValueError(f"mask_ratio must be in (0, 1), got {self.mask_ratio}")
        for name in ("decoder_dim", "decoder_depth", "decoder_nheads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.decoder_dim % 4:
            raise ValueError(f"decoder_dim must be a multiple of 4, for its positions, got {self.decoder_dim}")
        if self.augment.mixup or self.augment.cutmix:
            mixed = max(self.augment.mixup, self.augment.cutmix)
            raise ValueError(f"augment.mixup and augment.cutmix must be 0 without labels, got {mixed}")

    @property
    def follows_tokens(self) -> bool:
        """Whether the encoder's b is -log of the tokens of each call."""
        return self.model.sigmoid_bias is None and self.model.bias_mode == "fixed"

    def settings(self) -> dict[str, Any]:
        """The description in one flat dict for the records; sigmoid_bias is the encoder's in training."""
        settings = super().settings()
        if self.follows_tokens:
            with torch.device("meta"):
                encoder = build_vit(replace(self.model, pretrained=False))
                visible, _ = _mask(1, encoder, self.mask_ratio)
            settings["sigmoid_bias"] = -math.log(visible.shape[1])
        return settings

    def module(self, data: ImageData) -> MaskedModule:
        """What Lightning drives."""
        return MaskedModule(self, data)


class MaskedModule(PretrainingModule):
    """MAE: the encoder sees some patches of an image, and from what it says a small decoder draws the others.

        loss = mean over pixels of masked patches of (predicted - target)^2

    The decoder has the attention, LayerScale and QK-norm of the encoder, fixed positions and a linear layer at either
    end. A validation masks the images as they are, without augmentation.

    Args:
        run: the description.
        data: what is read.

    Raises:
        ValueError: the model has registers, or no patch would be visible, or none masked.

    Source: arXiv:2111.06377, section 3.
    """

    loss_unit = "squared_error"

    def __init__(self, run: MaskedRun, data: ImageData) -> None:
        encoder = build_vit(run.model)
        prefix = encoder.num_prefix_tokens  # the class token, or nothing
        if prefix > 1:
            raise ValueError(f"model must be without registers in a masked pretraining, got {run.model.name}")
        patches, size = tokens(encoder) - prefix, cast(int, encoder.patch_embed.patch_size[0])
        visible, hidden = _mask(1, encoder, run.mask_ratio)
        if visible.shape[1] == prefix or not hidden.shape[1]:
            raise ValueError(f"mask_ratio must leave and hide at least one of {patches} patches, got {run.mask_ratio}")
        if run.follows_tokens:
            for attention in encoder.modules():
                if isinstance(attention, VisionAttention):
                    attention.sigmoid_bias = None
        dim, nheads = run.decoder_dim, run.decoder_nheads
        decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=patches, embed_dim=dim, depth=0, num_heads=nheads, num_prefix_tokens=prefix
        )
        # lightly's own blocks have timm's attention
        drawn = replace(run.model, pretrained=False, dim=dim, depth=run.decoder_depth, nheads=nheads)
        decoder.blocks = build_vit(drawn).blocks
        super().__init__(
            run,
            data,
            encoder,
            embed=nn.Linear(encoder.num_features, dim),
            decoder=decoder,
            predict=nn.Linear(dim, size * size * run.model.in_chans),
        )
        self.patch_size, self.prefix = size, prefix
        self.augment = Augment(run.augment, data.mean, data.std, len(data.classes))
        # in a tuple it is no part of this module, which would have the encoder's weights twice
        vit: Any = encoder
        frame = MaskedVisionTransformerTIMM(vit, weight_initialization="skip", pos_embed_initialization="skip")
        self._frame = (frame,)
        self._predicted = self.compiled(self.predicted)

    def loss_of(self, batch: ImageBatch, part: Part) -> Tensor:
        """Mean loss of a batch under a fresh mask of each image."""
        if self.training:
            x, _ = self.augment(batch.images, batch.labels, part)
        else:
            x = normalised(batch.images, self.data.mean, self.data.std)
        visible, hidden = map(part.of, _mask(part.total, self.encoder, self.run.mask_ratio))
        return part.weight * F.mse_loss(self.model(self._predicted, x, visible, hidden), self.targets(x, hidden))

    def predicted(self, x: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Pixels (batch, hidden, channels * patch^2) of the hidden patches, seen from the visible tokens.

        Args:
            x: normalised images (batch, channels, size, size).
            visible, hidden: numbers of tokens (batch, count), which are all of them together.
        """
        seen = self.part("embed")(self._frame[0].encode(x, idx_keep=visible))
        decoder = cast(MaskedVisionTransformerDecoderTIMM, self.part("decoder"))
        whole = repeat_token(decoder.mask_token, (len(x), tokens(cast(Any, self.encoder))))
        out = decoder(set_at_index(whole, visible, seen.to(whole.dtype)))
        return self.part("predict")(get_at_index(out, hidden)).float()

    def targets(self, x: Tensor, hidden: Tensor) -> Tensor:
        """What `predicted` should be."""
        pixels = get_at_index(patchify(x, self.patch_size), hidden - self.prefix)
        return normalize_mean_var(pixels) if self.run.norm_pixels else pixels


def _mask(batch: int, encoder: Any, ratio: float) -> tuple[Tensor, Tensor]:
    """Numbers of the visible and of the hidden tokens, drawn for each image; a class token is visible."""
    has_token, device = encoder.num_prefix_tokens > 0, encoder.patch_embed.proj.weight.device
    return random_token_mask((batch, tokens(encoder)), ratio, mask_class_token=not has_token, device=device)
