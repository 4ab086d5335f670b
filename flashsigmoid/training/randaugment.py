"""RandAugment of a batch of bytes on its device: an operation for every image, each done once to all of its own.

The operations are torchvision's, which takes one strength for a batch; those with a strength of every image are here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional

from .part import Part

# in the order in which a batch is sorted: unchanged, moved, blended with another image, and the rest
OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
_MOVED, _BLENDED = slice(1, 6), slice(6, 10)
_LARGEST = 30  # magnitude


class RandAugment(nn.Module):
    """`num_ops` operations one after the other, each uniform among `OPERATIONS`, with either sign where there are two.

    All draws are torch's on the CPU, where the sizes of the groups are known without waiting for the device: a batch is
    sorted by operation, changed group by group, and put back in order.

    Args:
        num_ops: operations of every image.
        magnitude: of them, from 0 to 30.

    Source: arXiv:1909.13719; space and strengths as torchvision's RandAugment with 31 bins.
    """

    def __init__(self, num_ops: int, magnitude: int) -> None:
        super().__init__()
        self.num_ops, self.share = num_ops, magnitude / _LARGEST
        self._constants: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def forward(self, images: Tensor, part: Part | None = None) -> Tensor:
        """(batch, channels, height, width) uint8 into the same; of a part of a batch by the draws for the whole."""
        part = part or Part(0, len(images), len(images))
        for _ in range(self.num_ops):
            images = self.changed(images, part.of(torch.randint(2 * len(OPERATIONS), (part.total,))))
        return images

    def changed(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Every image by its operation.

        Args:
            images: (batch, channels, height, width) uint8.
            drawn: (batch,) on the CPU: 2 * number of the operation, and 1 more for the negative strength.
        """
        drawn, order = drawn.sort(stable=True)
        counts = drawn.div(2, rounding_mode="floor").bincount(minlength=len(OPERATIONS)).tolist()
        # the only upload; a copy that does not wait
        drawn, order = torch.stack([drawn, order]).to(images.device, non_blocking=True)
        parts, kinds = images[order].split(counts), drawn.split(counts)
        theta, factor, grid, kernel = self._of(images)
        out = [parts[0]]
        if sum(counts[_MOVED]):
            out.append(_moved(torch.cat(parts[_MOVED]), theta[torch.cat(kinds[_MOVED])], grid))
        if sum(counts[_BLENDED]):
            out.append(_blended([*parts[_BLENDED]], factor[torch.cat(kinds[_BLENDED])], kernel))
        bits, threshold = round(8 - 4 * self.share), 255.0 * (1.0 - self.share)
        posterize, solarize, autocontrast, equalize = parts[10:]
        out += [functional.posterize(posterize, bits), functional.solarize(solarize, threshold)]
        out += [functional.autocontrast(autocontrast), functional.equalize(equalize)]
        return torch.empty_like(images).index_copy_(0, order, torch.cat(out))

    def _of(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Constants for images of this size on their device, uploaded once.

        Returns:
            (28, 3, 2): of what is drawn, where a pixel comes from, in halves of the sides; (28, 1, 1, 1): the factor of
            a blend; (pixels, 3): pixels as (x, y, 1) from the centre; (1, 1, 3, 3): what sharpness blends with.
        """
        height, width = images.shape[-2:]
        key = (height, width, images.device)
        if key not in self._constants:
            moves = [_move(name, sign * self.share, height, width) for name in OPERATIONS for sign in (1.0, -1.0)]
            theta = torch.tensor(moves).mT / torch.tensor([0.5 * width, 0.5 * height])
            factor = torch.tensor([1.0 + 0.9 * self.share, 1.0 - 0.9 * self.share]).repeat(len(OPERATIONS))
            x, y = (torch.linspace((1.0 - size) / 2, (size - 1.0) / 2, size) for size in (width, height))
            y, x = torch.meshgrid(y, x, indexing="ij")
            grid = torch.stack([x, y, torch.ones(height, width)], -1)
            kernel = torch.full((1, 1, 3, 3), 1.0 / 13.0)
            kernel[..., 1, 1] = 5.0 / 13.0
            found = (theta, factor.view(-1, 1, 1, 1), grid.view(-1, 3), kernel)
            self._constants[key] = tuple(x.to(images.device) for x in found)  # pyright: ignore[reportArgumentType]
        return self._constants[key]


def _move(name: str, share: float, height: int, width: int) -> list[list[float]]:
    """(2, 3): where the pixel at (x, y, 1) from the centre comes from; shears keep the upper left corner."""
    shear, angle = 0.3 * share, math.radians(30.0 * share)
    if name == "ShearX":
        return [[1.0, shear, shear * height / 2], [0.0, 1.0, 0.0]]
    if name == "ShearY":
        return [[1.0, 0.0, 0.0], [shear, 1.0, shear * width / 2]]
    if name == "TranslateX":
        return [[1.0, 0.0, -float(int(150.0 / 331.0 * width * share))], [0.0, 1.0, 0.0]]
    if name == "TranslateY":
        return [[1.0, 0.0, 0.0], [0.0, 1.0, -float(int(150.0 / 331.0 * height * share))]]
    if name == "Rotate":
        return [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]
    return [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def _moved(images: Tensor, theta: Tensor, grid: Tensor) -> Tensor:
    """Each image by its own matrix (batch, 3, 2), the nearest pixel, black where there is none."""
    batch, _, height, width = images.shape
    where = (grid.expand(batch, -1, -1) @ theta).view(batch, height, width, 2)
    return F.grid_sample(images.float(), where, mode="nearest", padding_mode="zeros", align_corners=False).byte()


def _blended(parts: list[Tensor], factor: Tensor, kernel: Tensor) -> Tensor:
    """Brightness, colour, contrast and sharpness: an image x and a poorer one y, x factor + y (1 - factor).

    y is black, grey, grey everywhere alike, and smooth.
    """
    x = torch.cat(parts).float()
    counts = [len(part) for part in parts]
    dark, colour, contrast, sharp = x.split(counts)
    poorer = [
        torch.zeros_like(dark),
        _grey(colour).expand_as(colour),
        _grey(contrast).mean((1, 2, 3), keepdim=True).expand_as(contrast),
    ]
    colours = len(x) - len(sharp)
    out = x[:colours] * factor[:colours] + torch.cat(poorer) * (1.0 - factor[:colours])
    if x.shape[1] == 1:  # without colours an image stays as it is
        out[counts[0] : counts[0] + counts[1]] = colour
    if len(sharp) and min(sharp.shape[-2:]) > 2:
        channels, inner = sharp.shape[1], sharp[..., 1:-1, 1:-1]
        smooth = F.conv2d(sharp, kernel.expand(channels, 1, 3, 3), groups=channels).round()
        sharp = F.pad((1.0 - factor[colours:]) * (smooth - inner), (1, 1, 1, 1)) + sharp  # the rim stays
    return torch.cat([out, sharp]).clamp(0.0, 255.0).byte()


def _grey(x: Tensor) -> Tensor:
    """(batch, 1, height, width), whole numbers."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, 1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).floor()
