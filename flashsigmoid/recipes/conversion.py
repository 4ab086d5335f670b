"""A language model that softmax has trained, in the layout of Llama, to sigmoid attention: all weights stay.

    softmax(S)_ij = exp(S_ij - log sum_j exp(S_ij))   is replaced by   sigmoid(S_ij + b),   b = -log(seqlen)

The two agree where a row sums its exponentials to about seqlen and no weight is near 1. Elsewhere not, so a short
training follows; the softmax original gets the same one, as the control. No report is written here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..integrations.transformers import NAME, register
from ..nn.config import check_types
from ..record import RecordWriter
from ..samples import tinyshakespeare
from ..training.data import DataConfig, LanguageData, PackedText, fixed_windows, read_documents, split, tokenize
from ..training.language import LanguageModule
from ..training.module import Metric, Options, Prepared, train_run
from ..training.optim import OptimConfig
from ..training.run import LanguageRun

MODEL = "model"  # folder of the trained model in that of an arm
LAYOUT = "llama"


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A checkpoint of transformers, and the attention it is to have.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    path: str  # a folder, or a name that transformers knows
    seqlen: int  # tokens of a window: of the training, and of -log(seqlen)
    attention: Literal["sigmoid", "softmax"] = "sigmoid"
    sigmoid_bias: float | None = None  # b; None: -log(seqlen)

    def __post_init__(self) -> None:
        check_types(self)
        if type(self.seqlen) is not int or self.seqlen < 1:
            raise ValueError(f"seqlen must be a positive integer, got {self.seqlen!r}")
        if Path(self.path).is_dir():
            config = Path(self.path, "config.json")
            if not config.exists():
                raise ValueError(f"checkpoint must be a folder of transformers, with a config.json, got {self.path}")
            # before transformers asks on the terminal whether to run the checkpoint's own code
            self._check_layout(json.loads(config.read_text("utf-8")).get("model_type"))
        if self.attention not in ("sigmoid", "softmax"):
            raise ValueError(f"attention must be 'sigmoid' or 'softmax', got {self.attention!r}")
        if self.sigmoid_bias is not None and not math.isfinite(self.sigmoid_bias):
            raise ValueError(f"sigmoid_bias must be a finite number or None, got {self.sigmoid_bias}")

    def _check_layout(self, model_type: str | None) -> None:
        if model_type != LAYOUT:
            raise ValueError(f"model_type of {self.path} must be {LAYOUT!r}, got {model_type!r}")

    @property
    def bias(self) -> float:
        """`sigmoid_bias`, or -log(seqlen)."""
        return -math.log(self.seqlen) if self.sigmoid_bias is None else self.sigmoid_bias

    def load(self) -> nn.Module:
        """The model in float32, with this attention and every weight of the checkpoint.

        Raises:
            ValueError: its layout is not Llama's, or its positions are fewer than seqlen.
        """
        register()
        config = AutoConfig.from_pretrained(self.path)
        self._check_layout(config.model_type)
        if self.seqlen > config.max_position_embeddings:
            most = config.max_position_embeddings
            raise ValueError(f"seqlen must be at most max_position_embeddings={most}, got {self.seqlen}")
        if self.attention == "sigmoid":
            config.sigmoid_bias = self.bias
        implementation = NAME if self.attention == "sigmoid" else "sdpa"
        return AutoModelForCausalLM.from_pretrained(
            self.path, config=config, attn_implementation=implementation, dtype=torch.float32
        )


@dataclass(frozen=True, kw_only=True)
class ConversionRun(LanguageRun):
    """One arm of a conversion: a training that begins with the weights of a checkpoint, and has its tokenizer.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    model: Pretrained  # pyright: ignore[reportIncompatibleVariableOverride]
    data: DataConfig = field(default_factory=DataConfig)  # text files; its tokenizer stays at the default
    sample_tokens: int = 0  # no sample is drawn
    attention_snapshots: int = 0  # the weights of transformers' layers are not seen

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.tokenizer != "bytes":
            raise ValueError(f"data.tokenizer has no effect: the checkpoint has one, got {self.data.tokenizer!r}")
        for name in ("sample_tokens", "attention_snapshots"):
            if getattr(self, name):
                raise ValueError(f"{name} must be 0 in a conversion, got {getattr(self, name)}")

    def train(self, out_dir: Path, **options: Any) -> dict[str, float]:
        """`train_arm`."""
        return train_arm(self, out_dir, **options)

    def settings(self) -> dict[str, Any]:
        """As of any run; of the path the last part."""
        settings = {**super().settings(), "path": Path(self.model.path).name}
        del settings["tokenizer"]
        return settings


def llama_recovery(path: str | Path, seqlen: int) -> ConversionRun:
    """A short training after a softmax checkpoint in Llama's layout has been given sigmoid attention.

    Paper: arXiv:2409.04431 for b = -log n; it converts nothing, the recovery is ours. Command: flashsigmoid convert
    CHECKPOINT. Hardware: 2 CPU cores for the record, a toy. Wall time: one minute an arm. Expected:
    benchmarks/results/conversion; of a checkpoint of real size, not yet measured.

    Args:
        path: of the checkpoint: a folder, or a name that transformers knows.
        seqlen: tokens of a window.
    """
    return ConversionRun(
        name="llama_recovery",
        model=Pretrained(path=str(path), seqlen=seqlen),
        data=DataConfig(val_windows=128),
        optim=OptimConfig(lr=1e-3, warmup=20),
        steps=200,
        batch=16,
        val_every=50,
        save_every=100,
        keep_last=1,
    )


def convert(run: ConversionRun, out_dir: str | Path, **options: Unpack[Options]) -> dict[str, Path]:
    """Convert, train, and train the softmax original in the same way.

    Records of an arm are in out_dir/ARM, its model in out_dir/ARM/model: config, safetensors, tokenizer. The loss
    before the training is the validation of step 0. The config.json of the converted model has its `sigmoid_bias` and
    names its attention: it loads as sigmoid after `register`, and raises before. Saved again by transformers, it loses
    the name, and attn_implementation="sigmoid" must be given.

    Args:
        run: what to do; its attention is "sigmoid".
        out_dir: folder of both arms.
        options: as `language.train`; max_minutes is an arm's.

    Returns:
        The folder of each arm, "sigmoid" first.

    Raises:
        ValueError: the run's attention is softmax; a checkpoint of another layout; as `language.train`.
    """
    if run.model.attention != "sigmoid":
        raise ValueError(f"model.attention has no effect: both arms are trained, got {run.model.attention}")
    folders = {arm: Path(out_dir) / arm for arm in ("sigmoid", "softmax")}
    for arm, folder in folders.items():
        # b is none of softmax's business
        twin = run if arm == "sigmoid" else replace(run, model=replace(run.model, attention=arm, sigmoid_bias=None))
        train_arm(twin, folder, **options)
    return folders


def train_arm(run: ConversionRun, out_dir: str | Path, **options: Unpack[Options]) -> dict[str, float]:
    """Train one arm; arguments and errors are those of `language.train`.

    Returns:
        The last validation, "val/loss".
    """

    def prepare(start: Path | None) -> Prepared:
        data = _load_data(run)
        return Prepared(lambda: _Module(run, data, _Logits(run.model.load().train())), data.fingerprint)

    return train_run(run, out_dir, prepare, ("val/loss",), **options)


class _Logits(nn.Module):
    """A model of transformers as ours are called: logits (batch, seqlen, vocab_size) of tokens (batch, seqlen)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


class _Module(LanguageModule):
    def __init__(self, run: ConversionRun, data: LanguageData, model: _Logits) -> None:
        super().__init__(run, data, model)
        seen: dict[int, str] = {}
        # tied matrices: a checkpoint holds the first of them only
        self._tied = {
            name: first
            for name, tensor in self.state_dict().items()
            if (first := seen.setdefault(tensor.data_ptr(), name)) != name
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        for name in self._tied:
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for name, first in self._tied.items():
            checkpoint["state_dict"][name] = checkpoint["state_dict"][first]

    def validated(self) -> Iterator[Metric]:
        """Per token only: how many bytes a foreign token stands for depends on its neighbours."""
        yield "val/loss", self.val_losses()[0], "nats_per_token"

    def kernel(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Not known: transformers calls it."""

    def probed(self) -> Iterator[tuple[str, float]]:
        """Nothing: the probes look into our modules."""
        return iter(())

    def finish(self, writer: RecordWriter) -> None:
        """Save the model, and the tokenizer of the checkpoint with it."""
        logits: Any = self.model
        folder, model = writer.path.parent / MODEL, logits.model
        model.save_pretrained(folder)
        if self.run.model.attention == "sigmoid":
            # not saved by transformers; as a field of the file it is taken as if the caller had given it
            config = json.loads((folder / "config.json").read_text("utf-8"))
            text = json.dumps({**config, "attn_implementation": NAME}, indent=2)
            (folder / "config.json").write_text(text + "\n", "utf-8")
        AutoTokenizer.from_pretrained(self.run.model.path).save_pretrained(folder)
        writer.write("parameters", sum(p.numel() for p in model.parameters()))


class _Tokenizer:
    """The tokenizer of a checkpoint, as training takes one."""

    def __init__(self, path: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {path} must have an end of text (eos_token), got none")
        self.eot: int = self._tokenizer.eos_token_id
        self.vocab_size: int = len(self._tokenizer)

    def encode(self, text: bytes) -> np.ndarray:
        tokens = self._tokenizer(text.decode("utf-8", errors="replace"), add_special_tokens=False, verbose=False)
        return np.array(tokens["input_ids"], dtype=np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray:
        return np.zeros(self.vocab_size, dtype=np.int64)  # not known: see `_Module.validated`

    def to_json(self) -> str:
        return self._tokenizer.backend_tokenizer.to_str()

    to_library_json = to_json


def _load_data(run: ConversionRun) -> LanguageData:
    """Text files in tokens of the checkpoint; the windows as `load_text` cuts them, without a baseline."""
    path = tinyshakespeare() if run.data.source is None else Path(run.data.source)
    tokenizer = _Tokenizer(run.model.path)
    train, val = (tokenize(part, tokenizer) for part in split(read_documents(path), run.data.val_fraction))
    source = PackedText(train, run.model.seqlen, run.seed)
    windows = fixed_windows(val, run.model.seqlen, run.data.val_windows)
    fingerprint = hashlib.sha256(train.tobytes() + val.tobytes()).hexdigest()
    return LanguageData(tokenizer, source, windows, fingerprint, None)
