"""What is done to a batch of images before the model sees it, on its device. Reading is images.py's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

_GROUPS = 16  # of a batch: RandAugment draws its operations for each, since one by one they would cost more than a step
_RATIO = math.log(4 / 3)  # a crop's sides differ by at most this factor, as in Inception's


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is drawn for every image of a training batch.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    crop: tuple[float, float] = (
        1.0,
        1.0,
    )  # least and largest share of the area that is cut out, and resized
    flip: bool = False  # left and right with probability 1/2
    randaugment: int = 0  # operations of RandAugment one after the other; 0: none
    magnitude: int = 9  # of them, 0 to 30
    mixup: float = 0.0  # alpha of Beta(alpha, alpha), the share of one image that another takes; 0: off
    cutmix: float = 0.0  # the same of the area of a box; with both one of them is drawn for the batch

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop", tuple(self.crop))
        if len(self.crop) != 2 or not 0.0 < self.crop[0] <= self.crop[1] <= 1.0:
            raise ValueError(f"crop must be two shares 0 < least <= largest <= 1, got {self.crop}")
        if self.randaugment < 0:
            raise ValueError(f"randaugment must be at least 0, got {self.randaugment}")
        if not 0 <= self.magnitude <= 30:
            raise ValueError(f"magnitude must be in [0, 30], got {self.magnitude}")
        for name in ("mixup", "cutmix"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


class Augment(nn.Module):
    """Images of bytes and labels into what a model learns from.

        x = mix(normalise(randaugment(flip(crop(image)))))

    All draws are torch's: on the CPU those of the operations, on the device those of crops and flips.

    Args:
        config: what is drawn.
        mean, std: of every channel, in [0, 1].
        num_classes: of the labels.
    """

    def __init__(self, config: AugmentConfig, mean: Sequence[float], std: Sequence[float], num_classes: int) -> None:
        super().__init__()
        self.config, self.mean, self.std = config, tuple(mean), tuple(std)
        self.policy = v2.RandAugment(config.randaugment, config.magnitude) if config.randaugment else None
        mixes = [
            make(alpha=alpha, num_classes=num_classes)
            for make, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
            if alpha > 0
        ]
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, channels, size, size) uint8 and (batch,) into float32 images and (batch,) labels, or, mixed, the
        probabilities (batch, num_classes)."""
        config = self.config
        if config.crop != (1.0, 1.0) or config.flip:
            images = cropped(images, config.crop, config.flip)
        if self.policy is not None:
            images = torch.cat([self.policy(group) for group in images.tensor_split(_GROUPS) if len(group)])
        x = normalised(images, self.mean, self.std)
        # a batch of one has nothing to be mixed with
        return self.mix(x, labels) if self.mix is not None and len(x) > 1 else (x, labels)


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(image / 255 - mean) / std of uint8 (batch, channels, height, width), in float32."""
    shape = (1, -1, 1, 1)
    centre, width = (torch.tensor(x, dtype=torch.float32, device=images.device).view(shape) for x in (mean, std))
    return (images.float() / 255.0 - centre) / width


def cropped(images: Tensor, area: tuple[float, float], flip: bool) -> Tensor:
    """A rectangle of every image, resized to all of it, bilinearly; half of them mirrored if `flip`.

    The share of the area is uniform, the ratio of the sides log-uniform from 3/4 to 4/3, the place uniform.
    """
    batch, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, device=device)

    share, ratio = uniform(*area), (uniform(-_RATIO, _RATIO) / 2).exp()
    if area == (1.0, 1.0):
        ratio = torch.ones_like(ratio)
    # halves of the sides and the centre, of an image that reaches from -1 to 1
    width, height = (share.sqrt() * ratio).clamp(max=1.0), (share.sqrt() / ratio).clamp(max=1.0)
    x, y = (uniform(-1.0, 1.0) * (1.0 - side) for side in (width, height))
    mirror = torch.where(uniform(0.0, 1.0) < 0.5, -1.0, 1.0) if flip else torch.ones_like(width)
    zero = torch.zeros_like(width)
    theta = torch.stack([torch.stack([mirror * width, zero, x], -1), torch.stack([zero, height, y], -1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return out.round().clamp(0, 255).to(torch.uint8)
