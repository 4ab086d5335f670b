"""SimCLR and BYOL: learning from two views of each image. Losses, heads and the momentum's schedule are lightly's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..models.vision import build_vit
from .augment import Views, ViewsConfig
from .classification import ImageBatch
from .images import ImageData
from .part import Part, here
from .pretraining import PretrainingModule, PretrainingRun


@dataclass(frozen=True, kw_only=True)
class ContrastiveRun(PretrainingRun):
    """A complete description of one pretraining by two views of each image.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    method: Literal["simclr", "byol"]
    views: ViewsConfig = field(default_factory=ViewsConfig)
    projection_hidden: int = 2048  # channels within a head
    projection_dim: int = 128  # channels that are compared
    temperature: float = 0.2  # of SimCLR's similarities, above 0
    momentum: float = 0.996  # of BYOL's target at the first step, in [0, 1]; 1 at the last, along a cosine

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("simclr", "byol"):
            raise ValueError(f"method must be 'simclr' or 'byol', got {self.method!r}")
        for name in ("projection_hidden", "projection_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1e-3 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0.001, got {self.temperature}")
        if not 0.0 <= self.momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {self.momentum}")
        if self.batch < 2:
            raise ValueError(f"batch must be at least 2, images are compared with one another, got {self.batch}")

    def module(self, data: ImageData) -> SimCLRModule | BYOLModule:
        """What Lightning drives."""
        return (SimCLRModule if self.method == "simclr" else BYOLModule)(self, data)


class SimCLRModule(PretrainingModule):
    """SimCLR: the two views of an image are to be nearer to each other than to any view of another of the micro-batch.

        z = projection(encoder(view)),  normalised
        loss = mean over views i of -log (exp(z_i . z_j / t) / sum over k != i of exp(z_i . z_k / t))    nats per view

    with j the other view of i's image. On a mesh every rank has the z of all and computes the loss of all: exactly that
    of one process, and its similarities take as much memory as there.

    Args:
        run: the description.
        data: what is read.

    Source: arXiv:2002.05709, equation 1.
    """

    loss_unit = "nats_per_view"

    def __init__(self, run: ContrastiveRun, data: ImageData) -> None:
        encoder = build_vit(run.model)
        projection = SimCLRProjectionHead(encoder.num_features, run.projection_hidden, run.projection_dim)
        super().__init__(run, data, encoder, projection=projection)
        self.views = Views(run.views, data.mean, data.std)
        self.criterion = NTXentLoss(run.temperature)
        self._embedded = self.compiled(lambda x: self.part("projection")(self.encoder(x)))

    def loss_of(self, batch: ImageBatch, part: Part) -> Tensor:
        """Mean loss of two fresh views of a batch."""
        z = self.model(self._embedded, torch.cat(self.views(batch.images, part)))
        with torch.autocast(z.device.type, enabled=False):  # a similarity over t in bf16 has two digits
            return self.criterion(*map(part.whole, z.float().chunk(2)))


class BYOLModule(PretrainingModule):
    """BYOL: from one view of an image predict what a slowly moving average of the model makes of the other.

        p = prediction(projection(encoder(view))),  t = target(other view), without gradient
        loss = mean over views of -cos(p, t)
        target <- m target + (1 - m) (encoder, projection) after each step, m from run.momentum to 1 along a cosine

    The published loss is 2 + 2 of it. Nothing but the moving target and the prediction keeps the features apart:
    watch val/feature_spread.

    Args:
        run: the description.
        data: what is read.

    Source: arXiv:2006.07733, equations 1 and 2.
    """

    loss_unit = "minus_cosine"

    def __init__(self, run: ContrastiveRun, data: ImageData) -> None:
        encoder = build_vit(run.model)
        hidden, dim = run.projection_hidden, run.projection_dim
        projection = BYOLProjectionHead(encoder.num_features, hidden, dim)
        prediction = BYOLPredictionHead(dim, hidden, dim)
        super().__init__(run, data, encoder, projection=projection, prediction=prediction)
        self.views = Views(run.views, data.mean, data.std)
        self.criterion = NegativeCosineSimilarity()
        self.target = copy.deepcopy(nn.Sequential(encoder, projection))
        deactivate_requires_grad(self.target)
        self._predicted = self.compiled(lambda x: self.part("prediction")(self.part("projection")(self.encoder(x))))
        self._targets = self.compiled(self.target.__call__)

    @property
    def beside(self) -> Mapping[str, nn.Module]:
        """The target."""
        return {"target": self.target}

    def loss_of(self, batch: ImageBatch, part: Part) -> Tensor:
        """Mean loss of two fresh views of a batch, each predicted from the other."""
        x = torch.cat(self.views(batch.images, part))
        p0, p1 = self.model(self._predicted, x).float().chunk(2)
        with torch.no_grad():
            t0, t1 = self._targets(x).float().chunk(2)
        return part.weight * (self.criterion(p0, t1) + self.criterion(p1, t0)) / 2.0

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """Lightning's hook: the target follows each step."""
        m = cosine_schedule(self.trainer.global_step, self.run.steps, self.run.momentum, 1.0)
        super().optimizer_step(*args, **options)
        # all parameters at once; lightly's update_momentum is three operations for each
        models = (self.encoder, self.part("projection"))
        weights: list[Tensor] = [here(weight) for model in models for weight in model.parameters()]
        averages: list[Tensor] = [*map(here, self.target.parameters())]
        get_ema_multi_avg_fn(m)(averages, weights, 0)
