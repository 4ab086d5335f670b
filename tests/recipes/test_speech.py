"""Every recipe for speech is complete, names itself, documents itself, builds, and its pair differs in one field."""

from __future__ import annotations

import pytest
import torch

from flashsigmoid.models.speech import parameter_count
from flashsigmoid.recipes.speech import RECIPES

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


@recipes
def test_a_pair_differs_in_one_field(recipe) -> None:
    run = recipe()
    assert run.model.attention == "sigmoid"
    assert (run.model.sigmoid_bias is None) == (not run.model.out_norm)  # -log n but with the norm
    a, b = run.settings(), run.with_attention("softmax").settings()
    assert {key for key in a if a[key] != b[key]} == {"attention"}
    assert a["recipe"] == run.name
    assert a["sigmoid_bias"] == run.model.bias


@recipes
def test_a_recipe_is_documented(recipe) -> None:
    run, doc = recipe(), recipe.__doc__ or ""
    assert RECIPES[run.name] is recipe
    assert run == recipe()
    assert "arXiv:2409.04431" in doc
    assert f"flashsigmoid train {run.name}" in " ".join(doc.split())
    for word in ("hardware", "wall time", "expected"):
        assert word in doc.lower()


@recipes
def test_the_schedule_fits_and_the_model_builds(recipe) -> None:
    run = recipe()
    assert run.optim.warmup <= run.steps / 5
    assert run.steps % run.val_every == 0
    with torch.device("meta"):
        model = run.build().eval()
        logits, lengths = model(torch.empty(2, 300, run.model.mels), torch.empty(2, dtype=torch.int64))
    assert logits.shape == (2, run.model.positions(300), run.model.vocab_size)
    assert lengths.shape == (2,)


def test_the_papers_size_and_data() -> None:
    run = RECIPES["paper_speech_255m"]()
    assert parameter_count(run.model) == pytest.approx(255e6, rel=0.01)
    assert run.steps * run.batch * run.accumulate / 281_241 == pytest.approx(100, rel=0.01)
