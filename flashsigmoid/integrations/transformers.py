"""Sigmoid attention for the models of transformers: register() makes attn_implementation="sigmoid" a name they know.

Padding, left or right, costs nothing: the values of masked keys are zeroed. No weight is changed here, and our
own model is in sigmoid_gpt.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from .. import functional
from .sdpa import scaled_dot_product_sigmoid_attention

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped

NAME = "sigmoid"  # transformers takes a name with "flash" in it for FlashAttention's


def register() -> None:
    """Let `attn_implementation="sigmoid"` choose sigmoid attention in any model of transformers, from now on.

        O = A V,   A = sigmoid(scaling * Q K^T + config.sigmoid_bias)

    A model must be given its bias: config.sigmoid_bias, -log of its training length, is saved with the config. It is
    the same number whatever the length of an input, a padding or a cache; a composite model has one in each of its
    configs that has attention.

    AutoConfig and AutoModelForCausalLM know `SigmoidGPTConfig` from then on. Called twice it does nothing more.

    Source: arXiv:2409.04431.
    """
    from .sigmoid_gpt import SigmoidGPTConfig, SigmoidGPTForCausalLM

    AttentionInterface.register(NAME, sigmoid_attention_forward)
    AttentionMaskInterface.register(NAME, sigmoid_mask)
    AutoConfig.register(SigmoidGPTConfig.model_type, SigmoidGPTConfig, exist_ok=True)
    AutoModelForCausalLM.register(SigmoidGPTConfig, SigmoidGPTForCausalLM, exist_ok=True)


def sigmoid_attention_forward(
    module: nn.Module,
    query: Float[Tensor, "batch nheads seqlen_q head_dim"],
    key: Float[Tensor, "batch nheads_k seqlen_k head_dim"],
    value: Float[Tensor, "batch nheads_k seqlen_k head_dim_v"],
    attention_mask: Shaped[Tensor, "batch _ rows keys"] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch seqlen_q nheads head_dim_v"], None]:
    """What transformers calls for an attention layer.

    A boolean mask of one row, (batch, 1, 1, keys), hides keys from every query, on top of the layer's causality; keys
    it does not reach are hidden too. Any other mask says everything itself, element by element, in plain torch and
    O(seqlen_q * seqlen_k) memory.

    Args:
        module: the layer; its `config.sigmoid_bias` is b, its `is_causal` the default of is_causal.
        query, key, value: (batch, heads, seqlen, dim), nheads a multiple of nheads_k.
        attention_mask: of `sigmoid_mask`, or a model's own: boolean, or added to the scores.
        dropout: probability of dropping a weight.
        scaling: factor of Q K^T. Default: head_dim ** -0.5.
        is_causal: bottom-right causal, where the mask leaves it open.
        options: what other implementations take. Those that change the result are refused.

    Returns:
        out (batch, seqlen_q, nheads, head_dim_v), and None for the weights.

    Raises:
        ValueError: no config.sigmoid_bias, a mask of another rank, or an option that sigmoid attention does not have.
    """
    for name in ("softcap", "s_aux", "position_bias", "output_attentions"):
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"{name} must not be given with attn_implementation={NAME!r}, got {options[name]!r}")
    if attention_mask is None and options.get("cu_seq_lens_q") is not None:
        raise ValueError(
            "cu_seq_lens_q must come with position_ids that begin anew, by which transformers makes the mask of packed "
            f"sequences, got none for {tuple(query.shape)}"
        )
    b = _bias(module, key.shape[2])
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if attention_mask is not None:
        if attention_mask.dim() != 4:
            raise ValueError(f"attention_mask must be (batch, heads, rows, keys), got {tuple(attention_mask.shape)}")
        if attention_mask.dtype != torch.bool or attention_mask.shape[1:3] != (1, 1):
            out = scaled_dot_product_sigmoid_attention(
                query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True, sigmoid_bias=b
            )
            return out.transpose(1, 2).contiguous(), None
        keys = attention_mask.shape[3]
        key, value = key[:, :, :keys], value[:, :, :keys].masked_fill(~attention_mask.mT, 0.0)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = functional.sigmoid_attention(q, k, v, sigmoid_bias=b, scale=scaling, causal=is_causal, dropout_p=dropout)
    return out, None


def sigmoid_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Bool[Tensor, "batch seen"] | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Bool[Tensor, "batch 1 rows keys"] | None:
    """What transformers calls for the mask of an attention: no more of it than sigmoid attention has to be told.

        causal, every key up to the last query is there     None, or with padding (batch, 1, 1, keys up to there)
        causal, one query                                   (batch, 1, 1, kv_length)
        bidirectional                                       None, or with padding a view (batch, 1, q_length, kv_length)
        windows, chunks, packed sequences, other patterns   (batch, 1, q_length, kv_length), by transformers

    Whether padding is there is not read, so that a GPU is not waited for.
    """
    if mask_function is causal_mask_function and (q_length == 1 or not isinstance(q_offset, Tensor)):
        if isinstance(q_offset, Tensor):  # a static cache: what is beyond the query has not been written
            keep = _kept_keys(attention_mask, batch_size, kv_length, kv_offset, device)
            keep = keep & (torch.arange(kv_length, device=device) + kv_offset <= q_offset)
            return keep[:, None, None, :]
        seen = min(kv_length, q_offset + q_length - kv_offset)
        if attention_mask is None and seen == kv_length:
            return None
        return _kept_keys(attention_mask, batch_size, seen, kv_offset, device)[:, None, None, :]
    if mask_function is bidirectional_mask_function:
        # a causal model that is asked to look both ways has causal layers, so its mask says that it is not
        if attention_mask is None and getattr(config, "is_causal", True):
            return None
        keep = _kept_keys(attention_mask, batch_size, kv_length, kv_offset, device)
        return keep[:, None, None, :].expand(-1, 1, q_length, -1)
    options.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    start: Any = q_offset
    return sdpa_mask(
        batch_size, q_length, kv_length, start, kv_offset, mask_function, attention_mask, device=device, **options
    )


def _kept_keys(
    attention_mask: Tensor | None, batch: int, keys: int, kv_offset: int, device: torch.device | str
) -> Tensor:
    """(batch, keys) bool of the padding mask; a key that it does not reach is not there yet."""
    if attention_mask is None:
        return torch.ones(batch, keys, dtype=torch.bool, device=device)
    keep = attention_mask[:, kv_offset : kv_offset + keys]
    return nn.functional.pad(keep, (0, keys - keep.shape[1]))


def _bias(module: nn.Module, keys: int) -> float:
    config = getattr(module, "config", None)
    b = getattr(config, "sigmoid_bias", None)
    if isinstance(b, bool) or not isinstance(b, int | float):
        n = getattr(config, "max_position_embeddings", None)
        of_context = f"{-math.log(n):.4f} for its max_position_embeddings={n}, " if n else ""
        raise ValueError(
            f"{type(config).__name__}.sigmoid_bias must be a number, -log of the training length: {of_context}"
            f"{-math.log(max(1, keys)):.4f} for the {keys} keys of this call, got {b!r}"
        )
    return float(b)
