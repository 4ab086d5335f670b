"""Text data sets of Hugging Face `datasets`, streamed and packed, with a position that can be taken up again."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from .data import Batch, DataConfig, LanguageData, fixed_windows, tokenize
from .tokenizer import ByteTokenizer, Tokenizer, train_bpe

PREFIX = "hf:"


class PackedStream:
    """Windows of seqlen + 1 tokens cut from documents in the order in which they stream; the last starts again.

    Nothing is shuffled here: a shuffle buffer would be lost when a training is resumed. Shuffle the shards of `dataset`
    beforehand if their order matters.

    Args:
        dataset: a datasets.IterableDataset that nobody has read from.
        column: of the text.
        tokenizer: documents to tokens.
        seqlen: tokens of input per window.
    """

    def __init__(self, dataset: Any, column: str, tokenizer: Tokenizer, seqlen: int) -> None:
        self.dataset, self.column, self.tokenizer, self.seqlen = dataset, column, tokenizer, seqlen

    def batches(self, batch: int, position: dict[str, Any] | None = None) -> Iterator[Batch]:
        """Batches of `batch` windows from a position on; None is the beginning.

        Raises:
            ValueError: a whole pass over the data gives no text.
            OSError: a file of them is gone, or cannot be read.
        """
        # a data set knows how far it has been read: one of its own for every reader
        dataset = copy.deepcopy(self.dataset)
        carry = np.empty(0, np.int64) if position is None else position["carry"].numpy()
        if position is not None:
            dataset.load_state_dict(copy.deepcopy(position["dataset"]))
        documents, need, empty = iter(dataset), batch * self.seqlen + 1, position is None
        while True:
            parts, have = [carry], len(carry)
            while have < need:
                try:
                    row = next(documents, None)
                except OSError as error:
                    raise OSError(f"data must stay readable while they are streamed, got {error}") from error
                if row is None:
                    if empty:
                        raise ValueError(f"data must contain text in the column {self.column}, got none")
                    dataset = copy.deepcopy(self.dataset)
                    documents, empty = iter(dataset), True
                elif row[self.column]:
                    parts.append(tokenize([row[self.column].encode()], self.tokenizer).astype(np.int64))
                    have, empty = have + len(parts[-1]), False
            tokens = np.concatenate(parts)
            carry = tokens[need - 1 :]
            windows = np.stack([tokens[row * self.seqlen :][: self.seqlen + 1] for row in range(batch)])
            position = {
                "carry": torch.from_numpy(carry.copy()),
                "dataset": copy.deepcopy(dataset.state_dict()),
            }
            yield Batch(torch.from_numpy(windows), position)


def load_stream(
    config: DataConfig, *, vocab_size: int, seqlen: int, tokenizer: Tokenizer | None = None
) -> LanguageData:
    """Open hf:NAME[:CONFIG] for streaming; NAME is a data set of the hub or a local folder of data files.

    Validation is on the split "validation" or "test" if there is one, else on the first config.val_documents documents,
    which training then skips. A BPE is trained on the first 10,000 documents of training.

    Args:
        config: what to open.
        vocab_size: of the model; a BPE is trained to at most this many tokens.
        seqlen: of the model.
        tokenizer: used instead of training one, as when a training is resumed.

    Raises:
        ValueError: `datasets` cannot open it, has no such column, or finds too little text. Names the data set.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, subset = (config.source or "").removeprefix(PREFIX).partition(":")
    try:
        splits = load_dataset(name, subset or None, streaming=True)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"data must be a text data set that can be opened, got hf:{name}: {reason}") from error
    if "train" not in splits:
        raise ValueError(f"data must have a split train, got {sorted(splits)} in hf:{name}")
    train = splits["train"]
    row = next(iter(copy.deepcopy(train)), {})
    if not isinstance(row.get(config.text_column), str):
        raise ValueError(
            f"text_column must name a column of text, got {config.text_column!r}, in hf:{name} with {sorted(row)}"
        )
    held_out = next((splits[key] for key in ("validation", "test") if key in splits), None)
    if held_out is None:
        held_out, train = train.take(config.val_documents), train.skip(config.val_documents)

    def texts(rows: Iterable[dict[str, Any]]) -> list[bytes]:
        return [text.encode() for row in rows if (text := row[config.text_column])]

    try:
        if tokenizer is None and config.tokenizer == "bytes":
            tokenizer = ByteTokenizer()
        elif tokenizer is None:
            tokenizer = train_bpe(texts(islice(copy.deepcopy(train), 10_000)), vocab_size)
        val_tokens = tokenize(texts(islice(copy.deepcopy(held_out), config.val_documents)), tokenizer)
        windows = fixed_windows(val_tokens, seqlen, config.val_windows)
    except ValueError as error:
        raise ValueError(f"{error}, in hf:{name}") from error
    source = PackedStream(train, config.text_column, tokenizer, seqlen)
    digest = hashlib.sha256(f"{name}:{subset}:{config.text_column}".encode() + windows.numpy().tobytes())
    return LanguageData(tokenizer, source, windows, digest.hexdigest(), None)
