"""Every recipe for images is complete, names itself, documents itself, builds, and its pair differs in one field."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.data import TensorDataset

from flashsigmoid.models.vision import build_vit
from flashsigmoid.recipes import pretraining, vision
from flashsigmoid.recipes.vision import demo
from flashsigmoid.training.contrastive import BYOLModule, SimCLRModule
from flashsigmoid.training.images import ImageData
from flashsigmoid.training.masked import MaskedModule
from flashsigmoid.training.pretraining import PretrainingRun

RECIPES = {**vision.RECIPES, **pretraining.RECIPES}
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
    assert out.shape == (2, run.model.num_classes or model.num_features)


def test_the_demo_is_a_shorter_run_of_a_recipe() -> None:
    ours, whole = demo().settings(), RECIPES["digits"]().settings()
    assert {key for key in ours if ours[key] != whole[key]} == {"steps"}
    assert ours["steps"] % ours["val_every"] == 0


def test_the_papers_sizes() -> None:
    for name, images, epochs in (
        *(("paper_vit_b16", 1.28e6, 300), ("paper_vit_l16", 1.28e6, 300)),
        *(("paper_simclr_vit_b16", 1.28e6, 300), ("paper_byol_vit_b16", 1.28e6, 600)),
        ("paper_mae_vit_l16", 1.28e6, 400),
    ):
        run = RECIPES[name]()
        assert run.steps * run.batch * run.accumulate / images == pytest.approx(epochs, rel=0.01)
        assert run.batch * run.accumulate == 4096


def data_of(run) -> ImageData:
    """None: what a module has to know of its data."""
    size, chans = run.model.img_size or 224, run.model.in_chans
    return ImageData(TensorDataset(), TensorDataset(), ("a", "b"), size, chans, (0.5,) * chans, (0.2,) * chans, "")


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if isinstance(recipe(), PretrainingRun)])
def test_a_pretraining_has_its_shapes_on_the_meta_device(name) -> None:
    """Views, heads, masks and decoder, without memory; the losses are for real numbers, in tests of training."""
    run = RECIPES[name]()
    data = data_of(run)
    with torch.device("meta"):
        module = run.module(data).train()
        images = torch.empty(4, data.in_chans, data.img_size, data.img_size, dtype=torch.uint8)
        if isinstance(module, MaskedModule):
            patches = (data.img_size // module.patch_size) ** 2
            visible, hidden = (
                torch.zeros(4, n, dtype=torch.int64) for n in (patches // 4 + module.prefix, patches // 4)
            )
            x = torch.empty(images.shape)
            predicted, targets = module.predicted(x, visible, hidden), module.targets(x, hidden)
            assert predicted.shape == targets.shape == (4, patches // 4, data.in_chans * module.patch_size**2)
            blocks = module.part("decoder").blocks
            assert len(blocks) == run.decoder_depth  # pyright: ignore
            assert blocks[0].attn.kind == "sigmoid"  # pyright: ignore
            return
        assert isinstance(module, SimCLRModule | BYOLModule)
        first, second = module.views(images)
        assert first.shape == second.shape == images.shape
        z = module.part("projection")(module.encoder(torch.cat([first, second])))
        assert z.shape == (8, run.projection_dim)
        if isinstance(module, BYOLModule):
            assert module.part("prediction")(z).shape == module.target(first.repeat(2, 1, 1, 1)).shape == z.shape


@pytest.mark.parametrize("source", ["digits", "cifar10"])
def test_probe_and_fine_tuning_take_every_encoder_of_their_data(source) -> None:
    own = {"num_classes": None, "drop_path": None}
    encoders = [RECIPES[f"{method}_{source}"]().model for method in ("simclr", "byol", "mae")]
    users = [RECIPES[f"{use}_{source}"]().model for use in ("probe", "finetune")]
    assert len({str(asdict(model) | own) for model in (*encoders, *users)}) == 1
    assert RECIPES[f"probe_{source}"]().train_only == "head"
    assert RECIPES[f"finetune_{source}"]().train_only == "all"
    assert RECIPES[f"probe_{source}"]().init is None


def test_the_cifar10_encoder_is_the_classifiers_without_classes() -> None:
    assert RECIPES["simclr_cifar10"]().model == replace(RECIPES["cifar10_fast"]().model, num_classes=0)
