"""Sampling: what each option may draw, the window of the context, the random state, errors."""

from __future__ import annotations

import pytest
import torch

from flashsigmoid.models.generation import generate, kept, stream
from flashsigmoid.models.gpt import GPT, GPTConfig

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


def test_temperature_zero_top_k_one_and_a_tiny_top_p_are_greedy(model):
    prompt = torch.randint(50, (2, 4))
    greedy = generate(model, prompt, 6, temperature=0.0)
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
        (None, {"max_new_tokens": -1}, "max_new_tokens must not be negative, got -1"),
        (None, {"temperature": -0.5}, "temperature must not be negative, got -0.5"),
        (None, {"temperature": float("nan")}, "temperature must not be negative, got nan"),
        (None, {"top_k": 0}, "top_k must be at least 1, got 0"),
        (None, {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        (None, {"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_errors_come_at_the_call(model, prompt, options, rule):
    prompt = torch.zeros(1, 1, dtype=torch.long) if prompt is None else prompt
    with pytest.raises(ValueError, match=rule):
        stream(model, prompt, **{"max_new_tokens": 3, **options})
