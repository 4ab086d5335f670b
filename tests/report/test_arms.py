"""Arms: what runs are alike, their differences seed by seed, and what is no run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from report.reading import arms_of

from flashsigmoid.report import summary_rows, write_report
from flashsigmoid.report.arms import load_runs, paired_differences
from flashsigmoid.report.summary import title, warnings

MakeRun = Callable[..., Path]


def test_arms_are_settings_without_the_seed_and_the_pair_comes_first(seeds: Path) -> None:
    arms = arms_of(seeds)
    assert [arm.label for arm in arms] == ["sigmoid", "softmax", "sigmoid, sigmoid_bias=0.0"]
    assert [[run.seed for run in arm.runs] for arm in arms] == [[0, 1, 2]] * 3
    assert title(arms) == "Sigmoid against softmax attention"


def test_a_run_named_twice_counts_once(run: MakeRun) -> None:
    folder = run("sigmoid")
    assert len(load_runs([folder, folder.parent, folder / ".." / "sigmoid"])) == 1


def test_differences_are_paired_by_seed(seeds: Path) -> None:
    sigmoid, softmax, _ = arms_of(seeds)
    spread = paired_differences(sigmoid, softmax)
    assert spread.values == pytest.approx((0.01, 0.03, 0.02))
    assert spread.mean == pytest.approx(0.02)
    assert spread.deviation == pytest.approx(0.01)


def test_other_seeds_give_one_difference_of_means_and_are_told(run: MakeRun) -> None:
    folders = [
        run("a", seed=0, final=1.8),
        run("b", seed=1, final=1.9),
        run("c", seed=7, final=1.7, attention="softmax"),
    ]
    sigmoid, softmax = arms_of(*folders)
    assert paired_differences(sigmoid, softmax).values == pytest.approx((0.15,))
    assert "different seeds: sigmoid 0 and 1 and softmax 7" in " ".join(warnings([sigmoid, softmax]))


@pytest.mark.parametrize(
    ("paths", "rule"),
    [([], "at least one run"), (["missing"], "got missing, which is no folder"), (["."], "found none at or below")],
)
def test_no_runs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], rule: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rule):
        write_report(paths, tmp_path / "out")
    with pytest.raises(ValueError, match=rule):
        summary_rows(paths)
    assert list(tmp_path.iterdir()) == []
