"""A watched run: records, TensorBoard and page have what is measured, and the training is the same to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from training.test_classification import RUN, few, quiet  # noqa: F401  few: fewer digits
from training.tiny import differences, remains, tiny_run, write_text

from flashsigmoid.record import read_records
from flashsigmoid.report import write_report
from flashsigmoid.training.classification import train_classifier
from flashsigmoid.training.language import train
from flashsigmoid.training.watching import check_watchable

ATTENTION = {
    "probe_attn_norm", "probe_attn_grad", "probe_row_mass", "probe_effective_keys", "probe_sink", "probe_sink_4",
    "probe_saturation", "probe_gain",
}  # fmt: skip
NORMS = {
    "probe_output", "probe_output_grad", "probe_param", "probe_param_grad", "probe_exp_avg", "probe_exp_avg_sq",
}  # fmt: skip


def measured(folder: Path) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for record in read_records(folder / "records.jsonl").records:
        if record.name.startswith("probe_") and record.step is not None:
            found.setdefault(record.step, []).append(record.name)
    return found


def test_a_watched_run_is_the_run_itself_and_its_page_shows_what_was_seen(tmp_path) -> None:
    run = tiny_run(write_text(tmp_path / "text.txt"))
    train(run, tmp_path / "plain", device="cpu", show=quiet)
    train(run, tmp_path / "watched", device="cpu", show=quiet, probe_every=4)
    assert differences(remains(run, tmp_path / "plain"), remains(run, tmp_path / "watched")) == []
    assert measured(tmp_path / "plain") == {}
    found = measured(tmp_path / "watched")
    assert [*found] == [1, 5, 9]
    for names in found.values():
        assert {*names} == {f"{name}/layer_{i}" for name in ATTENTION for i in (0, 1)} | NORMS
    page = write_report([tmp_path / "watched"], tmp_path / "page").read_text()
    for title in ("Under the microscope", "Effective number of keys", "Gradients at outputs", "First moments"):
        assert title in page
    assert (tmp_path / "page" / "report-figures" / "probe-param-grad.png").read_bytes()[:4] == b"\x89PNG"
    assert "Under the microscope" not in write_report([tmp_path / "plain"], tmp_path / "page").read_text()


def test_tensorboard_has_it_too(tmp_path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    train(tiny_run(write_text(tmp_path / "text.txt")), tmp_path / "run", device="cpu", show=quiet, probe_every=6)
    events = reader.EventAccumulator(str(tmp_path / "run" / "tb"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"probe_attn_norm/layer_1", "probe_param_grad/blocks.0.attention.q_proj.weight"} <= {*tags}
    assert [event.step for event in events.Scalars("probe_row_mass/layer_0")] == [1, 7]


def test_a_watched_run_that_is_resumed_measures_each_step_once(tmp_path) -> None:
    text = write_text(tmp_path / "text.txt")
    whole, halves = tiny_run(text, val_every=4), tiny_run(text, val_every=4)
    train(whole, tmp_path / "whole", device="cpu", show=quiet, probe_every=2)

    def stop(progress) -> None:
        if progress.step == 6:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        train(halves, tmp_path / "halves", device="cpu", show=stop, probe_every=2)
    train(halves, tmp_path / "halves", device="cpu", show=quiet, probe_every=2, resume=True)
    of_whole, of_halves = measured(tmp_path / "whole"), measured(tmp_path / "halves")
    assert {step: sorted(names) for step, names in of_whole.items()} == {
        step: sorted(names) for step, names in of_halves.items()
    }


@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
def test_images_are_watched_too(tmp_path, few, attention) -> None:  # noqa: F811
    run = replace(RUN, model=replace(RUN.model, attention=attention), steps=2, val_every=2, save_every=2)
    train_classifier(run, tmp_path, device="cpu", show=quiet, probe_every=1)
    found = measured(tmp_path)
    assert [*found] == [1, 2]
    assert {f"probe_row_mass/layer_{i}" for i in (0, 1)} | NORMS <= {*found[1]}


def test_what_cannot_be_watched_is_one_clear_error(tmp_path) -> None:
    run = tiny_run(write_text(tmp_path / "text.txt"))
    for options, message in (
        ((run, -1, False), "probe_every must not be negative, got -1"),
        ((replace(run, compile=True), 5, False), "probe_every must be 0 with compile, got 5"),
        ((run, 5, True), "probe_every must be 0 with mesh, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            check_watchable(*options)
    check_watchable(replace(run, compile=True), 0, True)
    with pytest.raises(ValueError, match="probe_every must not be negative"):
        train(run, tmp_path / "run", device="cpu", show=quiet, probe_every=-1)
    assert not (tmp_path / "run" / "records.jsonl").exists()
