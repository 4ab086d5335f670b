"""`import flashsigmoid` costs nothing: torch only, no GPU touched, nothing printed, no warning."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_floors import GUESTS, TYPING_ONLY

ROOT = Path(__file__).parents[1]

# torch first and alone, so that what follows is ours; then every way to the GPU raises
PROBE = """
import json, sys, time, warnings
import torch
if {block!r}:
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {block!r}:
                raise ImportError(name + " is blocked")
    sys.meta_path.insert(0, Blocked())
def touched(*args, **kwargs):
    raise AssertionError("the GPU was touched at import")
for name in ("_lazy_init", "init", "is_available", "device_count", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, touched)
before = set(sys.modules)
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
loaded = sorted({{name.split(".")[0] for name in set(sys.modules) - before}})
print(json.dumps({{"seconds": seconds, "loaded": loaded}}))
"""


def run_probe(module: str, folder: Path, block: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Import a module in a fresh process in which every warning is an error."""
    probe = PROBE.format(module=module, block=block)
    command = [sys.executable, "-W", "error", "-c", probe]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def guests_in(loaded: list[str]) -> set[str]:
    return set(loaded) & (set(GUESTS) | TYPING_ONLY)


def test_import_is_silent_and_brings_no_guest():
    done = run_probe("flashsigmoid", ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert guests_in(json.loads(line)["loaded"]) == set()


def test_import_takes_less_than_a_second_beyond_torch():
    """Once in three times: a busy machine may take longer."""
    seconds = (json.loads(run_probe("flashsigmoid", ROOT).stdout)["seconds"] for _ in range(3))
    assert any(each < 1.0 for each in seconds)


def test_import_and_a_call_work_without_triton():
    call = "x = torch.ones(1, 3, 2, 8); flashsigmoid.sigmoid_attention(x, x, x)"
    done = run_probe(f"flashsigmoid; {call}", ROOT, block=("triton",))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["nn", "testing", "record", "__main__"])
def test_the_rooms_users_import_need_torch_alone(name):
    """numpy is torch's own optional company and may come with it."""
    done = run_probe(f"flashsigmoid.{name}", ROOT, block=tuple(set(GUESTS) - {"numpy"}))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import torch; torch.cuda.is_available()", "the GPU was touched"),
        ("import torch; torch.zeros(1, device='cuda')", "the GPU was touched"),
        ("import warnings; warnings.warn('old', DeprecationWarning)", "DeprecationWarning"),
        ("import triton_sigmoid", "triton_sigmoid is blocked"),
    ],
)
def test_the_probe_catches_a_planted_fault(tmp_path, source, complaint):
    (tmp_path / "planted.py").write_text(source)
    done = run_probe("planted", tmp_path, block=("triton_sigmoid",))
    assert done.returncode == 1
    assert complaint in done.stderr


def test_the_probe_sees_a_planted_guest_and_print(tmp_path):
    (tmp_path / "triton.py").write_text("")
    (tmp_path / "planted.py").write_text("import triton; print('hello')")
    done = run_probe("planted", tmp_path)
    greeting, line = done.stdout.splitlines()
    assert greeting == "hello"
    assert guests_in(json.loads(line)["loaded"]) == {"triton"}


def test_the_package_init_only_gives_names():
    """`X as X` and the version; nothing else lives there."""
    for node in ast.parse((ROOT / "flashsigmoid/__init__.py").read_text("utf-8")).body:
        match node:
            case ast.Expr(ast.Constant(str())) | ast.Assign([ast.Name("__version__")], ast.Constant()):
                pass
            case ast.ImportFrom(names=names):
                assert all(alias.asname == alias.name for alias in names), ast.unparse(node)
            case _:
                pytest.fail(f"unexpected in flashsigmoid/__init__.py: {ast.unparse(node)}")
