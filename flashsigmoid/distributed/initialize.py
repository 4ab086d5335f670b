"""Weights for a model that was made on the meta device and laid over a mesh: those of one process, never whole."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ..nn import LayerScale, RMSNorm


def initialize(model: nn.Module, device: torch.device | str) -> None:
    """Give a `models.gpt.GPT` the bits that `GPT(config)` has from the same random state; in place.

    A rank holds one whole matrix at a time, on the CPU, and its shards. Every rank calls it, from the same state.

        with torch.device("meta"):
            model = GPT(config)
        initialize(parallelize(model, mesh), "cuda")

    Args:
        model: on the meta device, after `plans.parallelize`.
        device: of its shards.

    Raises:
        ValueError: a parameter that neither a Linear, an Embedding, a norm nor a LayerScale has.
    """
    tree, given = cast(Any, model), set[str]()
    model.to_empty(device=device)
    for module in model.modules():
        if isinstance(module, RMSNorm | LayerScale):
            module.reset_parameters()
            given.add(_name(model, module.weight))
        elif isinstance(module, nn.Linear | nn.Embedding):
            _skip(module)

    def normal_(weight: Tensor, std: float) -> None:
        name = _name(model, weight)
        given.add(name)
        whole = nn.init.normal_(torch.empty(weight.shape, dtype=weight.dtype, device="cpu"), std=std)
        set_model_state_dict(model, {name: whole}, options=StateDictOptions(full_state_dict=True, strict=False))

    tree.reset_parameters(normal_)
    if missing := sorted({name for name, _ in model.named_parameters()} - given):
        raise ValueError(f"a model made on the meta device must have no parameters of other kinds, got {missing}")


def _skip(module: nn.Linear | nn.Embedding) -> None:
    """Draw what the module's constructor draws, which `reset_parameters` of the model then replaces."""
    with torch.device("cpu"):
        if isinstance(module, nn.Embedding):
            nn.Embedding(module.num_embeddings, module.embedding_dim, dtype=module.weight.dtype)
        else:
            nn.Linear(module.in_features, module.out_features, module.bias is not None, dtype=module.weight.dtype)


def _name(model: nn.Module, weight: Tensor) -> str:
    return next(name for name, parameter in model.named_parameters() if parameter is weight)
