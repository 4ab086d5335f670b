"""The Makefile and .ci/run: what they would do, read without installing anything."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def copy(tmp_path) -> Path:
    """The files make reads, in a folder with a space in its name."""
    folder = tmp_path / "a path with spaces"
    (folder / ".ci").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", ".ci/run"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def fake_python(tmp_path) -> Path:
    """A python that makes environments whose pip and modules only write down how they were called."""
    script = tmp_path / "bin" / "fakepython"
    script.parent.mkdir()
    script.write_text(f"""#!/bin/sh
echo "$@" >> "{tmp_path}/calls"
case "$1 $2" in
  "-m venv")
    for folder; do :; done
    rm -rf "$folder"; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python" ;;
  "-m pip")
    if [ "$3" = install ] && [ -e "{tmp_path}/no-network" ]; then exit 1; fi ;;
  "-c "*)
    exec "{sys.executable}" "$@" ;;
esac
""")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def outside_make() -> dict[str, str]:
    """The environment without what a `make test` around this test passes on."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "PYTHON"))}


def make(folder: Path, *words: str, python: str | Path | None = None) -> subprocess.CompletedProcess[str]:
    chosen = [f"PYTHON={python}"] if python else []
    return subprocess.run(
        ["make", *chosen, *words],
        cwd=folder,
        env=outside_make(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def calls(tmp_path: Path) -> list[str]:
    """How the fake python was called since the last look, version checks left out."""
    log = tmp_path / "calls"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [line for line in lines if line.startswith("-m") and line != "-m pip --version"]


@pytest.mark.parametrize("target", ["demo", "test", "test-long", "lint", "docs"])
def test_each_target_installs_its_extras_and_runs(copy, target):
    plan = make(copy, "-n", target)
    assert plan.returncode == 0, plan.stderr
    extras = {"demo": "train,report", "docs": "docs"}.get(target, "test")
    assert f'.venv/bin/python -m pip install -e ".[{extras}]"' in plan.stdout
    last = {"demo": "flashsigmoid demo", "lint": "pyright", "docs": "mkdocs build --strict"}.get(target, "pytest")
    assert f"-m {last}" in plan.stdout.splitlines()[-1]


def test_the_oldest_torch_has_an_environment_of_its_own(copy, tmp_path, fake_python):
    assert make(copy, "test-oldest", python=fake_python).returncode == 0
    assert calls(tmp_path) == [
        "-m venv --clear .venv-oldest",
        "-m pip install torch==2.11.0 torchvision==0.26.0 numpy<2.4 -e .[test]",
        "-m pytest -n logical --maxprocesses 8 --dist worksteal",
    ]


def test_a_second_time_installs_nothing(copy, tmp_path, fake_python):
    assert make(copy, "demo", python=fake_python).returncode == 0
    assert calls(tmp_path) == [
        "-m venv --clear .venv-fakepython",
        "-m pip install -e .[train,report]",
        "-m flashsigmoid demo",
    ]
    assert make(copy, "demo", python=fake_python).returncode == 0
    assert calls(tmp_path) == ["-m flashsigmoid demo"]


@pytest.mark.parametrize("kind", ["vision", "speech"])
def test_the_demo_of_another_kind_installs_its_extra_too(copy, tmp_path, fake_python, kind):
    """Beside the language demo, which stays as it is."""
    assert make(copy, "demo", f"ARGS={kind} --fresh", python=fake_python).returncode == 0
    assert calls(tmp_path) == [
        "-m venv --clear .venv-fakepython",
        f"-m pip install -e .[train,report,{kind}]",
        f"-m flashsigmoid demo {kind} --fresh",
    ]
    assert make(copy, "demo", f"ARGS={kind}", python=fake_python).returncode == 0
    assert calls(tmp_path) == [f"-m flashsigmoid demo {kind}"]
    assert make(copy, "demo", "ARGS=--fresh", python=fake_python).returncode == 0
    assert calls(tmp_path) == ["-m pip install -e .[train,report]", "-m flashsigmoid demo --fresh"]


def test_a_changed_pyproject_installs_again_into_the_same_environment(copy, tmp_path, fake_python):
    make(copy, "demo", python=fake_python)
    calls(tmp_path)
    later = (copy / ".venv-fakepython/.demo").stat().st_mtime + 10
    os.utime(copy / "pyproject.toml", (later, later))
    make(copy, "demo", python=fake_python)
    assert calls(tmp_path) == ["-m pip install -e .[train,report]", "-m flashsigmoid demo"]


def test_an_interrupted_install_is_made_anew(copy, tmp_path, fake_python):
    (tmp_path / "no-network").touch()
    failed = make(copy, "test", python=fake_python)
    assert failed.returncode != 0
    assert calls(tmp_path) == ["-m venv --clear .venv-fakepython", "-m pip install -e .[test]"]
    (tmp_path / "no-network").unlink()
    repaired = make(copy, "test", python=fake_python)
    assert repaired.returncode == 0
    assert "interrupted" in repaired.stdout
    assert calls(tmp_path)[:2] == ["-m venv --clear .venv-fakepython", "-m pip install -e .[test]"]


def test_an_environment_without_python_is_made_anew(copy, tmp_path, fake_python):
    """The interpreter it pointed to was removed, or `python -m venv` was stopped half-way."""
    (copy / ".venv-fakepython/bin").mkdir(parents=True)
    (copy / ".venv-fakepython/bin/python").symlink_to(tmp_path / "gone")
    assert make(copy, "demo", python=fake_python).returncode == 0
    assert calls(tmp_path)[0] == "-m venv --clear .venv-fakepython"


def write_python(folder: Path, source: str) -> Path:
    """An interpreter that runs `source` first: how an old or a crippled one looks."""
    program, script = folder / "otherpython.py", folder / "otherpython"
    program.write_text(f"import sys\n{source}\nexec(sys.argv[2])\n")
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{program}" "$@"\n')
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("sys.version_info = (3, 10, 4)", "needs Python 3.11 or later, got 3.10"),
        ("sys.modules['venv'] = None", "has no venv module"),
        ("sys.modules['ensurepip'] = None", "has no venv module"),
    ],
)
def test_a_python_that_cannot_is_one_clear_line(copy, tmp_path, source, complaint):
    done = make(copy, "demo", python=write_python(tmp_path, source))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make:")]
    assert len(lines) == 1
    assert complaint in lines[0]
    assert not list(copy.glob(".venv*"))


def test_a_missing_python_is_one_clear_line(copy):
    done = make(copy, "demo", python="python9.99")
    assert done.returncode != 0
    assert "found no python9.99" in done.stderr.splitlines()[0]


def test_ci_ends_with_the_line_of_pytest(copy, tmp_path, fake_python):
    """.ci/run, called from anywhere, is `make test`, and nothing is printed after pytest."""
    binaries = tmp_path / "bin"
    (binaries / "python3").symlink_to(fake_python)
    environment = outside_make() | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [copy / ".ci/run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert calls(tmp_path)[-1].startswith("-m pytest")
    assert "-m pytest" in done.stdout.splitlines()[-1]


def test_the_version_in_the_message_is_the_one_required():
    required = (ROOT / "pyproject.toml").read_text().split('requires-python = ">=')[1].split('"')[0]
    assert f"needs Python {required} or later" in (ROOT / "Makefile").read_text()
