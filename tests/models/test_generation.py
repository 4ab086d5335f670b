"""Sampling: what each option may draw, the cache, the window of the context, the random state, errors."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from rounding import LAYER, assert_rounded

from flashsigmoid import sigmoid_attention
from flashsigmoid.models.generation import generate, kept, stream
from flashsigmoid.models.gpt import GPT, GPTConfig
from flashsigmoid.testing import assert_within_budget

CONFIG = GPTConfig(vocab_size=50, seqlen=8, nlayers=1, dim=16, nheads=2, dropout_p=0.5)


@pytest.fixture
def model():
    return GPT(CONFIG)


def test_the_prompt_is_continued_beyond_the_context(model):
    prompt = torch.randint(50, (2, 3))
    tokens = generate(model, prompt, 12, seed=0)
    assert tokens.shape == (2, 15)
    assert torch.equal(tokens[:, :3], prompt)
    assert tokens.min() >= 0
    assert tokens.max() < 50
    # the last token was drawn from the last 8 before it
    greedy = generate(model, tokens, 1, temperature=0.0)[:, -1]
    assert torch.equal(greedy, generate(model, tokens[:, -8:], 1, temperature=0.0)[:, -1])


SHAPES = [
    {},
    {"position": "rope", "nheads_k": 1, "gate": True},
    {"window_size": (5, None), "norm": "hybrid", "layer_scale": 0.5},
    {"sigmoid_bias": -1.0, "qk_norm": False, "mlp": "gelu"},
    {"sigmoid_bias": -6.0, "out_norm": True},
    {"alibi_bias": True},
    {"attention": "softmax"},
    {"attention": "softmax", "position": "rope", "nheads_k": 1, "window_size": (5, None)},
]


def reordered(model: GPT) -> GPT:
    """The same function, with the channels of the residual stream in a random order: its sums round in other places."""
    model, order = copy.deepcopy(model), torch.randperm(model.config.dim)
    for name, parameter in model.named_parameters():
        if not any(head in name for head in ("q_norm", "k_norm", "attention.out_norm")):
            ends_branch = name.endswith(("out_proj.weight", "down_proj.weight")) or parameter.dim() == 1
            parameter.data = parameter.data[order] if ends_branch else parameter.data[:, order]
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_and_decoding_are_the_full_forward_at_every_position(shape):
    model = GPT(replace(CONFIG, seqlen=24, nlayers=3, dim=32, **shape)).eval()
    exact_model = copy.deepcopy(model).double()
    tokens = torch.randint(50, (3, 24))
    prompt = 5
    with torch.no_grad():
        cache = model.new_cache(3)
        logits = [model(tokens[:, :prompt], cache)]
        cache.seqlens = cache.seqlens + prompt
        for t in range(prompt, 24):
            logits.append(model(tokens[:, t : t + 1], cache))
            cache.seqlens = cache.seqlens + 1
        decoded = torch.cat(logits, dim=1)
        exact = exact_model(tokens)
        near = torch.stack([reordered(model)(tokens) for _ in range(8)])
    # or the budget would have no meaning; three layers of an attention and an MLP
    assert_rounded(near, exact.float().expand_as(near), 6 * LAYER)
    for t in range(24):
        assert_within_budget(f"logits[{t}]", decoded[:, t], exact[:, t], near[:, :, t])


@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[4:5], ids=str)
def test_tokens_are_the_same_with_and_without_a_cache_in_a_batch_and_alone(shape):
    model = GPT(replace(CONFIG, seqlen=16, nlayers=2, dim=32, **shape))
    lengths = torch.tensor([3, 9, 1, 6])
    prompts = torch.randint(50, (4, 9)).masked_fill(torch.arange(9) >= lengths[:, None], -100)
    # 12 new tokens lead the longest beyond the context of 16, the others not
    greedy = {"max_new_tokens": 12, "temperature": 0.0}
    batch = generate(model, prompts, lengths=lengths, **greedy)
    assert batch.shape == (4, 21)
    assert torch.equal(batch, generate(model, prompts, lengths=lengths, use_cache=False, **greedy))
    for row, prompt, length in zip(batch, prompts, lengths.tolist(), strict=True):
        alone = generate(model, prompt[None, :length], **greedy)[0]
        assert torch.equal(row[: length + 12], alone)
        assert (row[length + 12 :] == -100).all()
    drawn = {"max_new_tokens": 12, "top_p": 0.9, "seed": 3}
    assert torch.equal(generate(model, prompts[1:2], **drawn), generate(model, prompts[1:2], use_cache=False, **drawn))


def test_padding_among_the_tokens_is_masked_for_good():
    model = GPT(replace(CONFIG, position="alibi")).eval().double()
    tokens = torch.randint(50, (2, 6))
    mask = torch.tensor([[True] * 6, [False, False, True, True, False, True]])
    with torch.no_grad():
        cache = model.new_cache(2)
        logits = [model(tokens[:, :5], cache, mask[:, :5])]
        cache.seqlens = cache.seqlens + 5
        logits.append(model(tokens[:, 5:], cache, mask[:, 5:]))
        full = model(tokens, key_mask=mask)
        assert_rounded(torch.cat(logits, dim=1), full)
        assert_rounded(full[:1], model(tokens[:1]))
        assert_rounded(full[1:, 2:4], model(tokens[1:, 2:4]))


def test_a_step_computes_new_tokens_only(model):
    seen = []
    model.embedding.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    generate(model, torch.zeros(1, 5, dtype=torch.long), 6)
    # the context of 8 is full after 3 steps: then every window is computed anew
    assert seen == [5, 1, 1, 1, 8, 8]


def test_an_injected_attention_is_asked_without_a_cache():
    def attend(*args, **options):
        calls.append(args[0].shape[1])
        return sigmoid_attention(*args, **options)

    calls = []
    model = GPT(CONFIG, attention_fn=attend)
    prompt = torch.zeros(1, 2, dtype=torch.long)
    generate(model, prompt, 3)
    assert calls == [2, 3, 4]
    with pytest.raises(ValueError, match="use_cache must be False"):
        stream(model, prompt, 3, use_cache=True)
    with pytest.raises(ValueError, match="cache needs a causal module in eval mode with its own attention_fn"):
        model.eval()(prompt, model.new_cache(1))


def test_a_cache_is_not_for_training(model):
    with pytest.raises(ValueError, match="training=True"):
        model(torch.zeros(1, 2, dtype=torch.long), model.new_cache(1))
    with pytest.raises(ValueError, match="q must not require a gradient"):
        model.eval()(torch.zeros(1, 2, dtype=torch.long), model.new_cache(1))
    softmax, mask = GPT(replace(CONFIG, attention="softmax")).eval(), torch.ones(1, 2, dtype=torch.bool)
    with torch.no_grad(), pytest.raises(ValueError, match="key_mask must be None with a cache"):
        softmax(torch.zeros(1, 2, dtype=torch.long), softmax.new_cache(1), mask)
    with torch.no_grad(), pytest.raises(ValueError, match="cache_seqlens must be from 0 to capacity"):
        model(torch.zeros(1, 4, dtype=torch.long), model.new_cache(1, 3))


def test_the_seed_decides_and_the_global_state_is_left_alone(model):
    prompt = torch.zeros(1, 2, dtype=torch.long)
    state = torch.get_rng_state()
    first = generate(model, prompt, 20, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, generate(model, prompt, 20, seed=7))
    assert not torch.equal(first, generate(model, prompt, 20, seed=8))
    assert not torch.equal(generate(model, prompt, 20), generate(model, prompt, 20))


def test_streaming_draws_what_generate_draws_and_leaves_the_mode(model):
    prompt = torch.zeros(2, 2, dtype=torch.long)
    streamed = []
    for token in stream(model, prompt, 5, seed=1):
        assert model.training
        streamed.append(token)
    assert torch.equal(torch.stack(streamed, dim=1), generate(model, prompt, 5, seed=1)[:, 2:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_text_ends_with_its_stop_token_and_the_stream_with_the_last_text(model, use_cache):
    prompts, lengths = torch.randint(50, (3, 4)), torch.tensor([4, 1, 2])
    options = {"lengths": lengths, "seed": 5, "use_cache": use_cache}
    plain = torch.stack(list(stream(model, prompts, 12, **options)), dim=1)
    stop = int(plain[0, 2])
    ends = [row.index(stop) if stop in row else 11 for row in plain.tolist()]
    assert min(ends) < max(ends)
    drawn = torch.stack(list(stream(model, prompts, 12, stop_token=stop, **options)), dim=1)
    assert drawn.shape == (3, max(ends) + 1)
    for row, free, end in zip(drawn.tolist(), plain.tolist(), ends, strict=True):
        assert row == (free[: end + 1] + [stop] * 12)[: max(ends) + 1]
    both = generate(model, prompts, 12, stop_token=stop, **options)
    assert both.shape == (3, 4 + drawn.shape[1])
    for row, prompt, length, new in zip(both, prompts, lengths.tolist(), drawn, strict=True):
        assert torch.equal(row, torch.cat([prompt[:length], new, prompt[length:]]))
    # of a text alone the stop token is the last of all
    alone = [int(token) for token in stream(model, prompts[:1], 12, stop_token=stop, seed=5, use_cache=use_cache)]
    assert alone.index(stop) == len(alone) - 1 if stop in alone else len(alone) == 12


def test_temperatures_near_zero_top_k_one_and_a_tiny_top_p_are_greedy(model):
    prompt = torch.randint(50, (2, 4))
    greedy = generate(model, prompt, 6, temperature=0.0)
    assert torch.equal(greedy, generate(model, prompt, 6, temperature=1e-40))  # the logits over it are infinite
    assert torch.equal(greedy, generate(model, prompt, 6, top_k=1))
    assert torch.equal(greedy, generate(model, prompt, 6, top_p=1e-6))


def test_kept():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]]).log()

    def left(**options):
        return (kept(logits, **options) > -torch.inf).tolist()

    assert left(top_k=None, top_p=None) == [[True] * 4] * 2
    assert left(top_k=9, top_p=1.0) == [[True] * 4] * 2
    assert left(top_k=1, top_p=None) == [[True, False, False, False], [False, False, False, True]]
    # 0.5 alone is less than 0.6, 0.7 is not
    assert [sum(row) for row in left(top_k=None, top_p=0.6)] == [2, 1]
    # of the top two, 0.5 / 0.7 is enough
    assert left(top_k=None, top_p=0.5) == [[True, False, False, False], [False, False, False, True]]


@pytest.mark.parametrize(
    ("prompt", "options", "rule"),
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, "tokens must be"),
        (torch.zeros(3, dtype=torch.long), {}, "tokens must be"),
        (None, {"lengths": torch.tensor([0])}, "lengths must be from 1 to seqlen=1"),
        (None, {"lengths": torch.tensor([2])}, "lengths must be from 1 to seqlen=1"),
        (None, {"lengths": [1]}, r"lengths must be a tensor of integers \(batch,\) = \(1,\), got \[1\]"),
        (None, {"lengths": torch.tensor([1.0])}, "lengths must be integers"),
        (None, {"lengths": torch.tensor([1, 1])}, "lengths must be integers"),
        (None, {"max_new_tokens": -1}, "max_new_tokens must be a non-negative integer, got -1"),
        (None, {"temperature": -0.5}, "temperature must not be negative, got -0.5"),
        (None, {"temperature": float("nan")}, "temperature must not be negative, got nan"),
        (None, {"top_k": 0}, "top_k must be a positive integer, got 0"),
        (None, {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        (None, {"stop_token": 50}, "stop_token must be an integer from 0 to vocab_size - 1 = 49, got 50"),
        (None, {"stop_token": "x"}, "stop_token must be an integer"),
        (None, {"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_errors_come_at_the_call(model, prompt, options, rule):
    prompt = torch.zeros(1, 1, dtype=torch.long) if prompt is None else prompt
    with pytest.raises(ValueError, match=rule):
        stream(model, prompt, **{"max_new_tokens": 3, **options})
