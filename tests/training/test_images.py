"""Images: the embedded digits, torchvision's sets from files of their layout, folders, and what cannot be read."""

from __future__ import annotations

import gzip
import pickle
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from flashsigmoid.samples import mnist
from flashsigmoid.training.augment import normalised
from flashsigmoid.training.images import ImageConfig, collate, load_images, read_idx


def draw(path, size=(40, 30), colour=(200, 30, 60)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, three images of one and one of the other, in training; one of each in validation."""
    for name in ("cat/1.png", "cat/deep/2.jpg", "cat/3.PNG", "dog/1.png"):
        draw(tmp_path / "train" / name)
    for name in ("cat/1.png", "dog/1.png"):
        draw(tmp_path / "val" / name)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image, by its name")
    return tmp_path


def test_the_embedded_digits() -> None:
    data = load_images(ImageConfig())
    assert (len(data.train), len(data.val), data.in_chans, data.img_size) == (8000, 2000, 1, 28)
    assert data.classes == tuple("0123456789")
    images, labels = collate([data.train[i] for i in range(64)])
    assert (images.dtype, tuple(images.shape), labels[:5].tolist()) == (torch.uint8, (64, 1, 28, 28), [5, 0, 4, 1, 9])
    whole = torch.stack([data.train[i][0] for i in range(8000)]).double() / 255
    assert data.mean[0] == pytest.approx(float(whole.mean()), abs=1e-9)
    assert data.std[0] == pytest.approx(float(whole.std(unbiased=False)), abs=1e-9)
    counts = torch.bincount(torch.tensor([data.val[i][1] for i in range(2000)]))
    assert data.majority == float(counts.max()) / 2000
    assert load_images(ImageConfig()).fingerprint == data.fingerprint


def test_examples_are_the_first_readable_image_of_each_class(folder) -> None:
    draw(folder / "val" / "cat" / "2.png", colour=(0, 0, 0))
    (folder / "val" / "cat" / "1.png").write_bytes(b"no image")
    data = load_images(ImageConfig(source="folder", root=str(folder), img_size=8, on_corrupt="skip"))
    images, names = data.examples(3)
    assert names == ["cat", "dog"]
    assert [int(image.sum()) > 0 for image in images] == [False, True]
    assert data.examples(1)[1] == ["cat"]
    assert data.skipped == [[], [0]]
    other = load_images(ImageConfig(source="folder", root=str(folder), img_size=8, on_corrupt="skip"))
    other.skip(data.skipped)
    assert other.skipped == data.skipped
    digits = load_images(ImageConfig())
    images, names = digits.examples(4)
    labels = [digits.val[i][1] for i in range(100)]
    assert names == ["0", "1", "2", "3"]
    assert all(torch.equal(image, digits.val[labels.index(i)][0]) for i, image in enumerate(images))
    assert digits.skipped == [[], []]


def test_a_class_without_a_readable_image_is_no_example_and_no_majority(folder) -> None:
    for name in ("cat/2.png", "cat/3.png", "dog/2.png"):
        draw(folder / "val" / name)
    for path in (folder / "val" / "cat").iterdir():
        path.write_bytes(b"no image")
    data = load_images(ImageConfig(source="folder", root=str(folder), img_size=8, on_corrupt="skip"))
    assert data.majority == 0.6
    assert data.examples(1)[1] == ["dog"]
    assert data.majority == 1.0


def test_an_empty_channel_is_no_division_by_zero(tmp_path) -> None:
    path, pixels = tmp_path / "set.npz", np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    pixels[..., 2] = 7
    np.savez(path, **arrays(train_images=pixels))
    data = load_images(ImageConfig(source="npz", root=str(path)))
    assert data.std[2] == 1.0
    assert data.std[0] == pytest.approx(pixels[..., 0].std() / 255, rel=1e-9)
    x = normalised(torch.from_numpy(pixels).movedim(-1, 1), data.mean, data.std)
    assert x.isfinite().all()
    assert x[:, 2].abs().max() < 1e-6


def test_images_are_resized() -> None:
    image, _ = load_images(ImageConfig(img_size=16)).train[0]
    assert image.shape == (1, 16, 16)
    assert image.float().std() > 10


def test_cifar_as_torchvision_lays_it_out(tmp_path, monkeypatch) -> None:
    """Files of CIFAR-10's form; torchvision's check of their sums is not ours to test."""
    from torchvision import datasets

    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5: True)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        rows = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": rows, "labels": [0, 1, 2, 9]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    data = load_images(ImageConfig(source="cifar10", root=str(tmp_path)))
    assert (len(data.train), len(data.val), data.in_chans, data.img_size) == (20, 4, 3, 32)
    assert (data.classes[9], data.majority) == ("class 9", 0.25)
    with (base / "test_batch").open("rb") as file:
        rows = pickle.load(file)["data"]
    image, label = data.val[3]
    assert label == 9
    assert torch.equal(image, torch.from_numpy(rows[3].reshape(3, 32, 32)))


def arrays(**changed: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {
        "train_images": rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8),
        "train_labels": np.array([0, 1, 2, 0, 1, 2]),
        "test_images": rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8),
        "test_labels": np.array([[2], [1], [1]], dtype=np.uint8),  # a column, as Keras and MedMNIST have them
    }
    return made | changed


@pytest.mark.parametrize("names", [("train_images", "test_images"), ("x_train", "x_test")])
def test_an_npz(names, tmp_path) -> None:
    made = arrays()
    keras = {"train_images": "x_train", "train_labels": "y_train", "test_images": "x_test", "test_labels": "y_test"}
    path = tmp_path / "set.npz"
    np.savez(path, **{key if names[0] == "train_images" else keras[key]: x for key, x in made.items()})
    data = load_images(ImageConfig(source="npz", root=str(path), img_size=4))
    assert (data.classes, data.in_chans, data.img_size, data.majority) == (("0", "1", "2"), 3, 4, 2 / 3)
    whole = load_images(ImageConfig(source="npz", root=str(path)))
    image, label = whole.val[0]
    assert label == 2
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(made["test_images"][0]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": np.zeros((6, 8, 8, 3))}, "train_images is no uint8"),
        ({"train_images": np.zeros((6, 8, 8, 2), np.uint8)}, "train_images is no uint8"),
        ({"train_labels": np.zeros(5, int)}, "train_labels is no whole number for each image"),
        ({"test_labels": np.zeros(3)}, "test_labels is no whole number for each image"),
        ({"test_labels": np.array([0, 1, -1])}, "labels from 0 on"),
        ({"test_images": np.zeros((3, 9, 9, 3), np.uint8)}, "images of one size"),
    ],
)
def test_an_npz_of_something_else_is_one_clear_error(changed, message, tmp_path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, **arrays(**changed))
    with pytest.raises(ValueError, match=f"root must .*{message}"):
        load_images(ImageConfig(source="npz", root=str(path)))
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="it has no train_images, train_labels or x_train, y_train"):
        load_images(ImageConfig(source="npz", root=str(path)))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="root must be an npz of images and labels"):
        load_images(ImageConfig(source="npz", root=str(path)))


@pytest.mark.parametrize("size", [28, 20])
def test_a_batch_at_once_is_its_images_one_by_one(size) -> None:
    data = load_images(ImageConfig(img_size=size))
    at_once, one_by_one = (
        DataLoader(data.val, batch_size=50, collate_fn=collate),
        collate([data.val[i] for i in range(50)]),
    )
    for batch, expected in zip(next(iter(at_once)), one_by_one, strict=True):
        assert torch.equal(batch, expected)


def test_a_folder(folder) -> None:
    data = load_images(ImageConfig(source="folder", root=str(folder), img_size=20))
    assert (data.classes, len(data.train), len(data.val), data.majority) == (("cat", "dog"), 4, 2, 0.5)
    assert [label for _, label in data.train] == [0, 0, 0, 1]
    for image, _ in data.train:
        assert (image.shape, image.dtype) == ((3, 20, 20), torch.uint8)
        assert (image[:, 3:-3, 3:-3].float().mean((1, 2)) - torch.tensor([200.0, 30.0, 60.0])).abs().max() < 4
    assert load_images(ImageConfig(source="folder", root=str(folder))).img_size == 224
    before = data.fingerprint
    draw(folder / "train" / "dog" / "2.png")
    assert load_images(ImageConfig(source="folder", root=str(folder), img_size=20)).fingerprint != before


def test_a_corrupt_image_ends_the_run_by_its_name(folder) -> None:
    broken = folder / "train" / "cat" / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    data = load_images(ImageConfig(source="folder", root=str(folder), img_size=20))
    with pytest.raises(ValueError, match=r"images must be readable, got .*broken.png: ") as caught:
        list(DataLoader(data.train, batch_size=2, collate_fn=collate))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_left_out_named_once_and_counted(folder, workers, capfd) -> None:
    (folder / "train" / "cat" / "broken.png").write_bytes(b"no image")
    draw(folder / "train" / "dog" / "cut.jpg", size=(400, 300))
    whole = (folder / "train" / "dog" / "cut.jpg").read_bytes()
    (folder / "train" / "dog" / "cut.jpg").write_bytes(whole[:30])
    data = load_images(ImageConfig(source="folder", root=str(folder), img_size=20, on_corrupt="skip"))
    for _ in range(2):
        batches = list(DataLoader(data.train, batch_size=3, collate_fn=collate, num_workers=workers))
        assert sum(len(labels) for _, labels in batches) == 4
    assert data.train.count_skipped == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 2
    assert "broken.png" in lines[0] + lines[1]
    assert "cut.jpg" in lines[0] + lines[1]


def bomb(path) -> None:
    """A PNG of a few bytes whose header promises 10^10 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")))
    parts = (struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (bomb, r"Image size \(10000000000 pixels\) exceeds limit"),
        (lambda path: Image.fromarray(np.zeros((8, 8), np.float32)).save(path, "TIFF"), "more than 16 bits, mode F"),
        (lambda path: Image.fromarray(np.zeros((8, 8), np.int32)).save(path, "TIFF"), "more than 16 bits, mode I"),
    ],
)
def test_an_absurd_size_and_values_without_a_range_are_corrupt_too(folder, write, reason, capsys) -> None:
    write(folder / "val" / "cat" / "1.png")
    config = ImageConfig(source="folder", root=str(folder), img_size=8)
    with pytest.raises(ValueError, match=rf"images must be readable, got .*1.png: .*{reason}"):
        load_images(config).val[0]
    assert load_images(replace(config, on_corrupt="skip")).val[0] is None
    assert "left out, not a readable image" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_values_of_16_bits_are_not_cut_off(folder, suffix) -> None:
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(grey).save(folder / "val" / "cat" / f"0.{suffix}")
    image, _ = load_images(ImageConfig(source="folder", root=str(folder), img_size=8)).val[0]
    assert torch.equal(image, torch.from_numpy((grey / 257).round().astype(np.uint8)).expand(3, -1, -1))


def test_nothing_readable_is_no_batch() -> None:
    assert collate([None, None]) is None


def test_idx_files(tmp_path) -> None:
    images, labels = map(read_idx, mnist("test"))
    assert (tuple(images.shape), tuple(labels.shape)) == ((2000, 28, 28), (2000,))
    good = struct.pack(">HBBI", 0, 8, 1, 3) + b"abc"
    for name, data in (("cut", gzip.compress(good[:-1])), ("plain", good), ("other", gzip.compress(b"\0\0\x0d\x01"))):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"a gzipped IDX file of unsigned bytes is needed, got .*{name}: "):
            read_idx(path)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"source": "imagenet22k"},
            ValueError,
            "source must be one of sample, cifar10, cifar100, mnist, npz, folder, tar, got",
        ),
        ({"source": "folder"}, ValueError, "root must be the folder of the data for source='folder', got None"),
        ({"img_size": 0}, ValueError, "img_size must be a positive integer, got 0"),
        ({"on_corrupt": "hide"}, ValueError, "on_corrupt must be 'fail' or 'skip', got 'hide'"),
        ({"download": True}, ValueError, "download must be off for source='sample'"),
        (
            {"source": "folder", "root": "{tmp}"},
            FileNotFoundError,
            "root must hold the folders train and val, got none",
        ),
        (
            {"source": "cifar10", "root": "{tmp}"},
            FileNotFoundError,
            "root must hold cifar10 as torchvision lays it out",
        ),
    ],
)
def test_bad_fields_are_one_clear_error(fields, error, message, tmp_path) -> None:
    fields = {key: str(tmp_path) if value == "{tmp}" else value for key, value in fields.items()}
    with pytest.raises(error, match=message):
        load_images(ImageConfig(**fields))


def test_folders_that_do_not_fit(folder) -> None:
    draw(folder / "val" / "bird" / "1.png")
    with pytest.raises(ValueError, match=r"classes of .*val must be among those of .*train, got bird"):
        load_images(ImageConfig(source="folder", root=str(folder)))
    (folder / "none" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"must hold a folder of images for each class, got none with \.jpg"):
        load_images(ImageConfig(source="folder", root=str(folder / "none")))
