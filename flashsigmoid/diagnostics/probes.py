"""What every attention layer of a model does with one batch, in one forward: norms, masses, shares.

Explicit weights are O(seqlen_q * seqlen_k) memory: for a small batch now and then. Through a training: watch.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .seeing import Seen, seeing
from .weights import attention_norm, effective_keys, row_mass, saturation, sink_mass


@dataclass(frozen=True, kw_only=True)
class AttentionProbe:
    """One attention layer during one forward; means over batch, heads and queries, in float32."""

    layer: int  # 0 is the first that ran
    name: str  # of the module in the model
    attention: Literal["sigmoid", "softmax"]
    attention_norm: float  # |A V|, before a gate and the output projection
    row_mass: float  # sum_j A_ij; exactly 1 for softmax
    sink_mass: float  # A_i0 / sum_j A_ij
    effective_keys: float  # exp of the entropy of a row divided by its sum
    saturation: float  # share of a row's mass on weights above 0.99
    max_weight: float  # max_ij A_ij


def probe_attention(model: nn.Module, *inputs: Any, **keywords: Any) -> list[AttentionProbe]:
    """Measure every attention layer of a model in one forward without gradients, model(*inputs, **keywords).

    Layers are those of ours that have an attention_fn, `nn.SigmoidAttention`, `nn.SoftmaxAttention` and
    `models.vision.VisionAttention`, and of models of others (timm, transformers, torch)
    whatever calls torch's `scaled_dot_product_attention`, or `multi_head_attention_forward`, which is behind
    `torch.nn.MultiheadAttention`; in the order in which they run. A layer of others has the name of the innermost
    module that was running, and a layer that was called twice is there twice. Attention that multiplies its matrices
    by itself, as attn_implementation="eager" of transformers, is not seen.

    The norm is that of what the layer's attention function returned; the weights are computed again from q and k, in
    float32 whatever the dtype of the model. The forward is in eval mode. Afterwards the model is as it was: attention
    functions, the mode of each module, and torch's random state, also if the forward fails. A compiled model runs
    eagerly here. Give a batch without padding, since padded tokens count.

    Args:
        model: on the device of the inputs.
        inputs, keywords: one small batch. Memory is O(batch * nheads * seqlen^2), one layer at a time.

    Raises:
        ValueError: no such layer ran.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    probes: list[AttentionProbe] = []

    def see(seen: Seen) -> None:
        weights = seen.weights(None)
        probes.append(
            AttentionProbe(
                layer=len(probes),
                name=seen.name.replace("_orig_mod.", ""),  # which torch.compile puts in front
                attention=seen.kind,
                attention_norm=attention_norm(seen.out).item(),
                row_mass=row_mass(weights).item(),
                sink_mass=sink_mass(weights).item(),
                effective_keys=effective_keys(weights).item(),
                saturation=saturation(weights).item(),
                max_weight=weights.max().item(),
            )
        )

    try:
        model.eval()
        with (
            seeing(model, see) as mode,
            torch.no_grad(),
            torch.random.fork_rng(devices),
            torch.compiler.set_stance("force_eager"),
            mode,
        ):
            model(*inputs, **keywords)
    finally:
        for module, training in modes.items():
            module.training = training
    if not probes:
        raise ValueError(
            "model must have run a SigmoidAttention, a SoftmaxAttention or torch's scaled_dot_product_attention, got "
            f"{type(model).__name__} without"
        )
    return probes
