"""The command line: help, errors of one line, exit codes, and the whole way from training to report, tiny."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training.digits import few_images
from training.test_audio import tone
from training.test_images import draw
from typer.testing import CliRunner

from flashsigmoid import __main__, __version__, cli
from flashsigmoid.record import read_records
from flashsigmoid.training import baseline, classification, ctc, pretraining

COMMANDS = (
    "demo",
    "train",
    "pair",
    "generate",
    "export",
    "convert",
    "transcribe",
    "report",
    "study",
    "theory",
    "pack",
    "explain",
    "bench",
)
TINY = (
    *(
        "--set",
        "model.dim=16",
        "--set",
        "nlayers=1",
        "--set",
        "nheads=2",
        "--set",
        "seqlen=32",
        "--set",
        "batch=2",
    ),
    *("--set", "val_windows=2", "--set", "val_every=2", "--set", "save_every=2", "--set", "sample_tokens=8"),
)


@dataclasses.dataclass
class Outcome:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


Flashsigmoid = Callable[..., Outcome]


@pytest.fixture
def flashsigmoid(capfd, monkeypatch, tmp_path) -> Flashsigmoid:
    """Runs the command in this process, in an empty folder, as its entry point does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*words: str | Path) -> Outcome:
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as left:
                __main__.main([str(word) for word in words])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        return Outcome(int(left.value.code or 0), out, err)

    return call


@pytest.fixture
def few_digits(monkeypatch) -> None:
    """Of the embedded digits the first 200 and 100: what a run takes longest for is to look at them."""
    for module in (classification, pretraining):
        monkeypatch.setattr(module, "load_images", lambda config: few_images(config, 200, 100))


@functools.cache
def best_constant(said: tuple[str, ...], candidates: tuple[str, ...], characters: str) -> str:
    return baseline.best_constant(said, candidates, characters)


@pytest.fixture
def constant_found_once(monkeypatch) -> None:
    """The search for the best constant answer is three quarters of a short run; it is the same in all of them."""
    monkeypatch.setattr(ctc, "best_constant", lambda *texts: best_constant(*map(tuple, texts[:2]), texts[2]))


def assert_one_error(outcome: Outcome, code: int, *words: str) -> None:
    """One line on stderr that says what is wrong, nothing else, and the exit code."""
    assert outcome.code == code, outcome
    (line,) = outcome.err.splitlines()
    assert re.match(r"error: (?!\w+Error)", line), line  # the rule, not the name of a class
    for word in words:
        assert word in line
    assert outcome.out == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_helps_with_an_example(command):
    environment = {"COLUMNS": "200", "TERM": "dumb"}
    result = CliRunner().invoke(cli.app, [command, "--help"], env=environment, prog_name="flashsigmoid")
    assert result.exit_code == 0
    assert f"Usage: flashsigmoid {command}" in result.output
    assert re.search(rf"Examples?: flashsigmoid {command} ", result.output)


def test_help_names_every_command(flashsigmoid):
    for words in (["--help"], ["-h"]):
        outcome = flashsigmoid(*words)
        assert outcome.code == 0
        for command in COMMANDS:
            assert re.search(rf"\b{command}\b", outcome.out)


def test_no_command_shows_the_help_as_a_usage_error(flashsigmoid):
    outcome = flashsigmoid()
    assert outcome.code == 2
    assert "Usage" in outcome.out + outcome.err
    assert "error" not in outcome.err


def test_version(flashsigmoid):
    assert flashsigmoid("--version") == Outcome(0, f"flashsigmoid {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["explode"], 2, "explode"),
        (["train", "demo", "--colour", "red"], 2, "--colour"),
        (["report"], 2, "Missing argument"),
        (["explain", "--dtype", "float8"], 2, "float8"),
        (["train"], 1, "RECIPE must be one of those that flashsigmoid train --list names, got none"),
        (["train", "dmeo"], 1, "got dmeo; did you mean demo?"),
        (["train", "demo", "--device", "tpu"], 2, "'tpu' is not one of"),
        (["train", "demo", "--steps", "many"], 1, "steps must be an integer, got 'many'"),
        (["train", "demo", "--steps", "-1"], 1, "steps must be a positive integer, got -1"),
        (
            ["train", "demo", "--attention", "linear"],
            1,
            "model.attention must be sigmoid or softmax, got 'linear'",
        ),
        (["train", "demo", "--set", "model.dmi=8"], 1, "no field model.dmi; did you mean model.dim?"),
        (["train", "demo", "--set", "nlayer=8"], 1, "did you mean model.nlayers?"),
        (["train", "demo", "--set", "dim"], 1, "--set must be FIELD=VALUE, got dim"),
        (["train", "demo", "--set", "dim=8", "--set", "model.dim=8"], 1, "model.dim must be set once"),
        (["train", "demo", "--steps", "8", "--set", "steps=8"], 1, "steps must be set once"),
        (
            ["train", "demo", "--attention", "softmax", "--sigmoid-bias", "-3"],
            1,
            "sigmoid_bias has no effect",
        ),
        (
            ["train", "demo", "--attention", "softmax", "--set", "model.sigmoid_bias=0"],
            1,
            "sigmoid_bias has no effect",
        ),
        (["train", "demo", "--data", "nowhere.txt"], 1, "nowhere.txt"),
        (["pair", "dmeo"], 1, "got dmeo; did you mean demo?"),
        (["pair", "demo", "--set", "attention=softmax"], 1, "model.attention must be set for all arms or by an arm"),
        (["pair", "demo", "--jobs", "0"], 1, "jobs must be at least 1, got 0"),
        (["pair", "demo", "--arm", "a:dim"], 1, "--arm must be FIELD=VALUE, got dim"),
        (["pair", "demo", "--arm", "a", "--arm", "a"], 1, "--arm must be given once for each name, got a twice"),
        (["pair", "demo", "--max-minutes", "0"], 1, "max_minutes must be positive or None, got 0"),
        (["train", "demo", "--out", "."], 1, "must not hold a run"),
        (["demo", "--set", "attention=softmax"], 1, "the demo trains both arms"),
        (["generate", "nowhere"], 1, "nowhere"),
        (["transcribe", "nowhere", "a.wav"], 1, "a checkpoint, or a run with one, must be at the path, got nowhere"),
        (["transcribe", "nowhere"], 2, "Missing argument"),
        (["transcribe", "nowhere", "a.wav", "--beam", "0"], 1, "--beam must be at least 1, got 0"),
        (["report", "nowhere"], 1, "nowhere"),
        (["pack", "nowhere", "shards"], 1, "root must hold the folders train and val, got none at nowhere"),
        (["pack", "nowhere", "."], 1, "out must not exist yet, got ."),
        (
            ["study", "sleep"],
            1,
            "STUDY must be one of diagnosis, retrieval, k-summation, pair-repeat, neighbours, sinks, speculative, "
            "vision-ablation, got sleep",
        ),
        (["study", "sinks", "--only", "swish"], 1, "an arm must be one of softmax, normalised-sigmoid, sigmoid, "),
        (["study", "sinks", "--quick", "--seed", "7"], 1, "a seed of the study must be one of 0, got 7"),
        (["study", "sinks", "--recipe", "digits"], 1, "--recipe and --set are of vision-ablation only"),
        (["study", "vision-ablation", "--quick"], 1, "vision-ablation has no --quick, --seed and --jobs"),
        (["study", "vision-ablation", "--recipe", "demo"], 1, "--recipe must be one of digits, cifar10, "),
        (["study", "vision-ablation", "--only", "swish"], 1, "a variant must be one of base, softmax, "),
        (["explain", "--backend", "warp"], 1, "backend must be one of auto, "),
        (
            ["explain", "--nheads", "3", "--nheads-k", "2"],
            1,
            "nheads must be a positive multiple of nheads_k",
        ),
        (["explain", "--window", "3"], 1, "window must be"),
        (["explain", "--window", "3,x"], 1, "window must be"),
        (["explain", "--sigmoid-bias", "1", "--bias-per-head"], 1, "sigmoid_bias has no effect"),
    ],
)
def test_an_error_is_one_line(flashsigmoid, tmp_path, words, code, complaint):
    (tmp_path / "records.jsonl").touch()
    assert_one_error(flashsigmoid(*words), code, complaint)


def test_an_empty_text_is_one_line(flashsigmoid, tmp_path):
    (tmp_path / "empty.txt").touch()
    assert_one_error(flashsigmoid("train", "demo", "--data", "empty.txt"), 1, "empty.txt")


@pytest.mark.parametrize("words", [["--debug", "generate", "nowhere"], ["generate", "nowhere", "--debug"]])
def test_debug_gives_the_traceback(flashsigmoid, words):
    with pytest.raises(ValueError, match="nowhere"):
        flashsigmoid(*words)


def test_debug_in_a_process_prints_a_traceback(tmp_path):
    done = run_python("-m", "flashsigmoid", "generate", "nowhere", "--debug", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")


@pytest.mark.parametrize(("module", "extra"), [("typer", "cli"), ("rich", "cli"), ("matplotlib", "report")])
def test_a_missing_library_names_its_extra(flashsigmoid, monkeypatch, module, extra):
    # the largest first, as hatchling writes them
    everything = [f"{name}; extra == 'all'" for name in ("matplotlib", "rich", "torch", "typer>=0.15")]
    requirements = [*everything, 'typer>=0.15; extra == "cli"', "rich; extra == 'cli'", 'matplotlib; extra == "report"']
    monkeypatch.setattr(__main__.importlib.metadata, "requires", lambda name: requirements)

    def run(words: list[str]) -> int:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(__main__, "_run", run)
    assert_one_error(flashsigmoid("demo"), 1, module, f'pip install "flashsigmoid[{extra}]"')


def test_the_installed_metadata_know_the_extras():
    assert __main__._extra_with("pytorch_lightning") in ("train", "all")
    assert __main__._extra_with("no_such_module") == "all"


def test_bench_times_and_records_a_problem(flashsigmoid, tmp_path):
    listed = flashsigmoid("bench", "--list")
    assert listed.code == 0
    assert "cpu-512-d64" in listed.out
    words = ("cpu-512-d64", "--work", "forward", "--rounds", "2", "--out", "bench.jsonl", "--plot", "bench.svg")
    outcome = flashsigmoid("bench", *words)
    assert outcome.code == 0, outcome.err
    numbers = r" +[\d.]+ +[\d.]+ to [\d.]+ +[\d.]+ +\d\.\d\d +\d\.\de-07 +0\.\d\d"
    assert re.search(rf"cpu-512-d64, forward\n.*\nblocked{numbers}", outcome.out), outcome.out
    assert "cpu-512-d64: no sdpa flash, sdpa cudnn, sdpa efficient, fa3" in outcome.out
    assert len(read_records(tmp_path / "bench.jsonl").records) > 5
    assert "blocked" in (tmp_path / "bench.svg").read_text("utf-8")
    assert_one_error(flashsigmoid("bench", "warp"), 1, "problem must be one of cpu-512-d64")
    assert_one_error(flashsigmoid("bench", "--work", "sideways"), 1, "work must be one of forward, backward, both")
    assert_one_error(flashsigmoid("bench", "--peer", "nobody"), 1, "peer must be one of hopper, triton, blocked")
    assert_one_error(flashsigmoid("bench", "--device", "tpu"), 1, "device must be one of cpu")
    assert_one_error(flashsigmoid("bench", "--load-library", "none.so"), 1, "--load-library must be a shared library")
    assert_one_error(flashsigmoid("bench", "--plot", "bench.gif"), 1, "--plot must end in .png or .svg")


def test_bench_tune_is_of_16_bits_and_takes_no_option_in_silence(flashsigmoid, monkeypatch):
    from flashsigmoid.bench import tune

    seen = []
    monkeypatch.setattr(tune, "tune", lambda names, **options: seen.append((names, options)))
    assert flashsigmoid("bench", "lm-4k-d64", "--tune", "--kernel", "fwd", "--rounds", "3").code == 0
    assert seen == [(["lm-4k-d64"], {"dtype": torch.bfloat16, "kernels": ["fwd"], "rounds": 3, "show": print})]
    assert flashsigmoid("bench", "--tune", "--dtype", "float32").code == 0
    assert seen[1][1]["dtype"] == torch.float32
    for words in (["--work", "forward"], ["--peer", "triton"], ["--out", "x"], ["--plot", "x.svg"], ["--no-graphs"]):
        assert_one_error(flashsigmoid("bench", "--tune", *words), 1, "--tune takes problems, --kernel, --dtype and")
    assert_one_error(flashsigmoid("bench", "--kernel", "fwd"), 1, "--kernel goes with --tune, got fwd without it")


def test_train_lists_its_recipes(flashsigmoid):
    outcome = flashsigmoid("train", "--list")
    assert outcome.code == 0
    assert outcome.out.startswith("demo ")
    assert "\ncifar10 " in outcome.out
    assert "\nan4_sample " in outcome.out


def test_train_lists_what_it_can_without_an_extra(flashsigmoid, monkeypatch):
    def missing(name: str, package: str):
        raise ModuleNotFoundError(f"No module named {name}", name=f"guest-of{name}")

    # of our own importing alone: what typer imports meanwhile is there
    monkeypatch.setattr("flashsigmoid.cli.recipes.importlib", SimpleNamespace(import_module=missing))
    outcome = flashsigmoid("train", "--list")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == (
        "recipes for images need guest-of..recipes.vision: pip install 'flashsigmoid[vision]'; "
        "recipes for images without labels need guest-of..recipes.pretraining: pip install 'flashsigmoid[vision]'; "
        "recipes for speech need guest-of..recipes.speech: pip install 'flashsigmoid[speech]'"
    )
    assert_one_error(flashsigmoid("train", "an4"), 1, "got an4", "pip install 'flashsigmoid[speech]'")


@pytest.mark.usefixtures("constant_found_once")
def test_train_on_speech_then_transcribe(flashsigmoid, tmp_path):
    """A few steps of both arms, then what they hear in files, good and bad."""
    tiny = ("--device", "cpu", "--steps", "2", "--batch-size", "4", "--set", "model.dim=16", "--set", "nlayers=1")
    first = flashsigmoid("train", "an4_sample", *tiny)
    assert first.code == 0, first.err
    assert first.out.startswith("val/cer ")
    assert "baseline/constant_cer 0." in first.out
    assert first.out.endswith("next: flashsigmoid transcribe runs/an4_sample/sigmoid FILE...\n")
    assert flashsigmoid("train", "an4_sample", "--resume", *tiny).out == first.out
    assert flashsigmoid("train", "an4_sample", "--attention", "softmax", *tiny).code == 0
    for name in ("one", "two"):
        tone(tmp_path / f"{name}.wav")
    (tmp_path / "bad.wav").write_bytes(b"")
    words = ("transcribe", "runs/an4_sample/sigmoid")
    single, beam = flashsigmoid(*words, "one.wav"), flashsigmoid(*words, "one.wav", "--beam", "4")
    assert (single.code, beam.code, single.err, beam.err) == (0, 0, "", "")
    assert re.fullmatch(r"[A-Z' ]*\n", single.out)
    assert re.fullmatch(r"[A-Z' ]*\n", beam.out)
    both = flashsigmoid(*words, "one.wav", "bad.wav", "two.wav", "--skip")
    assert both.code == 0
    assert [line.partition("\t")[0] for line in both.out.splitlines()] == ["one.wav", "two.wav"]
    assert both.out.splitlines()[0] == f"one.wav\t{single.out.rstrip(chr(10))}"
    assert re.fullmatch(r"left out, audio must be usable, got bad.wav: .+\n1 of 3 files left out\n", both.err)
    assert_one_error(flashsigmoid(*words, "bad.wav", "one.wav"), 1, "audio must be usable, got bad.wav: ")


@pytest.mark.usefixtures("constant_found_once")
def test_the_demo_of_speech_reports_errors_against_the_constant(flashsigmoid, tmp_path):
    """Two steps of each arm teach nothing, and the report says so."""
    tiny = ("--set", "steps=2", "--set", "batch=4", "--set", "model.dim=16", "--set", "nlayers=1")
    outcome = flashsigmoid("demo", "speech", *tiny)
    assert outcome.code == 0, outcome.err
    assert re.search(r"The validation character errors ended at [\d.]+% ± [\d.]+% for sigmoid and ", outcome.out)
    assert "; the best constant answer has 68.1%;" in outcome.out
    assert "Fewer than 3 standard errors below the constant are no sign of learning: " in outcome.out
    assert "The character errors of sigmoid minus those of softmax are " in outcome.out
    page = (tmp_path / "runs/demo-speech/report.html").read_text("utf-8")
    assert "final validation character errors ± " in page
    assert "bigram" not in page
    assert "not recorded" not in page
    assert "taken as it is" in flashsigmoid("demo", "speech", *tiny).out


@pytest.mark.usefixtures("few_digits")
def test_train_on_images(flashsigmoid, tmp_path):
    """A few steps, and what is there already."""
    out = tmp_path / "run"
    tiny = (
        "--out",
        str(out),
        "--device",
        "cpu",
        "--set",
        "model.dim=16",
        "--set",
        "model.depth=1",
        "--batch-size",
        "8",
    )
    first = flashsigmoid("train", "digits", "--steps", "2", *tiny)
    assert first.code == 0, first.err
    assert first.out.startswith("val/accuracy 0.")
    assert first.out.splitlines()[-1] == f"run: {out}   next: flashsigmoid report {out}"
    assert_one_error(flashsigmoid("train", "digits", "--steps", "2", *tiny), 1, "out_dir must not hold a run unless")
    assert flashsigmoid("train", "digits", "--steps", "2", "--resume", *tiny).out == first.out
    assert_one_error(flashsigmoid("train", "digits", "--tokenizer", "bpe", *tiny), 1, "the run has no field data.token")


def test_a_folder_is_packed_and_trained_on(flashsigmoid, tmp_path):
    for split, count in (("train", 9), ("val", 2)):
        for number in range(count):
            draw(tmp_path / "images" / split / f"class-{number % 2}" / f"{number}.png")
    packed = flashsigmoid("pack", "images", "shards", "--shard-size", "4")
    assert (packed.code, packed.err) == (0, "")
    assert packed.out.splitlines()[:3] == [f"train-000{i}.tar: {n} images" for i, n in enumerate((4, 4, 1))]
    assert packed.out.splitlines()[3] == "val-0000.tar: 2 images"
    words = ("train", "digits", "--steps", "1", "--batch-size", "4", "--device", "cpu", "--out", "run")
    fields = ("data.source=tar", "data.root=shards", "num_classes=2", "in_chans=3", "data.img_size=28", "model.dim=16")
    trained = flashsigmoid(*words, *(word for field in fields for word in ("--set", field)))
    assert trained.code == 0, trained.err
    assert "baseline/majority 0.5000" in trained.out


@pytest.mark.usefixtures("few_digits")
def test_a_study_trains_compares_and_takes_what_is_there(flashsigmoid, tmp_path):
    words = ("study", "vision-ablation", "--only", "base", "--only", "relu", "--device", "cpu", "--set", "steps=2")
    words += ("--set", "model.dim=16", "--set", "model.depth=1", "--set", "batch=8")
    first = flashsigmoid(*words)
    assert first.code == 0, first.err
    assert re.search(r"base +│ +\d+\.\d ± \d\.\d +│ +│", first.out)
    assert re.search(r"relu +│ +\d+\.\d ± \d\.\d +│ [+-]\d\.\d ± ", first.out)
    folder = Path("runs/vision-ablation/digits")
    assert first.out.splitlines()[-1] == f"records: {folder / 'ablation.jsonl'}"
    assert "hints, not findings" in first.out
    assert "\nrelu  2/2 " in first.err
    again = flashsigmoid(*words)
    assert (again.out, again.err) == (first.out, "")
    assert_one_error(flashsigmoid(*words, "--set", "seed=1"), 1, "seed must be that of the run in", "0, got 1")
    fresh = flashsigmoid(*words, "--set", "seed=1", "--fresh")
    assert fresh.code == 0, fresh.err
    assert {path.name for path in (tmp_path / folder).iterdir()} == {"base", "relu", "ablation.jsonl"}


def test_a_small_study_is_recorded_drawn_printed_and_taken_as_it_is(flashsigmoid, tmp_path, monkeypatch):
    from flashsigmoid.studies import sinks

    monkeypatch.setattr(sinks, "QUICK", dataclasses.replace(sinks.QUICK, steps=2, batch=2))
    words = ("study", "sinks", "--quick", "--only", "s*max", "--only", "sigmoid", "--device", "cpu")
    first = flashsigmoid(*words)
    assert first.code == 0, first.err
    folder = Path("runs/sinks-quick")
    last = first.out.splitlines()[-1]
    assert last == f"records: {folder / 'sinks.jsonl'}   figure: {folder / 'sinks.png'}"
    assert "hints, not findings" in first.out
    assert "\nsigmoid-seed-0  2/2 " in first.err
    assert {path.name for path in (tmp_path / folder).iterdir()} == {"sinks.jsonl", "sinks.png", "trials"}
    again = flashsigmoid(*words)
    assert (again.out, again.err) == (first.out, "")
    monkeypatch.setattr(sinks, "QUICK", dataclasses.replace(sinks.QUICK, lr=1.0))
    assert_one_error(flashsigmoid(*words), 1, "lr must be that of", "0.003, got 1.0")
    assert flashsigmoid(*words, "--fresh").code == 0


def test_a_theory_is_recorded_drawn_and_printed(flashsigmoid, tmp_path):
    outcome = flashsigmoid("theory", "universal", "--quick", "--out", tmp_path / "mine")
    assert outcome.code == 0, outcome.err
    assert "lopsided" in outcome.out
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["universal.jsonl", "universal.png"]
    assert_one_error(flashsigmoid("theory", "magic"), 2, "'magic' is not one of 'bias', 'regularity', 'tightness'")


@pytest.mark.parametrize("recipe", ["simclr_digits", pytest.param("byol_digits", marks=pytest.mark.long), "mae_digits"])
@pytest.mark.usefixtures("few_digits")
def test_train_without_labels_then_a_probe(flashsigmoid, tmp_path, recipe):
    """A few steps of each, a page of both, and an encoder of the other attention."""
    tiny = ("--device", "cpu", "--steps", "2", "--set", "model.dim=16", "--set", "model.depth=1", "--batch-size", "8")
    first = flashsigmoid("train", recipe, *tiny, "--set", "knn_images=50")
    assert first.code == 0, first.err
    assert first.out.startswith("val/knn_accuracy 0.")
    assert flashsigmoid("train", recipe, *tiny, "--set", "knn_images=50", "--resume").out == first.out
    init = ("--set", f"run.init=runs/{recipe}/sigmoid")
    probe = flashsigmoid("train", "probe_digits", *tiny, *init)
    assert probe.code == 0, probe.err
    assert probe.out.startswith("val/accuracy 0.")
    assert_one_error(
        flashsigmoid("train", "probe_digits", *tiny, *init, "--attention", "softmax"),
        1,
        "model.attention must be that of the encoder in runs",
    )
    assert not (tmp_path / "runs/probe_digits/softmax").exists()
    for folder, label in ((f"runs/{recipe}", "kNN accuracy"), ("runs/probe_digits", "accuracy")):
        page = flashsigmoid("report", folder)
        assert page.code == 0, page.err
        assert f"final validation {label} " in (tmp_path / folder / "report.html").read_text("utf-8")


def test_explain_says_backend_formula_and_why_not_the_others(flashsigmoid):
    outcome = flashsigmoid("explain", "--seqlen", "5", "--window", "3,none", "--alibi", "--bias-per-head", "--causal")
    assert outcome.code == 0
    assert outcome.out.startswith("backend: blocked\nformula: ")
    assert "not reference: " in outcome.out


def test_explain_of_an_absent_device_needs_no_device(flashsigmoid):
    assert flashsigmoid("explain", "--device", "cuda").code == 0


def test_train_resume_generate_report(flashsigmoid, tmp_path):
    """The round trip: two arms, one of them in two parts, text from it, and a page."""
    run = tmp_path / "runs/demo/sigmoid"
    first = flashsigmoid("train", "demo", "--steps", "2", "--device", "cpu", "--resume", *TINY)
    assert first.code == 0, first.err
    assert "val/loss" in first.out
    assert first.err.startswith("no checkpoint in runs/demo/sigmoid to resume from: training from the beginning\n")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]

    assert_one_error(flashsigmoid("train", "demo", "--steps", "2", *TINY), 1, "must not hold a run")
    again = flashsigmoid("train", "demo", "--steps", "2", "--device", "cpu", "--resume", *TINY)
    assert again.code == 0, again.err
    assert again.out == first.out

    twin = flashsigmoid("train", "demo", "--attention", "softmax", "--steps", "2", "--device", "cpu", *TINY)
    assert twin.code == 0, twin.err
    assert (tmp_path / "runs/demo/softmax/records.jsonl").exists()

    options = ("--max-new-tokens", "12", "--seed", "3")
    text = flashsigmoid("generate", run, "--prompt", "To be", *options)
    assert text.code == 0, text.err
    assert text.out.startswith("To be")
    assert text.out == flashsigmoid("generate", run / "checkpoints/step-00000002", "--prompt", "To be", *options).out
    assert_one_error(flashsigmoid("generate", run, "--prompt", ""), 1, "prompt must have at least one character")
    assert_one_error(flashsigmoid("generate", run, "--top-p", "2"), 1, "top_p must be in (0, 1], got 2.0")

    exported = flashsigmoid("export", run, "exported")
    assert exported.code == 0, exported.err
    assert (tmp_path / "exported/model.safetensors").exists()
    assert_one_error(flashsigmoid("export", run, "exported"), 1, "out_dir must be new or empty")
    assert_one_error(
        flashsigmoid("export", "runs/demo/softmax", "other"), 1, "attention of the model must be 'sigmoid'"
    )

    page = flashsigmoid("report", "runs/demo")
    assert page.code == 0, page.err
    assert (tmp_path / "runs/demo/report.html").exists()
    assert "report: " in page.out
    assert "softmax" in page.out
    assert flashsigmoid("report", "runs/demo", "--out", "other/page.html").code == 0
    assert (tmp_path / "other/page.html").exists()


def test_demo_trains_both_arms_and_takes_them_the_second_time(flashsigmoid, tmp_path):
    words = ("demo", "--set", "steps=2", *TINY)
    first = flashsigmoid(*words)
    assert first.code == 0, first.err
    assert (tmp_path / "runs/demo/report.html").exists()
    assert "bigram model of the same text: " in first.out
    weights = {path: path.read_bytes() for path in tmp_path.rglob("model.safetensors")}
    assert len(weights) == 2

    second = flashsigmoid(*words)
    assert second.code == 0, second.err
    assert second.out.count("trained already") == 2
    assert "/2" not in second.err  # no step was trained
    assert {path: path.read_bytes() for path in tmp_path.rglob("model.safetensors")} == weights
    assert second.out.splitlines()[2:] == first.out.splitlines()

    third = flashsigmoid(*words, "--no-bias-arm")
    assert third.code == 0, third.err
    assert third.out.count("trained already") == 2
    assert (tmp_path / "runs/demo/sigmoid-no-bias/records.jsonl").exists()

    other = flashsigmoid(*words, "--seed", "1")
    assert other.code == 1
    assert "seed must stay as the run began" in other.err
    assert "--fresh trains anew" in other.err.splitlines()[-1]
    fresh = flashsigmoid(*words, "--seed", "1", "--fresh")
    assert fresh.code == 0, fresh.err
    assert "trained already" not in fresh.out


TINY_IMAGES = (
    *("--set", "steps=2", "--set", "model.dim=16", "--set", "depth=1", "--set", "nheads=2", "--set", "batch=8"),
    *("--set", "data.img_size=14", "--set", "model.img_size=14", "--set", "patch_size=7", "--set", "val_every=2"),
)


def test_demo_vision_trains_both_arms_on_digits(flashsigmoid, tmp_path):
    first = flashsigmoid("demo", "vision", *TINY_IMAGES)
    assert first.code == 0, first.err
    out = tmp_path / "runs/demo-vision"
    assert "attention-maps-0-" in (out / "report.html").read_text("utf-8")
    assert (out / "report-figures/attention-maps.png").exists()
    assert re.search(r"accuracy +. +\d+\.\d% ± \d\.\d% . +\d+\.\d% ± ", first.out)
    values = [
        {r.name: r.value for r in read_records(out / arm / "records.jsonl").records} for arm in ("sigmoid", "softmax")
    ]
    ends = " and ".join(
        f"{each['val/accuracy']:.1%} ± {each['val/accuracy_se']:.1%} for {arm}"
        for each, arm in zip(values, ("sigmoid", "softmax"), strict=True)
    )
    assert f"The validation accuracy ended at {ends}; the most frequent class alone gets 11.7%;" in first.out
    assert " standard errors above the most frequent class for sigmoid and " in first.out
    assert " the standard error of the difference, " in first.out
    assert "bigram" not in first.out
    assert {each["data/skipped"] for each in values} == {0.0}

    second = flashsigmoid("demo", "vision", *TINY_IMAGES)
    assert second.out.count("trained already") == 2
    assert second.out.splitlines()[2:] == first.out.splitlines()
    fresh = flashsigmoid("demo", "vision", "--fresh", "--no-bias-arm", "--out", out, *TINY_IMAGES)
    assert fresh.code == 0, fresh.err
    assert "trained already" not in fresh.out
    assert read_records(out / "sigmoid-no-bias/records.jsonl").settings["sigmoid_bias"] == 0.0
    assert_one_error(flashsigmoid("demo", "music"), 2, "'music' is not one of 'language', 'vision', 'speech'")
    assert_one_error(flashsigmoid("demo", "vision", "--set", "dropout_p=0.1"), 1, "the run has no field dropout_p")


@pytest.mark.parametrize("module", ["timm", pytest.param("torchvision", marks=pytest.mark.long)])
def test_demo_vision_without_its_libraries_names_the_extra(tmp_path, module):
    program = (
        f"import sys; sys.modules[{module!r}] = None; from flashsigmoid.__main__ import main; main(['demo', 'vision'])"
    )
    done = run_python("-c", program, folder=tmp_path)
    assert done.returncode == 1
    assert module in done.stderr
    assert 'pip install "flashsigmoid[vision]"' in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_terminal_gets_a_bar(flashsigmoid, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    outcome = flashsigmoid("train", "demo", "--steps", "2", "--device", "cpu", *TINY)
    assert outcome.code == 0, outcome.err
    assert re.search(r"demo sigmoid .*━.* 2/2 +val \d\.\d{3}", re.sub(r"\x1b\[[\d;?]*\w", "", outcome.err))


def test_fresh_removes_nothing_but_runs(flashsigmoid, tmp_path):
    diary = tmp_path / "runs/demo/sigmoid/diary.txt"
    diary.parent.mkdir(parents=True)
    diary.write_text("mine")
    outcome = flashsigmoid("demo", "--fresh", "--set", "steps=2", *TINY)
    assert outcome.code == 0, outcome.err
    assert diary.read_text() == "mine"


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def run_python(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)]
)
def test_an_interrupted_training_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path, number, code):
    never = ["save_every=100000" if word == "save_every=2" else word for word in TINY]
    words = ["train", "demo", "--steps", "100000", "--device", "cpu", *never, "--set", "log_every=5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flashsigmoid", *words],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    records = tmp_path / "runs/demo/sigmoid/records.jsonl"
    deadline = time.monotonic() + 100
    while not (records.exists() and "train/loss" in records.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    (checkpoint,) = (tmp_path / "runs/demo/sigmoid/checkpoints").iterdir()
    last = err.splitlines()[-1]
    assert checkpoint.name in last
    assert "--resume" in last
    assert "Traceback" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_any_work_leaves_quietly(tmp_path, number, code):
    # a shell's background job, as CI may be, hands SIGINT down ignored
    listen = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    plant = f"__main__._run = lambda words: os.kill(os.getpid(), {int(number)})"
    program = f"import os, signal; from flashsigmoid import __main__; {listen}; {plant}; __main__.main([])"
    done = run_python("-c", program, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
