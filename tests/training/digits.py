"""The embedded digits, opened once for all tests, and the first few of them."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

from flashsigmoid.training.images import ImageConfig, ImageData, load_images


@functools.cache
def digits(config: ImageConfig) -> Any:
    """As `load_images` opens them; nobody changes them."""
    return load_images(config)


def few_images(config: ImageConfig, train: int, val: int) -> ImageData:
    """The first of the digits, so many; other sources as they are."""
    if config.source != "sample":
        return load_images(config)
    data = digits(config)
    parts = [copy.copy(part) for part in (data.train, data.val)]
    for part, count in zip(parts, (train, val), strict=True):
        part.images, part.labels = part.images[:count], part.labels[:count]
    return replace(data, train=parts[0], val=parts[1])
