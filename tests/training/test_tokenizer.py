"""Bytes and BPE: what goes in comes out, and what tokenizer.json keeps."""

from __future__ import annotations

import json

import pytest
import tokenizers

from flashsigmoid.samples import tinyshakespeare
from flashsigmoid.training.tokenizer import END_OF_TEXT, BPETokenizer, ByteTokenizer, load_tokenizer, train_bpe

TEXT = "To be, or not to be;\n\n  naïve 日本 🙂\ttabs\r\n" + END_OF_TEXT + " is text here"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([tinyshakespeare().read_bytes()[:100_000]], 500)


def test_bytes():
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(TEXT.encode())
    assert tokens.tolist() == list(TEXT.encode())
    assert tokenizer.decode([*tokens, 256]) == TEXT
    assert tokenizer.decode([0xC3]) == "�"
    assert tokenizer.byte_lengths().tolist() == [1] * 256 + [0]


def test_bpe_gives_every_text_back(bpe):
    tokens = bpe.encode(TEXT.encode())
    assert bpe.decode(tokens.tolist()) == TEXT
    assert bpe.decode([*tokens.tolist(), bpe.eot]) == TEXT
    assert bpe.eot not in tokens
    assert bpe.vocab_size == 500
    assert tokens.max() < 500
    # it has learnt something, and knows how long its tokens are
    shakespeare = b"And now the king hath spoken to the people of the city."
    assert len(bpe.encode(shakespeare)) < 0.6 * len(shakespeare)
    assert bpe.byte_lengths()[bpe.encode(shakespeare)].sum() == len(shakespeare)
    assert bpe.byte_lengths()[bpe.eot] == 0


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenizer_json_keeps_it(tmp_path, bpe, kind):
    before = ByteTokenizer() if kind == "bytes" else bpe
    (tmp_path / "tokenizer.json").write_text(before.to_json(), "utf-8")
    after = load_tokenizer(tmp_path / "tokenizer.json")
    assert type(after) is type(before)
    assert (after.vocab_size, after.eot) == (before.vocab_size, before.eot)
    assert after.encode(TEXT.encode()).tolist() == before.encode(TEXT.encode()).tolist()
    assert after.to_json() == before.to_json()


def test_a_small_text_gives_a_small_vocabulary():
    assert train_bpe([b"ab"], 1000).vocab_size < 300


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="vocab_size of a byte-level BPE must be at least 257, got 256"):
        train_bpe([b"text"], 256)
    with pytest.raises(ValueError, match=r"must be UTF-8 .* got byte 0x80 at offset 2"):
        train_bpe([b"ab\x80"], 300)
    with pytest.raises(ValueError, match=r"a tokenizer must have the token <\|endoftext\|>"):
        BPETokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
    with pytest.raises(ValueError, match="a tokenizer must be an existing file, got "):
        load_tokenizer(tmp_path / "none.json")
    for text in ("{", json.dumps({"version": "1.0"})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="a tokenizer must be the JSON of a tokenizer, got "):
            load_tokenizer(tmp_path / "bad.json")
