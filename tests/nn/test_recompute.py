"""Blocks that compute again what they do not keep: the same bits, less memory, and which products run twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from flashsigmoid.models.gpt import GPT, GPTConfig
from flashsigmoid.nn.recompute import RECOMPUTE, check_recompute

CONFIG = GPTConfig(
    vocab_size=64, seqlen=32, nlayers=2, dim=32, nheads=4, nheads_k=2, mlp_dim=80, norm="hybrid", dropout_p=0.2,
    position="rope", gate=True,
)  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts matrix products by the shapes of their factors, and calls of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.seen[tuple(args[0].shape), tuple(args[1].shape)] += 1
        elif func is torch.ops.flashsigmoid.fwd.default:
            self.seen["attention"] += 1
        return func(*args, **(kwargs or {}))


def model_of(how: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for block in model.blocks:
        block.recompute = how
    return model


def trained(model: GPT) -> tuple[Tensor, list[Tensor]]:
    """A loss and every gradient."""
    torch.manual_seed(1)
    tokens = torch.randint(0, 64, (2, 32))
    loss = model(tokens).square().mean()
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("how", ["full", "selective"])
def test_the_bits_are_those_of_a_block_that_keeps_everything(how: str) -> None:
    """Dropout of both kinds included, whose random state returns."""
    loss, grads = trained(model_of("none"))
    again, others = trained(model_of(how))
    assert torch.equal(loss, again)
    assert all(torch.equal(x, y) for x, y in zip(grads, others, strict=True))


def test_selective_repeats_everything_but_the_projections() -> None:
    """By the shapes of products: q and its gate, k and v, the MLP's; all differ but those of q, gate and out_proj."""
    counts = {}
    for how in RECOMPUTE:
        model = model_of(how)
        with Counted() as counted:
            trained(model)
        counts[how] = counted.seen
    tokens, d, kv, hidden = 64, 32, 16, 80
    wide, narrow, up = ((tokens, d), (d, d)), ((tokens, d), (d, kv)), ((tokens, d), (d, hidden))
    layers = CONFIG.nlayers
    for how in ("full", "selective"):
        repeated = counts[how] - counts["none"]
        assert repeated["attention"] == layers
        assert repeated[up] == 2 * layers  # up and gate of the MLP
        # full: k and v; and of q, gate and out_proj all
        assert repeated[narrow] == (2 * layers if how == "full" else 0)
        assert repeated[wide] == (3 * layers if how == "full" else 2 * layers)


class Alive(TorchDispatchMode):
    """Remembers every result's memory, weakly, but that of what was there before."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.before = {x.untyped_storage()._cdata for x in before}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.before:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def nbytes(self) -> int:
        """Of what is still there."""
        return sum(size for weak, size in self.storages.values() if not weak.expired())


def test_what_is_kept() -> None:
    """Bytes that a forward leaves behind: "full" its input, which was there before, "selective" also q, k and v."""
    held, tokens, d, kv = {}, 2 * 32, 32, 16
    for how in RECOMPUTE:
        block = model_of(how).blocks[0]
        x = torch.randn(2, 32, d, requires_grad=True)
        with Alive(x, *block.parameters()) as alive:
            out = block(x)
        held[how] = alive.nbytes() - 4 * out.numel()
    assert held["full"] == 0
    assert held["selective"] == 4 * tokens * (d + 2 * kv)
    assert held["none"] > 10 * 4 * tokens * d


def test_an_unknown_way_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="recompute must be one of none, full, selective, got 'some'"):
        check_recompute("some")
