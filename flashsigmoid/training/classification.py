"""Training on images: `ImageModule`, whatever is learned; and a classifier's description, module and training.

Steps, optimizer and resume are module.py's, learning without labels is pretraining.py's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from ..distributed.plans import parallelize_data
from ..distributed.processes import MeshSizes
from ..functional import explain
from ..models.vision import VisionAttention, ViTConfig, build_vit, initial_bias, layer_groups, share_drop_path, tokens
from ..record import RecordWriter
from .attention_maps import write_attention_maps, write_image_snapshot
from .augment import Augment, AugmentConfig, normalised
from .images import ImageConfig, ImageData, collate, load_images
from .module import Feed, Metric, Options, Prepared, RunModule, train_run
from .optim import adamw
from .part import (
    NO_LABEL,
    Order,
    Part,
    agree_on_skipped,
    check_data_parallel,
    first_left,
    here,
    part_of,
    share_batch_norm,
    val_numbers,
    what_is_left,
)
from .run import Run, check_cuda_graphs, check_snapshots
from .snapshots import is_due
from .transfer import Initial, load_encoder


@dataclass(frozen=True, kw_only=True)
class VisionRun(Run):
    """What every training on images is described by; what is learned is a subclass's.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    model: ViTConfig
    data: ImageConfig = field(default_factory=ImageConfig)
    workers: int = 0  # processes that read images; 0: this one
    attention_snapshots: int = 6  # of the weights for a validation image, spread over the validations; 0: none
    compile: bool = False  # torch.compile what trains: some minutes at most, then faster steps
    cuda_graphs: bool = False  # of what is compiled: a step of a small model no longer waits for Python

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cuda_graphs(self.cuda_graphs, self.compile, self.accumulate)
        check_snapshots(self.attention_snapshots)
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")

    def settings(self) -> dict[str, Any]:
        """The description in one flat dict for the records; sigmoid_bias is the number that is used, or begun with."""
        return {**super().settings(), "sigmoid_bias": initial_bias(self.model)}


@dataclass(frozen=True, kw_only=True)
class ImageRun(VisionRun):
    """A complete description of one supervised training on images: on the same machine with the same versions it gives
    the same model.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    label_smoothing: float = 0.0  # share of the target that all classes have alike, in [0, 1)
    ema: float = 0.0  # decay of an average of the weights, which is what is validated; 0: none
    init: str | None = None  # a run, or a checkpoint, whose encoder it begins with; None: random weights
    train_only: Literal["all", "head"] = "all"  # "head": a linear probe, the encoder stays as it is
    head_norm: bool = False  # BatchNorm without parameters before the head, as MAE's linear probe has
    layer_decay: float = 1.0  # of the learning rate from a block to the one before it, in (0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_only not in ("all", "head"):
            raise ValueError(f"train_only must be 'all' or 'head', got {self.train_only!r}")
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}")
        if self.train_only == "head" and self.layer_decay != 1.0:
            raise ValueError(f"layer_decay must be 1 with train_only='head', got {self.layer_decay}")
        if self.init is not None and self.model.pretrained:
            raise ValueError(f"init must be None with timm's weights, model.pretrained, got {self.init!r}")
        for name in ("label_smoothing", "ema"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def build(self) -> torch.nn.Module:
        """The model to train; a study's run that injects another attention builds its own."""
        return build_vit(self.model)

    def train(self, out_dir: Path, **options: Any) -> dict[str, float]:
        """`train_classifier`."""
        return train_classifier(self, out_dir, **options)


class ImageBatch(NamedTuple):
    """Images (batch, channels, size, size) uint8, labels (batch,), and where the data stand after them."""

    images: Tensor
    labels: Tensor
    position: dict[str, Any]
    spare: bool = False  # of one image that counts nowhere, where a rank has none


class ImageModule(RunModule):
    """What is trained on images, with the position of its data; a subclass has the loss.

    Args:
        run: the description.
        data: what is read.
        model: what is trained: a Vision Transformer, or what has one as `encoder`.

    Raises:
        ValueError: the model has another number of channels, or is for another size of images, than the data.
    """

    read_per_sample = ("images_per_s", 1)

    def __init__(self, run: VisionRun, data: ImageData, model: nn.Module) -> None:
        if run.model.in_chans != data.in_chans:
            raise ValueError(f"model.in_chans must be that of the data, {data.in_chans}, got {run.model.in_chans}")
        super().__init__(run, model)
        size = cast(Any, self.encoder).patch_embed.img_size
        if size != (data.img_size, data.img_size):
            raise ValueError(f"model.img_size must be that of the data, {data.img_size}, got {size[0]}")
        self.data = data
        self._part = Part(0, run.batch, run.batch)  # of the current micro-batch

    def check_mesh(self, sizes: MeshSizes) -> None:
        """Whether it can be trained on a mesh.

        Raises:
            ValueError: as `check_data_parallel`.
        """
        check_data_parallel(self.run, sizes)

    def share_whole(self, model: nn.Module) -> None:
        """On a mesh: stochastic depth draws for all images of a micro-batch, and BatchNorm is of all."""
        if self.mesh is not None:
            share_drop_path(model, lambda: (self._part.start, self._part.count, self._part.total))
            share_batch_norm(model, lambda: self._part)

    @property
    def encoder(self) -> nn.Module:
        """The Vision Transformer."""
        return self.model

    def kernel(self) -> str | None:
        """What computes the attention of all tokens: "sdpa" of torch, or our backend and, if another, its backward's;
        None where a function was given.
        """
        layer = next(module for module in self.encoder.modules() if isinstance(module, VisionAttention))
        if layer.attention_fn is not None:
            return None
        if layer.kind == "softmax":
            return "sdpa"
        like: Any = {"dtype": torch.bfloat16 if self.run.precision == "bf16" else torch.float32, "device": self.device}
        shape, heads = (self.run.batch, tokens(cast(Any, self.encoder))), (layer.num_heads, layer.nheads_k)
        q, k = (torch.empty(*shape, nheads, layer.head_dim, **like) for nheads in heads)
        b = layer.sigmoid_bias
        if isinstance(b, Tensor):  # on a mesh a shard, and of one element no scalar
            b = torch.empty(() if b.numel() == 1 else layer.num_heads, device=self.device)
        return explain(q, k, k, sigmoid_bias=b, scale=layer.scale, dropout_p=layer.attn_drop.p).both

    def compiled(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function of tensors, compiled for training if the run asks for it; on a mesh blocks are, and not this.

        Validations take it as it is: at their batches, and in their mode, it would be compiled again.
        """
        if not self.run.compile:
            return function
        fast = torch.compile(function, dynamic=False, mode="reduce-overhead" if self.run.cuda_graphs else None)
        return lambda *tensors: (fast if self.training and self.mesh is None else function)(*tensors)

    @property
    def compiled_blocks(self) -> Callable[[], bool] | None:
        """Of `parallelize_data`: when blocks are compiled."""
        return (lambda: self.training) if self.run.compile else None

    def train_dataloader(self) -> Feed:
        """Training batches without an end; where they begin is read when they do, after a checkpoint is restored."""
        return Feed(self._train_batches)

    def _train_batches(self) -> Iterator[ImageBatch]:
        start = 0 if self.position is None else self.position["sample"]
        loader = self._loader(self.data.train, batches=Order(self.run, self.data.train, start, *self.place))
        spare = self.nothing, torch.tensor([0])  # a label that can be mixed
        for number, batch in what_is_left(self, loader, self.data.train, spare):
            images, labels = batch
            yield ImageBatch(images, labels, {"sample": start + number * self.run.batch}, spare=batch is spare)

    def val_dataloader(self) -> Feed:
        """The validation images, on a mesh this rank's."""
        rank, ranks = self.place
        count, data = len(self.data.val), self.data  # pyright: ignore[reportArgumentType]
        mine, further = val_numbers(count, self.run.batch // ranks, rank, ranks)
        loader = self._loader(data.val, None if ranks == 1 else mine)
        spare = self.nothing, torch.tensor([NO_LABEL])

        def batches() -> Iterator[ImageBatch]:
            for _, (images, labels) in what_is_left(self, itertools.chain(loader, [spare] * further), data.val, spare):
                yield ImageBatch(images, labels, {})

        return Feed(batches)

    @property
    def nothing(self) -> Tensor:
        """An image of zeros."""
        return torch.zeros(1, self.data.in_chans, self.data.img_size, self.data.img_size, dtype=torch.uint8)

    def share(self, batch: ImageBatch) -> Part:
        """Of the micro-batch of which this rank has a batch."""
        mesh, ranks, count = self.mesh, self.place[1], 0 if batch.spare else len(batch.labels)
        # where images are left out a rank does not know how many the others have
        counts = self.of_all(count) if self.run.data.on_corrupt == "skip" else [count] * ranks
        return part_of(count, counts, None if mesh is None else mesh["dp"])

    def _loader(self, dataset: Any, order: Any = None, batches: Any = None) -> DataLoader:
        """Batches of an order of the images, all of them by default, or batches that are given as numbers of images."""
        return DataLoader(
            dataset,
            batch_size=1 if batches else self.run.batch // self.place[1],
            sampler=order,
            batch_sampler=batches,
            num_workers=self.run.workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.run.seed),  # else a draw of the training's
        )

    def transfer_batch_to_device(self, batch: ImageBatch, device: torch.device, dataloader_idx: int) -> ImageBatch:
        """Lightning's hook: only images and labels move."""
        images, labels = (x.to(device, non_blocking=True) for x in batch[:2])
        return batch._replace(images=images, labels=labels)

    def probed(self) -> Iterator[tuple[str, float]]:
        """Mean norm of A v of a token, before the output projection, of each block, on a batch of validation images."""
        norms: list[float] = []
        attentions = [module for module in self.encoder.modules() if isinstance(module, VisionAttention)]
        hooks = [
            attention.proj.register_forward_pre_hook(lambda _, args: norms.append(float(args[0].norm(dim=-1).mean())))
            for attention in attentions
        ]
        try:
            images = torch.stack([image for image, _ in first_left(self.data.val, min(self.run.batch, 64))])
            with torch.no_grad():
                self.encoder(normalised(images.to(self.device), self.data.mean, self.data.std))
        finally:
            for hook in hooks:
                hook.remove()
        yield from ((f"attn_norm/layer_{i}", norm) for i, norm in enumerate(norms))

    @property
    def shown(self) -> nn.Module:
        """The Vision Transformer whose attention is drawn at the end."""
        return self.encoder

    def snapshot(self, writer: RecordWriter, step: int) -> None:
        """Attention weights on a validation image."""
        if is_due(self.run, self.run.attention_snapshots, step):
            write_image_snapshot(writer, self.shown, self.data, step=step)

    def finish(self, writer: RecordWriter) -> None:
        """How many files were left out, and where the model looks in a few validation images."""
        agree_on_skipped(self)
        writer.write("data/skipped", sum(map(len, self.data.skipped)), unit="files", step=self.run.steps)
        write_attention_maps(writer, self.shown, self.data, step=self.run.steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add which files were left out."""
        super().on_save_checkpoint(checkpoint)
        agree_on_skipped(self)
        checkpoint["flashsigmoid"]["skipped"] = self.data.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back, of a checkpoint that has it."""
        super().on_load_checkpoint(checkpoint)
        self.data.skip(checkpoint["flashsigmoid"].get("skipped", [[], []]))


class ClassificationModule(ImageModule):
    """A Vision Transformer with its loss: what Lightning drives.

        loss = mean over images of -sum over classes of target * log softmax(logits)       nats per image

    On a mesh along dp each rank has its images of every micro-batch, and the mean over ranks is the loss of one
    process: what augmentation and stochastic depth draw is drawn for all images, by all ranks alike.

    Args:
        run: the description.
        data: what is read.
        initial: weights of the encoder. Default: random ones, or timm's.

    Raises:
        ValueError: the model has another number of classes or channels than the data, or there is one class; weights of
            another model.
    """

    loss_unit = "nats_per_image"

    def __init__(self, run: ImageRun, data: ImageData, initial: Initial | None = None) -> None:
        if run.model.num_classes != len(data.classes):
            raise ValueError(
                f"model.num_classes must be that of the data, {len(data.classes)}, got {run.model.num_classes}"
            )
        if len(data.classes) < 2:
            raise ValueError(f"data must have at least two classes to tell apart, got {', '.join(data.classes)} alone")
        model: Any = run.build()
        if initial is not None:
            initial.load_into(model)
        if run.head_norm:
            model.head = nn.Sequential(nn.BatchNorm1d(model.num_features, affine=False), model.head)
        if run.train_only == "head":
            model.requires_grad_(False)
            model.head.requires_grad_(True)
        super().__init__(run, data, model)
        self.augment = Augment(run.augment, data.mean, data.std, len(data.classes))
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(run.ema)) if run.ema else None
        self._logits = self.compiled(model.__call__)
        self._val = (0.0, 0, 0)  # nats, right answers, images

    def train(self, mode: bool = True) -> Self:
        """Lightning's and torch's switch; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.run.train_only == "head":
            self.model.eval()
            cast(Any, self.model).head.train(mode)
        return self

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, with a learning rate of every layer where layer_decay asks for it."""
        run = self.run
        if run.layer_decay == 1.0:
            return super().configure_optimizers()
        model, decay = cast(Any, self.model), run.optim.weight_decay
        return adamw(model, run.optim, layer_groups(model, weight_decay=decay, layer_decay=run.layer_decay))

    def batch_loss(self, batch: ImageBatch) -> Tensor:
        """Mean loss of a batch after its augmentation."""
        self._part = part = self.share(batch)
        x, targets = self.augment(batch.images, batch.labels, part)
        loss = F.cross_entropy(self._logits(x).float(), targets, label_smoothing=self.run.label_smoothing)
        return loss if part.weight == 1.0 else part.weight * loss

    def configure_model(self) -> None:
        """Lightning's hook: over the mesh, where there is one."""
        if (mesh := self.device_mesh) is None:
            return
        model: Any = self.model
        self.share_whole(model)
        parallelize_data(model, mesh, compiled=self.compiled_blocks)
        if self.average is not None:
            parallelize_data(self.average.module, mesh, trains=False)

    @property
    def beside(self) -> Mapping[str, nn.Module]:
        """The average of the weights."""
        return {} if self.average is None else {"average": self.average}

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """Lightning's hook: the average of the weights follows each step."""
        is_first = self.trainer.global_step == 0
        super().optimizer_step(*args, **options)
        if self.average is not None:
            self.follow(self.average, is_first)

    @torch.no_grad()
    def follow(self, average: AveragedModel, is_first: bool) -> None:
        """What `average.update_parameters` does, which reads a count on the device and so waits for it twice a step."""
        weights, averages = ([*map(here, model.parameters())] for model in (self.model, average.module))
        get_ema_multi_avg_fn(0.0 if is_first else self.run.ema)(averages, weights, 0)
        for buffer, ours in zip(average.module.buffers(), self.model.buffers(), strict=True):
            buffer.copy_(ours)
        average.n_averaged += 1

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self._val = (0.0, 0, 0)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Add a batch to the sums."""
        logits = self.judged(normalised(batch.images, self.data.mean, self.data.std)).float()
        nats, right, count = self._val
        nats += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
        right += int((logits.argmax(-1) == batch.labels).sum())
        self._val = nats, right, count + int((batch.labels != NO_LABEL).sum())

    @property
    def judged(self) -> torch.nn.Module:
        """What is validated: the model, or the average of its weights."""
        return self.model if self.average is None else self.average

    @property
    def shown(self) -> nn.Module:
        """What is validated, as a Vision Transformer."""
        return self.model if self.average is None else self.average.module

    def validated(self) -> Iterator[Metric]:
        """Share of right answers, with its standard error, and loss."""
        nats, right, count = (sum(of_rank) for of_rank in zip(*self.of_all(self._val), strict=True))
        accuracy = right / count
        yield "val/accuracy", accuracy, ""
        yield "val/accuracy_se", math.sqrt(accuracy * (1.0 - accuracy) / count), ""
        yield "val/loss", nats / count, "nats_per_image"

    def baselines(self) -> Iterator[Metric]:
        """What the most frequent class alone gets, of the images that were not left out."""
        agree_on_skipped(self)
        yield "baseline/majority", self.data.majority, ""


def train_classifier(run: ImageRun, out_dir: str | Path, **options: Unpack[Options]) -> dict[str, float]:
    """Train an image classifier; everything it leaves is in `out_dir`: records.jsonl, checkpoints/, tb/.

    On the CPU a run that was killed and resumed, however often, ends with the same bits as one that was not. Ctrl-C or
    SIGTERM finishes the step, saves a checkpoint, prints one line and raises `Interrupted`. The random states of
    python, numpy and torch are set.

    Args:
        run: what to train.
        out_dir, options: as `language.train`.

    Returns:
        The last validation and the baseline: "val/accuracy", "val/accuracy_se", "val/loss", "baseline/majority".

    Raises:
        FileNotFoundError: there is no data where it should be.
        ValueError: bad data; a model that does not fit it, or the encoder at run.init; a run in `out_dir` already;
            resuming with another description or other data.
        Interrupted: a signal, or max_minutes, ended it.
    """

    def prepare(start: Path | None) -> Prepared:
        data = load_images(run.data)
        # a checkpoint holds the weights: what the run began with may be gone by then
        initial = load_encoder(run.init, run.model) if run.init is not None and start is None else None
        return Prepared(lambda: ClassificationModule(run, data, initial), data.fingerprint, initial=initial)

    final = ("val/accuracy", "val/accuracy_se", "val/loss", "baseline/majority")
    return train_run(run, out_dir, prepare, final, **options)
