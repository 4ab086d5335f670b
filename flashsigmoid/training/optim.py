"""AdamW with decay on matrices only, and the learning rate as a function of the step. No scheduler object, no state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..nn.config import check_types


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule.

    Raises:
        ValueError: a field breaks the rule beside it.
    """

    lr: float  # peak learning rate, above 0
    warmup: int  # steps of linear warm-up, at least 0
    final_lr: float = 0.1  # the last step's rate as a fraction of the peak, in [0, 1]
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # per step: lr * weight_decay, on matrices only
    clip: float = 1.0  # largest L2 norm of the whole gradient; inf: no clipping

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "betas", tuple(self.betas))
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, got {self.warmup}")
        if not 0.0 <= self.final_lr <= 1.0:
            raise ValueError(f"final_lr must be in [0, 1], got {self.final_lr}")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and not negative, got {self.weight_decay}")
        if not self.clip > 0.0:
            raise ValueError(f"clip must be positive, got {self.clip}")


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (from 0) out of `steps`.

        lr * (step + 1) / warmup                                                  while step < warmup
        lr * (f + (1 - f) (1 + cos(pi t)) / 2),   t = (step - warmup) / (steps - 1 - warmup)     then

    with f = final_lr, reached at the last step.

    Source: arXiv:1608.03983 (cosine); warm-up and f = 0.1 as in arXiv:2409.04431.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    t = min(1.0, (step - config.warmup) / max(1, steps - 1 - config.warmup))
    return config.lr * (config.final_lr + (1.0 - config.final_lr) * (1.0 + math.cos(math.pi * t)) / 2.0)


def adamw(model: nn.Module, config: OptimConfig, groups: list[dict[str, Any]] | None = None) -> torch.optim.AdamW:
    """AdamW over the parameters of `model`; vectors and scalars (norms, LayerScales, biases) are not decayed.

    Args:
        model: what is trained.
        config: rates and decay.
        groups: of its parameters, with weight_decay of each, and lr_scale, a factor of the learning rate. Default:
            matrices, and the rest.

    Source: arXiv:1711.05101.
    """
    if groups is None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
