"""Tar files of images: packed from a folder, written by webdataset, read in any order, damaged, resumed on."""

from __future__ import annotations

import io
import os
import shutil
import signal
import tarfile
from collections import Counter
from dataclasses import replace

import pytest
import torch
import webdataset
from torch.utils.data import DataLoader
from training.test_classification import MODEL, RUN, numbers, quiet, remains
from training.test_images import draw
from training.tiny import differences
from webdataset.tariterators import group_by_keys, tar_file_expander

from flashsigmoid.training.callbacks import Interrupted
from flashsigmoid.training.classification import train_classifier
from flashsigmoid.training.images import ImageConfig, collate, load_images
from flashsigmoid.training.pack import pack_images

COUNTS = {"train": 11, "val": 4}


@pytest.fixture
def folder(tmp_path):
    """Two classes, an image of a colour of its own each; names with dots, upper case and other letters."""
    for split, count in COUNTS.items():
        for number in range(count):
            name = ("a.b.{}.png", "ö {}.PNG", "{}.bmp")[number % 3].format(number)
            draw(tmp_path / "images" / split / ("dog" if number % 4 else "cat") / name, colour=(20 * number, 9, 90))
    return tmp_path / "images"


@pytest.fixture
def shards(folder):
    """The same in shards of four."""
    pack_images(folder, folder.with_name("shards"), shard_size=4, show=lambda line: None)
    return folder.with_name("shards")


def config(root, **fields) -> ImageConfig:
    return ImageConfig(source="tar", root=str(root), img_size=14, **fields)


def sample(number: int, **parts: bytes) -> dict:
    return {"__key__": f"{number:03d}", **parts}


def encoded(colour=(1, 2, 3), kind="PNG") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(file, kind)
    return file.getvalue()


def write(path, *samples: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False) as tar:
        for each in samples:
            tar.write(each)


def test_packed_shards_hold_the_images_of_the_folder(folder, shards) -> None:
    assert sorted(path.name for path in shards.iterdir()) == [
        "classes.txt", "train-0000.tar", "train-0001.tar", "train-0002.tar", "val-0000.tar",
    ]  # fmt: skip
    assert not shards.with_name("shards.tmp").exists()
    plain = load_images(ImageConfig(source="folder", root=str(folder), img_size=14))
    data = load_images(config(shards))
    assert (data.classes, data.img_size, data.in_chans) == (("cat", "dog"), 14, 3)
    assert (data.majority, data.mean, data.std) == (plain.majority, plain.mean, plain.std)
    for part, other in ((data.train, plain.train), (data.val, plain.val)):
        assert len(part) == len(other)
        ours, theirs = (Counter((x.numpy().tobytes(), y) for x, y in each) for each in (part, other))
        assert ours == theirs
        assert max(ours.values()) == 1
    orders = ([x.numpy().tobytes() for x, _ in each.train] for each in (data, plain))
    assert next(orders) != next(orders)
    assert load_images(config(shards)).fingerprint == data.fingerprint != plain.fingerprint


def test_webdataset_reads_what_is_packed(folder, shards) -> None:
    theirs = []
    for path in sorted(shards.glob("train-*.tar")):
        with path.open("rb") as file:  # which webdataset's own opener leaves to the garbage collector
            theirs += group_by_keys(tar_file_expander([{"url": str(path), "stream": file}]))
    data = load_images(config(shards))
    assert [int(each["cls"]) for each in theirs] == [label for _, label in data.train]
    assert len({each["__key__"] for each in theirs}) == len(theirs) == COUNTS["train"]
    bytes_of = {path.read_bytes() for path in (folder / "train").rglob("*.*")}
    assert {member.open().read() for member, _ in data.train.files} == bytes_of


def test_what_webdataset_writes_is_read_in_any_order(tmp_path) -> None:
    """Its ShardWriter, JPEG, upper case, further files in a sample, no classes.txt."""
    with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=3, verbose=0, encoder=False) as writer:
        for i in range(7):
            parts = {"JPG": encoded((30 * i, 0, 0), "JPEG"), "cls": b" %d\n" % (i % 3), "json": b"{}", "seg.png": b"?"}
            writer.write(sample(i, **parts))
    write(tmp_path / "val-0.tar", sample(0, png=encoded(), cls=b"1"))
    data = load_images(config(tmp_path))
    assert (data.classes, len(data.train), len(data.val)) == (("0", "1", "2"), 7, 1)
    for i in (6, 0, 3, 6):
        image, label = data.train[i]
        assert label == i % 3
        assert abs(float(image[0].float().mean()) - 30 * i) < 3
    assert str(data.train.files[4][0]) == f"{tmp_path / 'train-000001.tar'}:004.JPG"


def test_packing_leaves_nothing_half_done(folder, tmp_path, monkeypatch) -> None:
    out = tmp_path / "shards"

    def stop(line: str) -> None:
        if line.startswith("train-0001"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_images(folder, out, shard_size=4, show=stop)
    assert not out.exists()
    lines = []
    pack_images(folder, out, shard_size=4, show=lines.append)
    assert lines[2:] == ["train-0002.tar: 3 images", "val-0000.tar: 4 images"]
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    pack_images(folder, tmp_path / "again", shard_size=4, show=lines.append)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == first
    with pytest.raises(ValueError, match=r"out must not exist yet, got .*shards"):
        pack_images(folder, out)
    with pytest.raises(ValueError, match="shard_size must be at least 1, got 0"):
        pack_images(folder, tmp_path / "third", shard_size=0)
    assert not (tmp_path / "third.tmp").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named_by_shard_and_key(folder, tmp_path, workers, capfd) -> None:
    (folder / "train" / "cat" / "broken.png").write_bytes(b"no image")
    pack_images(folder, tmp_path / "shards", shard_size=5, show=lambda line: None)
    data = load_images(config(tmp_path / "shards"))
    with pytest.raises(ValueError, match=r"readable, got .*train-000\d.tar:\d{8}_broken.png: ") as caught:
        list(DataLoader(data.train, collate_fn=collate))
    assert "\n" not in str(caught.value)
    data = load_images(config(tmp_path / "shards", on_corrupt="skip"))
    capfd.readouterr()
    for _ in range(2):
        batches = list(DataLoader(data.train, batch_size=3, collate_fn=collate, num_workers=workers))
        assert sum(len(labels) for _, labels in batches) == COUNTS["train"]
    assert data.train.count_skipped == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "left out, not a readable image: " in line
    assert line.endswith("_broken.png: cannot identify image file")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_to_the_same_bits(folder, tmp_path, workers) -> None:
    """Within an epoch, past a corrupt image, with workers or without."""
    (folder / "train" / "dog" / "broken.png").write_bytes(b"no image")
    pack_images(folder, tmp_path / "shards", shard_size=4, show=lambda line: None)
    data = config(tmp_path / "shards", on_corrupt="skip")
    run = replace(RUN, data=data, model=replace(MODEL, num_classes=2, in_chans=3), batch=4, workers=workers)

    def stop(progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = train_classifier(replace(run, workers=0), tmp_path / "whole", device="cpu", show=quiet)
    with pytest.raises(Interrupted):
        train_classifier(run, tmp_path / "halves", device="cpu", show=stop)
    assert train_classifier(run, tmp_path / "halves", resume=True, device="cpu", show=quiet) == whole
    assert differences(remains(tmp_path / "whole"), remains(tmp_path / "halves")) == []
    assert numbers(tmp_path / "whole", "train/loss") == numbers(tmp_path / "halves", "train/loss")
    write(tmp_path / "shards" / "train-9999.tar", sample(0, png=encoded(), cls=b"0"))
    with pytest.raises(ValueError, match="data must be the same as when the run began"):
        train_classifier(run, tmp_path / "halves", resume=True, device="cpu", show=quiet)


@pytest.mark.parametrize("cut", ["inside an image", "between two members", "inside of a header", "without an end"])
def test_a_shard_that_is_cut_short_is_one_clear_error(shards, cut) -> None:
    """Python's tarfile gives what comes before the cut, without a word, in three of these."""
    path = shards / "train-0001.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    where = {
        "inside an image": last.offset_data + last.size // 2,
        "between two members": last.offset,
        "inside of a header": last.offset + 100,
        "without an end": last.offset_data + (last.size + 511) // 512 * 512,
    }[cut]
    path.write_bytes(path.read_bytes()[:where])
    with pytest.raises(ValueError, match=r"a shard must be a whole tar file, not compressed, got .*train-0001.tar: "):
        load_images(config(shards, on_corrupt="skip"))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"png": b"?"}], "a sample must have an image and a .cls, got one without the other, .*train-0.tar:000"),
        ([{"cls": b"1"}], "a sample must have an image and a .cls, got one without the other, .*train-0.tar:000"),
        ([{"png": b"?", "jpg": b"?", "cls": b"1"}], "a sample must have one image, got .*:000.png beside another"),
        ([{"png": b"?", "cls": b"cat"}], "a label must be a number, 0 or more, got b'cat' in .*train-0.tar:000.cls"),
        ([{"png": b"?", "cls": b"-1"}], "a label must be a number, 0 or more, got b'-1'"),
        ([{"txt": b"?"}], r"shards must hold images, got none in .*train-\*.tar"),
        ([{"png": b"?", "cls": b"5"}], "labels must be below the number of classes, 2, got 5"),
    ],
)
def test_samples_that_do_not_fit_are_one_clear_error(tmp_path, samples, message) -> None:
    write(tmp_path / "train-0.tar", *(sample(i, **parts) for i, parts in enumerate(samples)))
    write(tmp_path / "val-0.tar", sample(0, png=encoded(), cls=b"1"))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=message):
        load_images(config(tmp_path))


def test_missing_and_compressed_shards_say_so(shards) -> None:
    val = shards / "val-0000.tar"
    shutil.move(val, shards / "other.tar")
    with pytest.raises(FileNotFoundError, match=r"root must hold train-\*.tar and val-\*.tar, got no val-\*.tar in"):
        load_images(config(shards))
    with tarfile.open(val, "w:gz") as tar:
        tar.add(shards / "classes.txt", "0.cls")
    with pytest.raises(ValueError, match=r"a shard must be a whole tar file, not compressed, got .*val-0000.tar: "):
        load_images(config(shards))
    val.touch()
    val.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a shard must be a whole tar file, not compressed, got .*val-0000.tar: "):
        load_images(config(shards))


def test_another_label_is_other_data(tmp_path) -> None:
    prints = []
    for label in (b"0", b"1"):
        write(tmp_path / "train-0.tar", sample(0, png=encoded(), cls=label))
        write(tmp_path / "val-0.tar", sample(0, png=encoded(), cls=b"1"))
        (tmp_path / "classes.txt").write_text("cat\ndog\n")
        prints.append(load_images(config(tmp_path)).fingerprint)
    assert prints[0] != prints[1]
    assert torch.equal(load_images(config(tmp_path)).train.files.labels, torch.tensor([1]))
