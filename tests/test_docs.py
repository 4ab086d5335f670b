"""What the pages show runs, what they point to exists, and the public names are on the API page."""

from __future__ import annotations

import hashlib
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_public_api import public_names

from flashsigmoid.report.tables import rewrite

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def fenced(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language ("" is none) on a page."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in blocks if name == language]


def run_python(*words: str) -> str:
    """What a python said, in the root of the repository; it must succeed."""
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pages
def test_python_on_a_page_runs_from_top_to_bottom(page: Path) -> None:
    source = "\n".join(fenced(page, "python"))
    if not source:
        pytest.skip(f"no python on {page.name}")
    # what is ignored is torch 2.11's, of its own code
    run_python("-W", "error", "-W", "ignore:`torch.jit.script` is deprecated", "-c", source)


def command_lines() -> list[str]:
    """Every line of a plain block that calls flashsigmoid, without its comment."""
    lines = [line for page in PAGES for block in fenced(page, "") for line in block.replace("\\\n", " ").splitlines()]
    return sorted({line.split("  #")[0].strip() for line in lines if line.startswith("flashsigmoid ")})


def test_documented_options_exist() -> None:
    """Each option on a page is one of its command; commands are not run here."""
    pytest.importorskip("typer")
    from typer.main import get_command

    from flashsigmoid.cli import app

    commands = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    found = command_lines()
    assert len(found) > 5
    for line in found:
        command, *words = shlex.split(line)[1:]
        known = {
            option for parameter in commands[command].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in known, line


def test_documented_pairs_can_be_planned() -> None:
    """Their recipes, fields and arms fit together; nothing is trained."""
    pytest.importorskip("typer")
    from typer.main import get_command

    from flashsigmoid.cli import app
    from flashsigmoid.cli.options import read_assignments, read_named_fields
    from flashsigmoid.cli.recipes import find_recipes
    from flashsigmoid.studies.pair import ARMS, plan

    command = get_command(app).commands["pair"]  # pyright: ignore[reportAttributeAccessIssue]
    recipes, missing = find_recipes()
    if missing:
        pytest.skip(missing)
    lines = [line for line in command_lines() if line.startswith("flashsigmoid pair ")]
    found = [shlex.split(line, comments=True)[2:] for line in lines]
    assert len(found) > 5
    for words in found:
        given = command.make_context("pair", list(words)).params
        arms = read_named_fields("--arm", given["arm"]) if given["arm"] else ARMS
        fields, then = read_assignments(given["assignments"]), read_named_fields("--then", given["then"])
        assert plan(recipes, given["recipe"], Path("out"), arms=arms, fields=fields, then=then), words


@pages
def test_tables_are_those_of_the_records(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = page.read_text("utf-8")
    assert rewrite(text) == text, f"python -m flashsigmoid.report.tables {page.relative_to(ROOT)}"


@pytest.mark.parametrize("path", sorted((ROOT / "docs/images").glob("theory-*.png")), ids=lambda path: path.stem)
def test_figures_of_theory_are_drawn_from_the_records(path: Path) -> None:
    records = ROOT / "benchmarks/results/theory" / f"{path.stem.removeprefix('theory-')}.jsonl"
    made_of = hashlib.sha256(records.read_bytes()).hexdigest()
    assert made_of.encode() in path.read_bytes(), f"draw {path.name} anew by report.theory.write_theory"


def test_the_support_table_is_what_the_backends_say(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashsigmoid.backends import support, triton

    page = (ROOT / "docs" / "backends.md").read_text()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert support.rewrite(page) == page
    monkeypatch.setattr(triton, "unsupported", lambda problem, direction: "it is broken")
    assert support.rewrite(page) != page


def test_a_changed_number_in_a_table_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = "<!-- table speed benchmarks/results/blocked-cuda-float32.jsonl -->\n<!-- end -->\n"
    page = rewrite(text)
    assert page.count("\n| cpu-") == 12
    assert rewrite(page.replace("cpu-512", "cpu-513")) == page
    with pytest.raises(ValueError, match=r"kind of a table must be one of arms, ablation, .*, got sped"):
        rewrite(text.replace("speed", "sped"))


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_every_public_name_is_on_the_api_page() -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    for module in ("flashsigmoid", "flashsigmoid.nn"):
        for name in public_names(importlib.import_module(module)):
            assert f"::: {module}.{name}\n" in text or name == "nn", name


def test_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the pages need the extra docs")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the pages need the extra docs")
    said = run_python("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site"))
    assert "WARNING" not in said
