"""A mesh of one process trains as one process does: to the same bits, and nothing of a step asks another rank.

What it costs on a GPU is measured by `python -m flashsigmoid.bench.mesh_of_one`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed.runs import free_port, losses, mesh_run
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from training.tiny import differences, write_text

from flashsigmoid.bench.mesh_of_one import BASE, arms, run_of
from flashsigmoid.bench.steps import measure
from flashsigmoid.functional import sigmoid_attention
from flashsigmoid.record import read_records
from flashsigmoid.training import language
from flashsigmoid.training.checkpoint import find_checkpoint, load_weights

SPOKEN = (
    (dist, "all_reduce"), (dist, "broadcast"), (dist, "broadcast_object_list"), (dist, "all_gather_object"),
    (DeviceMesh, "__getitem__"),
)  # fmt: skip


def test_it_has_the_bits_of_one_process_and_speaks_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_text(tmp_path / "text.txt")
    run = mesh_run(text, steps=4, val_every=4, save_every=4)
    run = replace(run, model=replace(run.model, dropout_p=0.2))
    language.train(run, tmp_path / "alone", device="cpu", show=lambda progress: None)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    said: list[str] = []
    seen: list[Any] = []
    part = language.LanguageModule.batch_loss

    def batch_loss(self: Any, batch: Any) -> torch.Tensor:
        seen.append(self)
        if len(seen) == 1:  # what follows is steps, up to the last
            for owner, name in SPOKEN:
                whole = getattr(owner, name)
                patch = mock.patch.object(
                    owner,
                    name,
                    lambda *args, name=name, whole=whole, **given: (said.append(name), whole(*args, **given))[1],
                )
                patch.start()
                patches.append(patch)
        if len(seen) == run.steps:
            while patches:
                patches.pop().stop()
        return part(self, batch)

    patches: list[Any] = []
    with mock.patch.object(language.LanguageModule, "batch_loss", batch_loss):
        again = replace(run, recompute="selective")  # whose bits are the same
        language.train(again, tmp_path / "mesh", device="cpu", show=lambda progress: None, mesh="dp=1,cp=1,tp=1")
    assert said == []
    assert losses(tmp_path / "mesh") == losses(tmp_path / "alone")
    there, alone = (load_weights(find_checkpoint(tmp_path / name)) for name in ("mesh", "alone"))
    assert differences(there, alone) == []
    module = seen[-1]
    assert module.device_mesh.size() == 1
    assert {block.recompute for block in module.model.blocks} == {"selective"}
    assert not any(isinstance(parameter, DTensor) for parameter in module.parameters())
    assert {attention.attention_fn for attention in module.model._attentions()} == {sigmoid_attention}


@pytest.mark.long
def test_the_measurement_runs_to_its_end(tmp_path: Path) -> None:
    run = run_of(block=2, rounds=2)
    small = replace(run.model, dim=32, nlayers=2, seqlen=64, nheads=2)
    run = replace(run, model=small, batch=2, precision="fp32", compile=False, data=replace(run.data, val_windows=2))
    with pytest.raises(ValueError, match=r"steps must be \(rounds \+ 2\) log_every = 10, got 8"):
        measure(arms(run), BASE, "cpu", 3, tmp_path / "x.jsonl")
    times = measure(arms(run), BASE, "cpu", 2, tmp_path / "x.jsonl", "test")
    records = read_records(tmp_path / "x.jsonl").records
    assert [record.value for record in records if record.name == "step" and record.tags["arm"] == "mesh"] == (
        times["mesh"].ms
    )
    assert {record.tags["arm"] for record in records} == set(arms(run))
    assert {record.name for record in records if record.tags["arm"] == "plain again"} == {
        "step", "step/p10", "step/median", "step/p90", "over_plain/p10", "over_plain/median", "over_plain/p90",
    }  # fmt: skip
