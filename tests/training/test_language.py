"""Training end to end: the loss falls, records say what was asked, TensorBoard agrees, and precision and arms work."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rounding import assert_rounded
from training.test_resume import quiet, signal_at
from training.tiny import tiny_model, tiny_run, write_text

from flashsigmoid.distributed.processes import MeshSizes
from flashsigmoid.record import read_records
from flashsigmoid.training.callbacks import Interrupted, Progress, Stopwatch, show_line
from flashsigmoid.training.checkpoint import load_model
from flashsigmoid.training.data import Batch
from flashsigmoid.training.language import LanguageModule, load_data, train
from flashsigmoid.training.optim import OptimConfig
from flashsigmoid.training.run import LanguageRun


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt")


@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
def test_the_loss_falls_below_the_bigrams(tmp_path, text, attention):
    """A repeating text: after 60 steps the model knows more than the previous byte tells."""
    run = tiny_run(text, steps=120, val_every=60, save_every=60, batch=8, accumulate=1, log_every=20)
    run = replace(run, model=tiny_model(attention=attention, dim=32), optim=OptimConfig(lr=1e-2, warmup=10))
    final = train(run, tmp_path / "run", show=quiet)
    records = read_records(tmp_path / "run/records.jsonl").records
    first = next(r.value for r in records if r.name == "val/loss")
    assert abs(first - math.log(257)) < 0.3
    assert final["val/loss"] < final["baseline/bigram"] < first


def test_every_record_is_there(tmp_path, text):
    run = tiny_run(text)
    seen: list[Progress] = []
    final = train(run, tmp_path / "run", show=seen.append, command="the command")
    file = read_records(tmp_path / "run/records.jsonl")
    steps: dict[str, list[int | None]] = {}
    for record in file.records:
        steps.setdefault(record.name, []).append(record.step)
    every, validated = list(range(1, 13)), [0, 6, 12]
    assert {name for name in steps if "/layer_" not in name} == {
        *(
            "train/loss",
            "grad_norm",
            "lr",
            "tokens_per_s",
            "val/loss",
            "val/loss_bytes",
            "baseline/bigram",
            "baseline/bigram_floor",
            "attention_kernel",
            "attention_snapshot",
            "sample",
        ),
    }
    assert all(steps[name] == every for name in ("train/loss", "grad_norm", "lr", "tokens_per_s"))
    assert all(steps[name] == validated for name in ("val/loss", "val/loss_bytes"))
    for kind in ("attn_norm", "row_mass", "sink"):
        assert all(steps[f"{kind}/layer_{i}"] == validated for i in (0, 1))
    assert (steps["baseline/bigram"], steps["attention_kernel"], steps["sample"]) == ([0], [0], [12])
    assert [r.tags["kernel"] for r in file.records if r.name == "attention_kernel"] == ["blocked"]
    units = {r.name: r.unit for r in file.records}
    assert (units["val/loss"], units["val/loss_bytes"], units["baseline/bigram"]) == (
        "nats_per_token",
        "nats_per_byte",
        "nats_per_byte",
    )
    assert (tmp_path / "run/sample.txt").read_bytes()[:16] == bytes(load_data(run).val_windows[0, :16].tolist())
    assert file.header["command"] == "the command"
    assert file.settings["recipe"] == "tiny"
    assert file.settings["sigmoid_bias"] == -math.log(16)
    for field in ("attention", "position", "norm", "seed", "lr", "tokenizer", "batch", "window_size", "steps"):
        assert field in file.settings
    assert (seen[0].step, seen[0].validated, seen[-1].step, seen[-1].validated) == (0, True, 12, True)
    assert seen[-1].metrics["val/loss"] == final["val/loss"]


def test_row_mass_of_the_two_arms_at_the_start(tmp_path, text):
    """1 for softmax by definition; below 1 for causal sigmoid with b = -log n, since a row sees half the keys."""
    mass = {}
    for attention in ("sigmoid", "softmax"):
        run = tiny_run(text, steps=2).with_attention(attention)
        train(run, tmp_path / attention, show=quiet)
        records = read_records(tmp_path / attention / "records.jsonl").records
        mass[attention] = next(r.value for r in records if r.name == "row_mass/layer_0")
    assert_rounded(mass["softmax"], 1.0, 16, dtype=torch.float32)
    assert 0.2 < mass["sigmoid"] < 1.0


def test_the_arms_have_the_same_parameters_data_and_order(text):
    run = tiny_run(text)
    shapes, batches = [], []
    for attention in ("sigmoid", "softmax"):
        arm = run.with_attention(attention)
        data = load_data(arm)
        module = LanguageModule(arm, data)
        shapes.append({name: tuple(p.shape) for name, p in module.named_parameters()})
        batches.append(next(data.train.batches(arm.batch)).tokens)
        module.loss(batches[-1]).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    assert shapes[0] == shapes[1]
    assert torch.equal(*batches)
    different = {key for key, value in run.settings().items() if run.with_attention("softmax").settings()[key] != value}
    assert different == {"attention"}


EPS = torch.finfo(torch.float32).eps


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative difference."""
    return (found / expected - 1.0).abs().max().item()


def test_accumulation_is_a_larger_batch(tmp_path, text, monkeypatch):
    """Two micro-batches of 2 are one batch of 4: losses and norms off by what another order of the batch changes."""
    part = LanguageModule.batch_loss

    def numbers(name: str, batch: int, accumulate: int) -> list[torch.Tensor]:
        run = tiny_run(text, model=tiny_model(dropout_p=0.0), batch=batch, accumulate=accumulate)
        train(run, tmp_path / name, show=quiet)
        records = read_records(tmp_path / name / "records.jsonl").records
        return [torch.tensor([r.value for r in records if r.name == kind]) for kind in ("train/loss", "grad_norm")]

    parts, whole = numbers("parts", 2, 2), numbers("whole", 4, 1)
    monkeypatch.setattr(LanguageModule, "batch_loss", lambda self, b: part(self, Batch(b.tokens.flip(0), b.position)))
    for found, expected, near in zip(parts, whole, numbers("upside down", 4, 1), strict=True):
        assert len(found) == 12
        assert far(found, expected) <= 4.0 * max(far(near, expected), EPS)


@pytest.mark.long  # compilers take minutes
def test_compiled_it_is_the_same_training(tmp_path, text):
    """Twelve steps with two attentions: losses as in eager mode, up to rounding; nothing is left in the checkpoint."""
    for attention in ("sigmoid", "softmax"):
        run = tiny_run(text, model=tiny_model(dropout_p=0.0)).with_attention(attention)
        losses = []
        for compiled in (False, True):
            folder = tmp_path / f"{attention}-{compiled}"
            final = train(replace(run, compile=compiled), folder, device="cpu", show=quiet)
            records = read_records(folder / "records.jsonl").records
            losses.append(torch.tensor([r.value for r in records if r.name in ("train/loss", "val/loss")]))
            assert load_model(folder)[0].config == run.model
            assert final["val/loss"] > 0.0
        assert (losses[0] / losses[1] - 1.0).abs().max() < 1e-4


def test_bf16(tmp_path, text):
    run = tiny_run(text, precision="bf16")
    final = train(run, tmp_path / "bf16", show=quiet)
    exact = train(replace(run, precision="fp32"), tmp_path / "fp32", show=quiet)
    assert final["val/loss"] != exact["val/loss"]
    assert final["val/loss"] == pytest.approx(exact["val/loss"], rel=2**-9)  # half a unit of bfloat16
    assert {p.dtype for p in load_model(tmp_path / "bf16")[0].parameters()} == {torch.float32}


def test_bpe_end_to_end(tmp_path):
    run = tiny_run(write_text(tmp_path / "text.txt", 4000), model=tiny_model(vocab_size=270))
    run = replace(run, data=replace(run.data, tokenizer="bpe"))
    final = train(run, tmp_path / "run", show=quiet)
    # a token is more than a byte
    assert final["val/loss_bytes"] < 0.9 * final["val/loss"]
    model, tokenizer = load_model(tmp_path / "run")
    assert tokenizer.vocab_size == model.config.vocab_size == 270


def test_tensorboard_has_the_records_and_nothing_after_a_resumed_step_twice(tmp_path, text):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tiny_run(text)
    with pytest.raises(Interrupted):
        train(run, tmp_path / "run", show=signal_at(5, 2))
    train(run, tmp_path / "run", resume=True, show=quiet)
    events = accumulator.EventAccumulator(str(tmp_path / "run/tb")).Reload()
    records = read_records(tmp_path / "run/records.jsonl").records
    for name in ("train/loss", "val/loss", "attn_norm/layer_1"):
        ours = [(r.step, torch.tensor(r.value).item()) for r in records if r.name == name]  # float32
        assert ours
        assert [(event.step, event.value) for event in events.Scalars(name)] == ours


def test_the_line(capsys):
    show_line(Progress("demo sigmoid", 50, 100, 30.0, {"train/loss": 2.0}, validated=False))
    assert capsys.readouterr().err == ""
    show_line(Progress("demo sigmoid", 50, 100, 30.0, {"val/loss": 2.12345}, validated=True))
    assert capsys.readouterr().err == "demo sigmoid  50/100  val/loss 2.123  30 s left\n"


def test_the_line_on_a_terminal_is_rewritten(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for step in (50, 100):
        show_line(Progress("demo", step, 100, 30.0, {"train/loss": 2.0}, validated=False))
    erase = "\r\033[K"
    assert capsys.readouterr().err == (
        f"{erase}demo  50/100  train/loss 2  30 s left{erase}demo  100/100  train/loss 2  0 s left\n"
    )


def test_the_stopwatch_stands_still_when_stopped(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    watch = Stopwatch()
    assert watch.read() == 0.0
    watch.start(100.0)
    now[0] = 12.0
    watch.stop()
    now[0] = 50.0
    assert watch.read() == 102.0
    watch.start()
    now[0] = 51.0
    assert watch.read() == 103.0


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("steps", 0, "steps must be a positive integer, got 0"),
        ("steps", 13, "steps must be at most val_every=6 or a multiple of it, got 13"),
        ("batch", 1.5, "batch must be an integer, got 1.5"),
        ("precision", "fp8", "precision must be 'fp32' or 'bf16', got 'fp8'"),
        ("cuda_graphs", True, "cuda_graphs needs compile=True and accumulate=1, got False, 2"),
        ("sample_tokens", -1, "sample_tokens must not be negative, got -1"),
        ("seed", -1, r"seed must be in \[0, 2\^32\), got -1"),
    ],
)
def test_bad_runs(field, value, rule):
    with pytest.raises(ValueError, match=rule):
        tiny_run(None, **{field: value})


def test_cuda_graphs_are_of_what_is_compiled_and_of_one_rank(text, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: modes.append(options["mode"]) or function)
    for cuda_graphs in (False, True):
        run = tiny_run(text, compile=True, accumulate=1, cuda_graphs=cuda_graphs)
        module = LanguageModule(run, load_data(run))
        module.check_mesh(MeshSizes())
    assert modes == [None, "reduce-overhead"]
    with pytest.raises(ValueError, match="cuda_graphs must be false on a mesh of several ranks, got dp=2,cp=1,tp=1"):
        module.check_mesh(MeshSizes(dp=2))


def test_describing_a_run_needs_no_lightning():
    code = "import sys, flashsigmoid.recipes.language; print('pytorch_lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_run_is_hashable_data():
    run = tiny_run(None)
    assert isinstance(run, LanguageRun)
    assert {run, replace(run)} == {run}
