"""The studies of theory write what their docstrings say, and the numbers are those of the functions."""

from __future__ import annotations

import math

import pytest

from flashsigmoid.diagnostics.theory.bias import scaled_row_mass
from flashsigmoid.record import Record, read_records
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
def test_regularity(tmp_path) -> None:
    records = read_records(THEORIES["regularity"](tmp_path, quick=True)).records
    bounds = {tuple(r.tags.values()): r.value for r in named(records, "bound")}
    norms = {tuple(r.tags.values()): r.value for r in named(records, "worst_norm")}
    assert norms.keys() == bounds.keys()
    assert all(0 < norms[key] <= bounds[key] for key in norms)
    (largest,) = named(records, "norm_over_bound/max")
    assert largest.value <= 1 + 1e-12
