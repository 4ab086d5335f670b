"""probes.py: the numbers against loops, both arms against their layers, and a model left as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashsigmoid.backends.reference import attention_weights
from flashsigmoid.diagnostics import attention_norm, probe_attention, row_mass, sink_mass, softmax_weights
from flashsigmoid.nn import SigmoidAttention, SoftmaxAttention, alibi_slopes, softmax_attention

ARMS = {"sigmoid": SigmoidAttention, "softmax": SoftmaxAttention}


class Model(nn.Module):
    """Two attention layers that run in the opposite order of their registration."""

    def __init__(self, arm: str, **options: Any) -> None:
        super().__init__()
        self.second = ARMS[arm](24, 4, **options)
        self.first = ARMS[arm](24, 4, **options)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return self.second(self.dropout(self.first(x, key_mask)), key_mask)


def test_attention_norm_is_a_mean_over_tokens_of_concatenated_heads() -> None:
    out = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = sum(
        math.sqrt(sum(out[b, i, h, d] ** 2 for h in range(4) for d in range(5))) for b in range(2) for i in range(3)
    )
    assert attention_norm(out).item() == pytest.approx(expected / 6, rel=1e-12)


def test_row_mass_and_sink_mass_by_hand() -> None:
    # (1, 1, 3, 2): the second row sees nothing
    weights = torch.tensor([[[[0.3, 0.1], [0.0, 0.0], [0.0, 0.5]]]], dtype=torch.float64)
    assert row_mass(weights).item() == pytest.approx((0.4 + 0.0 + 0.5) / 3, rel=1e-12)
    assert sink_mass(weights).item() == pytest.approx((0.75 + 0.0) / 2, rel=1e-12)
    assert math.isnan(sink_mass(torch.zeros(1, 1, 2, 2)).item())


def test_even_causal_weights_give_the_documented_sink() -> None:
    n = 7
    zeros = torch.zeros(1, n, 1, 4)
    expected = sum(1 / i for i in range(1, n + 1)) / n
    assert sink_mass(attention_weights(zeros, zeros, causal=True)).item() == pytest.approx(expected, rel=1e-6)
    assert sink_mass(softmax_weights(zeros, zeros, causal=True)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("measure", [attention_norm, row_mass, sink_mass])
def test_half_precision_is_measured_in_float32(measure: Any) -> None:
    x = torch.rand(2, 3, 4, 300, dtype=torch.bfloat16)
    assert measure(x).dtype == torch.float32
    assert measure(x).item() == measure(x.float()).item()


@pytest.mark.parametrize("nheads_k", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(None, None), (2, 1)])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 5), (3, 7), (7, 3)])
def test_softmax_weights_are_those_of_softmax_attention(
    nheads_k: int,
    causal: bool,
    window_size: tuple[int | None, int | None],
    alibi: bool,
    masked: bool,
    seqlen_q: int,
    seqlen_k: int,
) -> None:
    q = torch.randn(2, seqlen_q, 4, 8, dtype=torch.float64)
    k = torch.randn(2, seqlen_k, nheads_k, 8, dtype=torch.float64)
    # values that read the weights out: out = A I, for one head at a time
    v = torch.eye(seqlen_k, dtype=torch.float64)[None, :, None, :].expand(2, -1, nheads_k, -1)
    options: dict[str, Any] = {"scale": 0.7, "causal": causal, "window_size": window_size}
    if alibi:
        options["alibi_slopes"] = alibi_slopes(4)
    if masked:
        options["key_mask"] = torch.rand(2, seqlen_k) > 0.4
    weights = softmax_weights(q, k, **options)
    torch.testing.assert_close(weights.transpose(1, 2), softmax_attention(q, k, v, **options), rtol=1e-9, atol=1e-12)
    rows = weights.sum(-1)
    assert torch.all(torch.isclose(rows, torch.ones_like(rows)) | (rows == 0))


@pytest.mark.parametrize("arm", ["sigmoid", "softmax"])
@pytest.mark.parametrize("position", [None, "rope", "alibi"])
def test_probes_agree_with_weights_taken_by_hand(arm: str, position: str | None) -> None:
    n = 9
    model = Model(arm, causal=True, position=position, nheads_k=2, sigmoid_bias=-1.0)
    x = torch.randn(3, n, 24)
    probes = probe_attention(model, x)
    assert [(p.layer, p.name, p.attention) for p in probes] == [(0, "first", arm), (1, "second", arm)]

    layer = model.first
    q = layer.rope(layer.q_norm(layer.q_proj(x).unflatten(-1, (4, 6))))
    k = layer.rope(layer.k_norm(layer.k_proj(x).unflatten(-1, (2, 6)))).repeat_interleave(2, 2)
    v = layer.v_proj(x).unflatten(-1, (2, 6)).repeat_interleave(2, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(6)
    if position == "alibi":
        i = torch.arange(n)
        scores = scores - alibi_slopes(4)[:, None, None] * (i[:, None] - i).abs()
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    if arm == "sigmoid":
        a = torch.sigmoid(scores - 1.0).masked_fill(hidden, 0.0)
    else:
        a = scores.masked_fill(hidden, -math.inf).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", a, v)

    first = probes[0]
    assert first.attention_norm == pytest.approx(out.flatten(2).norm(dim=-1).mean().item(), rel=1e-5)
    assert first.row_mass == pytest.approx(a.sum(-1).mean().item(), rel=1e-5)
    assert first.sink_mass == pytest.approx((a[..., 0] / a.sum(-1)).mean().item(), rel=1e-5)
    assert first.max_weight == pytest.approx(a.max().item(), rel=1e-5)


def test_padded_keys_weigh_nothing_in_softmax() -> None:
    model = Model("softmax")
    key_mask = torch.tensor([[False, True, True, True]])
    assert all(probe.sink_mass == 0.0 for probe in probe_attention(model, torch.randn(1, 4, 24), key_mask=key_mask))


@pytest.mark.parametrize("arm", ["sigmoid", "softmax"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(arm: str, fails: bool) -> None:
    model = Model(arm, causal=True, dropout_p=0.3).train()
    model.first.q_proj.eval()  # a mode of its own
    modes = [module.training for module in model.modules()]
    functions = [model.first.attention_fn, model.second.attention_fn]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 5, 24, requires_grad=True)
    random = torch.get_rng_state()

    if fails:
        model.second.out_proj.register_forward_pre_hook(lambda *_: torch.rand(1) and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            probe_attention(model, x)
    else:
        without_dropout = Model(arm, causal=True).eval()
        without_dropout.load_state_dict(state)
        torch.set_rng_state(random)
        assert probe_attention(model, x) == probe_attention(without_dropout, x)
    assert [module.training for module in model.modules()] == modes
    assert [model.first.attention_fn, model.second.attention_fn] == functions
    assert torch.equal(torch.get_rng_state(), random)
    assert x.grad is None
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("arm", ["sigmoid", "softmax"])
def test_weights_are_float32_under_autocast(arm: str) -> None:
    seen = []

    def attention_fn(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((q, k, options))
        return softmax_attention(q, k, v, **options)

    model = Model(arm, causal=True, sigmoid_bias=-2.0, attention_fn=attention_fn)
    with torch.autocast("cpu", torch.bfloat16):
        probes = probe_attention(model, torch.randn(2, 33, 24))
    q, k, options = seen[0]
    assert q.dtype == torch.bfloat16
    if arm == "sigmoid":
        weights = attention_weights(q.float(), k.float(), sigmoid_bias=-2.0, scale=options["scale"], causal=True)
    else:
        weights = softmax_weights(q.float(), k.float(), scale=options["scale"], causal=True)
    assert probes[0].max_weight == weights.max().item()


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="must contain a SigmoidAttention or a SoftmaxAttention, got Linear"):
        probe_attention(nn.Linear(2, 2), torch.randn(1, 2))
