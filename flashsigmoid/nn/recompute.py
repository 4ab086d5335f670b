"""What a block keeps for its backward, and what it computes again. Which blocks do so, a model's owner decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# "full": a block keeps its input alone; "selective": its input and q, k, v as they leave their projections
Recompute = Literal["none", "full", "selective"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "full", "selective")

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.linear.default}
_KEPT = 3  # the first matrix products of a block are the projections to q, k and v


def check_recompute(how: str) -> None:
    """Raises ValueError for what is no `Recompute`."""
    if how not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {how!r}")


def recomputed(function: Callable[..., Any], how: Recompute, *args: Any) -> Any:
    """function(*args), of whose inner values the backward computes again what is not kept; random states included.

    Args:
        function: of a block.
        how: "full" or "selective".
        args: tensors and what else it takes.
    """
    if how == "full":
        return checkpoint(function, *args, use_reentrant=False)
    return checkpoint(function, *args, use_reentrant=False, context_fn=_keep_projections)


def _keep_projections() -> tuple[Any, Any]:
    """Contexts of the forward and of its repetition, for torch.utils.checkpoint."""
    seen = {False: 0, True: 0}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _PRODUCTS:
            seen[ctx.is_recompute] += 1
            if seen[ctx.is_recompute] <= _KEPT:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
