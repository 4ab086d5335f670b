"""What is done to a batch of images before the model sees it, on its device. Reading is images.py's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from ..nn.config import check_types
from .part import Part
from .randaugment import RandAugment

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
        check_types(self)
        object.__setattr__(self, "crop", tuple(self.crop))
        _check_crop(self.crop)
        if self.randaugment < 0:
            raise ValueError(f"randaugment must be at least 0, got {self.randaugment}")
        if not 0 <= self.magnitude <= 30:
            raise ValueError(f"magnitude must be in [0, 30], got {self.magnitude}")
        for name in ("mixup", "cutmix"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """What is drawn for every image of a batch, twice: two views of it for contrastive learning.

    Raises:
        ValueError: a field breaks the rule beside it.

    Source: arXiv:2002.05709 (SimCLR, appendix A), arXiv:2006.07733 (BYOL, appendix B: the two views differ).
    """

    crop: tuple[float, float] = (0.2, 1.0)  # least and largest share of the area that is cut out, and resized
    flip: bool = True  # left and right with probability 1/2
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # of brightness, contrast, saturation and hue
    jitter_p: float = 0.8  # probability of all four
    grayscale: float = 0.2  # probability
    blur: tuple[float, float] = (0.0, 0.0)  # probability in the first and in the second view
    solarize: tuple[float, float] = (0.0, 0.0)  # the same

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("crop", "jitter", "blur", "solarize"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_crop(self.crop)
        if len(self.jitter) != 4 or not all(0.0 <= x < math.inf for x in self.jitter) or self.jitter[3] > 0.5:
            raise ValueError(f"jitter must be four strengths of at least 0, of hue at most 0.5, got {self.jitter}")
        for name in ("jitter_p", "grayscale"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("blur", "solarize"):
            pair = getattr(self, name)
            if len(pair) != 2 or not all(0.0 <= p <= 1.0 for p in pair):
                raise ValueError(f"{name} must be two probabilities in [0, 1], got {pair}")


class Views(nn.Module):
    """Images of bytes into two views of each.

        view = normalise(solarize(blur(grayscale(jitter(flip(crop(image)))))))

    All draws are torch's, on the device of the images, for each image alone; of a part of a batch they are those for
    the whole.

    Args:
        config: what is drawn.
        mean, std: of every channel, in [0, 1].
    """

    def __init__(self, config: ViewsConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.config, self.normalise = config, Normalise(mean, std)

    def forward(self, images: Tensor, part: Part | None = None) -> tuple[Tensor, Tensor]:
        """(batch, channels, size, size) uint8 into two of that shape, float32."""
        first, second = (self._view(images, which, part) for which in (0, 1))
        return first, second

    def _view(self, images: Tensor, which: int, part: Part | None) -> Tensor:
        config = self.config
        x = cropped(images, config.crop, config.flip, part).float() / 255.0
        x = _some(x, config.jitter_p, lambda x: jittered(x, config.jitter, part), part)
        x = _some(x, config.grayscale, lambda x: grey(x).expand_as(x), part)
        x = _some(x, config.blur[which], lambda x: blurred(x, part), part)
        x = _some(x, config.solarize[which], lambda x: torch.where(x < 0.5, x, 1.0 - x), part)
        return self.normalise.of_floats(x)


class Augment(nn.Module):
    """Images of bytes and labels into what a model learns from.

        x = mix(normalise(randaugment(flip(crop(image)))))

    All draws are torch's: on the CPU those of operations and mixtures, on the device those of crops and flips. Nothing
    waits for the device. Of a part of a batch the draws are those for the whole, and what is mixed with the first image
    comes from the rank before.

    Args:
        config: what is drawn.
        mean, std: of every channel, in [0, 1].
        num_classes: of the labels.
    """

    def __init__(self, config: AugmentConfig, mean: Sequence[float], std: Sequence[float], num_classes: int) -> None:
        super().__init__()
        self.config, self.normalise = config, Normalise(mean, std)
        self.policy = RandAugment(config.randaugment, config.magnitude) if config.randaugment else None
        mixes = [
            make(alpha=alpha, num_classes=num_classes)
            for make, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
            if alpha > 0
        ]
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def forward(self, images: Tensor, labels: Tensor, part: Part | None = None) -> tuple[Tensor, Tensor]:
        """(batch, channels, size, size) uint8 and (batch,) into float32 images and (batch,) labels, or, mixed, the
        probabilities (batch, num_classes).

        Args:
            images, labels: of a batch, or of a rank's part of one.
            part: which. Default: all of it.
        """
        config, part = self.config, part or Part(0, len(images), len(images))
        if config.crop != (1.0, 1.0) or config.flip:
            images = cropped(images, config.crop, config.flip, part)
        if self.policy is not None:
            images = self.policy(images, part)
        x = self.normalise(images)
        # a batch of one has nothing to be mixed with
        if self.mix is None or part.total == 1:
            return x, labels
        if part.mesh is None:
            return self.mix(x, labels)
        # torchvision mixes each image with the one before it
        x, labels = self.mix(part.preceded(x), part.preceded(labels))
        return x[1:], labels[1:]


class Normalise(nn.Module):
    """(image / 255 - mean) / std, with constants that are on the device already: an upload would wait for it.

    Args:
        mean, std: of every channel, in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            constant = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, constant, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Of uint8 (batch, channels, height, width), in float32."""
        return self.of_floats(images.float() / 255.0)

    def of_floats(self, x: Tensor) -> Tensor:
        """Of (batch, channels, height, width) in [0, 1]."""
        return (x - self.mean) / self.std


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """As `Normalise`, once."""
    return Normalise(mean, std).to(images.device)(images)


def cropped(images: Tensor, area: tuple[float, float], flip: bool, part: Part | None = None) -> Tensor:
    """A rectangle of every image, resized to all of it, bilinearly; half of them mirrored if `flip`.

    Of a part of a batch the draws are those for the whole.

    The share of the area is uniform, the ratio of the sides log-uniform from 3/4 to 4/3, the place uniform.
    """
    part = part or Part(0, len(images), len(images))
    drawn = part.of(torch.rand(5, part.total, device=images.device), dim=1)
    share, ratio = area[0] + (area[1] - area[0]) * drawn[0], (_RATIO * (drawn[1] - 0.5)).exp()
    if area == (1.0, 1.0):
        ratio = torch.ones_like(ratio)
    # halves of the sides and the centre, of an image that reaches from -1 to 1
    side = share.sqrt()
    sides = torch.stack([side * ratio, side / ratio]).clamp(max=1.0)
    x, y = (2.0 * drawn[2:4] - 1.0) * (1.0 - sides)
    width, height = sides
    if flip:
        width = torch.where(drawn[4] < 0.5, -width, width)
    zero = torch.zeros_like(width)
    theta = torch.stack([width, zero, x, zero, height, y], -1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return out.round().clamp(0, 255).to(torch.uint8)


def grey(x: Tensor) -> Tensor:
    """Luma (batch, 1, height, width) of images of three channels; those of one are grey already."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def jittered(x: Tensor, strengths: tuple[float, float, float, float], part: Part | None = None) -> Tensor:
    """Images in [0, 1] with other brightness, contrast, saturation and hue, in this order.

    Images of one channel have the first two. Each factor is uniform in [1 - strength, 1 + strength], at least 0. The
    hue turns by up to `strength` of a circle about the grey axis, so that red, green and blue turn into one another
    and grey stays.
    """
    brightness, contrast, saturation, hue = (_uniform(x, -strength, strength, part) for strength in strengths)
    x = (x * (1.0 + brightness).clamp(min=0.0)).clamp(0.0, 1.0)
    mean = grey(x).mean((1, 2, 3), keepdim=True)
    x = (mean + (1.0 + contrast).clamp(min=0.0) * (x - mean)).clamp(0.0, 1.0)
    if x.shape[1] != 3:
        return x
    luma = grey(x)
    x = (luma + (1.0 + saturation).clamp(min=0.0) * (x - luma)).clamp(0.0, 1.0)
    angle = 2.0 * math.pi * hue
    third, cosine, sine = 1.0 / 3.0, angle.cos(), angle.sin() / math.sqrt(3.0)
    # Rodrigues' rotation about (1, 1, 1) of the channels
    return (cosine * x + (1.0 - cosine) * third * x.sum(1, keepdim=True) + sine * (x.roll(1, 1) - x.roll(-1, 1))).clamp(
        0.0, 1.0
    )


def blurred(x: Tensor, part: Part | None = None) -> Tensor:
    """Images convolved with a Gaussian whose deviation is uniform in [0.1, 2] pixels; at the rim it has its inner part.

    Source: arXiv:2002.05709, appendix A.
    """
    deviation = _uniform(x, 0.1, 2.0, part)

    def kernel(size: int) -> Tensor:
        """(batch, 1, size, size), of which each row sums to 1."""
        i = torch.arange(size, device=x.device)
        weights = (-((i[:, None] - i[None, :]) ** 2) / (2.0 * deviation**2)).exp()
        return weights / weights.sum(-1, keepdim=True)

    height, width = x.shape[-2:]
    return kernel(height) @ x @ kernel(width).mT


def _some(x: Tensor, p: float, change: Callable[[Tensor], Tensor], part: Part | None) -> Tensor:
    """Images of which each is changed with probability p."""
    return torch.where(_uniform(x, 0.0, 1.0, part) < p, change(x), x) if p else x


def _uniform(x: Tensor, low: float, high: float, part: Part | None) -> Tensor:
    """A number for every image of x, drawn for all of which x is a part: (batch, 1, 1, 1)."""
    part = part or Part(0, len(x), len(x))
    return low + (high - low) * part.of(torch.rand(part.total, 1, 1, 1, device=x.device))


def _check_crop(crop: tuple[float, ...]) -> None:
    if len(crop) != 2 or not 0.0 < crop[0] <= crop[1] <= 1.0:
        raise ValueError(f"crop must be two shares 0 < least <= largest <= 1, got {crop}")
