"""Whole runs on a mesh of two processes: the losses of one, checkpoints for any mesh, and what a fault ends in.

Kills, hangs and the command are test_failures.py's.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from distributed import runs
from distributed.crew import Crew
from distributed.runs import far, free_port, is_one_line, losses, mesh_run, remains
from safetensors.torch import load_file
from training.tiny import differences, write_text

from flashsigmoid.distributed.checkpoint import damage, load_tensors
from flashsigmoid.record import RecordWriter
from flashsigmoid.training import language, module
from flashsigmoid.training.callbacks import Interrupted
from flashsigmoid.training.checkpoint import checkpoints, export_weights, load_model, load_trainer

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def alone(text: Path) -> Path:
    """One process."""
    language.train(mesh_run(text), text.parent / "alone", device="cpu", show=lambda progress: None)
    return text.parent / "alone"


@pytest.fixture(scope="module")
def allowed(text: Path, alone: Path) -> float:
    """Four times what rounding does to a loss: the same run, its batches in two parts."""
    halves = text.parent / "halves"
    language.train(mesh_run(text, batch=2, accumulate=2), halves, device="cpu", show=lambda progress: None)
    return 4.0 * max(far(losses(halves), losses(alone)), torch.finfo(torch.float32).eps)


@pytest.fixture(scope="module")
def whole(text: Path, ranks: Crew) -> Path:
    """dp=2 that nobody touched."""
    trained(ranks, text, text.parent / "whole", "dp=2")
    return text.parent / "whole"


def on(ranks: Crew, text: Path, out_dir: Path, mesh: str, fault: str = "", **options) -> list[dict]:
    """Each rank's answer."""
    changes = options.pop("changes", {})
    return ranks.run(runs.train, free_port(), mesh_run(text, **changes), out_dir, fault, mesh=mesh, **options)


def trained(ranks: Crew, text: Path, out_dir: Path, mesh: str, fault: str = "", **options) -> list[dict]:
    """`on`, to the end, with the same results on every rank."""
    answers = on(ranks, text, out_dir, mesh, fault, **options)
    assert all("results" in answer for answer in answers), answers
    assert answers[0]["results"] == answers[1]["results"]
    return answers


@pytest.mark.parametrize("mesh", ["dp=2", "cp=2", "tp=2"])
def test_two_processes_have_the_losses_of_one(tmp_path, text, ranks, alone, allowed, mesh):
    trained(ranks, text, tmp_path / "run", mesh)
    assert far(losses(tmp_path / "run"), losses(alone)) <= allowed <= 1e-5
    assert far(losses(tmp_path / "run", "val/loss"), losses(alone, "val/loss")) <= allowed
    assert len(losses(tmp_path / "run")) == 12


def test_a_rank_with_another_part_of_the_batch_is_seen(tmp_path, text, ranks, alone, allowed):
    trained(ranks, text, tmp_path / "run", "dp=2", "others-part")
    assert far(losses(tmp_path / "run"), losses(alone)) > 100.0 * allowed


def test_a_checkpoint_goes_on_on_another_mesh(tmp_path, text, ranks, alone, allowed):
    """Interrupted on dp=2, gone on on tp=2 and cp=2: the order of the data is that of one process."""
    answers = on(ranks, text, tmp_path / "run", "dp=2", "SIGTERM")
    assert [answer["error"] for answer in answers] == ["Interrupted 143 3"] * 2
    assert is_one_line(answers[0]["err"], "stopped by SIGTERM after step 3, saved .*step-00000003")
    assert answers[1]["err"] == ""
    for mesh, steps in (("tp=2", 6), ("cp=2", 12)):
        shutil.copytree(tmp_path / "run", tmp_path / mesh)
        trained(ranks, text, tmp_path / mesh, mesh, resume=True)
        assert far(losses(tmp_path / mesh), losses(alone)) <= allowed, (mesh, steps)


@pytest.mark.parametrize("mesh", ["dp=2", *(pytest.param(mesh, marks=pytest.mark.long) for mesh in ("cp=2", "tp=2"))])
def test_one_process_and_a_mesh_go_on_from_each_other(tmp_path, text, ranks, alone, allowed, mesh):
    """One process to step 3, the mesh to step 6, one process to the end: the losses of one, moments and all."""
    out, run = tmp_path / "run", mesh_run(text)
    with pytest.raises(Interrupted, match="143"):
        language.train(run, out, device="cpu", show=runs.stopped_at(3))
    answers = on(ranks, text, out, mesh, "SIGTERM 6", resume=True)
    assert [answer["error"] for answer in answers] == ["Interrupted 143 6"] * 2, answers
    assert not (checkpoints(out)[-1] / "model.safetensors").is_file()
    language.train(run, out, device="cpu", resume=True, show=lambda progress: None)
    assert far(losses(out), losses(alone)) <= allowed
    moments = {}
    for folder in (out, alone):
        (state,) = load_trainer(checkpoints(folder)[-1])["optimizer_states"]
        moments[folder] = [of_one["exp_avg_sq"].double() for of_one in state["state"].values()]
        assert {float(of_one["step"]) for of_one in state["state"].values()} == {12.0}
    for here, there in zip(*moments.values(), strict=True):
        assert (here - there).norm() <= 100.0 * allowed * there.norm()


def test_moments_that_are_lost_are_seen(tmp_path, text, alone, allowed, whole):
    """A mesh's checkpoint whose moments are forgotten."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(checkpoints(out)[-1])
    with mock.patch.object(module, "one_process_state", forgotten):
        language.train(mesh_run(text), out, device="cpu", resume=True, show=lambda progress: None)
    assert far(losses(out), losses(alone)) > 10.0 * allowed


def forgotten(model, optimizer, path):
    return optimizer.state_dict()


@pytest.mark.long
def test_a_stream_goes_on_on_another_mesh(tmp_path, monkeypatch, allowed):
    """Every rank reads all of it and takes its part: documents of Hugging Face `datasets`, in their order."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(3):
        rows = [json.dumps({"text": f"document {shard} {i} of many words {'x' * (i % 13)}"}) for i in range(20)]
        (folder / f"train-{shard}.jsonl").write_text("\n".join(rows))
    run = mesh_run(f"hf:{folder}")
    run = runs.replace(run, data=runs.replace(run.data, val_documents=5))
    crew = Crew(2, grouped=False)

    def trained(out: str, mesh: str, fault: str = "", **options) -> list[dict]:
        return crew.run(runs.train, free_port(), run, tmp_path / out, fault, mesh=mesh, **options)

    assert "results" in trained("whole", "dp=2")[0]
    assert trained("run", "dp=2", "SIGTERM")[1]["error"] == "Interrupted 143 3"
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for out, mesh in (("run", "dp=2"), ("other", "cp=2")):
        assert "results" in trained(out, mesh, resume=True)[0]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert far(losses(tmp_path / "other"), losses(tmp_path / "whole")) <= allowed
    crew.close()


def test_interrupted_and_resumed_it_has_the_same_bits(tmp_path, text, ranks, whole):
    on(ranks, text, tmp_path / "run", "dp=2", "SIGTERM")
    trained(ranks, text, tmp_path / "run", "dp=2", resume=True)
    assert differences(remains(whole), remains(tmp_path / "run")) == []


@pytest.mark.long
def test_micro_batches_on_a_mesh_go_on_with_the_same_bits(tmp_path, text, ranks, alone, allowed):
    """Batches of one process in two parts, each over two ranks."""
    changes = {"batch": 2, "accumulate": 2}
    trained(ranks, text, tmp_path / "whole", "dp=2", changes=changes)
    assert far(losses(tmp_path / "whole"), losses(alone)) <= allowed
    on(ranks, text, tmp_path / "run", "dp=2", "SIGTERM", changes=changes)
    trained(ranks, text, tmp_path / "run", "dp=2", resume=True, changes=changes)
    assert differences(remains(tmp_path / "whole"), remains(tmp_path / "run")) == []


def test_checkpoints_are_whole_and_are_a_model(tmp_path, text, whole):
    """keep_last of them, each file hashed, and the weights in one file of safetensors."""
    found = checkpoints(whole)
    assert [path.name for path in found] == ["step-00000010", "step-00000012"]
    assert [damage(path) for path in found] == [None, None]
    model, _ = load_model(whole)
    exported = load_file(export_weights(whole, tmp_path / "model.safetensors"))
    assert differences(dict(model.state_dict()), exported) == []
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    assert model(tokens).shape == (1, 4, 264)


@pytest.mark.parametrize("how", ["late", "torn"])
def test_a_checkpoint_is_of_its_step_and_stops_no_other(tmp_path, text, ranks, whole, how):
    """The shards of step 10 are written when step 11 is done; torn: from weights that step 11 has changed."""
    trained(ranks, text, tmp_path / "run", "dp=2", f"{how} 12")
    for path in checkpoints(whole):
        there = load_tensors(tmp_path / "run/checkpoints" / path.name, "")
        found = differences(load_tensors(path, ""), there)
        is_torn = how == "torn" and path.name == "step-00000010"
        assert ("/model.head.weight" in found) == is_torn
        assert is_torn or found == []


@pytest.mark.parametrize("how", ["cut", "bit", "gone", "manifest"])
def test_damage_is_found(tmp_path, whole, how):
    path = Path(shutil.copytree(checkpoints(whole)[-1], tmp_path / "step-00000012"))
    assert damage(path) is None
    shard = sorted(path.glob("shard-*"))[1]
    content = bytearray(shard.read_bytes())
    if how == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif how == "bit":
        content[-5] ^= 1
        shard.write_bytes(content)
    elif how == "gone":
        shard.unlink()
    else:
        (path / "manifest.json").write_text("{")
    said = {"gone": f"{shard.name} is missing", "manifest": "manifest.json is not whole"}
    assert damage(path) == said.get(how, f"{shard.name} is not as it was written")


def test_a_damaged_checkpoint_is_passed_over(tmp_path, text, ranks, whole):
    on(ranks, text, tmp_path / "run", "dp=2", "SIGTERM 4")
    shard = next((checkpoints(tmp_path / "run")[-1]).glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    answers = trained(ranks, text, tmp_path / "run", "dp=2", resume=True)
    assert is_one_line(answers[0]["err"], "step-00000004 is damaged, .* the one before it is used"), answers
    assert answers[1]["err"] == ""
    assert differences(remains(whole), remains(tmp_path / "run")) == []


def test_a_full_disk_ends_every_rank_and_leaves_the_last_checkpoint(tmp_path, text, ranks, whole):
    answers = on(ranks, text, tmp_path / "run", "dp=2", "full-disk 6")
    assert answers[0]["error"] == (
        "OSError: checkpoint step-00000006 could not be written: No space left on device; the one before stands"
    )
    assert answers[1]["error"] == "SystemExit: 1"
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000002", "step-00000004"]
    trained(ranks, text, tmp_path / "run", "dp=2", resume=True)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert differences(remains(whole), remains(tmp_path / "run")) == []


def test_files_that_the_system_refuses_end_every_rank_too(tmp_path, text, ranks):
    """By a limit of the system on one rank, which the checkpoint being written may meet, or the next one."""
    answers = on(ranks, text, tmp_path / "run", "dp=2", "no-room-1 5")
    said = r"OSError: checkpoint step-0000000([46]) could not be written: File too large; the one before stands"
    found = re.fullmatch(said, answers[0]["error"])
    assert found is not None, answers
    assert answers[1]["error"] == "SystemExit: 1"
    whole = {path.name: damage(path) for path in checkpoints(tmp_path / "run")}
    assert whole == {f"step-{step:08d}": None for step in (2, 4) if step < int(found[1])}


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(tmp_path, text, ranks, whole):
    trained(ranks, text, tmp_path / "run", "dp=2", "nan-once 4")
    assert losses(tmp_path / "run", "skipped_steps") == [1.0] * 9
    assert [loss == loss for loss in losses(tmp_path / "run")].count(False) == 1
    assert torch.isfinite(remains(tmp_path / "run")["tensors"]["model.head.weight"]).all()


def test_too_many_of_them_end_the_run(tmp_path, text, ranks):
    answers = on(ranks, text, tmp_path / "run", "dp=2", "nan 5", max_skipped=3)
    assert answers[0]["error"].startswith(
        "FloatingPointError: loss and gradient must be finite in one of 3 steps in a row"
    )
    assert answers[1]["error"] == "SystemExit: 1"
    weights = load_model(tmp_path / "run")[0].state_dict()
    assert all(torch.isfinite(x).all() for x in weights.values())


def test_the_error_of_one_rank_is_said_by_it_alone(tmp_path, text, ranks):
    answers = on(ranks, text, tmp_path / "run", "dp=2", "raise 3", timeout_s=5.0)
    assert answers[1]["error"] == "ValueError: batch must be whole, got half a one"
    assert answers[0]["error"] == "SystemExit: 1"


def test_no_group_of_a_mesh_waits_longer_than_it_should(tmp_path, text, ranks):
    """torch's own limit, 30 minutes, is that of every group that is not the group of all."""
    answers = on(ranks, text, tmp_path / "run", "cp=2", "limits", timeout_s=50.0, changes={"steps": 1})
    assert is_one_line(answers[0]["err"], r"limits \[50.0, 50.0, 50.0, 50.0\]"), answers


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ("dp=3", {}, "mesh must have as many ranks as there are processes, 2, got dp=3,cp=1,tp=1"),
        ("dp=2", {"batch": 3}, "batch must be a multiple of dp=2, got 3"),
        ("tp=2", {"compile": True}, "compile must be False with tp above 1, whose tensors break its graphs, got tp=2"),
        ("fsdp=2", {}, "mesh must be like dp=2,cp=2,tp=1, got 'fsdp=2'"),
        ("tp=2", {"model": {"nheads": 2, "nheads_k": 1}}, "nheads_k must be a multiple of tp=2, got 1"),
        ("tp=2", {"model": {"vocab_size": 265}}, "vocab_size must be a multiple of tp=2, got 265"),
    ],
)
def test_what_a_mesh_cannot_train_is_one_clear_error(tmp_path, text, ranks, mesh, changes, message):
    run, changes = mesh_run(text), dict(changes)
    run = runs.replace(run, model=runs.replace(run.model, **changes.pop("model", {})), **changes)
    answers = ranks.run(runs.train, free_port(), run, tmp_path / "run", mesh=mesh)
    assert answers[0]["error"] == f"ValueError: {message}"
    # the same command, mended, need not name another folder
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.long
def test_softmax_trains_on_the_mesh_of_its_pair(tmp_path, text, ranks, allowed):
    run = mesh_run(text).with_attention("softmax")
    language.train(run, tmp_path / "alone", device="cpu", show=lambda progress: None)
    for mesh in ("cp=2", "tp=2"):
        answers = ranks.run(runs.train, free_port(), run, tmp_path / mesh, mesh=mesh)
        assert "results" in answers[0], answers
        assert far(losses(tmp_path / mesh), losses(tmp_path / "alone")) <= allowed


def test_a_data_file_that_vanished_is_named_once(tmp_path, ranks):
    text = write_text(tmp_path / "text.txt")
    on(ranks, text, tmp_path / "run", "dp=2", "SIGTERM")
    text.unlink()
    answers = on(ranks, text, tmp_path / "run", "dp=2", resume=True)
    assert answers[0]["error"] == f"FileNotFoundError: data must be an existing text file or folder, got {text}"
    assert answers[1]["error"] == "SystemExit: 1"
    assert [damage(path) for path in checkpoints(tmp_path / "run")] == [None, None]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_language_recipe_has_the_losses_of_one_process(tmp_path):
    """Leaves benchmarks/results/recipe-losses.jsonl: 100 steps in float64, the first one in float32. fsdp is dp."""
    command = f"python -m pytest -m long {Path(__file__).relative_to(RESULTS.parents[1])}"
    crews: dict[int, Crew] = {}
    with RecordWriter(RESULTS / "recipe-losses.jsonl", runs.recipe_run(100).settings(), command) as writer:
        for name, steps, most in (("float64", 100, 1e-9), ("float32", 1, 1e-5)):
            run, alone = runs.recipe_run(steps), tmp_path / f"{name} alone"
            with runs.planted(name):
                language.train(run, alone, device="cpu", show=lambda progress: None)
            assert len(losses(alone)) == steps
            for mesh, size in (("dp=2", 2), ("cp=2", 2), ("tp=2", 2), ("dp=2,cp=2", 4), ("cp=2,tp=2", 4)):
                if size not in crews:
                    crews[size] = Crew(size, grouped=False)
                out = tmp_path / f"{name} {mesh}"
                answers = crews[size].run(runs.train, free_port(), run, out, name, mesh=mesh)
                assert all("results" in answer for answer in answers), answers
                apart = far(losses(out), losses(alone))
                writer.write("largest_relative_difference", apart, step=steps, mesh=mesh, dtype=name)
                assert apart <= most, (name, mesh)
    for crew in crews.values():
        crew.close()
