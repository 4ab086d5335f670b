"""The wheel and the sdist: what is inside, and that each installs and answers where nothing but torch is."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The folder of `python -m build`: the sdist from the tree, the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def closure(names: Iterable[str]) -> set[str]:
    """Installed distributions that these need, themselves included, extras left out."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform or Python
            continue
        found.add(name)
        waiting += [re.split(r"[^\w.-]", line)[0] for line in requirements if "extra ==" not in line]
    return found


def empty_environment(folder: Path, names: Iterable[str]) -> Path:
    """The python of a new environment that holds these distributions, linked from ours, and what they need."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    for name in closure(names):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            link = Path(where) / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    return python


@pytest.fixture(scope="module", params=["whl", "tar.gz"])
def installed(request, dist, tmp_path_factory) -> Path:
    """The python of an environment with torch, in which pip installed the wheel or the sdist without an index."""
    folder = tmp_path_factory.mktemp("installed") / "environment with a space"
    builder = [] if request.param == "whl" else ["hatchling"]
    python = empty_environment(folder, ["torch", "numpy", *builder])
    (package,) = dist.glob(f"*.{request.param}")
    options = ["--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    done = run(sys.executable, "-m", "pip", "--python", python, "install", *options, package, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return python


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "flashsigmoid").rglob("*.py")}
    assert sources <= names
    assert {"flashsigmoid/py.typed", "flashsigmoid/samples/tinyshakespeare.txt"} <= names
    assert "flashsigmoid/samples/tinyshakespeare.md" in names  # origin and licence, beside the data
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"flashsigmoid", next(top for top in tops if top.endswith(".dist-info"))}
    assert not [name for name in names if name.endswith((".pyc", ".pth", ".so"))]
    assert wheel.stat().st_size < 10 * 2**20


def test_the_sdist_holds_what_is_needed_to_build_and_test(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"} <= names
    assert {"tests/conftest.py", "flashsigmoid/py.typed", "flashsigmoid/samples/tinyshakespeare.txt"} <= names
    assert not [name for name in names if name.startswith((".venv", "runs", "site/", "build/"))]


def test_the_metadata_say_torch_and_only_torch(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(path).decode().splitlines()
    requirements = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist")]
    assert [line for line in requirements if "extra ==" not in line] == ["torch>=2.11"]
    extras = {line.partition(": ")[2] for line in lines if line.startswith("Provides-Extra")}
    assert extras == {"cli", "train", "datasets", "report", "vision", "speech", "hf", "docs", "test", "all"}
    assert "License-Expression: MIT" in lines


def test_an_installed_package_answers(installed, tmp_path):
    call = (
        "import flashsigmoid, torch; x = torch.ones(1, 2, 1, 4); print(flashsigmoid.__file__); "
        "print(flashsigmoid.sigmoid_attention(x, x, x).sum().item())"
    )
    done = run(installed, "-W", "error", "-c", call, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where, total = done.stdout.splitlines()
    assert Path(where).is_relative_to(installed.parents[1])
    # two equal keys, scale 1/2, b = -log 2: each weight is sigmoid(2 - log 2), eight sums of two of them
    assert float(total) == pytest.approx(16 / (1 + 2 * 2.718281828**-2), rel=1e-6)
    assert done.stderr == ""


def test_the_command_without_its_extra_names_it(installed, tmp_path):
    for command in ([installed.parent / "flashsigmoid"], [installed, "-m", "flashsigmoid"]):
        done = run(*command, "--help", cwd=tmp_path)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert 'pip install "flashsigmoid[cli]"' in line


def test_the_command_with_its_extra_helps(dist, tmp_path):
    python = empty_environment(tmp_path / "environment", ["torch", "numpy", "typer", "rich"])
    (wheel,) = dist.glob("*.whl")
    options = ["--no-index", "--disable-pip-version-check"]
    done = run(sys.executable, "-m", "pip", "--python", python, "install", *options, f"{wheel}[cli]", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(python.parent / "flashsigmoid", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
