"""attn_implementation="sigmoid" against an eager reference on the same weights: models, padding, caches, training.

The reference is transformers' eager implementation with the sigmoid written in: every mask as transformers builds it,
float and dense, keys repeated for their groups.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from rounding import LAYER, assert_rounded

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.cache_utils import StaticCache  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    bidirectional_mask_function,
    eager_mask,
    sliding_window_causal_mask_function,
)

from flashsigmoid.integrations.transformers import register, sigmoid_mask  # noqa: E402

BIAS = -math.log(24)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0}


def eager(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """The equation, with a dense mask that is added."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.mT * scaling + module.config.sigmoid_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.sigmoid(scores)
    return (weights @ value).transpose(1, 2).contiguous(), weights


register()
AttentionInterface.register("sigmoid_eager", eager)
AttentionMaskInterface.register("sigmoid_eager", eager_mask)


def llama(**changed):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**TEXT, "num_key_value_heads": 2, "sigmoid_bias": BIAS, **changed})
    )


def qwen(**changed):
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**{**TEXT, "num_key_value_heads": 1, "sigmoid_bias": BIAS, **changed})
    )


def qwen_of_windows():
    return qwen(use_sliding_window=True, sliding_window=4, max_window_layers=1)


def bert():
    return transformers.BertModel(transformers.BertConfig(**TEXT, sigmoid_bias=BIAS), add_pooling_layer=False)


def vit():
    return transformers.ViTModel(
        transformers.ViTConfig(**SIZES, image_size=24, patch_size=8, sigmoid_bias=-math.log(10)),
        add_pooling_layer=False,
    )


def pair(build) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights, with ours and with the reference, in float64: what differs then is a mistake."""
    model = build().eval().double()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # transformers starts at 0.02, where attention hardly matters
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    ours, reference = copy.deepcopy(model), model
    ours.set_attn_implementation("sigmoid")
    reference.set_attn_implementation("sigmoid_eager")
    return ours, reference


def texts(side: str) -> dict[str, Any]:
    """Three texts of 9, 5 and 1 tokens in a batch, padded on the left, on the right, on both sides, or not at all."""
    tokens = torch.randint(1, 40, (3, 9))
    lengths = torch.tensor([9, 9, 9] if side == "none" else [9, 5, 1])
    start = {"left": 9 - lengths, "both": (9 - lengths) // 2}.get(side, 0 * lengths)[:, None]
    place = torch.arange(9)
    keep = (place >= start) & (place < start + lengths[:, None])
    return {"input_ids": tokens.masked_fill(~keep, 0), "attention_mask": keep.long()}


def hidden(model, **inputs) -> torch.Tensor:
    out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def with_cache(model, tokens, cache):
    """transformers 5.24 has renamed the argument."""
    names = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    return model(tokens, **{"cache" if "cache" in names else "past_key_values": cache})


@pytest.mark.parametrize("side", ["none", "left", "right", "both"])
@pytest.mark.parametrize("build", [llama, qwen, qwen_of_windows, bert])
def test_texts_with_padding(build, side):
    ours, reference = pair(build)
    inputs = texts(side)
    if side == "none" and build is not bert:
        del inputs["attention_mask"]
    keep = inputs.get("attention_mask", torch.ones(3, 9)).bool()
    out = hidden(ours, **inputs)
    assert out.isfinite().all()
    # the rows of padding are nobody's
    assert_rounded(out[keep], hidden(reference, **inputs)[keep])


def test_padding_changes_nothing():
    """Not only the same mistake twice: a padded text is the text alone."""
    ours, _ = pair(qwen)
    inputs = texts("left")
    position = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    alone = hidden(ours, input_ids=inputs["input_ids"][1:2, 4:])
    assert_rounded(hidden(ours, **inputs, position_ids=position)[1:2, 4:], alone)


def test_images():
    ours, reference = pair(vit)
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    assert_rounded(hidden(ours, pixel_values=images), hidden(reference, pixel_values=images))


def test_packed_sequences():
    ours, reference = pair(llama)
    inputs = {"input_ids": torch.randint(1, 40, (1, 9)), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])}
    inputs["use_cache"] = False  # with a cache transformers takes positions for those of one sequence
    out = hidden(ours, **inputs)
    assert_rounded(out, hidden(reference, **inputs))
    assert_rounded(out[:, 4:7], hidden(ours, input_ids=inputs["input_ids"][:, 4:7]))


def test_packed_sequences_that_only_their_lengths_tell_are_refused():
    """transformers makes a mask from positions, and none from lengths, which would then be ignored."""
    ours, _ = pair(llama)
    tokens, lengths = torch.randint(1, 40, (1, 9)), {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32)}
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with pytest.raises(ValueError, match="cu_seq_lens_q must come with position_ids that begin anew"):
        ours(tokens, use_cache=False, **lengths)
    out = ours(tokens, position_ids=position, use_cache=False, **lengths).logits
    assert_rounded(out[:, 4:], ours(tokens[:, 4:]).logits)


def test_looking_both_ways_with_a_causal_model():
    ours, reference = pair(lambda: llama(is_causal=False))
    inputs = texts("none")
    del inputs["attention_mask"]
    out = hidden(ours, **inputs)
    assert_rounded(out, hidden(reference, **inputs))
    assert not torch.allclose(out[:, :3], hidden(ours, input_ids=inputs["input_ids"][:, :3]))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("build", [llama, qwen_of_windows])
def test_generate(build, cache):
    ours, reference = pair(build)
    inputs = texts("left")
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached = ours.generate(**inputs, **options, cache_implementation=cache)
    plain = reference.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    assert_rounded(torch.stack(cached.logits), torch.stack(plain.logits))


def test_a_draft_of_another_model_changes_no_token():
    """Several tokens at a time on a cache that is cut back again."""
    ours, reference = pair(llama)
    tokens, options = torch.randint(1, 40, (1, 9)), {"max_new_tokens": 12, "do_sample": False}
    expected = reference.generate(tokens, use_cache=False, **options)
    for draft in ({"assistant_model": pair(llama)[0]}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}):
        assert torch.equal(ours.generate(tokens, **options, **draft), expected), draft


def test_beams():
    ours, reference = pair(qwen)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    inputs = texts("left")
    expected = reference.generate(**inputs, **options, use_cache=False)
    assert torch.equal(ours.generate(**inputs, **options), expected)
    assert torch.equal(ours.generate(**inputs, **options, cache_implementation="static"), expected)


def test_prefill_in_chunks_with_a_dynamic_cache():
    ours, _ = pair(llama)
    tokens = torch.randint(1, 40, (2, 9))
    cache, parts = transformers.DynamicCache(), []
    for chunk in tokens.split(4, dim=1):
        parts.append(with_cache(ours, chunk, cache).logits)
    assert_rounded(torch.cat(parts, dim=1), ours(tokens).logits)


def test_a_static_cache_under_torch_compile():
    torch.compiler.reset()
    ours, reference = pair(llama)
    tokens = torch.randint(1, 40, (2, 9))
    cache = StaticCache(config=ours.config, max_cache_len=12)
    with torch.no_grad():
        logits = [with_cache(ours, tokens[:, :6], cache).logits]
        step = torch.compile(ours, backend="eager", fullgraph=True)
        logits += [with_cache(step, tokens[:, t : t + 1], cache).logits for t in range(6, 9)]
        assert_rounded(torch.cat(logits, dim=1), reference(tokens).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("build", [llama, bert])
def test_training(build, checkpointing):
    ours, reference = pair(build)
    inputs = texts("right")
    keep = inputs["attention_mask"].bool()
    for model in (ours, reference):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        if hasattr(model, "embeddings"):
            for name in ("attention_probs_dropout_prob", "hidden_dropout_prob"):
                setattr(model.config, name, 0.0)
    if checkpointing:
        enable = "activation_checkpointing_enable"  # of 5.24, before it gradient_checkpointing_enable
        getattr(ours, enable if hasattr(ours, enable) else "gradient_checkpointing_enable")()
    weight = None
    for model in (ours, reference):
        out = hidden(model, **inputs)[keep]
        # not the mean of squares: the last norm makes a constant of it, and of all gradients before it nothing
        weight = torch.randn_like(out) if weight is None else weight
        (out * weight).mean().backward()
    size = max(p.grad.abs().max().item() for p in reference.parameters() if p.grad is not None)
    for (name, ours_p), (_, theirs) in zip(ours.named_parameters(), reference.named_parameters(), strict=True):
        assert (ours_p.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert theirs.grad.abs().max() > 1e-6 * size, name
            assert_rounded(ours_p.grad, theirs.grad, 4 * LAYER, name=name)


def test_masks_say_no_more_than_attention_has_to_be_told():
    padding = torch.tensor([[False, True, True, True], [True, True, True, True]])
    sizes = {"batch_size": 2, "q_length": 4, "kv_length": 4}
    both = {"mask_function": bidirectional_mask_function}
    assert sigmoid_mask(**sizes) is None
    assert sigmoid_mask(**sizes, **both) is None
    assert torch.equal(sigmoid_mask(**sizes, attention_mask=padding), padding[:, None, None])
    mask = sigmoid_mask(**sizes, attention_mask=padding, **both)
    assert mask.shape == (2, 1, 4, 4)
    assert mask.stride(2) == 0
    # a static cache with room for 7: at prefill the mask ends where the queries do, at a step it knows how far it is
    static = {**sizes, "kv_length": 7}
    assert sigmoid_mask(**static).tolist() == [[[[True] * 4]]] * 2
    step = sigmoid_mask(**{**static, "q_length": 1}, q_offset=torch.tensor(3), attention_mask=padding)
    assert step[:, 0, 0].tolist() == [[False, True, True, True, *[False] * 3], [True] * 4 + [False] * 3]
    # later chunks whose place only the device knows, and windows, are written out
    chunk = sigmoid_mask(**{**static, "q_length": 2}, q_offset=torch.tensor(3))
    assert chunk[0, 0].long().tolist() == [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]
    window = sigmoid_mask(**sizes, mask_function=sliding_window_causal_mask_function(2))
    assert window[0, 0].long().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_attention_dropout_drops():
    ours, _ = pair(lambda: llama(attention_dropout=0.5))
    tokens = torch.randint(1, 40, (2, 9))
    quiet = ours(tokens).logits
    ours.train()
    assert not torch.allclose(ours(tokens).logits, quiet)


def test_the_bias_is_saved_and_loaded(tmp_path):
    ours, _ = pair(qwen)
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sigmoid", dtype="auto")
    assert loaded.config.sigmoid_bias == BIAS
    tokens = torch.randint(1, 40, (1, 9))
    assert_rounded(loaded(tokens).logits, ours(tokens).logits)


@pytest.mark.parametrize("b", [None, "-3", True])
def test_a_missing_bias_is_one_error_that_names_it(b):
    model = llama(sigmoid_bias=b, attn_implementation="sigmoid")
    rule = r"LlamaConfig.sigmoid_bias must be a number, -log of the training length: -4.1589 for its "
    with pytest.raises(ValueError, match=rule + r"max_position_embeddings=64, -1.0986 for the 3 keys of this call"):
        model(torch.ones(1, 3, dtype=torch.long))


def test_a_softmax_only_option_is_refused():
    model = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**TEXT, head_dim=8, num_key_value_heads=2, attn_implementation="sigmoid")
    )
    model.config.sigmoid_bias = BIAS
    with pytest.raises(ValueError, match="softcap must not be given with attn_implementation='sigmoid', got 50"):
        model(torch.ones(1, 3, dtype=torch.long))
