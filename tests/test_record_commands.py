"""The commands in the headers of published records are still taken, and still describe the trainings they began."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashsigmoid.studies import trials

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
# what recipes have changed since, by folder: the page beside the table gives the command of today
CHANGED = {"an4_sample-warmup-50": {"warmup"}, "demo-alibi": {"alibi_bias"}}
REFUSED = "demo/seed-?/no-attention/*"  # b = -inf beside a b by slope, which the recipe had not then


def headers(*names: str) -> Iterator[tuple[Path, str, list[str], dict[str, Any]]]:
    """Of every `flashsigmoid NAME`: file, name, words without the device, settings."""
    for path in sorted(RESULTS.rglob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines():
            if not line.startswith('{"header"'):
                continue
            header = json.loads(line)["header"]
            words = shlex.split(header["command"])
            if "flashsigmoid" not in words:
                continue
            name, *words = words[words.index("flashsigmoid") + 1 :]
            if "--device" in words:  # which this machine may not have
                del words[words.index("--device") : words.index("--device") + 2]
            if not names or name in names:
                yield path.relative_to(RESULTS), name, words, header["settings"]


def parsed(name: str, words: list[str]) -> dict[str, Any]:
    """What the command of today makes of the words."""
    pytest.importorskip("typer")
    from typer.main import get_command

    from flashsigmoid.cli import app

    commands = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    return commands[name].make_context(name, list(words)).params


def test_the_words_of_every_command_are_taken() -> None:
    found = list(headers())
    assert len(found) > 100
    for path, name, words, _ in found:
        assert parsed(name, words), path


@pytest.mark.long
def test_trainings_are_described_as_they_were() -> None:
    """Or differ in what `CHANGED` names, and in nothing else."""
    pytest.importorskip("pytorch_lightning")
    from flashsigmoid.cli.options import read_assignments
    from flashsigmoid.cli.recipes import find_recipes
    from flashsigmoid.recipes.fields import override

    recipes, missing = find_recipes()
    if missing:
        pytest.skip(missing)
    flags = {"attention": "model.attention", "sigmoid_bias": "model.sigmoid_bias", "precision": "precision"}
    flags |= {"steps": "steps", "seed": "seed", "data": "data.source"}
    seen: dict[str, set[str]] = {}
    for path, _, words, before in headers("train"):
        given = parsed("train", words)
        fields = {field: given[flag] for flag, field in flags.items() if given[flag] is not None}
        if path.match(REFUSED):
            with pytest.raises(ValueError, match="sigmoid_bias must be -log n"):
                override(recipes[given["recipe"]](), fields, read_assignments(given["assignments"]))
            continue
        run = override(recipes[given["recipe"]](), fields, read_assignments(given["assignments"]))
        now = json.loads(json.dumps(run.settings()))
        # a field that is new since has the value that was; a checkpoint to start from is recorded by its name
        differ = {name for name in before if name != "init" and now.get(name) != before[name]}
        seen.setdefault(path.parts[0], set()).update(differ)
    assert {folder: differ for folder, differ in seen.items() if differ} == CHANGED


def test_studies_have_the_arms_that_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashsigmoid.studies import STUDIES, load

    class Chosen(Exception):
        """Nothing is trained."""

    chosen = trials._chosen

    def stop(*args: Any) -> None:
        raise Chosen(chosen(*args))

    monkeypatch.setattr(trials, "_chosen", stop)
    found = [header for header in headers("study") if parsed("study", header[2])["name"] in STUDIES]
    assert len(found) > 5
    for path, _, words, _ in found:
        given = parsed("study", words)
        options = {"quick": given["quick"], "only": given["only"] or (), "seeds": given["seed"] or (), "device": "cpu"}
        with pytest.raises(Chosen) as caught:
            load(given["name"])(tmp_path / given["name"], **options)
        assert caught.value.args[0], path
