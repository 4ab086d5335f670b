"""The wheel and the sdist: what is inside, and that each installs and answers where nothing but torch is."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that sees neither the source tree nor pip's settings and leaves no bytecode behind."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The folder of `python -m build`: the sdist from the tree, the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def closure(names: Iterable[str]) -> set[str]:
    """Installed distributions that these requirements need, themselves included."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(name), "") for name in names]
    while waiting:
        wanted, of_extra = waiting.pop()
        if wanted.marker and not wanted.marker.evaluate({"extra": of_extra}):
            continue
        requirements = [Requirement(line) for line in importlib.metadata.requires(wanted.name) or []]
        for extra in ("", *wanted.extras):
            if (wanted.name, extra) not in seen:
                seen.add((wanted.name, extra))
                waiting += [(requirement, extra) for requirement in requirements]
        found.add(wanted.name)
    return found


def environment_with(wheel: Path, names: Iterable[str], folder: Path) -> Path:
    """The python of a new environment that holds a wheel, beside these distributions and what they need.

    pip installs the wheel first, without dependencies, into an environment that holds nothing. The rest is
    linked from the running environment afterwards, to be read: pip must never run where such links are: it
    would write through them.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--isolated", "--python", python, "--disable-pip-version-check"]
    done = run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr

    links = folder / "links"
    links.mkdir()
    for name in closure(names):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (links / top).exists():
                (links / top).symlink_to(Path(str(distribution.locate_file(top))))
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "links.pth").write_text(f"{links}\n")
    return python


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def installed(request, dist, tmp_path_factory) -> Path:
    """The python of an environment with torch and our wheel, or the wheel that pip makes of our sdist."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = dist.glob("*.whl")
    if request.param == "sdist":
        (sdist,) = dist.glob("*.tar.gz")
        options = ["--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
        done = run(sys.executable, "-m", "pip", "--isolated", "wheel", *options, sdist, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        (wheel,) = folder.glob("*.whl")
    return environment_with(wheel, ["torch", "numpy"], folder / "a path with spaces")


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "flashsigmoid").rglob("*.py")}
    assert sources <= names
    assert {"flashsigmoid/py.typed", "flashsigmoid/samples/tinyshakespeare.txt"} <= names
    assert "flashsigmoid/samples/tinyshakespeare.md" in names  # origin and licence, beside the data
    parts = ("train-images", "train-labels", "test-images", "test-labels")
    digits = {f"flashsigmoid/samples/mnist-{part}.gz" for part in parts}
    assert digits | {"flashsigmoid/samples/mnist.md"} <= names
    speech = {f"flashsigmoid/samples/an4-{part}" for part in ("train.flac", "val.flac")}
    assert speech | {"flashsigmoid/samples/an4.tsv", "flashsigmoid/samples/an4.md"} <= names
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
    (wheel,) = dist.glob("*.whl")
    python = environment_with(wheel, ["torch", "numpy", "typer", "rich"], tmp_path / "environment")
    done = run(python.parent / "flashsigmoid", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
