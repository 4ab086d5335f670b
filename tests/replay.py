"""What activation checkpointing computes again is what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def assert_replayed(call: Callable[..., Tensor], tensors: Sequence[Tensor], dout: Tensor) -> None:
    """Gradients of `call` have the same bits with and without checkpointing, its dropout included."""
    grads = []
    for recompute in (False, True):
        leaves = [x.clone().requires_grad_() for x in tensors]
        torch.manual_seed(4)
        out = checkpoint(call, *leaves, use_reentrant=False) if recompute else call(*leaves)
        assert isinstance(out, Tensor)
        grads.append(torch.autograd.grad(out, leaves, dout))
    for plain, replayed in zip(*grads, strict=True):
        assert torch.equal(plain, replayed)
