"""The learning rate's shape and which parameters decay."""

from __future__ import annotations

import pytest
import torch
from rounding import assert_rounded
from training.tiny import tiny_model

from flashsigmoid.models.gpt import GPT
from flashsigmoid.training.optim import OptimConfig, adamw, lr_at


def test_warm_up_then_cosine_to_a_tenth():
    config = OptimConfig(lr=2.0, warmup=4)
    rates = [lr_at(step, 105, config) for step in range(105)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[104] == pytest.approx(0.2, rel=1e-12)
    assert rates[54] == pytest.approx(1.1, rel=1e-12)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (5, 10)])
def test_short_runs_have_a_rate_at_every_step(steps, warmup):
    assert all(0.0 < lr_at(step, steps, OptimConfig(lr=1.0, warmup=warmup)) <= 1.0 for step in range(steps))


def test_only_matrices_decay():
    """A step without gradient shrinks matrices by 1 - lr * decay and leaves every norm as it was."""
    model = GPT(tiny_model(norm="hybrid", layer_scale=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw(model, OptimConfig(lr=0.5, warmup=0, weight_decay=0.1)).step()
    for name, p in model.named_parameters():
        expected = before[name] * (0.95 if p.dim() == 2 else 1.0)
        assert_rounded(p, expected, 1, name=name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", float("nan")),
        ("warmup", -1),
        ("final_lr", 1.5),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("weight_decay", -0.1),
        ("clip", 0.0),
    ],
)
def test_bad_configs(field, value):
    with pytest.raises(ValueError, match=f"{field} must "):
        OptimConfig(**{"lr": 1e-3, "warmup": 1, field: value})
