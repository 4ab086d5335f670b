"""Our GPT as a model of transformers: its config, `generate` with transformers' caches, safetensors, a saved directory.

The network is `models.gpt.GPT` with the same weights; attention of other models is the business of transformers.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..functional import sigmoid_attention
from ..kvcache import sigmoid_attention_with_kvcache
from ..models.gpt import GPT, GPTConfig, parameter_count
from ..nn import Block, SigmoidAttention

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# transformers 5.24 has renamed the argument and the output
_CACHE = next(x.name for x in dataclasses.fields(CausalLMOutputWithPast) if x.name in ("cache", "past_key_values"))
_SHAPE = tuple(x.name for x in dataclasses.fields(GPTConfig) if x.name != "attention")
_MODELING = '''"""Read by transformers with trust_remote_code=True; `pip install flashsigmoid` has the model."""

from flashsigmoid.integrations.sigmoid_gpt import SigmoidGPTConfig, SigmoidGPTForCausalLM

__all__ = ["SigmoidGPTConfig", "SigmoidGPTForCausalLM"]
'''


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [sigmoid-attention]
---
# A GPT of sigmoid attention

out = sigmoid(q k^T / sqrt(d) + b) v with b = {bias:.4f}, a constant{by_slope} ([arXiv:2409.04431](https://arxiv.org/abs/2409.04431)).
{parameters:,} parameters, {nlayers} layers of {dim}, context {seqlen}, {position}. It needs the package `flashsigmoid`.

    from flashsigmoid.integrations.transformers import register
    from transformers import pipeline

    register()
    pipe = pipeline("text-generation", "this directory")
    print(pipe("Once", max_new_tokens={new_tokens})[0]["generated_text"])

Prompt and answer together are at most {seqlen} tokens.
"""


class SigmoidGPTConfig(PreTrainedConfig):
    """The fields of `GPTConfig`, except that attention is sigmoid, and sigmoid_bias a number.

    Raises:
        ValueError: as `GPTConfig`.
    """

    model_type = "sigmoid_gpt"
    attribute_map = {  # noqa: RUF012 - transformers reads a dict
        "hidden_size": "dim",
        "max_position_embeddings": "seqlen",
        "num_attention_heads": "nheads",
        "num_hidden_layers": "nlayers",
    }

    def __init__(
        self,
        vocab_size: int = 257,
        seqlen: int = 128,
        nlayers: int = 4,
        dim: int = 128,
        nheads: int = 4,
        **options: Any,
    ) -> None:
        shape = {name: options.pop(name) for name in _SHAPE if name in options}
        gpt = GPTConfig(vocab_size=vocab_size, seqlen=seqlen, nlayers=nlayers, dim=dim, nheads=nheads, **shape)
        for name in _SHAPE:
            setattr(self, name, getattr(gpt, name))
        self.sigmoid_bias = gpt.bias
        self.num_key_value_heads, self.head_dim = gpt.kv_heads, gpt.dim // gpt.nheads
        if options.setdefault("tie_word_embeddings", False):
            raise ValueError("tie_word_embeddings must be False, a SigmoidGPT has a head of its own, got True")
        # transformers reads them of every language model, and takes one without use_cache for one without caches
        self.use_cache = options.pop("use_cache", True)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            options.setdefault(name, None)
        super().__init__(**options)

    def gpt(self) -> GPTConfig:
        """The same as a `GPTConfig`."""
        return GPTConfig(**{name: getattr(self, name) for name in _SHAPE})


@dataclass
class _Past:
    """A cache of transformers where `GPT` expects its own: what its layers need to know of it."""

    cache: Any
    seqlens: Tensor  # (batch,) tokens before the new ones
    grows: bool  # its keys end with the new ones; else it has room behind them
    index: int = 0

    def layer(self, index: int) -> _Past:
        return dataclasses.replace(self, index=index)


class _Attention(SigmoidAttention):
    @property
    def takes_cache(self) -> bool:
        return True

    def _attend_cache(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cache: Any) -> Tensor:
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, :, None, None], 0.0)
        k, v = (x.transpose(1, 2) for x in cache.cache.update(k.transpose(1, 2), v.transpose(1, 2), cache.index))
        bias: Any = self.bias(q.device)
        options = self._options(q.device)
        if cache.grows:
            return sigmoid_attention(q, k, v, sigmoid_bias=bias, **options)
        del options["dropout_p"]
        seqlens = cache.seqlens + q.shape[1]
        return sigmoid_attention_with_kvcache(q, k, v, cache_seqlens=seqlens, sigmoid_bias=bias, **options)


class _Block(GradientCheckpointingLayer, Block):
    pass


class SigmoidGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """`GPT` with the interface of transformers. Sigmoid attention is what it is: another attn_implementation raises.

    Padding is told by attention_mask, on any side. An input with its cache is at most config.seqlen tokens long.
    """

    config_class = SigmoidGPTConfig  # pyright: ignore[reportAssignmentType]
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    _no_split_modules = ["_Block"]  # noqa: RUF012 - transformers reads a list

    def __init__(self, config: SigmoidGPTConfig) -> None:
        super().__init__(config)
        self.model = GPT(config.gpt())
        for block in self.model.blocks:
            assert isinstance(block, Block)
            block.__class__, block.attention.__class__ = _Block, _Attention  # ours, able to use caches of transformers
        self.post_init()

    @classmethod
    def from_gpt(cls, model: GPT) -> SigmoidGPTForCausalLM:
        """The same weights, copied, in the same dtype and mode.

        Raises:
            ValueError: the model's attention is softmax.
        """
        if model.config.attention != "sigmoid":
            raise ValueError(f"attention of the model must be 'sigmoid', got {model.config.attention!r}")
        shape = {name: getattr(model.config, name) for name in _SHAPE}
        weight = model.embedding.weight
        new = cls(SigmoidGPTConfig(**shape))
        torch.nn.Module.to(new, weight.device, weight.dtype)
        new.model.load_state_dict(model.state_dict())
        return new.train(model.training)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """'sigmoid', or a ValueError."""
        if requested_attention not in (None, "sigmoid"):
            raise ValueError(f"attn_implementation of a SigmoidGPT must be 'sigmoid', got {requested_attention!r}")
        return "sigmoid"

    def get_input_embeddings(self) -> torch.nn.Module:
        """Of tokens."""
        return self.model.embedding

    def set_input_embeddings(self, value: torch.nn.Embedding) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Replace it; its rows are the vocabulary."""
        self.model.embedding = value
        self.model.config = dataclasses.replace(self.model.config, vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> torch.nn.Module:
        """The head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: torch.nn.Linear) -> None:
        """Replace it."""
        self.model.head = new_embeddings

    def _init_weights(self, module: torch.nn.Module) -> None:
        if isinstance(module, GPT):
            module.reset_parameters()

    @staticmethod
    def create_masks_for_generate(
        inputs_embeds: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Which of the new tokens count, for caches of a fixed size: the earlier ones were told before.

        Of one shape, stride and dtype at every token, with padding and without (transformers leaves a mask of ones
        out): a compiler compiles anew for any other, and for each length of a view's strides.
        """
        batch, seqlen = inputs_embeds.shape[:2]
        if attention_mask is None:
            return torch.ones(batch, seqlen, dtype=torch.bool, device=inputs_embeds.device)
        return attention_mask[:, -seqlen:].to(torch.bool, copy=True, memory_format=torch.contiguous_format)

    @can_return_tuple  # return_dict=False
    def forward(
        self,
        input_ids: Int[Tensor, "batch seqlen"] | None = None,
        attention_mask: Int[Tensor, "batch seen"] | None = None,
        position_ids: Int[Tensor, "batch seqlen"] | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "batch seqlen dim"] | None = None,
        labels: Int[Tensor, "batch seqlen"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if there are labels.

        Args:
            input_ids: (batch, seqlen) int64.
            attention_mask: (batch, tokens before and these), 0 for padding on any side. Default: no padding.
            position_ids: may start anywhere, since distances are all that counts, but must rise by one: there are no
                packed sequences.
            cache, past_key_values: a cache of transformers, by its newer or its older name.
            inputs_embeds: (batch, seqlen, dim) in place of input_ids.
            labels: (batch, seqlen), -100 where there is none; shifted here.
            use_cache: make a cache where none is given, in eval mode. Default: config.use_cache.
            output_hidden_states: also what enters each block, and what enters the head. Default: the config's, False.
            logits_to_keep: of so many last tokens only, 0 is all; or a tensor of their places. Default: 0.
            options: of the loss, num_items_in_batch say.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds, an input longer than the context, a mask of
                another shape, packed sequences, or an option without meaning here.
        """
        for name in ("output_attentions", "cu_seq_lens_q", "seq_idx"):
            if options.get(name) is not None and options[name] is not False:
                raise ValueError(f"{name} must not be given to a SigmoidGPT, got {type(options[name]).__name__}")
        if (input_ids is None) == (inputs_embeds is None):
            how_many = "neither" if input_ids is None else "both"
            raise ValueError(f"one of input_ids and inputs_embeds must be given, got {how_many}")
        x = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        batch, seqlen = x.shape[:2]
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and not self.training and use_cache:
            cache = DynamicCache()
        key_mask = None
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < seqlen:
                raise ValueError(
                    f"attention_mask must be (batch, at least seqlen) for {(batch, seqlen)}, "
                    f"got {tuple(attention_mask.shape)}"
                )
            key_mask = attention_mask[:, -seqlen:].bool()
        _check_positions(position_ids, key_mask, seqlen)
        past = self._past(cache, batch, seqlen)
        x = self.model.dropout(x)
        states = [x]
        for i, block in enumerate(self.model.blocks):
            x = block(x, key_mask) if past is None else block(x, key_mask, cache=past.layer(i))
            states.append(x)
        states[-1] = x = self.model.norm(x)
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        logits = self.model.head(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states: Any = tuple(states) if output_hidden_states else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=hidden_states, **{_CACHE: cache})

    def _past(self, cache: Any, batch: int, seqlen: int) -> Any:
        if cache is None:
            self._check_length(seqlen)
            return None
        start = cache.get_seq_length()
        keys, _ = cache.get_mask_sizes(seqlen, 0)
        grows = not isinstance(start, Tensor) and keys == start + seqlen
        longest = keys if isinstance(start, Tensor) else start + seqlen
        self._check_length(longest)
        seqlens = torch.as_tensor(start, device=self.device).expand(batch).clone()
        return _Past(cache, seqlens, grows)

    def _check_length(self, longest: int) -> None:
        if longest > self.config.seqlen:
            raise ValueError(f"input and cache must have at most seqlen={self.config.seqlen} tokens, got {longest}")

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As any model, and a modelling file, so that a process that has not called `register` can load it.

        That needs trust_remote_code=True; the file imports flashsigmoid and nothing else. So can `transformers serve`,
        which looks up the architecture of a config among the names of transformers itself.
        """
        self.config.auto_map = {
            "AutoConfig": "modeling_sigmoid_gpt.SigmoidGPTConfig",
            "AutoModelForCausalLM": "modeling_sigmoid_gpt.SigmoidGPTForCausalLM",
        }
        super().save_pretrained(save_directory, **options)
        # not this class, which transformers has no name for; the auto class finds it by auto_map
        self.config.architectures = ["AutoModelForCausalLM"]
        self.config.save_pretrained(save_directory)
        (Path(save_directory) / "modeling_sigmoid_gpt.py").write_text(_MODELING, "utf-8")


def _check_positions(position_ids: Tensor | None, key_mask: Tensor | None, seqlen: int) -> None:
    """Packed sequences, whose positions begin anew, would see each other. A compiler has no values to look at."""
    if position_ids is None or seqlen < 2 or torch.compiler.is_compiling():
        return
    rises = position_ids.diff(dim=-1) == 1
    if key_mask is not None:
        rises = rises | ~(key_mask[:, 1:] & key_mask[:, :-1])  # of padding they are anything
    if not rises.all():
        raise ValueError(f"position_ids must rise by one, a SigmoidGPT packs no sequences, got {position_ids.tolist()}")


def export(model: GPT, tokenizer_json: str, out_dir: str | Path) -> Path:
    """A directory that transformers loads: config, safetensors, tokenizer, modelling file, model card.

    Args:
        model: a GPT of sigmoid attention.
        tokenizer_json: what `to_library_json` of its tokenizer says; its end of text ends a generation and pads.
        out_dir: new, or empty.

    Raises:
        ValueError: the model's attention is softmax; out_dir has files.
    """
    new, out_dir = SigmoidGPTForCausalLM.from_gpt(model), Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"out_dir must be new or empty, got {out_dir}")
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "tokenizer.json").write_text(tokenizer_json, "utf-8")
    end = "<|endoftext|>"
    tokenizer = Tokenizer(
        tokenizer_file=str(out_dir / "tokenizer.json"), eos_token=end, pad_token=end, padding_side="left",
        model_max_length=model.config.seqlen, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.save_pretrained(out_dir)
    for config in (new.config, new.generation_config):
        assert isinstance(config, PreTrainedConfig | GenerationConfig)
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    new.save_pretrained(out_dir)
    shape = new.config.gpt()
    by_slope = ", for each head made larger by its slope (`nn.alibi_bias`)" if shape.alibi_bias else ""
    card = _CARD.format(
        **dataclasses.asdict(shape), bias=shape.bias, by_slope=by_slope, parameters=parameter_count(shape),
        new_tokens=min(100, shape.seqlen // 2),
    )  # fmt: skip
    (out_dir / "README.md").write_text(card, "utf-8")
    return out_dir
