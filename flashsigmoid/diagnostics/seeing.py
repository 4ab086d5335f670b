"""Sees every attention of a model while it runs, ours and that of others, and hands it to a function that measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..backends.reference import attention_weights
from ..functional import sigmoid_attention
from ..nn.attention import SoftmaxAttention, softmax_attention
from ..nn.flex import fused_softmax_attention
from .weights import sdpa_weights, softmax_weights

Kind = Literal["sigmoid", "softmax"]


@dataclass(frozen=True)
class Seen:
    """One attention of a forward.

    Attributes:
        name: of the module in the model, of others the innermost that was running.
        kind: "sigmoid" or "softmax".
        returned: A V before a gate and the output projection, as the model goes on with it.
        arrange: of a tensor of that layout, the view (batch, seqlen_q, nheads, head_dim_v).
        weights: called with a number of sequences, A of the first of them, (sequences, nheads, seqlen_q, seqlen_k),
            computed again from q and k in float32 whatever the dtype of the model; None: of all.
    """

    name: str
    kind: Kind
    returned: Tensor
    arrange: Callable[[Tensor], Tensor]
    weights: Callable[[int | None], Tensor]

    @property
    def out(self) -> Tensor:
        """A V, (batch, seqlen_q, nheads, head_dim_v)."""
        return self.arrange(self.returned)


See = Callable[[Seen], None]


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of ours by name: those that call a function `attention_fn`, or may be given one."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "attention_fn")}


@contextmanager
def seeing(model: nn.Module, see: See) -> Iterator[SeesSoftmax]:
    """Hand every attention to `see` while the mode that is given is entered; afterwards the model is as it was.

    Layers of ours are seen anywhere within, what calls torch's `scaled_dot_product_attention`, or
    `multi_head_attention_forward`, within the mode only.
    """
    layers = attention_layers(model)
    functions = {name: layer.attention_fn for name, layer in layers.items()}
    try:
        with _running(model) as names:
            mode = SeesSoftmax(names, see)
            for name, layer in layers.items():
                layer.attention_fn = _watched(layer, name, see, mode)
            yield mode
    finally:
        for name, layer in layers.items():
            layer.attention_fn = functions[name]


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are running, the innermost last, while the model runs."""
    names: list[str] = []

    def leave(*_: Any) -> None:
        if names:  # not of a module that was running already
            names.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(lambda *_, name=name: names.append(name)).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield names


class SeesSoftmax(TorchFunctionMode):
    """Hands over each call of torch's attention, except where `blind`: inside of a layer of ours."""

    def __init__(self, names: list[str], see: See) -> None:
        super().__init__()
        self.names, self.see, self.blind = names, see, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.blind:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            # no mode sees what happens inside; without weights it calls the function that is put in its way
            with mock.patch.object(F, "scaled_dot_product_attention", self._attended(F.scaled_dot_product_attention)):
                out = func(*args, **{**kwargs, "need_weights": False})
            return func(*args, **kwargs) if kwargs.get("need_weights", True) else out
        return func(*args, **kwargs)

    def _attended(self, func: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: self._attend(func, *args, **kwargs)

    def _attend(
        self,
        func: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        out = func(query, key, value, attn_mask, dropout_p, is_causal, **options)

        def weights(sequences: int | None) -> Tensor:
            q, k, mask = query.detach(), key.detach(), attn_mask
            if sequences is not None and q.dim() == 4:
                mask = mask[:sequences] if mask is not None and mask.dim() == 4 and len(mask) == len(q) else mask
                q, k = q[:sequences], k[:sequences]
            with _wide(q):
                a = sdpa_weights(q, k, mask, is_causal=is_causal, **options)
            return a if a.dim() == 4 else a[:, None] if a.dim() == 3 else a.flatten(0, -4)

        name = self.names[-1] if self.names else ""
        self.see(Seen(name, "softmax", out, _heads_inside, weights))
        return out


def _heads_inside(x: Tensor) -> Tensor:
    """(batch, seqlen, heads, dim) of torch's (..., heads, seqlen, dim); without heads it is one."""
    return (x[:, None] if x.dim() == 3 else x.flatten(0, -4)).transpose(1, 2)


def _watched(layer: Any, name: str, see: See, mode: SeesSoftmax) -> Callable[..., Tensor]:
    """The layer's attention_fn, which also hands over what it sees, once, whatever it calls."""
    is_softmax = isinstance(layer, SoftmaxAttention) or getattr(layer, "kind", "sigmoid") == "softmax"
    own = softmax_attention if is_softmax else sigmoid_attention
    # FlexAttention would be compiled for this one length, or write out its scores; what it computes is plain softmax
    plain = {None: own, fused_softmax_attention: softmax_attention}
    attention_fn = plain.get(layer.attention_fn, layer.attention_fn)

    def watch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        mode.blind = True
        try:
            out = attention_fn(q, k, v, **options)
        finally:
            mode.blind = False

        def weights(sequences: int | None) -> Tensor:
            given = {key: _first(value, len(q), sequences) for key, value in options.items() if key != "dropout_p"}
            if is_softmax:
                given.pop("sigmoid_bias", None)
            compute = softmax_weights if is_softmax else attention_weights
            with _wide(q):
                return compute(q.detach()[:sequences], k.detach()[:sequences], **given)

        see(Seen(name, "softmax" if is_softmax else "sigmoid", out, lambda x: x, weights))
        return out

    return watch


def _first(value: Any, batch: int, sequences: int | None) -> Any:
    """Of an option that each sequence has for itself, those of the first."""
    if isinstance(value, Tensor) and value.dim() >= 2 and len(value) == batch:
        return value.detach()[:sequences]
    return value


@contextmanager
def _wide(q: Tensor) -> Iterator[None]:
    """Without a gradient, and without autocast, which would compute the scores in bfloat16."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        yield
