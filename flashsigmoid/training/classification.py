"""Training an image classifier: its description, its module, and `train_classifier`. The rest is module.py's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from ..models.vision import VisionAttention, ViTConfig, build_vit, tokens
from ..record import RECORDS_NAME, RecordWriter, read_records
from .attention_maps import write_attention_maps
from .augment import Augment, AugmentConfig, normalised
from .callbacks import Show, show_line
from .data import shuffled
from .images import ImageConfig, ImageData, collate, load_images
from .module import Feed, Metric, RunModule, fit, resumed_from
from .run import Run


@dataclass(frozen=True, kw_only=True)
class ImageRun(Run):
    """A complete description of one supervised training on images: on the same machine with the same versions it gives
    the same model.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    model: ViTConfig
    data: ImageConfig = field(default_factory=ImageConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    label_smoothing: float = 0.0  # share of the target that all classes have alike, in [0, 1)
    ema: float = 0.0  # decay of an average of the weights, which is what is validated; 0: none
    workers: int = 0  # processes that read images; 0: this one

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("label_smoothing", "ema"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")

    def build(self) -> torch.nn.Module:
        """The model to train; a study's run that injects another attention builds its own."""
        return build_vit(self.model)

    def settings(self) -> dict[str, Any]:
        """The description in one flat dict for the records; sigmoid_bias is the number that is used, or begun with."""
        b = self.model.sigmoid_bias
        if b is None:
            with torch.device("meta"):
                b = -math.log(tokens(build_vit(replace(self.model, pretrained=False))))
        return {**super().settings(), "sigmoid_bias": b}


class ImageBatch(NamedTuple):
    """Images (batch, channels, size, size) uint8, labels (batch,), and where the data stand after them."""

    images: Tensor
    labels: Tensor
    position: dict[str, Any]


class ClassificationModule(RunModule):
    """A Vision Transformer with its loss: what Lightning drives.

        loss = mean over images of -sum over classes of target * log softmax(logits)       nats per image

    Args:
        run: the description.
        data: what is read.

    Raises:
        ValueError: the model has another number of classes or channels than the data.
    """

    loss_unit = "nats_per_image"
    read_per_sample = ("images_per_s", 1)

    def __init__(self, run: ImageRun, data: ImageData) -> None:
        for name, has, needs in (
            ("num_classes", run.model.num_classes, len(data.classes)),
            ("in_chans", run.model.in_chans, data.in_chans),
        ):
            if has != needs:
                raise ValueError(f"model.{name} must be that of the data, {needs}, got {has}")
        super().__init__(run, run.build())
        self.data = data
        self.augment = Augment(run.augment, data.mean, data.std, len(data.classes))
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(run.ema)) if run.ema else None
        self._val = (0.0, 0, 0)  # nats, right answers, images

    def batch_loss(self, batch: ImageBatch) -> Tensor:
        """Mean loss of a batch after its augmentation."""
        x, targets = self.augment(batch.images, batch.labels)
        return F.cross_entropy(self.model(x).float(), targets, label_smoothing=self.run.label_smoothing)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """Lightning's hook: the average of the weights follows each step."""
        super().optimizer_step(*args, **options)
        if self.average is not None:
            self.average.update_parameters(self.model)

    def train_dataloader(self) -> Feed:
        """Training batches without an end; where they begin is read when they do, after a checkpoint is restored."""
        return Feed(self._train_batches)

    def _train_batches(self) -> Iterator[ImageBatch]:
        start = 0 if self.position is None else self.position["sample"]
        for number, (images, labels) in enumerate(self._loader(self.data.train, _Order(self.run, self.data, start)), 1):
            yield ImageBatch(images, labels, {"sample": start + number * self.run.batch})

    def val_dataloader(self) -> Feed:
        """The validation images."""
        loader = self._loader(self.data.val, None)
        return Feed(lambda: (ImageBatch(images, labels, {}) for images, labels in loader))

    def _loader(self, dataset: Any, order: Any) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.run.batch,
            sampler=order,
            num_workers=self.run.workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.run.seed),  # else a draw of the training's
        )

    def transfer_batch_to_device(self, batch: ImageBatch, device: torch.device, dataloader_idx: int) -> ImageBatch:
        """Lightning's hook: only images and labels move."""
        images, labels = (x.to(device, non_blocking=True) for x in batch[:2])
        return ImageBatch(images, labels, batch.position)

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self._val = (0.0, 0, 0)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Add a batch to the sums."""
        logits = self.judged(normalised(batch.images, self.data.mean, self.data.std)).float()
        nats, right, count = self._val
        nats += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
        right += int((logits.argmax(-1) == batch.labels).sum())
        self._val = nats, right, count + len(batch.labels)

    @property
    def judged(self) -> torch.nn.Module:
        """What is validated: the model, or the average of its weights."""
        return self.model if self.average is None else self.average

    def validated(self) -> Iterator[Metric]:
        """Share of right answers, with its standard error, and loss."""
        nats, right, count = self._val
        accuracy = right / count
        yield "val/accuracy", accuracy, ""
        yield "val/accuracy_se", math.sqrt(accuracy * (1.0 - accuracy) / count), ""
        yield "val/loss", nats / count, "nats_per_image"

    def baselines(self) -> Iterator[Metric]:
        """What the most frequent class alone gets."""
        yield "baseline/majority", self.data.majority, ""

    def probed(self) -> Iterator[tuple[str, float]]:
        """Mean norm of A v of a token, before the output projection, of each block, on a batch of validation images."""
        norms: list[float] = []
        attentions = [module for module in self.model.modules() if isinstance(module, VisionAttention)]
        hooks = [
            attention.proj.register_forward_pre_hook(lambda _, args: norms.append(float(args[0].norm(dim=-1).mean())))
            for attention in attentions
        ]
        try:
            val: Any = self.data.val
            images, _ = collate([val[i] for i in range(min(self.run.batch, len(val), 64))])
            with torch.no_grad():
                self.model(normalised(images.to(self.device), self.data.mean, self.data.std))
        finally:
            for hook in hooks:
                hook.remove()
        yield from ((f"attn_norm/layer_{i}", norm) for i, norm in enumerate(norms))

    def finish(self, writer: RecordWriter) -> None:
        """How many files were left out, and where the model looks in a few validation images."""
        writer.write("data/skipped", sum(map(len, self.data.skipped)), unit="files", step=self.run.steps)
        judged = self.model if self.average is None else self.average.module
        write_attention_maps(writer, judged, self.data, step=self.run.steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add which files were left out."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["flashsigmoid"]["skipped"] = self.data.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back, of a checkpoint that has it."""
        super().on_load_checkpoint(checkpoint)
        self.data.skip(checkpoint["flashsigmoid"].get("skipped", [[], []]))


class _Order:
    """Numbers of training images without an end, shuffled anew in every epoch: a function of (seed, position) only."""

    def __init__(self, run: ImageRun, data: ImageData, start: int) -> None:
        self.seed, self.count, self.start = run.seed, len(data.train), start  # pyright: ignore[reportArgumentType]

    def __iter__(self) -> Iterator[int]:
        s = self.start
        while True:
            epoch, index = divmod(s, self.count)
            yield shuffled(index, self.count, seed=self.seed, epoch=epoch)
            s += 1


def train_classifier(
    run: ImageRun,
    out_dir: str | Path,
    *,
    resume: bool = False,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    show: Show = show_line,
    command: str | None = None,
) -> dict[str, float]:
    """Train an image classifier; everything it leaves is in `out_dir`: records.jsonl, checkpoints/, tb/.

    On the CPU a run that was killed and resumed, however often, ends with the same bits as one that was not. Ctrl-C or
    SIGTERM finishes the step, saves a checkpoint, prints one line and raises `Interrupted`. The random states of
    python, numpy and torch are set.

    Args:
        run: what to train.
        out_dir, resume, device, show, command: as `language.train`.

    Returns:
        The last validation and the baseline: "val/accuracy", "val/accuracy_se", "val/loss", "baseline/majority".

    Raises:
        FileNotFoundError: there is no data where it should be.
        ValueError: bad data; a model that does not fit it; a run in `out_dir` already; resuming with another
            description or other data.
        Interrupted: a signal ended it.
    """
    out_dir = Path(out_dir)
    start = resumed_from(out_dir, resume)
    data = load_images(run.data)
    fit(
        run,
        lambda: ClassificationModule(run, data),
        out_dir,
        start,
        fingerprint=data.fingerprint,
        device=device,
        show=show,
        command=command,
    )
    final = ("val/accuracy", "val/accuracy_se", "val/loss", "baseline/majority")
    return {
        r.name: r.value for r in read_records(out_dir / RECORDS_NAME).records if r.name in final and r.value is not None
    }
