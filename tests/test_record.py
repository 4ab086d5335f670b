"""record.py: round trips, provenance, what a crash leaves, what damage is refused."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashsigmoid import record
from flashsigmoid.record import Record, RecordWriter, find_runs, read_records

SOURCE = Path(record.__file__)


def same(a: object, b: object) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "arm" / "records.jsonl"


def write_steps(path: Path, steps: range, **keywords: object) -> None:
    with RecordWriter(path, {"seed": 0}, **keywords) as writer:  # type: ignore[arg-type]
        for step in steps:
            writer.write("train/loss", 1.0 / (step + 1), step=step)


@pytest.mark.parametrize("value", [1.5, 0.0, -0.0, 1e-300, math.pi, math.nan, math.inf, -math.inf, None])
def test_every_value_survives_and_every_line_is_strict_json(path: Path, value: float | None) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    with RecordWriter(path, {"sigmoid_bias": value}) as writer:
        written = writer.write("val/loss", value, unit="nats_per_token", step=3, time_s=0.25, split=value)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    back = read_records(path)
    assert len(back.records) == 1
    assert same(back.records[0].value, value)
    assert same(back.records[0].tags["split"], value)
    assert same(back.settings["sigmoid_bias"], value)
    assert (back.records[0].unit, back.records[0].step, back.records[0].time_s) == ("nats_per_token", 3, 0.25)
    assert written.name == back.records[0].name


def test_settings_keep_their_types_and_lists(path: Path) -> None:
    settings = {
        "a": 1,
        "b": 1.0,
        "c": True,
        "d": None,
        "e": "-0.5",
        "window": (None, 3),
        "betas": [0.9, -math.inf],
    }
    RecordWriter(path, settings).close()
    back = read_records(path).settings
    assert back == {**settings, "window": [None, 3]}
    assert {key: type(value) for key, value in back.items()} == {
        key: list if isinstance(value, tuple) else type(value) for key, value in settings.items()
    }


def test_numbers_of_other_libraries_are_taken(path: Path) -> None:
    with RecordWriter(path) as writer:
        writer.write("a", torch.tensor(2.5), step=torch.tensor(7), time_s=torch.tensor(1.0))
    assert read_records(path).records == [Record(name="a", value=2.5, step=7, time_s=1.0)]


def test_each_record_is_on_disk_before_the_next(path: Path) -> None:
    with RecordWriter(path) as writer:
        for count in range(3):
            assert len(read_records(path).records) == count
            writer.write("a", count)
    with pytest.raises(ValueError, match="closed"):
        writer.write("a", 1)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"name": ""}, "name must be a non-empty string"),
        ({"value": "1"}, "value must be a number"),
        ({"value": True}, "value must be a number"),
        ({"time_s": "now"}, "time_s must be a number"),
        ({"unit": None}, "unit must be a string"),
        ({"step": -1}, "step must be a non-negative integer"),
        ({"step": 1.0}, "step must be a non-negative integer"),
        ({"tags": {"a": [1]}}, "tag a must be"),
        ({"tags": {"a": "nan"}}, "tag a must not be"),
        ({"tags": None}, "tags must be a dict"),
        ({"artifact": "../secret"}, "artifact must be the name"),
        ({"artifact": "/etc/hosts"}, "artifact must be the name"),
        ({"artifact": ".."}, "artifact must be the name"),
        ({"artifact": ""}, "artifact must be the name"),
    ],
)
def test_a_wrong_record_is_refused(fields: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Record(**{"name": "a", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [{"nested": 1}, [[1]], object(), "inf"])
def test_settings_that_are_not_flat_are_refused_and_leave_no_file(path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="setting deep must"):
        RecordWriter(path, {"deep": value})
    assert not path.exists()


# what a crash leaves, and what it does not


@pytest.mark.parametrize("kept", range(1, 12))
def test_a_torn_last_line_is_dropped(path: Path, kept: int) -> None:
    write_steps(path, range(3))
    text = path.read_bytes()
    last = text.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(text[: last + kept])
    assert [r.step for r in read_records(path).records] == [0, 1]


def test_a_last_line_without_newline_counts_once_it_is_complete(path: Path) -> None:
    write_steps(path, range(3))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert [r.step for r in read_records(path).records] == [0, 1, 2]


@pytest.mark.parametrize(
    "damage",
    [b'{"name": "a", "val', b"\x00\x00\xff", b"", b"[1]", b'{"value": 1.0}', b'{"name": "a", "colour": 1}'],
)
def test_a_damaged_line_in_the_middle_is_named(path: Path, damage: bytes) -> None:
    write_steps(path, range(3))
    lines = path.read_bytes().split(b"\n")
    lines[2] = damage  # line 3, step 1
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"line 3 of .*records\.jsonl must be"):
        read_records(path)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "must be an existing file"),
        (b"", "got an empty file"),
        (b"\n", "line 1"),
        (b'{"header": {"sett', "must start with a header"),
        (b'{"name": "a"}\n', "must start with a header"),
        (b'{"header": {}}\n', "must start with a header"),
    ],
)
def test_a_file_without_header_is_refused(path: Path, content: bytes | None, rule: str) -> None:
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rule):
        read_records(path)


# resuming


def test_resume_equals_a_run_that_never_stopped(path: Path, tmp_path: Path) -> None:
    write_steps(path, range(6))
    with path.open("ab") as file:
        file.write(b'{"name": "train/lo')
    header = read_records(path).header
    write_steps(path, range(4, 8), resume_step=3)
    whole = tmp_path / "whole.jsonl"
    write_steps(whole, range(8))
    assert read_records(path).records == read_records(whole).records
    resumed = read_records(path).header
    assert [entry["step"] for entry in resumed.pop("resumed")] == [3]
    assert resumed == header
    assert [p.name for p in path.parent.iterdir()] == ["records.jsonl"]


def test_resume_keeps_records_without_a_step(path: Path) -> None:
    with RecordWriter(path) as writer:
        writer.write("baseline/bigram", 2.5)
        writer.write("a", 1.0, step=5)
    RecordWriter(path, resume_step=0).close()
    assert [r.name for r in read_records(path).records] == ["baseline/bigram"]


def test_resume_of_nothing_begins_and_of_damage_refuses(path: Path) -> None:
    write_steps(path, range(2), resume_step=3)
    assert len(read_records(path).records) == 2
    path.write_text("not records\n")
    with pytest.raises(ValueError, match="line 1"):
        RecordWriter(path, resume_step=3)
    assert path.read_text() == "not records\n"
    with pytest.raises(ValueError, match="resume_step must be"):
        RecordWriter(path, resume_step=-1)


def test_a_new_run_replaces_an_old_one(path: Path) -> None:
    write_steps(path, range(5))
    write_steps(path, range(2))
    assert len(read_records(path).records) == 2


# provenance


def test_header_says_where_the_numbers_come_from(path: Path) -> None:
    RecordWriter(path, {"seed": 1}).close()
    header = read_records(path).header
    assert set(header) == {"settings", "hardware", "versions", "commit", "dirty", "command", "started"}
    assert header["hardware"]["cpu"]
    assert header["hardware"]["cores"] >= 1
    assert header["versions"]["torch"] == torch.__version__.partition("+")[0] or header["versions"]["torch"]
    assert header["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert header["started"].endswith("+00:00")


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    command = ("git", "-C", str(folder), *identity, *words)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def stand_alone(file: Path, expression: str) -> object:
    """An expression over the record.py at `file`, evaluated by a fresh interpreter that has no torch."""
    program = (
        "import importlib.util, json, sys; sys.modules['torch'] = None\n"
        f"spec = importlib.util.spec_from_file_location('record', {str(file)!r})\n"
        "record = sys.modules['record'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(record)\n"
        f"print(json.dumps({expression}))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_commit_is_that_of_the_source_and_of_nothing_else(tmp_path: Path) -> None:
    room = tmp_path / "with space" / "package"
    room.mkdir(parents=True)
    file = room / "record.py"
    file.write_text(SOURCE.read_text())
    state = "record._source_state()"
    assert stand_alone(file, state) == [None, None]  # outside git

    git(tmp_path, "init", "-q")
    (tmp_path / "other").write_text("x")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-q", "-m", "another project")
    assert stand_alone(file, state) == [None, None]  # installed inside somebody's repository

    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "ours")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert stand_alone(file, state) == [commit, False]
    (tmp_path / "other").write_text("a change outside the package")
    assert stand_alone(file, state) == [commit, False]
    (room / "new.py").write_text("")
    assert stand_alone(file, state) == [commit, True]


def test_record_needs_the_standard_library_only() -> None:
    tree = ast.parse(SOURCE.read_text())
    names = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert names <= set(sys.stdlib_module_names)
    assert stand_alone(SOURCE, "record.provenance('x')['hardware']['gpu']") is None


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["{bin}/python", "-m", "flashsigmoid", "demo"], "python -m flashsigmoid demo"),
        (["{bin}/python", "{bin}/flashsigmoid", "demo", "--steps", "5"], "flashsigmoid demo --steps 5"),
        (["python", "{cwd}/train.py", "{home}/my data/a.txt"], "python train.py ~/'my data/a.txt'"),
        (["python", "x.py", "--in={cwd}/a b.txt", "--out={home}"], "python x.py --in='a b.txt' --out=~"),
        (["python", "x.py", "/mnt/host/disk/text.txt"], "python x.py .../text.txt"),
        (["python", "x.py", "--prompt", "it's", ""], "python x.py --prompt 'it'\"'\"'s' ''"),
    ],
)
def test_command_is_as_typed_without_folders_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], told: str
) -> None:
    home, cwd = tmp_path / "home", tmp_path / "work"
    cwd.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(cwd)
    words = [word.format(bin=tmp_path / "bin", cwd=cwd, home=home) for word in typed]
    monkeypatch.setattr(sys, "orig_argv", words)
    assert record.command_line() == told


def test_find_runs(tmp_path: Path) -> None:
    for name in ("b/softmax", "b/sigmoid", "a"):
        RecordWriter(tmp_path / name / "records.jsonl").close()
    (tmp_path / "empty").mkdir()
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "b/sigmoid", tmp_path / "b/softmax"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
    assert find_runs(tmp_path / "empty") == []
    with pytest.raises(ValueError, match="existing folder"):
        find_runs(tmp_path / "missing")
