"""Who may import whom: imports go down, never sideways, and every guest library stays in its rooms.

The tables below are the only copy of the rule. Nothing is imported here: every source file is parsed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flashsigmoid"

# from the ground up; a room imports rooms of lower floors only. "__init__": the public names
FLOORS = (
    {"backends", "record", "samples"},
    {"functional"},
    {"kvcache", "testing"},
    {"nn"},
    {"__init__"},
    {"models", "diagnostics", "distributed"},
    {"training", "integrations"},
    {"recipes"},
    {"studies", "bench"},
    {"report"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {room: height for height, floor in enumerate(FLOORS) for room in floor}

# rooms that may import less than the floors below them
ONLY = {"report": {"record", "__init__"}}

# rooms within backends: one never imports another
BACKENDS = {"reference", "blocked", "triton", "hopper"}

# who may import what is neither torch, the standard library nor ours: a file or a folder of the package
GUESTS = {
    "triton": {"backends/triton", "backends/hopper"},
    "pytorch_lightning": {"training"},
    "lightly": {"training"},
    "torchmetrics": {"training"},
    "torchvision": {"training"},
    "soundfile": {"training"},
    "kaldi_native_fbank": {"training"},
    "datasets": {"training"},
    "tokenizers": {"training"},
    "webdataset": {"training"},
    "PIL": {"training"},
    "tensorboard": {"training"},
    "numpy": {"training", "report", "recipes/conversion.py"},
    "safetensors": {"training", "models"},
    "timm": {"models/vision.py", "integrations/timm.py"},
    "transformers": {"integrations/transformers.py", "integrations/sigmoid_gpt.py", "recipes/conversion.py"},
    "matplotlib": {"report"},
    "plotly": {"report"},
    "typer": {"cli"},
    "rich": {"cli"},
    "flash_attn": {"bench/peers.py"},
    "flash_attn_interface": {"bench/peers.py"},
    "flash_sigmoid": {"bench/peers.py"},
    "flashinfer": {"bench/peers.py"},
    "triton_sigmoid": {"bench/peers.py"},
}
TYPING_ONLY = {"jaxtyping"}  # under `if TYPE_CHECKING:`, anywhere


def imports(tree: ast.Module, module: tuple[str, ...], is_package: bool) -> Iterator[tuple[int, tuple[str, ...], bool]]:
    """(line, absolute name, for typing only) of every import, constant import_module() calls too."""
    here = module if is_package else module[:-1]
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        names: list[tuple[str, ...]] = []
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
            continue
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) for alias in node.names]
        elif ast.unparse(node.func) in (
            "import_module",
            "importlib.import_module",
            "__import__",
        ):
            match node.args:
                case [ast.Constant(str(name)), *_]:
                    level = len(name) - len(name.lstrip("."))
                    base = here[: len(here) - level + 1] if level else ()
                    names = [base + tuple(name.lstrip(".").split("."))]
        for name in names:
            yield node.lineno, name, id(node) in typing_only


def violations(package: Path) -> list[str]:
    """One line per import that breaks a table above, in the source tree of a package."""
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        module: tuple[str, ...] = (package.name, *place.with_suffix("").parts)
        is_package = module[-1] == "__init__"
        module = module[:-1] if is_package else module
        room = module[1] if len(module) > 1 else "__init__"
        if room not in FLOOR_OF:
            found.append(f"{place}: {room} is not a room")
            continue
        for line, name, typing_only in imports(ast.parse(path.read_text("utf-8")), module, is_package):
            where = f"{place}:{line}"
            if name[0] == package.name:
                target = name[1] if len(name) > 1 and name[1] in FLOOR_OF else "__init__"
                if target == room == "backends":
                    ours, theirs = (next(iter(BACKENDS & {*parts[2:3]}), None) for parts in (module, name))
                    if ours and theirs and ours != theirs:
                        found.append(f"{where}: backend {ours} imports backend {theirs}")
                elif target != room:
                    if FLOOR_OF[target] == FLOOR_OF[room]:
                        found.append(f"{where}: {room} imports {target}, sideways")
                    elif FLOOR_OF[target] > FLOOR_OF[room]:
                        found.append(f"{where}: {room} imports {target}, upwards")
                    elif target not in ONLY.get(room, {target}):
                        found.append(f"{where}: {room} imports {target}, it may import only {sorted(ONLY[room])}")
            elif name[0] in GUESTS:
                if not any(place == Path(home) or Path(home) in place.parents for home in GUESTS[name[0]]):
                    found.append(f"{where}: {name[0]} is a guest of {sorted(GUESTS[name[0]])}")
            elif name[0] in TYPING_ONLY:
                if not typing_only:
                    found.append(f"{where}: {name[0]} is imported outside `if TYPE_CHECKING:`")
            elif name[0] != "torch" and name[0] not in sys.stdlib_module_names:
                found.append(f"{where}: {name[0]} is in no table of {Path(__file__).name}")
    return found


def test_imports_go_down_and_guests_stay_in_their_rooms():
    assert violations(PACKAGE) == []


def test_every_room_of_the_package_is_seen():
    """The check above reads the files it should: the op, its backends, this very table's rooms."""
    rooms = {
        path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if not path.name.startswith("__py")
    }
    assert {"backends", "functional", "nn", "training", "report", "cli", "__main__"} <= rooms


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("nn/block.py", "from ..training import language", "nn imports training, upwards"),
        ("nn/block.py", "from flashsigmoid.training.language import train", "nn imports training, upwards"),
        ("nn/block.py", "from .. import training", "nn imports training, upwards"),
        ("nn/block.py", "from .. import sigmoid_attention", "nn imports __init__, upwards"),
        ("nn/block.py", "def f():\n    import flashsigmoid.report.html", "nn imports report, upwards"),
        (
            "nn/block.py",
            "import importlib\nimportlib.import_module('flashsigmoid.cli')",
            "nn imports cli, upwards",
        ),
        (
            "nn/__init__.py",
            "import importlib\nimportlib.import_module('..models', __package__)",
            "nn imports models, upwards",
        ),
        ("nn/__init__.py", "from ..models import gpt", "nn imports models, upwards"),
        (
            "nn/block.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..models import gpt",
            "upwards",
        ),
        ("functional.py", "from .testing import make_qkv", "functional imports testing, upwards"),
        ("__init__.py", "from .models import gpt", "__init__ imports models, upwards"),
        ("models/gpt.py", "from ..diagnostics.probes import norms", "models imports diagnostics, sideways"),
        ("report/page.py", "from ..models.gpt import GPT", "report imports models, it may import only"),
        ("backends/triton/fwd.py", "from ..hopper import tiles", "backend triton imports backend hopper"),
        (
            "backends/blocked.py",
            "from .reference import forward",
            "backend blocked imports backend reference",
        ),
        ("backends/blocked.py", "from . import reference", "backend blocked imports backend reference"),
        ("backends/blocked.py", "import triton", "triton is a guest of"),
        ("models/gpt.py", "import pytorch_lightning as pl", "pytorch_lightning is a guest of ['training']"),
        ("models/gpt.py", "from timm.layers import DropPath", "timm is a guest of"),
        ("recipes/language.py", "import typer", "typer is a guest of"),
        ("nn/norm.py", "from jaxtyping import Float", "jaxtyping is imported outside"),
        ("nn/norm.py", "import einops", "einops is in no table"),
        ("extras.py", "import torch", "extras is not a room"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, path, source, expected):
    file = tmp_path / "flashsigmoid" / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    (found,) = violations(tmp_path / "flashsigmoid")
    assert found.startswith(path)
    assert expected in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "nn/block.py",
            "import torch\nfrom . import mlp\nfrom .. import functional\nfrom ..backends import reference",
        ),
        (
            "nn/norm.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jaxtyping import Float",
        ),
        ("backends/op.py", "from . import reference, select\nfrom .problem import Problem"),
        (
            "backends/hopper/fwd.py",
            "import triton.experimental.gluon\nfrom ..problem import Problem\nfrom . import tiles",
        ),
        ("models/vision.py", "import timm"),
        ("report/page.py", "from ..record import read_records\nfrom . import figures"),
        (
            "cli/train.py",
            "import rich\nfrom .. import __version__\nfrom ..training import language\nfrom .root import app",
        ),
    ],
)
def test_what_the_tables_allow_passes(tmp_path, path, source):
    file = tmp_path / "flashsigmoid" / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path / "flashsigmoid") == []
