"""Augmentation of batches: what is switched off changes nothing, what is on does what it says and no more."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from rounding import assert_rounded
from torchvision.transforms.v2 import functional

from flashsigmoid.training.augment import (
    Augment,
    AugmentConfig,
    Views,
    ViewsConfig,
    blurred,
    cropped,
    grey,
    jittered,
    normalised,
)


def images(batch: int = 8, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (batch, channels, size, size), generator=torch.Generator().manual_seed(0)).byte()


def test_nothing_switched_on_is_the_normalisation() -> None:
    x, labels = images(), torch.arange(8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    out, same = Augment(AugmentConfig(), mean, std, 10)(x, labels)
    expected = (x.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert_rounded(out.double(), expected, 4, dtype=torch.float32)
    assert same is labels
    assert torch.equal(out, normalised(x, mean, std))


def test_a_crop_of_everything_is_the_image() -> None:
    assert torch.equal(cropped(images(), (1.0, 1.0), flip=False), images())


def test_a_flip_is_the_mirror_image_of_half_of_them() -> None:
    torch.manual_seed(1)
    x = images(batch=400)
    out = cropped(x, (1.0, 1.0), flip=True)
    same, mirrored = ((out == y).flatten(1).all(1) for y in (x, x.flip(-1)))
    assert (same | mirrored).all()
    assert abs(int(mirrored.sum()) - 200) < 5 * 10  # five standard deviations


def test_crops_have_their_share_and_stay_inside() -> None:
    """Of images whose pixels are their own coordinates: a crop's range is its place and its size."""
    torch.manual_seed(1)
    size = 128
    ramp = torch.linspace(0, 255, size).round().byte()
    x = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size)])[None].expand(500, -1, -1, -1)
    low, high = 0.2, 0.6
    flat = cropped(x, (low, high), flip=False).float().flatten(2)
    sides = (flat.amax(-1) - flat.amin(-1)) / 255.0 * size / (size - 1) + 1 / size  # (500, 2): width, height
    share, ratio = sides.prod(-1), sides[:, 0] / sides[:, 1]
    assert low - 0.03 < share.min() < low + 0.05
    assert high - 0.05 < share.max() < high + 0.03
    assert abs(share.mean() - (low + high) / 2) < 0.03
    assert 0.72 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.39
    places = flat.mean(-1)
    assert places.amin() < 80
    assert places.amax() > 175
    assert torch.corrcoef(places.T)[0, 1].abs() < 0.2


def test_randaugment_changes_each_image_in_its_own_way() -> None:
    torch.manual_seed(0)
    x = images(1).expand(64, -1, -1, -1).contiguous()
    out, _ = Augment(AugmentConfig(randaugment=2, magnitude=15), (0.0,) * 3, (1.0,) * 3, 10)(x, torch.zeros(64).long())
    assert len({image.numpy().tobytes() for image in out}) > 32


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}], ids=str)
def test_mixed_labels_say_what_was_mixed(options) -> None:
    """Images of one colour each: the share of a colour is the probability of its class."""
    torch.manual_seed(0)
    augment = Augment(AugmentConfig(**options), (0.0,), (1.0,), 8)
    labels = torch.arange(8)
    x = (labels * 32).byte().view(8, 1, 1, 1).expand(8, 1, 32, 32).contiguous()
    for _ in range(10):
        out, targets = augment(x, labels)
        assert_rounded(targets.sum(1), torch.ones(8), 4)
        expected = targets @ (labels * 32 / 255.0)
        assert_rounded(out.mean((1, 2, 3)), expected, 16)  # a mean of 1,024 in pairs: ten roundings, and the mixing
    alone, label = augment(x[:1], labels[:1])
    assert (alone.shape, label.tolist()) == ((1, 1, 32, 32), [0])


def test_the_same_seed_draws_the_same() -> None:
    config = AugmentConfig(crop=(0.3, 1.0), flip=True, randaugment=2, mixup=0.2, cutmix=1.0)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(Augment(config, (0.5,) * 3, (0.25,) * 3, 10)(images(), torch.arange(8)))
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    assert not torch.equal(results[0][0], results[2][0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": (0.0, 1.0)}, r"crop must be two shares 0 < least <= largest <= 1, got \(0.0, 1.0\)"),
        ({"crop": (0.5, 0.4)}, "crop must be two shares"),
        ({"randaugment": -1}, "randaugment must be at least 0, got -1"),
        ({"magnitude": 31}, r"magnitude must be in \[0, 30\], got 31"),
        ({"mixup": -0.1}, "mixup must be at least 0, got -0.1"),
        ({"cutmix": math.nan}, "cutmix must be at least 0, got nan"),
    ],
)
def test_bad_fields_are_one_clear_error(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**fields)


NOTHING = ViewsConfig(crop=(1.0, 1.0), flip=False, jitter_p=0.0, grayscale=0.0)


def test_views_of_nothing_are_the_normalised_images() -> None:
    x, mean, std = images(), (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    for view in Views(NOTHING, mean, std)(x):
        assert torch.equal(view, normalised(x, mean, std))


def test_two_views_differ_from_each_other_and_between_images() -> None:
    torch.manual_seed(0)
    x = images(1).expand(8, -1, -1, -1)
    first, second = Views(ViewsConfig(blur=(0.5, 0.5)), (0.5,) * 3, (0.25,) * 3)(x)
    assert first.shape == second.shape == x.shape
    assert not torch.allclose(first, second)
    assert len({view.numpy().tobytes() for view in (*first, *second)}) == 16


@pytest.mark.parametrize(
    ("fields", "view", "share", "changed"),
    [
        ({"jitter_p": 0.8}, 0, 0.8, lambda x: x),
        ({"grayscale": 0.2}, 0, 0.2, lambda x: grey(x).expand_as(x)),
        ({"blur": (0.0, 0.3)}, 1, 0.3, lambda x: x),
        ({"blur": (0.0, 0.3)}, 0, 0.0, lambda x: x),
        ({"solarize": (0.1, 0.4)}, 0, 0.1, lambda x: torch.where(x < 0.5, x, 1 - x)),
        ({"solarize": (0.1, 0.4)}, 1, 0.4, lambda x: torch.where(x < 0.5, x, 1 - x)),
    ],
)
def test_each_change_is_made_to_its_share_of_the_images(fields, view, share, changed) -> None:
    torch.manual_seed(2)
    count = 1000
    x = images(count, size=6)
    plain = x.float() / 255.0
    out = Views(dataclasses.replace(NOTHING, **fields), (0.0,) * 3, (1.0,) * 3)(x)[view]
    moved = (out != plain).flatten(1).any(1)
    assert abs(int(moved.sum()) - share * count) <= 5 * math.sqrt(count * share * (1 - share))
    if "jitter_p" not in fields and "blur" not in fields:
        assert_rounded(out[moved], changed(plain)[moved], 4)


def test_a_third_of_a_circle_turns_red_into_green_and_leaves_grey() -> None:
    draws = iter([torch.zeros(2, 1, 1, 1)] * 3 + [torch.full((2, 1, 1, 1), 1 / 3)])
    x = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.4, 0.4]]).view(2, 3, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashsigmoid.training.augment._uniform", lambda x, low, high, part: next(draws))
        out = jittered(x, (0.0, 0.0, 0.0, 0.5)).flatten(1)
    assert_rounded(out, torch.tensor([[0.0, 1.0, 0.0], [0.4, 0.4, 0.4]]), 16)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_jitter_is_torchvisions_with_a_factor_for_every_image(which) -> None:
    """Brightness, contrast and saturation one at a time; the hue of the two is measured differently."""
    torch.manual_seed(0)
    x, strengths = images().float() / 255.0, [0.0] * 4
    strengths[which] = 0.9
    factors = torch.tensor([0.1, 0.5, 0.9, 1.0, 1.2, 1.5, 1.7, 1.9])
    draws = iter([factors.view(8, 1, 1, 1) - 1.0 if i == which else torch.zeros(8, 1, 1, 1) for i in range(4)])
    adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)[which]
    expected = torch.stack([adjust(image, float(f)) for image, f in zip(x, factors, strict=True)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashsigmoid.training.augment._uniform", lambda x, low, high, part: next(draws))
        error = (jittered(x, (*strengths,)) - expected).abs().amax((1, 2, 3))
    # red has a weight of 0.299 in our luma, 0.2989 in torchvision's; brightness has none
    luma = 0.0 if which == 0 else (0.299 - 0.2989) * (1.0 - factors).abs()
    assert (error <= luma + 8 * torch.finfo(torch.float32).eps).all(), error


def test_images_of_one_channel_are_jittered_too() -> None:
    torch.manual_seed(0)
    x = images(channels=1).float() / 255.0
    out = jittered(x, (0.4, 0.4, 0.4, 0.1))
    assert out.shape == x.shape
    assert not torch.allclose(out, x)
    assert torch.equal(grey(x), x)


def test_a_blur_is_torchvisions_away_from_the_rim_and_keeps_a_colour() -> None:
    x = images(size=40).float() / 255.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "flashsigmoid.training.augment._uniform", lambda x, low, high, part: torch.full((len(x), 1, 1, 1), 1.5)
        )
        out = blurred(x)
        assert_rounded(blurred(torch.full_like(x, 0.3)), torch.full_like(x, 0.3), 2 * 23)
    expected = functional.gaussian_blur(x, [23, 23], [1.5, 1.5])
    inner = (..., slice(12, 28), slice(12, 28))
    assert_rounded(out[inner], expected[inner], 2 * 23)  # taps, along and across


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": (0.0, 1.0)}, "crop must be two shares"),
        ({"jitter": (0.4, 0.4, 0.4)}, "jitter must be four strengths"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "of hue at most 0.5"),
        ({"jitter_p": 1.5}, r"jitter_p must be in \[0, 1\], got 1.5"),
        ({"grayscale": -0.1}, r"grayscale must be in \[0, 1\], got -0.1"),
        ({"blur": (0.5,)}, r"blur must be two probabilities in \[0, 1\], got \(0.5,\)"),
        ({"solarize": (0.0, 2.0)}, "solarize must be two probabilities"),
    ],
)
def test_bad_fields_of_views_are_one_clear_error(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        ViewsConfig(**fields)
