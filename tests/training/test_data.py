"""Files to windows: what is read, where it is cut, in which order it comes, and the errors of bad data."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from training.tiny import tiny_model, tiny_run, write_text

from flashsigmoid.samples import tinyshakespeare
from flashsigmoid.training.data import (
    DataConfig,
    PackedText,
    fixed_windows,
    load_text,
    read_documents,
    shuffled,
    shuffled_all,
    split,
    tokenize,
)
from flashsigmoid.training.language import load_data
from flashsigmoid.training.tokenizer import ByteTokenizer


def load(path, **changes):
    return load_text(DataConfig(source=str(path), **changes), vocab_size=300, seqlen=16, seed=0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 17, 64, 1000])
def test_shuffled_is_a_permutation_of_its_own_for_every_seed_and_epoch(count):
    orders = [[shuffled(i, count, seed=s, epoch=e) for i in range(count)] for s, e in ((0, 0), (0, 1), (1, 0))]
    assert [sorted(order) for order in orders] == [list(range(count))] * 3
    if count >= 17:
        assert len({tuple(order) for order in orders} | {tuple(range(count))}) == 4


def test_shuffled_spreads_evenly():
    """Over many epochs a window stands at every place about as often: chi-square of 63 degrees of freedom."""
    places = np.bincount([shuffled(5, 64, seed=0, epoch=epoch) for epoch in range(6400)], minlength=64)
    assert ((places - 100) ** 2 / 100).sum() < 120


def test_shuffled_is_the_same_tomorrow():
    """The order is part of what a checkpoint means, so it is pinned."""
    assert [shuffled(i, 10, seed=3, epoch=2) for i in range(10)] == [5, 2, 3, 0, 1, 9, 7, 8, 6, 4]
    with pytest.raises(ValueError, match=r"index must be in range\(10\), got 10"):
        shuffled(10, 10, seed=0, epoch=0)


def test_every_token_is_a_target_once_an_epoch():
    tokens = np.arange(1000)
    source = PackedText(tokens, 16, seed=0)
    assert source.windows == 61
    targets = np.sort(np.concatenate([source.sample(s)[1:] for s in range(61)]))
    assert (np.diff(targets) == 1).all()
    assert len(targets) == 61 * 16
    # the next epoch cuts elsewhere and shuffles anew
    assert {s.tobytes() for s in map(source.sample, range(61))} != {
        s.tobytes() for s in map(source.sample, range(61, 122))
    }


def test_batches_go_on_from_any_position():
    source = PackedText(np.arange(1000), 16, seed=0)
    batches = source.batches(7)
    passed = [next(batches) for _ in range(30)]
    for at in (0, 8, 9, 20):
        again = source.batches(7, passed[at].position)
        assert all(torch.equal(next(again).tokens, batch.tokens) for batch in passed[at + 1 :])
    assert passed[0].tokens.shape == (7, 17)
    assert passed[0].tokens.dtype == torch.int64


def test_a_folder_is_its_texts_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, text in (("b.txt", b"second"), ("a.txt", b"first"), ("deep/c.txt", b"third"), ("d.md", b"never")):
        (tmp_path / name).write_bytes(text)
    documents = read_documents(tmp_path)
    assert documents == [b"first", b"second", b"third"]
    assert tokenize(documents[:2], ByteTokenizer()).tolist() == [*b"first", 256, *b"second", 256]


def test_split_cuts_at_the_fraction_and_between_characters():
    documents = [b"x" * 60, "é".encode() * 20]
    train, val = split(documents, 0.29)
    assert (train, val) == ([b"x" * 60, "é".encode() * 5], ["é".encode() * 15])
    assert split([b"abcdefghij"], 0.1) == ([b"abcdefghi"], [b"j"])
    for fraction in (0.01, 0.37, 0.9):
        train, val = split(documents, fraction)
        assert b"".join(train + val) == b"".join(documents)


def test_fixed_windows():
    windows = fixed_windows(np.arange(100), 10, None)
    assert windows[:, 0].tolist() == list(range(0, 90, 10))
    assert torch.equal(windows[:, 1:].flatten(), torch.arange(1, 91))
    assert fixed_windows(np.arange(100), 10, 3)[:, 0].tolist() == [0, 30, 60]
    assert len(fixed_windows(np.arange(100), 10, 50)) == 9


def test_the_embedded_text_is_the_default():
    data = load_text(DataConfig(), vocab_size=257, seqlen=128, seed=0)
    assert tinyshakespeare().stat().st_size == 1_115_394
    # 90 % of the bytes and an end of text
    assert len(data.train.tokens) == round(0.9 * 1_115_394) + 1
    text = tinyshakespeare().read_bytes()
    assert bytes(data.val_windows[0].tolist()) == text[len(data.train.tokens) - 1 :][:129]


def test_the_fingerprint_is_of_the_tokens(tmp_path):
    a = load(write_text(tmp_path / "a.txt"))
    assert a.fingerprint == load(write_text(tmp_path / "b.txt")).fingerprint
    assert a.fingerprint != load(write_text(tmp_path / "b.txt", 1001)).fingerprint
    assert a.fingerprint != load(tmp_path / "a.txt", val_fraction=0.2).fingerprint


@pytest.mark.parametrize(
    ("content", "config", "error", "message"),
    [
        (None, {}, FileNotFoundError, "data must be an existing text file or folder, got "),
        (b"", {}, ValueError, "data must contain text, got nothing but white space in "),
        (b" \n\n", {}, ValueError, "data must contain text, got nothing but white space in "),
        (b"short", {}, ValueError, r"training text must have at least 2 \* seqlen = 32 tokens, got 5, in "),
        (b"x" * 100, {}, ValueError, "validation text must have more than seqlen = 16 tokens, got 11, in "),
        (b"\xff\xfe" * 500, {"tokenizer": "bpe"}, ValueError, "must be UTF-8 .* got byte 0xff at offset 0, in "),
    ],
)
def test_bad_data_is_one_line_that_names_the_path(tmp_path, content, config, error, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        load(path, **config)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_without_texts(tmp_path):
    with pytest.raises(ValueError, match=r"a folder with \.txt files, got a folder without: "):
        load(tmp_path)


def test_bytes_take_any_bytes(tmp_path):
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 20)
    assert load(tmp_path / "binary.txt").val_windows[:, 1:].unique().tolist() == list(range(257))


def test_a_vocabulary_too_small_for_the_tokenizer(tmp_path):
    run = tiny_run(write_text(tmp_path / "text.txt"), model=tiny_model(vocab_size=256))
    with pytest.raises(ValueError, match=r"model\.vocab_size must be at least the tokenizer's 257, got 256"):
        load_data(run)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokenizer", "words"), ("val_fraction", 0.0), ("val_fraction", 1.0), ("val_windows", 0), ("val_documents", 0)],
)
def test_bad_configs(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*, got {value!r}"):
        DataConfig(**{field: value})


def test_reading_data_needs_neither_lightning_nor_datasets(tmp_path):
    code = "import sys, flashsigmoid.training.data; print({'pytorch_lightning', 'datasets'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("count", [1, 2, 3, 17, 1000, 50_000])
def test_many_are_shuffled_as_one_by_one(count):
    indices = range(max(0, count - 40), count)
    for seed, epoch in ((0, 0), (7, 3), (2**32 - 1, 10_000)):
        one_by_one = [shuffled(index, count, seed=seed, epoch=epoch) for index in indices]
        assert shuffled_all(indices, count, seed=seed, epoch=epoch) == one_by_one
    assert shuffled_all([], count, seed=0, epoch=0) == []
    for wrong in (count, -1):
        with pytest.raises(ValueError, match=rf"index must be in range\({count}\), got {wrong}$"):
            shuffled_all([0, wrong], count, seed=0, epoch=0)
