"""Every recipe for images is complete, names itself, documents itself, builds, and its pair differs in one field."""

from __future__ import annotations

import pytest
import torch

from flashsigmoid.models.vision import build_vit
from flashsigmoid.recipes.vision import RECIPES, demo

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


@recipes
def test_a_pair_differs_in_one_field(recipe) -> None:
    run = recipe()
    assert run.model.attention == "sigmoid"
    assert run.model.sigmoid_bias is None
    a, b = run.settings(), run.with_attention("softmax").settings()
    assert {key for key in a if a[key] != b[key]} == {"attention"}
    assert (a["recipe"], a["model.name"]) == (run.name, run.model.name)


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
    assert run.optim.warmup < run.steps / 5
    assert run.steps % run.val_every == 0
    with torch.device("meta"):
        model = build_vit(run.model)
        out = model(torch.empty(2, run.model.in_chans, run.model.img_size or 224, run.model.img_size or 224))
    assert out.shape == (2, run.model.num_classes)


def test_the_demo_is_a_shorter_run_of_a_recipe() -> None:
    ours, whole = demo().settings(), RECIPES["digits"]().settings()
    assert {key for key in ours if ours[key] != whole[key]} == {"steps"}
    assert ours["steps"] % ours["val_every"] == 0


def test_the_papers_sizes() -> None:
    for name, images, epochs in (("paper_vit_b16", 1.28e6, 300), ("paper_vit_l16", 1.28e6, 300)):
        run = RECIPES[name]()
        assert run.steps * run.batch * run.accumulate / images == pytest.approx(epochs, rel=0.01)
        assert run.batch * run.accumulate == 4096
