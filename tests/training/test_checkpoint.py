"""Checkpoint directories: all or nothing, no pickle, and what loading damaged ones says."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training.test_resume import quiet
from training.tiny import tiny_run, write_text

from flashsigmoid.distributed import checkpoint as sharded
from flashsigmoid.models.generation import generate
from flashsigmoid.training import checkpoint
from flashsigmoid.training.checkpoint import (
    WEIGHTS,
    DirectoryCheckpoint,
    checkpoint_path,
    checkpoints,
    clean,
    export_weights,
    find_checkpoint,
    keep_last,
    load_model,
    newest_whole,
    rng_state,
    set_rng_state,
)
from flashsigmoid.training.language import train
from flashsigmoid.training.tokenizer import ByteTokenizer

FILES = ["config.json", "manifest.json", "model.safetensors", "tokenizer.json", "trainer.pt"]


def save(run_dir, step):
    state = {"state_dict": {"model.weight": torch.full((2,), float(step))}, "global_step": step}
    plugin = DirectoryCheckpoint({"model": {}}, {checkpoint.TOKENIZER: ByteTokenizer().to_json()})
    plugin.save_checkpoint(state, checkpoint_path(run_dir, step))
    return plugin


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run = tiny_run(write_text(folder / "text.txt"), steps=6)
    train(run, folder / "run", show=quiet)
    return run, folder / "run"


def test_a_directory_of_files_and_back(tmp_path):
    plugin = save(tmp_path, 3)
    path = tmp_path / "checkpoints/step-00000003"
    assert sorted(file.name for file in path.iterdir()) == FILES
    state = plugin.load_checkpoint(path)
    assert state["global_step"] == 3
    assert torch.equal(state["state_dict"]["model.weight"], torch.full((2,), 3.0))


@pytest.mark.parametrize("stage", range(7))
def test_a_crash_at_any_flush_leaves_the_older_checkpoint_the_newest(tmp_path, monkeypatch, stage):
    """The files, then their directory, are flushed before the rename, the parent after it: only then it is there."""
    save(tmp_path, 1)
    flushed = []

    def crash(path):
        flushed.append(path.name)
        if len(flushed) > stage:
            raise InterruptedError(path)

    monkeypatch.setattr(sharded, "flush", crash)
    with pytest.raises(InterruptedError):
        save(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001", "step-00000002"][: 1 + (stage == 6)]
    assert flushed == [*FILES, "step-00000002.tmp", "checkpoints"][: stage + 1]
    clean(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    if stage < 6:
        save(tmp_path, 2)
    assert find_checkpoint(tmp_path).name == "step-00000002"


def test_incomplete_and_foreign_directories_are_no_checkpoints(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "checkpoints/step-00000002/tokenizer.json").unlink()
    (tmp_path / "checkpoints/step-00000003").mkdir()
    (tmp_path / "checkpoints/notes").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]
    assert checkpoints(tmp_path / "nowhere") == []
    with pytest.raises(ValueError, match="a checkpoint, or a run with one, must be at the path, got "):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "group").mkdir()
    save(tmp_path / "group" / "run", 1)
    with pytest.raises(ValueError, match=r"group; runs below it: .*group/run"):
        find_checkpoint(tmp_path / "group")


def test_keep_last(tmp_path):
    for step in (1, 20, 3, 100_000_000):
        save(tmp_path, step)
    keep_last(checkpoint_path(tmp_path, 100_000_000), 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000020", "step-100000000"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_stays_is_whole_after_a_run_went_back_behind_a_damaged_one(tmp_path, capsys, count):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    for step, name in ((30, WEIGHTS), (40, checkpoint.CONFIG)):
        file = checkpoint_path(tmp_path, step) / name
        file.write_bytes(file.read_bytes()[:-3])
    assert newest_whole(tmp_path) == checkpoint_path(tmp_path, 20)
    assert len(capsys.readouterr().err.splitlines()) == 2
    save(tmp_path, 25)  # it goes on from 20, and is stopped
    keep_last(checkpoint_path(tmp_path, 25), count)
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["10", "20", "25"][-count:]
    assert newest_whole(tmp_path) == checkpoint_path(tmp_path, 25)
    assert capsys.readouterr().err == ""


def test_whoever_reads_a_checkpoint_is_told_of_one_bit(trained, tmp_path, capsys):
    """Safetensors with a changed number are still safetensors; a run's older checkpoint is used in its place."""
    out = shutil.copytree(trained[1], tmp_path / "run")
    older, newer = checkpoints(out)
    whole = load_file(older / WEIGHTS)
    content = bytearray((newer / WEIGHTS).read_bytes())
    content[-2] ^= 1
    (newer / WEIGHTS).write_bytes(content)
    assert torch.equal(load_model(out)[0].state_dict()["head.weight"], whole["head.weight"])
    assert capsys.readouterr().err == (
        f"{newer} is damaged, model.safetensors is not as it was written: the one before it is used\n"
    )
    assert find_checkpoint(out) == older
    for read in (load_model, lambda path: export_weights(path, tmp_path / "x.safetensors")):
        with pytest.raises(ValueError, match=r"must be as it was written, got .*: model.safetensors is not as it was"):
            read(newer)


def test_a_pickle_is_refused(tmp_path):
    """A trainer.pt that would run code when unpickled does not."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    plugin = save(tmp_path, 1)
    path = checkpoint_path(tmp_path, 1)
    for write in (lambda: torch.save({"x": Evil()}, path / "trainer.pt"), lambda: dump(path / "trainer.pt", Evil())):
        write()
        with pytest.raises(ValueError, match="a checkpoint must be whole and plain, got "):
            plugin.load_checkpoint(path)
    assert not (tmp_path / "pwned").exists()


def dump(path, thing):
    path.write_bytes(pickle.dumps(thing, protocol=2))


@pytest.mark.parametrize("name", ["trainer.pt", "model.safetensors"])
@pytest.mark.parametrize("size", [0, 1, 0.5])
def test_a_truncated_file_is_named(tmp_path, name, size):
    plugin = save(tmp_path, 1)
    path = checkpoint_path(tmp_path, 1)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: int(size * len(content)) if size == 0.5 else size])
    with pytest.raises(ValueError, match=f"a checkpoint must be whole and plain, got {path}"):
        plugin.load_checkpoint(path)


def test_load_model(trained):
    run, run_dir = trained
    model, tokenizer = load_model(run_dir)
    assert not model.training
    assert model.config == run.model
    weights = load_file(find_checkpoint(run_dir) / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    prompt = torch.from_numpy(tokenizer.encode(b"To be"))[None]
    assert len(tokenizer.decode(generate(model, prompt, 5, seed=0)[0].tolist()).encode()) >= 5
    same, _ = load_model(find_checkpoint(run_dir))
    assert torch.equal(same(prompt), model(prompt))


def test_a_model_that_is_no_gpt_is_named(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"a checkpoint must hold a GPT and its weights, got .*step-00000001"):
        load_model(tmp_path)


def test_config_json_describes_the_run(trained):
    run, run_dir = trained
    config = json.loads((find_checkpoint(run_dir) / "config.json").read_text())
    fingerprint, files = config.pop("fingerprint"), config.pop("files")
    assert config == run.sections()
    assert len(fingerprint) == 64
    assert files == ["tokenizer.json"]


def test_a_damaged_config_is_named(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "checkpoints/step-00000001/config.json"
    path.write_text(path.read_text()[:-9])
    assert checkpoints(tmp_path) == [path.parent]  # which --resume asks
    with pytest.raises(ValueError, match=r"as it was written, got .*step-00000001: config.json is not as it was"):
        find_checkpoint(path.parent)
    (path.parent / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"config.json of a checkpoint must be whole, got .*step-00000001: "):
        find_checkpoint(tmp_path)


def test_a_checkpoint_without_further_files(tmp_path):
    state = {"state_dict": {"model.weight": torch.ones(2)}, "global_step": 1}
    DirectoryCheckpoint({"model": {}}).save_checkpoint(state, checkpoint_path(tmp_path, 1))
    assert find_checkpoint(tmp_path).name == "step-00000001"


def test_random_states_go_on_where_they_stood():
    random.random(), np.random.normal(), torch.rand(3)
    state = rng_state()
    torch.save(state, file := io.BytesIO())
    file.seek(0)

    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(2).tolist()

    first = draw()
    assert draw() != first
    set_rng_state(torch.load(file, weights_only=True))
    assert draw() == first
