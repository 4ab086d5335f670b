"""Images and labels: embedded digits, torchvision's public sets, arrays, folders and shards of any images.

What cannot be read is named in one line, and ends the run or is left out and counted: `ImageConfig.on_corrupt`.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.v2 import functional as transforms

from ..nn.config import check_types
from ..samples import mnist
from .shards import Member, Shards

_PUBLIC: dict[str, tuple[Callable[..., Any], int]] = {  # (class, channels)
    "cifar10": (datasets.CIFAR10, 3),
    "cifar100": (datasets.CIFAR100, 3),
    "mnist": (datasets.MNIST, 1),
}
SOURCES = ("sample", *_PUBLIC, "npz", "folder", "tar")
# names of the arrays in an npz: of MedMNIST and of Keras; what is validated is the first that is there
_TRAIN, _VAL = (("train_images", "train_labels"), ("x_train", "y_train")), (
    ("val_images", "val_labels"), ("test_images", "test_labels"), ("x_test", "y_test"),
)  # fmt: skip
SUFFIXES = datasets.folder.IMG_EXTENSIONS
Sample = tuple[Tensor, int]  # ((channels, size, size) uint8, label)
# mean and std of what ImageNet's photographs have: reading a large folder for its own would take minutes
_PHOTOGRAPHS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Which images a training reads.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    # "sample": embedded digits; "cifar10", "cifar100", "mnist"; "npz": a file with arrays train_images, train_labels,
    # val_images or test_images, ..., as MedMNIST's and Keras' are; "folder": root/train/CLASS/*, root/val/CLASS/*;
    # "tar": root/train-*.tar, root/val-*.tar, root/classes.txt, see shards.py
    source: str = "sample"
    root: str | None = None  # folder of the data, or the file; None for the embedded ones only
    download: bool = False  # let torchvision fetch a public set into root
    img_size: int | None = None  # pixels a side; None: as they are, 224 of a folder or of shards
    on_corrupt: Literal["fail", "skip"] = "fail"  # at a file that is no image: end, or leave it out and count it

    def __post_init__(self) -> None:
        check_types(self)
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        if self.source != "sample" and self.root is None:
            raise ValueError(f"root must be the folder of the data for source={self.source!r}, got None")
        if self.img_size is not None and not (type(self.img_size) is int and self.img_size > 0):
            raise ValueError(f"img_size must be a positive integer, got {self.img_size!r}")
        if self.on_corrupt not in ("fail", "skip"):
            raise ValueError(f"on_corrupt must be 'fail' or 'skip', got {self.on_corrupt!r}")
        if self.download and self.source not in _PUBLIC:
            raise ValueError(f"download must be off for source={self.source!r}, which nobody can fetch, got True")


@dataclass(frozen=True)
class ImageData:
    """Everything a training reads: made by `load_images`."""

    train: Dataset[Sample | None]  # an item is None where a corrupt image is left out
    val: Dataset[Sample | None]
    classes: tuple[str, ...]  # names, in the order of the labels
    img_size: int
    in_chans: int
    mean: tuple[float, ...]  # of a channel of the training images in [0, 1]
    std: tuple[float, ...]  # 1 where all values are the same
    fingerprint: str  # changes when the images, or the files of a folder, do

    @property
    def majority(self) -> float:
        """Share of the most frequent class in the validation images, but for those found corrupt so far: what a
        constant answer gets.
        """
        labels = torch.tensor(_labels(self.val))
        if isinstance(self.val, Files):
            labels = labels[~self.val.skipped]
        return float(torch.bincount(labels).max()) / len(labels)

    def examples(self, count: int) -> tuple[Tensor, list[str]]:
        """The first readable validation image of each of the first `count` classes that have one, and their names.

        Returns:
            (count or fewer, channels, size, size) uint8, and the name of each one's class.
        """
        val: Any = self.val
        labels = _labels(val)
        numbers: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            numbers.setdefault(label, []).append(index)
        found: dict[int, Tensor] = {}
        for label in sorted(numbers):
            if len(found) == count:
                break
            sample = next((sample for index in numbers[label] if (sample := val[index]) is not None), None)
            if sample is not None:
                found[label] = sample[0]
        return torch.stack(list(found.values())), [self.classes[label] for label in found]

    @property
    def skipped(self) -> list[list[int]]:
        """Numbers of the files of `train`, and of `val`, that were found corrupt and left out so far."""
        parts = (self.train, self.val)
        return [part.skipped.nonzero().flatten().tolist() if isinstance(part, Files) else [] for part in parts]

    def skip(self, numbers: list[list[int]]) -> None:
        """Take as found what `skipped` said in an earlier process."""
        for part, found in zip((self.train, self.val), numbers, strict=True):
            if isinstance(part, Files):
                part.skipped[found] = True


class Arrays(Dataset[Sample]):
    """Images in memory, (n, channels, height, width) uint8, resized as they are taken."""

    def __init__(self, images: Tensor, labels: Tensor, size: int) -> None:
        self.images, self.labels, self.size = images, labels, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return _resized(self.images[index], self.size), int(self.labels[index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once, for a DataLoader; `collate` leaves it as it is."""
        numbers = torch.tensor(indices)
        # index_select copies whole images, indexing byte by byte
        return _resized(self.images.index_select(0, numbers), self.size), self.labels[numbers]


class Files(Dataset["Sample | None"]):
    """Image files, of a folder or inside of shards, decoded as RGB: the shorter side resized, the middle cut out."""

    def __init__(
        self, files: Sequence[tuple[Path | Member, int]], size: int, on_corrupt: Literal["fail", "skip"]
    ) -> None:
        self.files, self.size, self.on_corrupt = files, size, on_corrupt
        # shared by the workers of a DataLoader
        self.skipped = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample | None:
        path, label = self.files[index]
        try:
            with path.open("rb") as file:
                image = transforms.pil_to_tensor(_rgb(Image.open(file)))
        # what Pillow's readers raise, the last at a size that is absurd
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            text = str(error).partition(" <_io.")[0].strip()  # Pillow shows the open file too
            reason = text.splitlines()[0] if text else type(error).__name__
            if self.on_corrupt == "fail":
                raise ValueError(f"images must be readable, got {path}: {reason}") from error
            if not self.skipped[index]:
                self.skipped[index] = True
                print(f"left out, not a readable image: {path}: {reason}", file=sys.stderr, flush=True)
            return None
        return _resized(image, self.size), label

    @property
    def count_skipped(self) -> int:
        """How many files were found corrupt so far."""
        return int(self.skipped.sum())


def _rgb(image: Image.Image) -> Image.Image:
    """An image as RGB; Pillow itself cuts grey values of more than 8 bits off at 255.

    Raises:
        ValueError: its values have no range that is known.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float32) / 257.0
        image = Image.fromarray(values.round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its values have more than 16 bits, mode {image.mode}")
    return image.convert("RGB")


def collate(samples: Sequence[Sample | None] | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Images (batch, channels, size, size) uint8 and labels (batch,) int64 of what is left; for a DataLoader.

    None if nothing is left; `part.what_is_left` passes over it.
    """
    if isinstance(samples, tuple) and isinstance(samples[0], Tensor):
        return samples  # pyright: ignore[reportReturnType]
    kept: list[Any] = [sample for sample in samples if sample is not None]
    if not kept:
        return None
    images, labels = zip(*kept, strict=True)
    return torch.stack(images), torch.tensor(labels)


def load_images(config: ImageConfig) -> ImageData:
    """Open the training and the validation images.

    Raises:
        FileNotFoundError: there is nothing where the data should be.
        ValueError: a folder without images, classes of the validation that training lacks, a file of another format.
    """
    if config.source == "folder":
        return _load_folder(config)
    if config.source == "tar":
        return _load_tar(config)
    if config.source == "sample":
        arrays = [read_idx(path) for split in ("train", "test") for path in mnist(split)]
        parts = [(arrays[0][:, None], arrays[1]), (arrays[2][:, None], arrays[3])]
        classes = tuple(map(str, range(10)))
    elif config.source == "npz":
        parts, classes = _load_npz(Path(config.root or ""))
    else:
        parts, classes = _load_public(config)
    size = config.img_size or parts[0][0].shape[-1]
    digest = hashlib.sha256()
    for part in parts:
        for x in part:
            digest.update(x.numpy().tobytes())
    mean, std = _statistics(parts[0][0])
    train, val = (Arrays(images, labels.long(), size) for images, labels in parts)
    return ImageData(train, val, classes, size, parts[0][0].shape[1], mean, std, digest.hexdigest())


def read_idx(path: str | Path) -> Tensor:
    """A gzipped IDX file of unsigned bytes, MNIST's format, as uint8 of its shape.

    Raises:
        ValueError: it is none, or is cut short.
    """
    try:
        data = gzip.decompress(Path(path).read_bytes())
        zero, kind, ndim = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{ndim}I", data[4 : 4 + 4 * ndim])
        values = np.frombuffer(data, np.uint8, offset=4 + 4 * ndim)
        if zero or kind != 8 or values.size != np.prod(shape):
            raise ValueError(f"type {kind}, {values.size} bytes for shape {shape}")
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise ValueError(f"a gzipped IDX file of unsigned bytes is needed, got {path}: {error}") from error
    return torch.from_numpy(values.reshape(shape).copy())


def _load_npz(path: Path) -> tuple[list[tuple[Tensor, Tensor]], tuple[str, ...]]:
    if not path.is_file():
        raise FileNotFoundError(f"root must be an npz file, got none at {path}")
    parts = []
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            for wanted in (_TRAIN, _VAL):
                names = next((names for names in wanted if all(name in file for name in names)), None)
                if names is None:
                    legal = " or ".join(", ".join(names) for names in wanted)
                    raise ValueError(f"it has no {legal}")
                images, labels = (file[name] for name in names)
                labels = labels.reshape(len(labels), -1)
                is_gray = images.ndim == 3
                if images.dtype != np.uint8 or not (is_gray or (images.ndim == 4 and images.shape[-1] in (1, 3))):
                    raise ValueError(
                        f"{names[0]} is no uint8 (n, height, width[, 1 or 3]): {images.dtype} {images.shape}"
                    )
                if labels.shape != (len(images), 1) or labels.dtype.kind not in "iu" or not len(labels):
                    raise ValueError(f"{names[1]} is no whole number for each image: {labels.dtype} {labels.shape}")
                images = images[:, None] if is_gray else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
                parts.append((torch.from_numpy(images), torch.from_numpy(labels[:, 0].astype(np.int64))))
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"root must be an npz of images and labels, got {path}: {error}") from error
    count = 1 + max(int(labels.max()) for _, labels in parts)
    if min(int(labels.min()) for _, labels in parts) < 0 or parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        raise ValueError(f"root must have labels from 0 on and images of one size, got {path}")
    return parts, tuple(map(str, range(count)))


def _load_public(config: ImageConfig) -> tuple[list[tuple[Tensor, Tensor]], tuple[str, ...]]:
    make, channels = _PUBLIC[config.source]
    parts = []
    for is_train in (True, False):
        try:
            whole = make(root=config.root, train=is_train, download=config.download)
        except RuntimeError as error:  # torchvision's word for a set that is not there
            raise FileNotFoundError(
                f"root must hold {config.source} as torchvision lays it out, or download must be on, "
                f"got {config.root}: {error}"
            ) from error
        images = torch.as_tensor(whole.data)  # (n, height, width[, channels])
        images = images[:, None] if channels == 1 else images.permute(0, 3, 1, 2).contiguous()
        parts.append((images, torch.as_tensor(whole.targets)))
    return parts, tuple(map(str, whole.classes))


def _load_folder(config: ImageConfig) -> ImageData:
    root, size = Path(config.root or ""), config.img_size or 224
    listed = {split: _listed(root / split) for split in ("train", "val")}
    classes = tuple(sorted(listed["train"]))
    unknown = sorted(set(listed["val"]) - set(classes))
    if unknown:
        raise ValueError(f"classes of {root / 'val'} must be among those of {root / 'train'}, got {unknown[0]}")
    train, val = (
        Files(
            [(path, classes.index(name)) for name, paths in sorted(listed[split].items()) for path in paths],
            size,
            config.on_corrupt,
        )
        for split in ("train", "val")
    )
    digest = hashlib.sha256(repr((config.img_size, classes)).encode())
    for paths in (*listed["train"].values(), *listed["val"].values()):
        for path in paths:
            digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
    return ImageData(train, val, classes, size, 3, *_PHOTOGRAPHS, digest.hexdigest())


def _load_tar(config: ImageConfig) -> ImageData:
    root, parts = Path(config.root or ""), []
    for split in ("train", "val"):
        paths = sorted(root.glob(f"{split}-*.tar"))
        if not paths:
            raise FileNotFoundError(f"root must hold train-*.tar and val-*.tar, got no {split}-*.tar in {root}")
        parts.append(Shards(paths, SUFFIXES))
        if not len(parts[-1]):
            raise ValueError(f"shards must hold images, got none in {root / f'{split}-*.tar'}")
    names = root / "classes.txt"
    classes = tuple(
        names.read_text("utf-8-sig").splitlines() if names.is_file() else map(str, range(_classes(parts[:1])))
    )
    if _classes(parts) > len(classes):
        raise ValueError(f"labels must be below the number of classes, {len(classes)}, got {_classes(parts) - 1}")
    digest = hashlib.sha256(repr((config.img_size, classes)).encode())
    for shards in parts:
        digest.update(repr([path.name for path in shards.paths]).encode())
        digest.update(shards.rows.numpy().tobytes())
    train, val = (Files(shards, config.img_size or 224, config.on_corrupt) for shards in parts)
    return ImageData(train, val, classes, train.size, 3, *_PHOTOGRAPHS, digest.hexdigest())


def _classes(parts: Sequence[Shards]) -> int:
    """How many classes the labels need."""
    return max(int(shards.labels.max()) for shards in parts) + 1


def _listed(folder: Path) -> dict[str, list[Path]]:
    """Images of each class: the folders within, and their files below, sorted."""
    if not folder.is_dir():
        raise FileNotFoundError(f"root must hold the folders train and val, got none at {folder}")
    found = {
        each.name: sorted(path for path in each.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        for each in folder.iterdir()
        if each.is_dir()
    }
    found = {name: paths for name, paths in found.items() if paths}
    if not found:
        raise ValueError(f"{folder} must hold a folder of images for each class, got none with {', '.join(SUFFIXES)}")
    return found


def _labels(dataset: Any) -> list[int]:
    return dataset.labels.tolist() if isinstance(dataset, Arrays) else [label for _, label in dataset.files]


def _resized(image: Tensor, size: int) -> Tensor:
    if image.shape[-2:] == (size, size):
        return image
    image = transforms.resize(image, [size], antialias=True)
    return transforms.center_crop(image, [size, size])


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in [0, 1], exact: from a count of the 256 values."""
    means, stds = [], []
    values = torch.arange(256, dtype=torch.float64) / 255.0
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten().int(), minlength=256).double() / channel.numel()
        mean = float(share @ values)
        means.append(mean)
        std = float(share @ (values - mean) ** 2) ** 0.5
        stds.append(std if share.count_nonzero() > 1 else 1.0)  # of a channel that is empty it would be divided by 0
    return tuple(means), tuple(stds)
