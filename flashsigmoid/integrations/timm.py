"""Sigmoid attention for a timm model that is already there: its attentions are exchanged in place, its weights stay."""

from __future__ import annotations

import re
from typing import Literal

from timm.layers.attention import Attention
from torch import nn

from ..models.vision import VisionAttention, check_settings
from ..nn.attention import AttentionFn

# class names of whatever attends in timm: Attention, WindowAttention, ClassAttn, AttentionPoolLatent, GPSA, MHSA, ...
# and not of blocks that hold one
_ATTENDS = re.compile(r"(Attention|Attn|SA$)(?!.*(Block|Layer|Stage)$)", re.IGNORECASE)


def swap_attention(
    model: nn.Module,
    kind: Literal["sigmoid", "softmax"] = "sigmoid",
    *,
    sigmoid_bias: float | None = None,
    bias_mode: Literal["fixed", "learnable", "per_head"] = "fixed",
    attention_fn: AttentionFn | None = None,
) -> int:
    """Exchange every attention of a timm model for ours, in place; parameters, hooks and names stay.

    Weights that softmax has trained give other numbers under sigmoid: fine-tune them, or start fresh.

    Args:
        model: any model, or a part of one such as model.blocks, whose attentions are all of the class
            `timm.layers.Attention`, or ours.
        kind: "sigmoid", or "softmax" to go back. Default: "sigmoid".
        sigmoid_bias: b. Default: -log of the number of tokens of each call.
        bias_mode: "fixed"; "learnable", one parameter an attention, or "per_head", that starts at sigmoid_bias.
            Default: "fixed".
        attention_fn: called as `nn.SigmoidAttention` calls its own. Default: `sigmoid_attention`, or torch's SDPA.

    Returns:
        How many attentions were exchanged.

    Raises:
        ValueError: there is none, or one of another class, which would stay as it is; a word is not one of those, or a
            learnable bias lacks its initial value.
    """
    check_settings(kind, sigmoid_bias, bias_mode)
    # a subclass of timm's has a forward of its own, which would be lost
    found = [m for m in model.modules() if type(m) is Attention or isinstance(m, VisionAttention)]
    others = [(name, m) for name, m in model.named_modules() if _ATTENDS.search(type(m).__name__) and m not in found]
    if others or not found:
        got = "none"
        if others:
            name, other = others[0]
            got = f"{type(other).__module__}.{type(other).__name__}" + (f" at {name}" if name else "")
        part = "; a part of the model can be given alone, as model.blocks" if found else ""
        raise ValueError(f"model must have attentions of the class timm.layers.Attention only, got {got}{part}")
    for module in found:
        module.__class__ = VisionAttention
        assert isinstance(module, VisionAttention)
        module.configure(kind, sigmoid_bias, bias_mode, attention_fn)
    return len(found)
