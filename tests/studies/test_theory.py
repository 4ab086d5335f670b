"""The studies of theory write what their docstrings say, and the numbers are those of the functions."""

from __future__ import annotations

import math

import pytest

from flashsigmoid.diagnostics.theory.bias import scaled_row_mass
from flashsigmoid.record import Record, read_records
from flashsigmoid.studies import theory
from flashsigmoid.studies.theory import TARGETS, THEORIES


def named(records: list[Record], name: str) -> list[Record]:
    return [record for record in records if record.name == name]


def test_bias(tmp_path) -> None:
    file = read_records(THEORIES["bias"](tmp_path, quick=True))
    assert (file.settings["theory"], file.settings["quick"]) == ("bias", True)
    distance = {(r.tags["n"], r.tags["std"], r.tags["bias"]): r.value for r in named(file.records, "distance")}
    for n, std, name in distance:
        assert distance[n, std, "closest_bias"] <= distance[n, std, name]
    for record in named(file.records, "log_n_bias"):
        assert record.value == -math.log(record.tags["n"])
    for record in named(file.records, "row_mass"):
        assert record.value == scaled_row_mass(record.tags["n"], record.tags["a"], record.tags["c"])


def test_universal(tmp_path) -> None:
    records = read_records(THEORIES["universal"](tmp_path, quick=True)).records
    values = {(r.name, *r.tags.values()): r.value for r in records}
    for name in TARGETS:
        errors = [values["error/max", name, cells] for cells in (2, 3, 4)]
        assert errors == sorted(errors, reverse=True)
        assert all(values["error/max", name, c] <= values["modulus", name, c] + 1e-9 for c in (2, 3, 4))
    assert all(r.value == 0 for r in named(records, "collisions") if r.tags["threshold"] == "lower")
    assert any(r.value > 0 for r in named(records, "collisions") if r.tags["threshold"] == "upper")
    allowed = {r.tags["steepness"]: r.value for r in named(records, "shift_error_allowed")}
    assert all(r.value <= allowed[r.tags["steepness"]] + 1e-12 for r in named(records, "shift_error"))


@pytest.mark.long
def test_tightness_and_that_it_would_see_a_bound_that_is_a_tenth_too_low(tmp_path, monkeypatch) -> None:
    records = read_records(THEORIES["tightness"](tmp_path / "right", quick=True)).records
    for cases, count in (("random", 1000), ("adversarial", 8)):
        for over in ("scores", "reals"):
            found = [r for r in records if r.tags["cases"] == cases and r.tags["over"] == over]
            assert all(r.tags["count"] == count for r in found)
            ratios = [r.value for r in found if r.name == "norm_over_bound"]
            assert len(ratios) == 101
            assert ratios == sorted(ratios)
            assert 0 <= ratios[0] < 0.1 < ratios[-1] <= 1 + 1e-12
            assert [r.value for r in found if r.name == "violations"] == [0]
    bound = theory.regular.jacobian_bound
    monkeypatch.setattr(theory.regular, "jacobian_bound", lambda *args: 0.9 * bound(*args))
    records = read_records(THEORIES["tightness"](tmp_path / "wrong", quick=True)).records
    assert sum(r.value for r in named(records, "violations") if r.tags["over"] == "scores") > 10


@pytest.mark.long
def test_the_bound_holds_in_ten_thousand_random_and_two_hundred_adversarial_cases(tmp_path) -> None:
    violations = named(read_records(THEORIES["tightness"](tmp_path)).records, "violations")
    assert {(r.tags["cases"], r.tags["count"]) for r in violations} == {("random", 10_000), ("adversarial", 200)}
    assert all(r.value == 0 for r in violations)


def test_numerics(tmp_path) -> None:
    records = read_records(THEORIES["numerics"](tmp_path, quick=True)).records
    errors = {(r.tags["formula"], r.tags["n"]): r.value for r in named(records, "weight_error")}
    lengths = sorted({n for _, n in errors})
    assert lengths == [2**4, 2**8, 2**12, 2**16, 2**20]
    for n in lengths:
        assert errors["full", n] < 1e-6
        assert errors["fine", n] < 2e-6
        assert errors["wide", n] < 4.4e-4
        assert errors["narrow", n] < 7e-4
        # a unit in the last place of a half, of a weight of about 1 / n
        assert 2**-27 * n < errors["half tanh", n] < 2**-23 * n
        assert errors["bfloat16 scores", n] > errors["float16 scores", n] > 5e-4


@pytest.mark.long
def test_regularity(tmp_path) -> None:
    records = read_records(THEORIES["regularity"](tmp_path, quick=True)).records
    bounds = {tuple(r.tags.values()): r.value for r in named(records, "bound")}
    norms = {tuple(r.tags.values()): r.value for r in named(records, "worst_norm")}
    assert norms.keys() == bounds.keys()
    assert all(0 < norms[key] <= bounds[key] for key in norms)
    (largest,) = named(records, "norm_over_bound/max")
    assert largest.value <= 1 + 1e-12
