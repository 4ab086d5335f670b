"""FlexAttention: softmax as it is, and sigmoid made of it through log-sigmoid and the log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .candidate import Attention, Candidate, Inputs, visible
from .problems import Shape

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Flex(Candidate):
    """flex_attention, compiled for the one shape, with its block mask made before."""

    heads_first = True

    def __init__(self, kind: Any) -> None:
        self.name, self.kind = f"flex {kind}", kind

    def unavailable(self, shape: Shape, dtype: torch.dtype, device: str) -> str | None:
        if device != "cuda":
            return f"needs CUDA, got {device}"
        return None

    def attention(self, inputs: Inputs) -> Attention:
        return torch.compile(attention_of(inputs, self.kind), dynamic=False)


def attention_of(inputs: Inputs, kind: str) -> Attention:
    """flex_attention of (batch, nheads, seqlen, head_dim), before compilation.

    Sigmoid: softmax weighs by exp(s) / sum exp(s); with s = log sigmoid(x) and lse = log sum exp(s), out * exp(lse) is
    sum sigmoid(x) v.
    """
    from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, flex_attention

    shape = inputs.shape
    keywords: dict[str, Any] = {
        "score_mod": _score_mod(inputs, kind),
        "block_mask": _block_mask(inputs),
        "enable_gqa": shape.group > 1,
    }

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flex_attention(q, k, v, **keywords)
        assert isinstance(out, Tensor)
        return out

    def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **keywords)
        assert isinstance(aux, AuxOutput) and aux.lse is not None  # noqa: PT018
        return (out * aux.lse.exp()[..., None]).to(out.dtype)

    return softmax if kind == "softmax" else sigmoid


def _score_mod(inputs: Inputs, kind: str) -> ScoreMod | None:
    shape, slopes = inputs.shape, inputs.slopes
    offset, bias = shape.seqlen_k - shape.seqlen_q, shape.bias

    def alibi(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert slopes is not None
        return score - slopes[head] * (query + offset - key).abs()

    def log_sigmoid(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        x = score if slopes is None else alibi(score, batch, head, query, key)
        return -torch.log(1.0 + torch.exp(-(x + bias)))

    if kind == "sigmoid":
        return log_sigmoid
    return alibi if shape.alibi else None


def _block_mask(inputs: Inputs) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    shape, device = inputs.shape, inputs.device
    offset = shape.seqlen_k - shape.seqlen_q
    if shape.band == (None, None) and not shape.lengths:
        return None
    document = None
    if shape.lengths:
        lengths = torch.tensor(shape.lengths, device=device)
        document = torch.repeat_interleave(torch.arange(len(shape.lengths), device=device), lengths)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        keep = visible(shape, query + offset - key)
        return keep if document is None else keep & (document[query] == document[key])

    # compiled, it never holds the whole mask
    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(seen, None, None, shape.seqlen_q, shape.seqlen_k, device=str(device))


@contextmanager
def compiler_settings() -> Iterator[None]:
    """What timing compiled functions needs: many shapes in one process, and never an eager call in silence.

    Donated buffers are off since a backward is called again and again on one forward.
    """
    import torch._dynamo.config
    import torch._functorch.config

    dynamo, functorch = torch._dynamo.config, torch._functorch.config
    with (
        dynamo.patch(recompile_limit=1000, accumulated_recompile_limit=10000, fail_on_recompile_limit_hit=True),  # pyright: ignore
        functorch.patch(donated_buffer=False),  # pyright: ignore
    ):
        yield
