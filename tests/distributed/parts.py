"""What a rank does in the tests of data parallel: train on few images, or utterances, with something wrong if asked."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from distributed.runs import stopped_at
from PIL import Image
from torch._dynamo.utils import counters

from flashsigmoid.models.speech import SpeechConfig
from flashsigmoid.models.vision import ViTConfig
from flashsigmoid.training import classification, contrastive, ctc, masked, module, part
from flashsigmoid.training.audio import AudioConfig, SpecAugmentConfig
from flashsigmoid.training.augment import Augment, AugmentConfig, Views, ViewsConfig
from flashsigmoid.training.callbacks import Interrupted
from flashsigmoid.training.classification import ImageRun
from flashsigmoid.training.contrastive import ContrastiveRun
from flashsigmoid.training.ctc import SpeechRun
from flashsigmoid.training.images import ImageConfig
from flashsigmoid.training.masked import MaskedRun
from flashsigmoid.training.optim import OptimConfig
from flashsigmoid.training.pretraining import PretrainingRun
from flashsigmoid.training.run import Run


def images(path: Path) -> Path:
    """40 images of 14 x 14 to train on, an epoch of two steps and a half, and 21 to validate."""
    draw = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name, count in (("train", 40), ("val", 21)):
        arrays[f"{name}_images"] = draw.integers(0, 256, (count, 14, 14, 3), np.uint8)
        arrays[f"{name}_labels"] = draw.permutation(np.arange(count) % 5)
    np.savez(path, **arrays)
    return path


def image_run(path: Path, **changes: Any) -> ImageRun:
    """Everything that is drawn, an average, micro-batches, a b of all heads that is learned."""
    sizes: dict[str, Any] = {"img_size": 14, "patch_size": 7, "dim": 16, "depth": 2, "nheads": 2}
    vit = ViTConfig(
        name="vit_tiny_patch16_224", num_classes=5, layer_scale=0.1, drop_path=0.3, bias_mode="learnable", **sizes
    )
    fields: dict[str, Any] = {
        "name": "few images",
        "model": vit,
        "data": ImageConfig(source="npz", root=str(path)),
        "augment": AugmentConfig(crop=(0.5, 1.0), flip=True, randaugment=2, mixup=0.8, cutmix=1.0),
        "optim": OptimConfig(lr=3e-3, warmup=2),
        "label_smoothing": 0.1,
        "ema": 0.9,
        "steps": 8,
        "batch": 8,
        "accumulate": 2,
        "val_every": 4,
        "save_every": 2,
        "log_every": 1,
        "attention_snapshots": 2,
    }
    return ImageRun(**(fields | changes))


def pictures(path: Path) -> Path:
    """40 images that differ in their colours, and 17 to validate, of which the last is alone in its batch."""
    draw = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name, count in (("train", 40), ("val", 17)):
        colours = draw.integers(20, 236, (count, 2, 2, 3)).repeat(7, 1).repeat(7, 2)
        arrays[f"{name}_images"] = (colours + draw.integers(-20, 20, (count, 14, 14, 3))).astype(np.uint8)
        arrays[f"{name}_labels"] = draw.permutation(np.arange(count) % 5)
    np.savez(path, **arrays)
    return path


def pretraining_run(path: Path, method: str, **changes: Any) -> PretrainingRun:
    """As `image_run`, without labels: "simclr", "byol" or "mae"."""
    like, is_masked = image_run(path), method == "mae"
    vit = replace(
        like.model, num_classes=0, patch_size=2 if is_masked else 7, pool="token" if is_masked else "avg",
        bias_mode="fixed" if is_masked else "learnable", layer_scale=1.0,
    )  # fmt: skip
    names = ("name", "data", "optim", "accumulate", "batch", "val_every", "save_every", "log_every")
    fields: dict[str, Any] = {name: getattr(like, name) for name in names}
    fields.update(model=vit, steps=8, attention_snapshots=2, knn_images=30, knn_k=5)
    if is_masked:
        fields.update(decoder_dim=16, decoder_depth=1, decoder_nheads=2)
        return MaskedRun(**(fields | changes))
    views = ViewsConfig(blur=(0.5, 0.1), solarize=(0.0, 0.2))
    fields.update(method=method, views=views, projection_hidden=24, projection_dim=8, momentum=0.9)
    return ContrastiveRun(**(fields | changes))


def calm() -> Any:
    """AdamW with an eps above all rounding.

    A bias before a BatchNorm has no gradient but rounding, of which AdamW makes whole steps, anywhere.
    """
    adamw = module.adamw

    def quiet(*args: Any) -> Any:
        optimizer = adamw(*args)
        for group in optimizer.param_groups:
            group["eps"] = 1e-3
        return optimizer

    return mock.patch.object(module, "adamw", quiet)


@contextmanager
def reordered(order: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Images of a batch, with all that is drawn for them, in another order: the same but for rounding."""
    views, augment, draw, judged = Views.forward, Augment.forward, masked._mask, masked.normalised

    def after(function: Any) -> Any:
        return lambda *args: tuple(order(x) for x in function(*args))

    with (
        mock.patch.object(Views, "forward", after(views)),
        mock.patch.object(Augment, "forward", after(augment)),
        mock.patch.object(masked, "_mask", after(draw)),
        mock.patch.object(masked, "normalised", lambda *args: order(judged(*args))),
    ):
        yield


def corrupt_folder(root: Path) -> Path:
    """The same as PNGs in a folder, of which four, in one class, are none."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 10)):
        for number in range(count):
            path = root / split / "ab"[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (14, 14, 3), np.uint8)).save(path)
    for number in (0, 4, 10, 16):
        (root / "train/a" / f"{number:02}.png").write_bytes(b"no image")
    (root / "val/b/03.png").write_bytes(b"none either")
    return root


def spoil(data: Any, run: ImageRun | PretrainingRun | SpeechRun) -> None:
    """Make of two ranks' parts the first's of micro-batch 1, the second's of 3 and both of 4 unreadable."""
    batches = reads(1, run, data, 5)
    half = run.batch // 2
    for number in (*batches[1][:half], *batches[3][half:], *batches[4]):
        files = data.train.utterances[number].path if isinstance(run, SpeechRun) else data.train.files[number][0]
        files.write_bytes(b"nothing")


def speech(folder: Path) -> Path:
    """20 utterances to train on, 13 to validate, of many lengths; the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, lines = np.random.default_rng(0), ["split\tpath\ttext"]
    for number in range(33):
        samples = 0.1 * draw.standard_normal(int(16_000 * draw.uniform(0.5, 1.2)))
        soundfile.write(folder / f"{number:02}.wav", samples, 16_000, subtype="PCM_16")
        text = "".join(draw.choice(list("ABC"), draw.integers(2, 6)))
        lines.append(f"{'train' if number < 20 else 'val'}\t{number:02}.wav\t{text}")
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.tsv"


def speech_run(manifest: Path, **changes: Any) -> SpeechRun:
    """SpecAugment, CAPE and micro-batches; no dropout, whose masks are a rank's own."""
    model = changes.pop("model", {})
    data = AudioConfig(source="manifest", root=str(manifest), mels=20, characters="ABC", on_corrupt="skip")
    fields: dict[str, Any] = {
        "name": "few utterances",
        "model": SpeechConfig(vocab_size=4, seqlen=30, nlayers=2, dim=16, nheads=2, mels=20, **model),
        "data": data,
        "augment": SpecAugmentConfig(),
        "optim": OptimConfig(lr=3e-3, warmup=2),
        "steps": 6,
        "batch": 4,
        "accumulate": 2,
        "val_every": 3,
        "save_every": 3,
        "log_every": 1,
    }
    return SpeechRun(**(fields | changes))


def train(port: int, run: Run, out_dir: Path, fault: str = "", **options: Any) -> dict[str, Any]:
    """Train as one rank of a crew: {"results" or "error", "err": what was printed to stderr, "graphs": compiled}."""
    os.environ["MASTER_PORT"] = str(port)
    err, answer = io.StringIO(), {}
    show = stopped_at(3) if fault == "SIGTERM" else lambda progress: None
    quiet = calm() if isinstance(run, PretrainingRun) else contextlib.nullcontext()
    with contextlib.redirect_stderr(err), planted(fault), quiet, warnings.catch_warnings():
        if cast(Any, run).compile:  # the compiler warns of its own doings
            warnings.simplefilter("ignore")
            torch._dynamo.reset()
        counters.clear()
        try:
            answer["results"] = run.train(out_dir, device="cpu", show=show, command="test", **options)
        except Interrupted as stop:
            answer["error"] = f"Interrupted {stop.code} {stop.step}"
        except (Exception, SystemExit) as error:
            answer["error"] = f"{type(error).__name__}: {error}"
    return {**answer, "err": err.getvalue(), "graphs": counters["stats"]["unique_graphs"]}


def as_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process be what a launcher started alone."""
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")


def before_rank(self: part.Part, x: torch.Tensor) -> torch.Tensor:
    """`Part.preceded`, of the rank before."""
    assert self.mesh is not None
    before = self.mesh.get_local_rank() - 1
    return torch.cat([part.unshard(x[-1:], self.mesh, dim=0, order="contiguous")[before:][:1], x])


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """Something that goes wrong, on rank 1 or on all."""
    patch: Any = contextlib.nullcontext()
    if os.environ.get("RANK") == "1":
        if fault == "others-part":  # it reads what rank 0 reads
            first = lambda run, data, start, *place: part.Order(run, data, start, 0, 2)  # noqa: E731
            patch = mock.patch.object(classification, "Order", first)
        elif fault == "others-draws":
            patch = mock.patch.object(part.Part, "of", lambda self, drawn, dim=0: drawn.narrow(dim, 0, self.count))
        elif fault == "others-utterances":
            first = lambda run, data, start, *place: part.Order(run, data, start, 0, 2)  # noqa: E731
            patch = mock.patch.object(ctc, "Order", first)
    if fault == "own-characters":  # each rank divides by those of its utterances
        share = ctc.SpeechModule._share

        def own(self: Any, batch: Any) -> int:
            share(self, batch)
            return 2 * int(batch.characters.sum())

        patch = mock.patch.object(ctc.SpeechModule, "_share", own)
    if fault == "spare-counts":  # a rank's image of zeros counts as much as an image
        patch = mock.patch.object(part.Part, "weight", 1.0)
    elif fault == "mixed-with-nothing":  # the image before is taken from the rank before, whatever it has
        patch = mock.patch.object(part.Part, "preceded", before_rank)
    if fault == "own-features":  # each rank compares its images with its own only
        patch = mock.patch.object(part.Part, "whole", lambda self, x: x)
    elif fault == "spare-in-statistics":  # a rank's image of zeros is in mean and variance
        share_norm = classification.share_batch_norm
        all_count = lambda model, of: share_norm(model, lambda: replace(of(), spare=False))  # noqa: E731
        patch = mock.patch.object(classification, "share_batch_norm", all_count)
    elif fault == "own-statistics":
        patch = mock.patch.object(classification, "share_batch_norm")
    elif fault == "own-masks":  # each rank draws for as many images as it has
        draw = masked._mask

        def halves(batch: int, encoder: Any, ratio: float) -> Any:
            drawn = draw(batch // 2, encoder, ratio)
            return tuple(torch.cat([x, x]) for x in drawn) if batch > 1 else draw(batch, encoder, ratio)

        patch = mock.patch.object(masked, "_mask", halves)
    elif fault == "still-target":  # it stays as it began
        patch = mock.patch.object(contrastive, "here", lambda x: x.to_local().detach().clone())
    if fault == "summed":  # gradients of all ranks, where their mean is due
        clip = module.clip_grad_norm

        def summed(parameters: Any, largest: float) -> Any:
            parameters = [parameter for parameter in parameters if parameter.grad is not None]
            for parameter in parameters:
                parameter.grad *= int(os.environ["WORLD_SIZE"])
            return clip(parameters, largest)

        patch = mock.patch.object(module, "clip_grad_norm", summed)
    with patch:
        yield


def reads(ranks: int, run: Run, data: Any, batches: int) -> list[list[int]]:
    """Numbers of the images of the first micro-batches, from all ranks."""
    orders = [part.Order(run, data.train, 0, rank, ranks) for rank in range(ranks)]
    return [[*itertools.chain(*each)] for each in itertools.islice(zip(*orders, strict=True), batches)]
