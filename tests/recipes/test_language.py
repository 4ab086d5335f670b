"""Every recipe is complete, names itself, documents itself, and its pair differs in one field."""

from __future__ import annotations

import pytest

from flashsigmoid.models.gpt import memory_estimate, parameter_count
from flashsigmoid.recipes.language import RECIPES, demo

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


@recipes
def test_a_pair_differs_in_one_field(recipe):
    run = recipe()
    assert run.model.attention == "sigmoid"
    assert run.model.sigmoid_bias is None
    a, b = run.settings(), run.with_attention("softmax").settings()
    assert {key for key in a if a[key] != b[key]} == {"attention"}


@recipes
def test_a_recipe_is_documented(recipe):
    run, doc = recipe(), recipe.__doc__ or ""
    assert RECIPES[run.name] is recipe
    assert run == recipe()
    for word in ("arXiv:2409.04431", f"flashsigmoid {'demo' if run.name == 'demo' else f'train {run.name}'}"):
        assert word in doc
    for word in ("hardware", "wall time", "expected"):
        assert word in doc.lower()


@recipes
def test_only_the_papers_own_has_one_b_for_all_heads(recipe):
    run = recipe()
    assert run.model.position == "alibi"
    assert run.model.alibi_bias is (None if run.name.startswith("paper") else True)


@recipes
def test_the_schedule_fits(recipe):
    run = recipe()
    assert run.optim.warmup < run.steps / 5
    assert run.steps % run.val_every == 0


def test_a_recipe_for_one_device_fits_it():
    """Estimates of the micro-batch in GiB against the memory that the docstrings name."""
    for name, gib in (("language_40m", 24), ("enwik8", 40), ("enwik8_4k", 40), ("paper_85m", 80), ("paper_1b", 131)):
        run = RECIPES[name]()
        assert memory_estimate(run.model, run.batch).total_bytes < gib * 2**30, name


def test_the_demo_is_small():
    run = demo()
    assert parameter_count(run.model) < 2_000_000
    assert run.data.source is None
    assert run.data.tokenizer == "bytes"
