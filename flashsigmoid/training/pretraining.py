"""Pretraining an encoder on images without their labels: what its methods share, and `pretrain`.

The losses are contrastive.py's and masked.py's. Labels serve to judge the features, never to learn them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from lightly.utils.benchmarking.knn import knn_predict
from torch import Tensor, nn
from torch.nn import functional as F

from ..distributed.plans import parallelize_data
from ..record import RecordWriter
from .augment import normalised
from .classification import ImageBatch, ImageModule, VisionRun
from .images import ImageData, load_images
from .module import Feed, Metric, Options, Prepared, train_run
from .part import NO_LABEL, Part, agree_on_skipped, part_of, val_shares, what_is_left
from .transfer import ENCODER

_CHUNK = 256  # features whose neighbours are sought at once
_KNN_TEMPERATURE = 0.1  # of the neighbours' weights, exp(cosine / temperature), as in arXiv:1805.01978


@dataclass(frozen=True, kw_only=True)
class PretrainingRun(VisionRun):
    """What every pretraining on images is described by; the method is a subclass's, and model.num_classes 0.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    knn_k: int = 20  # nearest neighbours of a validation image
    knn_images: int = 8192  # training images, at most, among which they are sought

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.num_classes != 0:
            raise ValueError(f"model.num_classes must be 0 in a pretraining, got {self.model.num_classes}")
        for name in ("knn_images", "knn_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def module(self, data: ImageData) -> PretrainingModule:
        """What Lightning drives."""
        raise NotImplementedError

    def train(self, out_dir: Path, **options: Any) -> dict[str, float]:
        """`pretrain`."""
        return pretrain(self, out_dir, **options)


class Parts(nn.Module):
    """What is trained together, by name. Whatever uses any of it is called through it, `parts(function, *inputs)`:

    on a mesh weights outside of blocks are whole within that call alone.
    """

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs)."""
        return function(*inputs)


class PretrainingModule(ImageModule):
    """An encoder and what is trained with it; a subclass has the loss.

    On a mesh along dp each rank has its images of every batch, in a validation too, and the mean over ranks is the loss
    of one process: draws are for all images, by all ranks alike, and a BatchNorm has the mean and variance of all.

    A validation has the loss on the validation images, with the same draws each time, and what the features of the
    encoder are worth: the accuracy of their nearest neighbours among training images, by cosine, and their spread.

    Args:
        run: the description.
        data: what is read.
        encoder: a Vision Transformer without a head.
        parts: trained beside it, by name.
    """

    def __init__(self, run: PretrainingRun, data: ImageData, encoder: nn.Module, **parts: nn.Module) -> None:
        super().__init__(run, data, Parts(**{ENCODER: encoder, **parts}))
        self._loss = (0.0, 0)  # sum over the validation images, and their number
        self._features: tuple[list[Tensor], list[Tensor]] = ([], [])  # of training and validation images
        self._labels: tuple[list[Tensor], list[Tensor]] = ([], [])

    def part(self, name: str) -> nn.Module:
        """One of what is trained."""
        return self.model.get_submodule(name)

    @property
    def encoder(self) -> nn.Module:
        """The Vision Transformer: images (batch, channels, size, size) into features (batch, dim)."""
        return self.part(ENCODER)

    def batch_loss(self, batch: ImageBatch) -> Tensor:
        """Mean loss of a training batch."""
        self._part = self.share(batch)
        return self.loss_of(batch, self._part)

    def loss_of(self, batch: ImageBatch, part: Part) -> Tensor:
        """Mean loss of a batch, of training or validation, of which this rank has a part: a scalar, float32."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Lightning's hook: over the mesh, where there is one."""
        if (mesh := self.device_mesh) is None:
            return
        for model in (self.model, *self.beside.values()):
            self.share_whole(model)
            parallelize_data(model, mesh, trains=model is self.model, compiled=self.compiled_blocks)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """On a mesh: for calls of the encoder alone."""
        model: Any = self.model
        if self.mesh is not None:
            model.unshard()
        yield
        if self.mesh is not None:
            model.reshard()

    def probed(self) -> Iterator[tuple[str, float]]:
        """As of every training on images."""
        with self._whole():
            yield from super().probed()

    def snapshot(self, writer: RecordWriter, step: int) -> None:
        """As of every training on images."""
        with self._whole():
            super().snapshot(writer, step)

    def finish(self, writer: RecordWriter) -> None:
        """As of every training on images."""
        with self._whole():
            super().finish(writer)

    def val_dataloader(self) -> list[Feed]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Training images without augmentation, evenly spaced, then the validation images."""
        data: Any = self.data
        count, bank = len(data.train), min(self.run.knn_images, len(data.train))
        numbers = [i * count // bank for i in range(bank)]
        return [self._judged(data.train, numbers), self._judged(data.val, range(len(data.val)))]

    def _judged(self, dataset: Any, numbers: Sequence[int]) -> Feed:
        """Batches of these images, on a mesh of each this rank's part, or a spare image without a label."""
        shares, is_spare = val_shares(numbers, self.run.batch, *self.place)
        loader = self._loader(dataset, batches=shares)
        spare = self.nothing, torch.tensor([NO_LABEL])

        def batches() -> Iterator[ImageBatch]:
            for number, (images, labels) in what_is_left(self, loader, dataset, spare):
                is_last = is_spare and number == len(shares)
                yield ImageBatch(images, torch.full_like(labels, NO_LABEL) if is_last else labels, {})

        return Feed(batches)

    def on_validation_epoch_start(self) -> None:
        """Start anew."""
        self._loss = (0.0, 0)
        self._features, self._labels = ([], []), ([], [])

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int) -> None:
        """Keep the features of a batch; add its loss if it is of the validation images."""
        self._part = part = self._judged_part(batch.labels)
        features = self.model(self.encoder, normalised(batch.images, self.data.mean, self.data.std))
        self._features[dataloader_idx].append(part.whole(F.normalize(features.float())))
        self._labels[dataloader_idx].append(part.whole(batch.labels))
        if dataloader_idx == 1:
            total, count = self._loss
            with _draws_of(batch_idx, self.device):
                total += float(self.loss_of(batch, part)) * part.total / self.place[1]
            self._loss = total, count + part.total

    def _judged_part(self, labels: Tensor) -> Part:
        """The part of a validation batch that has these labels."""
        if self.mesh is None:
            return Part(0, len(labels), len(labels))
        is_spare = bool(labels[0] == NO_LABEL)
        part = part_of(len(labels), self.of_all(0 if is_spare else len(labels)), self.mesh["dp"])
        return replace(part, start=part.total - 1, spare=True) if is_spare else part

    def validated(self) -> Iterator[Metric]:
        """Accuracy of the nearest neighbours with its standard error, loss, and spread of the features.

        The spread is the mean deviation of a coordinate of the features, which have length 1, over that of directions
        drawn uniformly: 0 is a collapse to one direction.
        """
        (bank, features), (known, labels) = ((torch.cat(x) for x in pair) for pair in (self._features, self._labels))
        k, classes = min(self.run.knn_k, len(bank)), len(self.data.classes)
        right = sum(
            int((knn_predict(x, bank.T, known, classes, k, _KNN_TEMPERATURE)[:, 0] == y).sum())
            for x, y in zip(features.split(_CHUNK), labels.split(_CHUNK), strict=True)
        )
        accuracy, total, count = right / len(labels), sum(self.of_all(self._loss[0])), self._loss[1]
        yield "val/knn_accuracy", accuracy, ""
        yield "val/knn_accuracy_se", math.sqrt(accuracy * (1.0 - accuracy) / len(labels)), ""
        yield "val/loss", total / count, self.loss_unit
        yield "val/feature_spread", float(features.std(0, correction=0).mean()) * math.sqrt(features.shape[1]), ""
        self._features, self._labels = ([], []), ([], [])

    def baselines(self) -> Iterator[Metric]:
        """What the most frequent class alone gets, of the images that were not left out."""
        agree_on_skipped(self)
        yield "baseline/majority", self.data.majority, ""


def pretrain(run: PretrainingRun, out_dir: str | Path, **options: Unpack[Options]) -> dict[str, float]:
    """Pretrain an encoder; everything it leaves is in `out_dir`: records.jsonl, checkpoints/, tb/.

    The weights of the encoder are those of model.safetensors whose names begin with "encoder."; `ImageRun.init` takes
    them. Interrupted and resumed as `language.train`, to the same bits on the CPU.

    Args:
        run: what to train.
        out_dir, options: as `language.train`.

    Returns:
        The last validation and the baseline: "val/knn_accuracy", "val/knn_accuracy_se", "val/loss",
        "val/feature_spread", "baseline/majority".

    Raises:
        FileNotFoundError: there is no data where it should be.
        ValueError: bad data; a model that does not fit it; a run in `out_dir` already; resuming with another
            description or other data.
        Interrupted: a signal, or max_minutes, ended it.
    """

    def prepare(start: Path | None) -> Prepared:
        data = load_images(run.data)
        return Prepared(lambda: run.module(data), data.fingerprint)

    final = ("val/knn_accuracy", "val/knn_accuracy_se", "val/loss", "val/feature_spread", "baseline/majority")
    return train_run(run, out_dir, prepare, final, **options)


@contextmanager
def _draws_of(seed: int, device: torch.device) -> Iterator[None]:
    """Random draws of their own: the same in every validation, and none of the training's."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
