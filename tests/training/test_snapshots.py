"""Snapshots of attention: the formula's weights, when they are taken, what is in the file; training stays the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models.test_vision import SMALL
from rounding import assert_rounded

from flashsigmoid.backends.reference import attention_weights
from flashsigmoid.diagnostics import softmax_weights
from flashsigmoid.models.gpt import GPT
from flashsigmoid.models.vision import build_vit
from flashsigmoid.nn.attention import SigmoidAttention
from flashsigmoid.record import RecordWriter, read_records
from flashsigmoid.training.attention_maps import write_image_snapshot
from flashsigmoid.training.checkpoint import load_model
from flashsigmoid.training.images import ImageConfig, load_images
from flashsigmoid.training.language import LanguageModule, load_data, train
from flashsigmoid.training.snapshots import NAME, is_due, see, write_snapshot

from .tiny import differences, remains, tiny_model, tiny_run, write_text


def attentions_of(model):
    found = [module for module in model.modules() if isinstance(module, SigmoidAttention)]
    return [(attention, attention.attention_fn) for attention in found]


@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
def test_weights_and_norms_are_those_of_the_formula(attention) -> None:
    torch.manual_seed(0)
    model = GPT(tiny_model(attention=attention, dim=32, nheads=4, nheads_k=2)).double().eval()
    tokens = torch.randint(257, (2, 11))
    attentions = attentions_of(model)
    formula, norms = [], []

    def spied(attend):
        def spy(q, k, v, **options):
            own = {key: value for key, value in options.items() if key != "dropout_p"}
            if attention == "softmax":
                del own["sigmoid_bias"]
            formula.append((attention_weights if attention == "sigmoid" else softmax_weights)(q, k, **own))
            out = attend(q, k, v, **options)
            norms.append(out.transpose(1, 2).norm(dim=-1))
            return out

        return spy

    with torch.no_grad():
        before = model(tokens)
        for module, attend in attentions:
            module.attention_fn = spied(attend)
        model(tokens)
    for module, attend in attentions:
        module.attention_fn = attend
    seen = see(lambda: model(tokens), attentions, [1, 3])
    assert_rounded(seen.weights, torch.stack(formula, 1)[:, :, [1, 3]].float())
    assert_rounded(seen.norms, torch.stack(norms, 1)[:, :, [1, 3]].float())
    assert [module.attention_fn for module, _ in attentions] == [attend for _, attend in attentions]
    with torch.no_grad():
        assert torch.equal(model(tokens), before)


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = GPT(tiny_model())
    attentions = attentions_of(model)
    with pytest.raises(ValueError, match="tokens must be"):
        see(lambda: model(torch.zeros(1, 99, dtype=torch.long)), attentions, [0])
    assert [module.attention_fn for module, _ in attentions] == [attend for _, attend in attentions]


@pytest.mark.parametrize(
    ("count", "steps"),
    [(0, []), (1, [60]), (2, [0, 60]), (3, [0, 30, 60]), (4, [0, 20, 40, 60]), (99, [0, 10, 20, 30, 40, 50, 60])],
)
def test_snapshots_are_spread_over_the_validations(count, steps) -> None:
    run = tiny_run(None, steps=60, val_every=10)
    assert [step for step in range(61) if is_due(run, count, step)] == steps


def test_a_count_that_is_none_is_an_error() -> None:
    for count in (-1, 1.5, True):
        with pytest.raises(ValueError, match=r"attention_snapshots must be (a non-negative|an) integer, got"):
            tiny_run(None, attention_snapshots=count)


@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
def test_a_training_leaves_what_its_models_attend_to(tmp_path: Path, attention) -> None:
    model = tiny_model(attention=attention, dim=32, nheads=2, dropout_p=0.2)
    run = tiny_run(write_text(tmp_path / "text.txt"), model=model, attention_snapshots=2)
    train(run, tmp_path / "run", device="cpu")
    records = [r for r in read_records(tmp_path / "run" / "records.jsonl").records if r.name == NAME]
    assert [(r.step, r.artifact) for r in records] == [(0, "attention-00000000.npz"), (12, "attention-00000012.npz")]
    data = load_data(run)
    tokens = data.val_windows[:1, :16]
    torch.manual_seed(run.seed)
    models = [LanguageModule(run, data).model.eval(), load_model(tmp_path / "run")[0]]
    for record, model in zip(records, models, strict=True):
        seen = see(lambda model=model: model(tokens), attentions_of(model), [0, 1])
        with np.load(tmp_path / "run" / record.artifact) as file:
            assert np.array_equal(file["weights"], seen.weights[0].numpy().astype(np.float16))
            assert np.array_equal(file["norms"], seen.norms[0].numpy())
            assert "".join(file["tokens"]) == data.tokenizer.decode(tokens[0].tolist())
            assert (file["layers"].tolist(), file["heads"].tolist()) == ([0, 1], [0, 1])
            assert (file["image"].size, file["grid"].tolist()) == (0, [0, 0])


def test_training_is_the_same_to_the_bit_with_and_without(tmp_path: Path) -> None:
    run = tiny_run(write_text(tmp_path / "text.txt"), attention_snapshots=0)
    for name, each in (("without", run), ("with", replace(run, attention_snapshots=3))):
        train(each, tmp_path / name, device="cpu")
    without, with_them = (remains(run, tmp_path / name) for name in ("without", "with"))
    assert differences(without, with_them) == ["/config"]
    assert not list((tmp_path / "without").glob("attention-*.npz"))
    assert len(list((tmp_path / "with").glob("attention-*.npz"))) == 3


@pytest.mark.parametrize(
    ("n", "depth", "nheads", "layers", "heads"),
    [
        (16, 4, 4, [0, 1, 2, 3], 4),
        (64, 24, 32, [0, 3, 7, 10, 13, 16, 20, 23], 8),
        (197, 12, 12, [0, 6, 11], 2),
        (600, 12, 12, [11], 1),
    ],
)
def test_a_file_is_bounded(tmp_path: Path, n, depth, nheads, layers, heads) -> None:
    class Layer:
        attention_fn = None

    stack = [Layer() for _ in range(depth)]
    q = torch.zeros(1, n, nheads, 2)

    def forward() -> None:
        for layer in stack:
            if layer.attention_fn is not None:
                layer.attention_fn(q, q, q)

    uniform = [(layer, lambda q, k, v: v.mean(1, keepdim=True).expand_as(v)) for layer in stack]
    with RecordWriter(tmp_path / "records.jsonl") as writer:
        write_snapshot(writer, forward, uniform, nheads=nheads, tokens=["x"] * n, step=0)
    with np.load(tmp_path / "attention-00000000.npz") as file:
        assert file["layers"].tolist() == layers
        assert file["weights"].shape == (len(layers), heads, n, n)
        assert file["weights"].size <= max(2**18, n * n)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_file_of_an_image(tmp_path: Path, pool) -> None:
    torch.manual_seed(0)
    data = load_images(ImageConfig(img_size=32))
    config = replace(SMALL, num_classes=10, in_chans=1, attention="softmax", pool=pool)
    with RecordWriter(tmp_path / "records.jsonl") as writer:
        write_image_snapshot(writer, build_vit(config).eval(), data, step=7)
    (record,) = read_records(tmp_path / "records.jsonl").records
    assert (record.name, record.step) == (NAME, 7)
    with np.load(tmp_path / "attention-00000007.npz") as file:
        first = ["class token"] if pool == "token" else []
        assert file["tokens"].tolist()[: len(first) + 2] == [*first, "row 0, column 0", "row 0, column 1"]
        assert file["grid"].tolist() == [4, 4]
        assert len(file["tokens"]) == len(first) + 16
        assert np.array_equal(file["image"], data.examples(1)[0][0].numpy())
        # float16 rounds each of the n weights of a row by at most 2^-11 of itself
        assert file["weights"].astype(np.float64).sum(-1) == pytest.approx(1.0, rel=2**-11)
