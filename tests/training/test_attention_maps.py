"""Where a Vision Transformer looks: the rows of the formula, the model left as it was, and what is in the file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from models.test_vision import SMALL, attentions, images
from rounding import assert_rounded

from flashsigmoid.backends.reference import attention_weights
from flashsigmoid.diagnostics import softmax_weights
from flashsigmoid.models.vision import build_vit
from flashsigmoid.nn.attention import sigmoid_attention, softmax_attention
from flashsigmoid.record import RecordWriter, read_records
from flashsigmoid.training.attention_maps import ARTIFACT, NAME, attention_rows, write_attention_maps
from flashsigmoid.training.images import ImageConfig, load_images

EPS = torch.finfo(torch.float32).eps


def relu_attention(q, k, v, *, scale, **options):
    """An attention that is neither: A = relu(scale * Q K^T) / n."""
    return torch.einsum("bihd,bjhd,bjhe->bihe", scale * q, k, v).relu() / q.shape[1]


@pytest.mark.parametrize("query", [0, None])
@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
@pytest.mark.parametrize("bias", [{}, {"sigmoid_bias": -1.0, "bias_mode": "per_head"}])
def test_rows_are_those_of_the_formula(attention, query, bias) -> None:
    torch.manual_seed(0)
    config = replace(SMALL, attention=attention, depth=3, **bias)
    model = build_vit(config).double().eval()
    formula = []

    def watch(q, k, v, **options):
        sigmoid_bias, scale = options["sigmoid_bias"], options["scale"]
        if attention == "sigmoid":
            formula.append(attention_weights(q, k, sigmoid_bias=sigmoid_bias, scale=scale))
            return sigmoid_attention(q, k, v, **options)
        formula.append(softmax_weights(q, k, scale=scale))
        return softmax_attention(q, k, v, **options)

    for each in attentions(model):
        each.attention_fn = watch
    with torch.no_grad():
        expected = model(images().double())
    for each in attentions(model):
        each.attention_fn = None
    # (batch, blocks, nheads, seqlen_q, seqlen_k)
    weights = torch.stack([formula[i] for i in (0, 2)], dim=1)[:, :, [1, 3]]
    rows = attention_rows(model, images().double(), blocks=[0, 2], heads=[1, 3], query=query)
    wanted = weights.mean(-2) if query is None else weights[..., query, :]
    assert_rounded(rows, wanted.float())
    assert all(each.attention_fn is None for each in attentions(model))
    with torch.no_grad():
        assert torch.equal(model(images().double()), expected)


def test_an_injected_attention_is_seen_as_it_is() -> None:
    torch.manual_seed(0)
    model = build_vit(SMALL, attention_fn=relu_attention).eval()
    model.blocks[0].attn.attention_fn = lambda q, k, v, **options: torch.full_like(v, 0.5)
    rows = attention_rows(model, images(), blocks=[0], heads=[0], query=0)
    assert torch.equal(rows, torch.full((2, 1, 1, 17), 0.5))
    assert model.blocks[1].attn.attention_fn is relu_attention


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = build_vit(SMALL).eval()
    with pytest.raises(AssertionError, match="Input"):
        attention_rows(model, torch.randn(1, 3, 40, 40), blocks=[0, 1], heads=[0], query=0)
    assert all(each.attention_fn is None for each in attentions(model))


@pytest.mark.parametrize(("attention", "pool"), [("sigmoid", "token"), ("softmax", "token"), ("softmax", "avg")])
def test_the_file(tmp_path, attention, pool) -> None:
    torch.manual_seed(0)
    data = load_images(ImageConfig(img_size=32))
    config = replace(SMALL, num_classes=10, in_chans=1, attention=attention, pool=pool, depth=5)
    with RecordWriter(tmp_path / "records.jsonl") as writer:
        write_attention_maps(writer, build_vit(config).eval(), data, step=7)
    (record,) = read_records(tmp_path / "records.jsonl").records
    assert (record.name, record.step, record.artifact) == (NAME, 7, ARTIFACT)
    with np.load(tmp_path / ARTIFACT) as file:
        found = dict(file)
    assert found["classes"].tolist() == ["0", "1", "2", "3"]
    assert (found["images"].dtype, found["images"].shape) == (np.uint8, (4, 1, 32, 32))
    for image, label in zip(found["images"], range(4), strict=True):
        first = next(x for x, y in (data.val[i] for i in range(100)) if y == label)
        assert np.array_equal(image, first.numpy())
    assert (found["blocks"].tolist(), found["heads"].tolist()) == ([0, 2, 4], [0, 1])
    assert found["maps"].shape == (4, 3, 2, 4, 4)
    assert str(found["query"]) == ("class token" if pool == "token" else "mean")
    on_patches = found["maps"].sum((-2, -1))
    if attention == "softmax":
        assert found["sums"] == pytest.approx(1.0, rel=17 * EPS)  # 17 terms at most
    if pool == "avg":  # there is no other token
        assert on_patches == pytest.approx(found["sums"], rel=16 * EPS)
    else:
        assert (on_patches < found["sums"]).all()
