"""The encoder that another training on images left, for a new one to begin with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor, nn

from ..distributed.checkpoint import MANIFEST, sha256_of
from .checkpoint import WEIGHTS, find_checkpoint, load_config, load_weights
from .run import FREE

if TYPE_CHECKING:
    from ..models.vision import ViTConfig

ENCODER = "encoder"  # name of the Vision Transformer among what a pretraining trains
_HEAD = "head."
_OWN = {"num_classes", "drop_path", "pretrained"}  # fields of a model that may differ from the encoder's


@dataclass(frozen=True)
class Initial:
    """Weights of an encoder and where they come from: made by `load_encoder`."""

    weights: dict[str, Tensor]  # without those of a head
    path: Path  # of the checkpoint
    origin: str  # recipe, checkpoint and a digest of the description; the same for both arms and for all seeds
    sha256: str  # of the file of the weights, or of the manifest of their shards

    def load_into(self, model: nn.Module) -> None:
        """Replace all of the model's weights but those of its head.

        Raises:
            ValueError: one is missing, too many or of another shape.
        """
        wanted = {name for name in model.state_dict() if not name.startswith(_HEAD)}
        differing = sorted(wanted ^ self.weights.keys())
        if differing:
            raise ValueError(f"init must hold this encoder's weights and no others, got {self.path}: {differing[0]}")
        try:
            model.load_state_dict(self.weights, strict=False)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"init must hold this encoder's weights, got {self.path}: {reason}") from error


def load_encoder(path: str | Path, config: ViTConfig) -> Initial:
    """The encoder of a pretraining, or of a classifier, that has this shape.

    Args:
        path: a checkpoint, or a run: its newest checkpoint.
        config: what the encoder must be, but for its head, stochastic depth and timm's weights.

    Raises:
        ValueError: there is none, it is damaged, or a field of its model is another: attention above all.
    """
    path = find_checkpoint(path)
    sections = load_config(path)
    model = sections.get("model", {})
    if "patch_size" not in model:
        raise ValueError(f"init must be a training on images, got {path}")
    if activation := sections["run"].get("activation"):
        raise ValueError(f"init must be of sigmoid or softmax attention, got {path}: {activation}")
    for name, value in asdict(config).items():
        if name not in _OWN and model.get(name) != value:
            raise ValueError(f"model.{name} must be that of the encoder in {path}, {model.get(name)!r}, got {value!r}")
    try:
        weights = load_weights(path)
    except SafetensorError as error:
        raise ValueError(f"init must be a whole checkpoint, got {path}: {error}") from error
    prefix = f"{ENCODER}."
    if any(name.startswith(prefix) for name in weights):
        weights = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
    else:
        weights = {name: x for name, x in weights.items() if not name.startswith(_HEAD)}
    digest = sha256_of(path / (WEIGHTS if (path / WEIGHTS).is_file() else MANIFEST))
    return Initial(weights, path, f"{sections['run']['name']} {path.name} {_description(sections)}", digest)


def _description(sections: dict[str, Any]) -> str:
    """Eight digits that differ between trainings which are not two seeds or two arms of one another."""
    fields = {
        f"{section}.{name}": value
        for section, values in sections.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }
    ignored = {*FREE, "model.attention", "run.seed"}
    told = json.dumps({name: value for name, value in sorted(fields.items()) if name not in ignored})
    return hashlib.sha256(told.encode()).hexdigest()[:8]
