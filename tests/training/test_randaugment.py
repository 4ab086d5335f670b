"""RandAugment of a batch: each operation is torchvision's, each image has its own, and nothing waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from flashsigmoid.training.augment import Augment, AugmentConfig, Views, ViewsConfig
from flashsigmoid.training.randaugment import OPERATIONS, RandAugment


def images(batch: int = 8, channels: int = 3, height: int = 24, width: int = 20) -> torch.Tensor:
    """Noise, ramps and a constant: what equalisation and contrast have their special cases for."""
    x = torch.randint(0, 256, (batch, channels, height, width), generator=torch.Generator().manual_seed(0)).byte()
    x[1] = torch.linspace(0, 255, width).byte()
    x[2] = torch.linspace(90, 130, height).byte()[:, None]
    x[3] = 77
    return x


def of_torchvision(x: torch.Tensor, name: str, magnitude: int, sign: float) -> torch.Tensor:
    policy = v2.RandAugment(1, magnitude)
    strengths, _ = policy._AUGMENTATION_SPACE[name]
    values = strengths(31, *x.shape[-2:])
    strength = 0.0 if values is None else float(values[magnitude])
    signed = sign * strength if policy._AUGMENTATION_SPACE[name][1] else strength
    return policy._apply_image_or_video_transform(x, name, signed, interpolation=policy.interpolation, fill={v2.Resize: None})  # pyright: ignore  # noqa: E501  # fmt: skip


def test_the_space_is_torchvisions() -> None:
    assert list(v2.RandAugment._AUGMENTATION_SPACE) == [*OPERATIONS]


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("magnitude", [0, 9, 17, 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name, magnitude, channels, monkeypatch) -> None:
    """But for a few pixels that come from the neighbour, and for brightness cut off at the other side of a level.

    The latter is all of the constant image, one of eight, where a product with a factor and the rest is a whole number.
    """
    monkeypatch.setattr("torchvision.transforms.v2._auto_augment._get_fill", lambda fill, kind: None)
    x = images(channels=channels)
    for sign in (0, 1):
        drawn = torch.full((len(x),), 2 * OPERATIONS.index(name) + sign)
        out = RandAugment(1, magnitude).changed(x, drawn)
        expected = of_torchvision(x, name, magnitude, 1.0 - 2.0 * sign)
        differing = (out.int() - expected.int()).abs()
        if name in ("ShearX", "ShearY", "Rotate"):
            assert (differing > 0).float().mean() < 0.003, (name, sign)
        else:
            assert differing.max() <= 1, (name, sign)
            assert (differing > 0).float().mean() < 0.13, (name, sign)


def test_each_image_has_its_own_operation_and_place() -> None:
    """A batch of all operations is what each of its images is alone."""
    policy, one = RandAugment(1, 12), images()
    drawn = torch.randperm(2 * len(OPERATIONS), generator=torch.Generator().manual_seed(1))
    x = torch.stack([images(28)[i] if i % 3 else one[0] for i in range(28)])
    out = policy.changed(x, drawn)
    alone = torch.cat([policy.changed(image[None], number[None]) for image, number in zip(x, drawn, strict=True)])
    assert torch.equal(out, alone)
    assert not torch.equal(policy.changed(x, drawn.roll(1)), alone)


def test_operations_and_signs_are_uniform(monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(RandAugment, "changed", lambda self, x, numbers: drawn.append(numbers) or x)
    torch.manual_seed(0)
    RandAugment(2, 9)(torch.zeros(14_000, 1, 1, 1, dtype=torch.uint8))
    assert len(drawn) == 2
    assert not torch.equal(*drawn)
    counts = torch.cat(drawn).bincount(minlength=28)
    assert len(counts) == 28
    assert (counts - 1000).abs().max() < 5 * 1000**0.5  # five standard deviations


class Uploads(TorchDispatchMode):
    """Counts the copies to another device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::_to_copy":
            self.count += out.device.type != args[0].device.type
        return out


@pytest.mark.parametrize("channels", [3, 1])
def test_nothing_is_read_back_and_little_uploaded(channels) -> None:
    """A tensor of the meta device has no values: what reads one, as a wait for a GPU would, is an error."""
    torch.manual_seed(0)
    x, labels = images(256, channels).to("meta"), torch.zeros(256, dtype=torch.long, device="meta")
    config = AugmentConfig(crop=(0.5, 1.0), flip=True, randaugment=2, mixup=0.2, cutmix=1.0)
    augment = Augment(config, (0.5,) * channels, (0.5,) * channels, 10).to("meta")
    augment(x, labels)
    with Uploads() as uploads:
        out, targets = augment(x, labels)
    assert (out.shape, targets.shape) == (x.shape, (256, 10))
    assert uploads.count == config.randaugment
    views = Views(ViewsConfig(blur=(0.5, 0.5), solarize=(0.2, 0.2)), (0.5,) * channels, (0.5,) * channels).to("meta")
    with Uploads() as uploads:
        views(x)
    assert uploads.count == 0
    with pytest.raises(RuntimeError, match="meta"):
        x.float().mean().item()
