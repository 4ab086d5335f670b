"""layers.py: the bound holds for layers as they are trained, and is the better the less is estimated."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

from flashsigmoid import nn, sigmoid_attention
from flashsigmoid.diagnostics.theory.layers import layer_bound, matrix_norm, product_norm
from flashsigmoid.diagnostics.theory.regularity import jacobian_bound, weights_of

OPTIONS: list[dict[str, Any]] = [
    {"qk_norm": qk_norm, "position": position, "causal": causal, "nheads_k": nheads_k}
    for qk_norm, position, causal, nheads_k in itertools.product(
        (True, False), (None, "rope", "alibi"), (True, False), (4, 2)
    )
] + [
    {"proj_bias": True, "sigmoid_bias": 0.0},
    {"window_size": (2, 1), "sigmoid_bias": 1.0},
    {"bias_mode": "per_head", "sigmoid_bias": -1.0},
]


def layer(**options: Any) -> nn.SigmoidAttention:
    attend = functools.partial(sigmoid_attention, backend="reference")
    module = nn.SigmoidAttention(8, 4, attention_fn=attend, **options).double()
    for norm in (module.q_norm, module.k_norm):
        if isinstance(norm, torch.nn.RMSNorm):
            torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    return module


def jacobian_norm(module: nn.SigmoidAttention, x: torch.Tensor, key_mask: torch.Tensor | None = None) -> float:
    full = torch.func.jacrev(lambda one: module(one[None], None if key_mask is None else key_mask[None])[0])(x)
    return float(torch.linalg.matrix_norm(full.reshape(x.numel(), x.numel()), 2).detach())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_bound_holds(options: dict[str, Any]) -> None:
    for seed, length in itertools.product(range(3), (0.1, 1.0, 10.0)):
        torch.manual_seed(seed)
        module, x = layer(**options), length * torch.randn(2, 6, 8, dtype=torch.float64)
        bounds = layer_bound(module, x)
        norms = [jacobian_norm(module, one) for one in x]
        for norm, bound in zip(norms, bounds.tolist(), strict=True):
            assert 0 < norm <= bound


def test_the_bound_holds_beside_padding() -> None:
    module, x = layer(), torch.randn(1, 6, 8, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, False, True]])
    bound = float(layer_bound(module, x, mask))
    assert jacobian_norm(module, x[0], mask[0]) <= bound
    assert bound != float(layer_bound(module, x))


def test_it_is_below_the_bound_of_the_suprema() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        module, x = layer(qk_norm=False), torch.randn(3, 6, 8, dtype=torch.float64)
        # Schatten's norms are at most 2^(1/16) of heads of two channels
        assert (layer_bound(module, x) <= 1.14 * jacobian_bound(x, weights_of(module, 6), "scores")).all()


def test_it_is_reached() -> None:
    """One channel, b = 0, equal short tokens: a bound that is 1 % lower does not hold."""
    attend = functools.partial(sigmoid_attention, backend="reference")
    module = nn.SigmoidAttention(1, 1, qk_norm=False, sigmoid_bias=0.0, attention_fn=attend).double()
    x = torch.full((1, 64, 1), 1e-3, dtype=torch.float64)
    bound = float(layer_bound(module, x))
    assert 0.99 * bound < jacobian_norm(module, x[0]) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("shape", [(5, 3, 7), (4, 7, 3), (1, 1, 1)])
def test_norms_of_matrices_are_a_little_above_the_largest_singular_value(shape: tuple[int, ...]) -> None:
    x, y = torch.randn(shape).double(), torch.randn(shape[0], shape[2], 4).double()
    for found, exact, rank in (
        (matrix_norm(x), torch.linalg.matrix_norm(x, 2), min(shape[1:])),
        (product_norm(x, y), torch.linalg.matrix_norm(x @ y, 2), min(*shape[1:], 4)),
    ):
        assert (found >= exact * (1 - 1e-12)).all()
        assert (found <= rank ** (1 / 16) * exact * (1 + 1e-12)).all()
    assert matrix_norm(torch.zeros(2, 3)).item() < 1e-15


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.SoftmaxAttention(8, 2), "module must be an nn.SigmoidAttention"),
        (nn.SigmoidAttention(8, 2, gate=True), "module must be without a gate"),
        (nn.SigmoidAttention(8, 2, dropout_p=0.1), "module must be without dropout"),
    ],
)
def test_what_it_does_not_hold_for_is_one_clear_error(module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_bound(module, torch.randn(1, 3, 8))
