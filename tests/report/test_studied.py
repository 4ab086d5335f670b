"""The page of studies: every table and figure, from records alone; runs and studies are not mixed."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the command needs the extra cli")
from typer.testing import CliRunner

from flashsigmoid.cli import app
from flashsigmoid.report.studied import studied, write_studied
from flashsigmoid.report.studies import study_rows, write_study
from flashsigmoid.report.theory import theory_rows

ROOT = Path(__file__).parents[2]
THEORY, SINKS = ROOT / "benchmarks/results/theory", ROOT / "benchmarks/results/studies/sinks-quick.jsonl"


def test_tables_and_figures_of_all_are_on_the_page(tmp_path: Path) -> None:
    files = studied([THEORY, SINKS])
    assert [file.stem for file in files] == [*sorted(p.stem for p in THEORY.glob("*.jsonl")), "sinks-quick"]
    page = write_studied(files, tmp_path / "of studies").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["bias", "numerics", "regularity", "tightness", "universal", "sinks"]
    cells = re.findall("<td>(.*?)</td>", page)
    for row in [*theory_rows(THEORY / "regularity.jsonl"), *study_rows(SINKS)]:
        assert all(text in cells for text in row.values())
    pictures = [base64.b64decode(found) for found in re.findall('data:image/png;base64,([^"]+)', page)]
    assert len(pictures) == 6
    write_study(SINKS, tmp_path / "sinks.png")
    assert pictures[-1] == (tmp_path / "sinks.png").read_bytes()
    assert "<script" not in page
    assert "flashsigmoid theory regularity" in page


def test_the_command_takes_folders_of_studies(tmp_path: Path, run) -> None:
    folder = tmp_path / "sinks"
    folder.mkdir()
    (folder / "sinks.jsonl").write_bytes(SINKS.read_bytes())
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0, done.output
    assert "<h2>sinks</h2>" in (folder / "report.html").read_text()
    one = run("sigmoid")
    assert studied([one]) == []
    with pytest.raises(ValueError, match="a report must be of runs or of studies, got"):
        CliRunner().invoke(app, ["report", str(folder), str(one)], catch_exceptions=False)
    with pytest.raises(ValueError, match="at least one file of a study"):
        write_studied([], tmp_path)
