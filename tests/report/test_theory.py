"""Rows and figures of `flashsigmoid theory`, from records alone."""

from __future__ import annotations

import re

import pytest

from flashsigmoid.record import RecordWriter
from flashsigmoid.report.theory import theory_figure, theory_rows, write_theory


def bias(writer: RecordWriter) -> None:
    for n in (16, 64):
        for std in (0.5, 1.0):
            for index, name in enumerate(("closest_bias", "unit_mass_bias", "log_n_bias", "normal_bias")):
                writer.write(name, -3.0 - index, n=n, std=std)
                writer.write("distance", 0.1 + index, n=n, std=std, bias=name)
        writer.write("row_mass", 1.5, n=n, a=0.0, c=1.0)


def regularity(writer: RecordWriter) -> None:
    for kind, power in (("sigmoid", 2), ("softmax", 3)):
        for seed, factor in ((0, 1.0), (1, 2.0), (2, 9.0)):
            for radius in (1.0, 2.0, 4.0):
                tags = {"kind": kind, "n": 8, "radius": radius, "seed": seed}
                writer.write("worst_norm", factor * radius**power, **tags)
                writer.write("bound", 10 * factor * radius**power, **tags)


def universal(writer: RecordWriter) -> None:
    for cells in (2, 4):
        for name, value in {"error/max": 0.4, "error/mean": 0.1, "modulus": 0.5, "contexts": 40}.items():
            writer.write(name, value / cells, target="pool", cells=cells)
    for steepness in (1.0, 4.0):
        writer.write("shift_error", 1 / steepness, steepness=steepness)
        writer.write("shift_error_allowed", 2 / steepness, steepness=steepness)


def tightness(writer: RecordWriter) -> None:
    for over, factor in (("scores", 1.0), ("reals", 0.5)):
        tags = {"cases": "random", "over": over, "count": 10_000}
        for share in (0.0, 0.5, 0.9, 0.99, 1.0):
            writer.write("norm_over_bound", factor * (0.1 + 0.9 * share), share=share, **tags)
        writer.write("violations", 3.0, **tags)


def numerics(writer: RecordWriter) -> None:
    for formula, error in (("full", 1e-7), ("half tanh", 1e-4)):
        for n in (16, 32, 4096):
            writer.write("weight_error", error * n, formula=formula, n=n)
            writer.write("mass_error", error, formula=formula, n=n)


MAKERS = {
    "bias": bias, "regularity": regularity, "universal": universal, "tightness": tightness, "numerics": numerics,
}  # fmt: skip


def written(folder, name):
    path = folder / f"{name}.jsonl"
    with RecordWriter(path, {"theory": name}) as writer:
        MAKERS[name](writer)
    return path


def test_rows_of_bias(tmp_path) -> None:
    rows = theory_rows(written(tmp_path, "bias"))
    assert [(row["n"], row["s"]) for row in rows] == [("16", "0.5"), ("16", "1"), ("64", "0.5"), ("64", "1")]
    assert rows[0]["closest (distance)"] == "-3.00 (0.1)"
    assert rows[3]["-log n (distance)"] == "-5.00 (2.1)"


def test_rows_of_regularity_are_medians_over_seeds_and_exponents(tmp_path) -> None:
    rows = theory_rows(written(tmp_path, "regularity"))
    assert [row["R"] for row in rows] == ["1", "2", "4"]
    assert [row["sigmoid: exponent"] for row in rows] == ["", "2.00", "2.00"]
    assert [row["softmax: exponent"] for row in rows] == ["", "3.00", "3.00"]
    assert float(rows[1]["sigmoid: norm"]) == 8.0  # the seed of factor 2
    assert rows[1]["sigmoid: of bound"] == "0.1"


def test_rows_of_universal(tmp_path) -> None:
    rows = theory_rows(written(tmp_path, "universal"))
    assert rows[1] == {
        "target": "pool",
        "grid step": "1/4",
        "largest error": "0.1000",
        "bound": "0.1250",
        "mean error": "0.0250",
        "contexts": "10",
    }


def test_rows_of_tightness_and_numerics(tmp_path) -> None:
    first, second = theory_rows(written(tmp_path, "tightness"))
    assert first == {
        "cases": "10,000 random", "suprema over": "scores", "50% below": "0.550", "90% below": "0.910",
        "99% below": "0.991", "largest": "1.000000", "violations": "3",
    }  # fmt: skip
    assert second["largest"] == "0.500000"
    assert theory_rows(written(tmp_path, "numerics")) == [
        {"formula": "full", "n = 16": "1.6e-06", "n = 4,096": "4.1e-04"},
        {"formula": "half tanh", "n = 16": "1.6e-03", "n = 4,096": "4.1e-01"},
    ]


@pytest.mark.parametrize("name", MAKERS)
def test_a_figure_has_its_lines_and_is_written(tmp_path, name) -> None:
    path = written(tmp_path, name)
    lines = {line.get_label() for axes in theory_figure(path).axes for line in axes.get_lines()}
    expected = {
        "bias": {"closest, n = 16", "closest, n = 64", "-log n - s²/2", "a = 0, c = 1"},
        "regularity": {"sigmoid, worst found", "softmax, worst found", "sigmoid, bound", "R²", "softmax, n = 8"},
        "universal": {"pool, largest error", "pool, bound", "error", "bound"},
        "tightness": {"random, scores", "random, reals"},
        "numerics": {"full", "half tanh"},
    }
    assert expected[name] <= lines
    write_theory(path, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes()[:4] == b"\x89PNG"


def test_other_records_are_one_clear_error(tmp_path) -> None:
    path = tmp_path / "other.jsonl"
    RecordWriter(path, {"name": "demo"}).close()
    message = "records must be of a theory, bias, regularity, tightness, universal, numerics, got None in"
    with pytest.raises(ValueError, match=re.escape(message)):
        theory_rows(path)
