"""What a training is: its complete, frozen description, and what of it may change when it is resumed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from ..models.gpt import GPTConfig
from ..nn.config import check_types
from ..nn.recompute import Recompute, check_recompute
from .data import DataConfig
from .optim import OptimConfig

# these touch neither a parameter nor the tokens; whether the tokens are the same is told by their fingerprint
FREE = {
    "run.attention_snapshots",
    "run.eval_stride",
    "run.name",
    "run.keep_last",
    "run.log_every",
    "run.recompute",
    "run.sample_tokens",
    "run.save_every",
    "run.val_every",
    "run.workers",
    "data.download",
    "data.root",
    "data.source",
    "data.val_fraction",
    "data.val_documents",
    "data.val_windows",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every training is described by; the model, the data and their kind are a subclass's.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    name: str  # of the recipe
    model: Any  # a frozen configuration with a field `attention`
    optim: OptimConfig
    steps: int  # optimizer steps, at most val_every or a multiple of it
    batch: int  # samples in a micro-batch
    accumulate: int = 1  # micro-batches in an optimizer step
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: parameters in fp32, products in bf16 under autocast
    seed: int = 0  # of the parameters, the order of the data and dropout
    val_every: int = 100  # steps between validations; there is one before the first step too
    save_every: int = 100  # steps between checkpoints; there is one after the last step too
    keep_last: int = 2  # checkpoints that stay
    log_every: int = 10  # steps between records of the training loss

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "batch", "accumulate", "val_every", "save_every", "keep_last", "log_every"):
            number = getattr(self, name)
            if type(number) is not int or number < 1:
                raise ValueError(f"{name} must be a positive integer, got {number!r}")
        if self.steps % self.val_interval:
            raise ValueError(f"steps must be at most val_every={self.val_every} or a multiple of it, got {self.steps}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2^32), got {self.seed}")

    @property
    def val_interval(self) -> int:
        """Steps between validations: val_every, or all steps if they are fewer."""
        return min(self.val_every, self.steps)

    @property
    def title(self) -> str:
        """Recipe and attention, and b where it is not the recipe's."""
        own_bias = self.model.attention == "sigmoid" and self.model.sigmoid_bias is not None
        return f"{self.name} {self.model.attention}" + (f" b={self.model.sigmoid_bias:g}" if own_bias else "")

    def with_attention(self, attention: Literal["sigmoid", "softmax"]) -> Self:
        """The same run with this attention: a pair differs in nothing else."""
        return replace(self, model=replace(self.model, attention=attention))

    def train(self, out_dir: Path, **options: Any) -> dict[str, float]:
        """Train it; the arguments, the results and the errors are those of `language.train`."""
        raise NotImplementedError

    def sections(self) -> dict[str, dict[str, Any]]:
        """The description in plain containers, as in config.json: {"model", "optim", "data", ..., "run"}."""
        fields = asdict(self)
        sections = {name: fields.pop(name) for name in list(fields) if is_dataclass(getattr(self, name))}
        return json.loads(json.dumps({**sections, "run": fields}))

    def settings(self) -> dict[str, Any]:
        """The description in one flat dict for the records; of two fields of one name the run's own keeps it."""
        sections = self.sections()
        flat = {"recipe": sections["run"].pop("name")}
        for name, section in sections.items():
            for key, value in section.items():
                is_taken = key in flat or key == "name" or (name != "run" and key in sections["run"])
                flat[f"{name}.{key}" if is_taken else key] = value
        return flat


@dataclass(frozen=True, kw_only=True)
class LanguageRun(Run):
    """A complete description of one training of a language model: on the same machine with the same versions it gives
    the same model. A sample of its batches is a window of model.seqlen tokens.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    model: GPTConfig
    data: DataConfig = field(default_factory=DataConfig)
    sample_tokens: int = 300  # of the text drawn at the end; 0: none
    attention_snapshots: int = 6  # of the weights for a validation text, spread over the validations; 0: none
    compile: bool = False  # torch.compile what trains and validates: some minutes at most, then faster steps
    cuda_graphs: bool = False  # of what is compiled: a step of a small model no longer waits for Python
    recompute: Recompute = "none"  # of each block in the backward: "full" all but its input, "selective" nor q, k, v
    eval_stride: int | None = None  # of the windows in which whole splits are evaluated at the end; None: seqlen / 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_snapshots(self.attention_snapshots)
        check_cuda_graphs(self.cuda_graphs, self.compile, self.accumulate)
        check_recompute(self.recompute)
        if self.sample_tokens < 0:
            raise ValueError(f"sample_tokens must not be negative, got {self.sample_tokens}")
        if not 1 <= self.stride <= self.model.seqlen:
            raise ValueError(f"eval_stride must be from 1 to model.seqlen={self.model.seqlen}, got {self.eval_stride}")

    @property
    def stride(self) -> int:
        """`eval_stride`, or half a context."""
        return max(1, self.model.seqlen // 2) if self.eval_stride is None else self.eval_stride

    def train(self, out_dir: Path, **options: Any) -> dict[str, float]:
        """`language.train`."""
        from .language import train

        return train(self, out_dir, **options)

    def settings(self) -> dict[str, Any]:
        """The description in one flat dict for the records; sigmoid_bias is the number that is used."""
        return {**super().settings(), "sigmoid_bias": self.model.bias}


def check_snapshots(count: int) -> None:
    """Raises ValueError for a field attention_snapshots that is no number of snapshots."""
    if type(count) is not int or count < 0:
        raise ValueError(f"attention_snapshots must be a non-negative integer, got {count!r}")


def check_cuda_graphs(cuda_graphs: bool, compile: bool, accumulate: int) -> None:
    """Raises ValueError for a field cuda_graphs that the fields compile and accumulate do not allow.

    Gradients of one micro-batch lie where the next one's are written.
    """
    if cuda_graphs and not (compile and accumulate == 1):
        raise ValueError(f"cuda_graphs needs compile=True and accumulate=1, got {compile}, {accumulate}")


def check_unchanged(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Whether a run described by config.json `old` may go on as `new` describes it.

    Raises:
        ValueError: a field that shapes the result differs; names it.
    """
    for section in sorted({*old, *new} - {"fingerprint", "files"}):
        for name in sorted({*old.get(section, {}), *new.get(section, {})}):
            before, now = old.get(section, {}).get(name), new.get(section, {}).get(name)
            if before != now and f"{section}.{name}" not in FREE:
                raise ValueError(f"{section}.{name} must stay as the run began to resume it, {before!r}, got {now!r}")
    if old["fingerprint"] != new["fingerprint"]:
        raise ValueError(
            f"data must be the same as when the run began to resume it, {old['data']['source']!r}, "
            f"got others from {new['data']['source']!r}"
        )
