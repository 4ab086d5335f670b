"""Help, and errors of one line with their exit codes."""

from __future__ import annotations

import re

import pytest
from cli.outcome import Outcome, assert_one_error, run_python
from typer.main import get_command
from typer.testing import CliRunner

from flashsigmoid import __main__, __version__, cli

COMMANDS = tuple(get_command(cli.app).commands)  # pyright: ignore[reportAttributeAccessIssue]


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
