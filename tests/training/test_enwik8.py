"""enwik8: the file or its zip, checked; its split; whole splits in bits per byte at the end of a training."""

from __future__ import annotations

import hashlib
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rounding import assert_rounded
from training.test_resume import quiet
from training.tiny import tiny_model, tiny_run

from flashsigmoid.record import read_records
from flashsigmoid.samples import tinyshakespeare
from flashsigmoid.training import enwik8
from flashsigmoid.training.checkpoint import load_model
from flashsigmoid.training.data import DataConfig
from flashsigmoid.training.language import load_data, train


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """10,000 bytes of another text in place of 100 million."""
    content = tinyshakespeare().read_bytes()[:10_000]
    monkeypatch.setattr(enwik8, "SPLIT", {"train": 9000, "val": 400, "test": 600})
    monkeypatch.setattr(enwik8, "SHA256", hashlib.sha256(content).hexdigest())
    path = tmp_path / "enwik8"
    path.write_bytes(content)
    return path


def zipped(path: Path, name: str = "enwik8") -> Path:
    archive = path.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.write(path, name)
    return archive


def test_the_file_is_mapped_and_its_zip_is_the_same(file) -> None:
    mapped = enwik8.read_enwik8(file)
    assert isinstance(mapped, np.memmap)
    assert mapped.tobytes() == file.read_bytes()
    assert np.array_equal(enwik8.read_enwik8(zipped(file)), mapped)


def test_the_split_is_in_the_order_of_the_file(file) -> None:
    text = file.read_bytes()
    data = enwik8.load_enwik8(DataConfig(source=f"enwik8:{file}"), seqlen=16, seed=0)
    assert data.splits["val"].tobytes() == text[9000:9400]
    assert data.splits["test"].tobytes() == text[9400:]
    assert len(data.train.tokens) == 9000
    assert bytes(data.val_windows[0].tolist()) == text[9000:9017]
    batch = next(data.train.batches(3)).tokens
    assert (batch.dtype, batch.shape) == (torch.int64, (3, 17))
    for row in batch.tolist():
        assert bytes(row) in text[:9000]


def damage(path: Path, how: str) -> Path:
    content = path.read_bytes()
    if how == "none":
        path.unlink()
    elif how == "other":
        path.write_bytes(content[:-1] + b"~")
    elif how == "short":
        path.write_bytes(content[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other name":
        return zipped(path, "text8")
    else:
        archive = zipped(path)
        content = bytearray(archive.read_bytes())
        content[200] ^= 0xFF
        archive.write_bytes(content)
        return archive
    return path


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("none", FileNotFoundError, "enwik8 must be the file or its zip, as from http.*, got none at "),
        ("other", ValueError, "enwik8 must have the SHA-256 .*, got .* of "),
        ("short", ValueError, "enwik8 must have 10,000 bytes, got 9,999 in "),
        ("empty", ValueError, "enwik8 must have 10,000 bytes, got 0 in "),
        ("other name", ValueError, "enwik8 must be the file or a zip that holds it, got .*: "),
        ("damaged", ValueError, "enwik8 must be the file or a zip that holds it, got .*: "),
    ],
)
def test_what_is_not_enwik8_is_one_clear_error(file, how, error, message) -> None:
    path = damage(file, how)
    run = tiny_run(f"enwik8:{path}")
    with pytest.raises(error, match=message) as raised:
        load_data(run)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_bpe_is_one_clear_error(file) -> None:
    with pytest.raises(ValueError, match="tokenizer must be 'bytes' for enwik8, got 'bpe'"):
        load_data(tiny_run(None, data=DataConfig(source=f"enwik8:{file}", tokenizer="bpe")))


@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
def test_whole_splits_are_evaluated_at_the_end(tmp_path, file, attention) -> None:
    """With 264 rows, as the recipe; against the definition, one target after the other."""
    run = tiny_run(f"enwik8:{file}", model=tiny_model(vocab_size=264, dropout_p=0.1), eval_stride=5)
    run = run.with_attention(attention)
    final = train(run, tmp_path / "run", device="cpu", show=quiet)
    found = {r.name: r for r in read_records(tmp_path / "run/records.jsonl").records}
    model, _ = load_model(tmp_path / "run")
    for split, tokens in (("val", file.read_bytes()[9000:9400]), ("test", file.read_bytes()[9400:])):
        record = found[f"bits_per_byte/{split}"]
        assert record.tags == {"stride": 5}
        assert final[record.name] == record.value
        nats, first = 0.0, 0  # the first target that no window has counted
        for start in [*range(0, len(tokens) - 17, 5), len(tokens) - 17]:
            window = torch.tensor(list(tokens[start : start + 17]))
            with torch.no_grad():
                log_p = model(window[None, :-1])[0].double().log_softmax(-1)
            for i in range(16):
                if start + i >= first:
                    nats -= float(log_p[i, window[i + 1]])
            first = start + 16
        assert_rounded(record.value, nats / math.log(2) / (len(tokens) - 1), dtype=torch.float32)


def test_the_stride_is_checked_and_may_change() -> None:
    run = tiny_run(None)
    assert run.stride == 8
    for stride in (0, 17):
        with pytest.raises(ValueError, match=f"eval_stride must be from 1 to model.seqlen=16, got {stride}"):
            replace(run, eval_stride=stride)
