"""Streams of Hugging Face `datasets`, here local files: packing, positions, validation, errors. No downloads."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
from training.test_resume import quiet, signal_at
from training.tiny import differences, remains, tiny_run

from flashsigmoid.training.callbacks import Interrupted
from flashsigmoid.training.data import DataConfig
from flashsigmoid.training.language import train
from flashsigmoid.training.stream import load_stream

datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")

WORDS = [f"document {i} of many words {'x' * (i % 13)}" for i in range(60)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps what it knows about data files; here in a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A data set of three shards, one empty text in it, and no validation split."""
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(3):
        rows = [{"text": text, "id": i} for i, text in enumerate(WORDS[20 * shard : 20 * shard + 20])]
        lines = [json.dumps(row) for row in [*rows, {"text": "", "id": -1}]]
        (folder / f"train-{shard}.jsonl").write_text("\n".join(lines))
    return folder


def load(folder, **changes):
    return load_stream(
        DataConfig(**{"source": f"hf:{folder}", "val_documents": 5, **changes}), vocab_size=300, seqlen=16
    )


def packed(documents):
    return torch.tensor([token for text in documents for token in [*text.encode(), 256]])


def test_documents_are_packed_in_their_order_again_and_again(folder):
    data = load(folder)
    assert torch.equal(data.val_windows[:, :-1].flatten(), packed(WORDS[:5])[: 16 * len(data.val_windows)])
    expected, n = packed(WORDS[5:]), 0
    # more than two passes
    for batch in islice(data.train.batches(4), 2 * len(expected) // 64 + 3):
        assert batch.tokens.shape == (4, 17)
        index = (n + torch.arange(4)[:, None] * 16 + torch.arange(17)) % len(expected)
        assert torch.equal(batch.tokens, expected[index])
        n += 64


def test_batches_go_on_from_any_position(folder):
    passed = list(islice(load(folder).train.batches(4), 80))
    # within a shard, at its end, in later passes
    for at in (0, 7, 11, 12, 30, 47, 60):
        again = load(folder).train.batches(4, passed[at].position)
        assert all(torch.equal(next(again).tokens, batch.tokens) for batch in passed[at + 1 :]), at


def test_a_validation_split_is_used(folder):
    (folder / "validation.jsonl").write_text(json.dumps({"text": "seen by nobody in training" * 3, "id": 0}))
    data = load(folder)
    assert bytes(data.val_windows[0].tolist()) == b"seen by nobody in"
    assert bytes(next(data.train.batches(1)).tokens[0].tolist()) == b"document 0 of man"


def test_bpe_on_a_stream(folder):
    data = load(folder, tokenizer="bpe")
    assert data.tokenizer.vocab_size == 300
    tokens = next(data.train.batches(2)).tokens[0].tolist()
    assert data.tokenizer.decode(tokens).startswith("document 5 of many words")


def test_a_training_on_a_stream_resumes_with_the_same_bits(folder, tmp_path):
    run = tiny_run(f"hf:{folder}")
    run = replace(run, data=replace(run.data, val_documents=5))
    whole = train(run, tmp_path / "whole", show=quiet)
    with pytest.raises(Interrupted):
        train(run, tmp_path / "halves", show=signal_at(7, 15))
    assert train(run, tmp_path / "halves", resume=True, show=quiet) == whole
    assert "baseline/bigram" not in whole
    found = differences(remains(run, tmp_path / "whole"), remains(run, tmp_path / "halves"))
    # `datasets` may write the same place in two ways; the batches that come next say that it is the same
    assert [where for where in found if "/position/dataset/" not in where] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "hf:/nowhere/at/all"}, "data must be a text data set that can be opened, got hf:/nowhere/at/all: "),
        ({"text_column": "id"}, r"text_column must name a column of text, got 'id', in hf:.* with \['id', 'text'\]"),
        ({"text_column": "body"}, "text_column must name a column of text, got 'body', in "),
        ({"val_documents": 60 * 2}, "training|tokens|text"),
    ],
)
def test_errors_are_one_line(folder, changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        next(load(folder, **changes).train.batches(1))
    assert "\n" not in str(raised.value)


def test_a_stream_without_text_is_an_error_not_a_loop(tmp_path):
    (tmp_path / "data").mkdir()
    rows = [{"text": WORDS[0]}, {"text": WORDS[1]}, *[{"text": ""}] * 5]
    (tmp_path / "data/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="data must contain text in the column text, got none"):
        next(load(tmp_path / "data", val_documents=2).train.batches(1))


def test_a_shard_that_vanishes_while_it_streams_is_named(folder, tmp_path):
    """The run ends with the last checkpoint, and goes on from it, to the same bits, when the file is there again."""
    run = tiny_run(f"hf:{folder}", steps=24, val_every=24)
    run = replace(run, data=replace(run.data, val_documents=5))
    train(run, tmp_path / "whole", show=quiet)
    shard, kept = folder / "train-1.jsonl", tmp_path / "kept"
    with pytest.raises(OSError, match=r"data must stay readable while they are streamed, got .*train-1.jsonl"):
        train(run, tmp_path / "run", show=lambda progress: shard.rename(kept) if progress.step == 2 else None)
    kept.rename(shard)
    train(run, tmp_path / "run", resume=True, show=quiet)
    found = differences(remains(run, tmp_path / "whole"), remains(run, tmp_path / "run"))
    # a position may be called the end of one shard, or the beginning of the next: the next batches are compared, too
    assert [where for where in found if "/position/dataset" not in where] == []
