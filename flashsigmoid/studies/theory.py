"""What the paper proves, as numbers: a study for each module of diagnostics/theory, writing one file of records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..diagnostics.theory import bias as biases
from ..diagnostics.theory import regularity as regular
from ..diagnostics.theory import worst
from ..diagnostics.theory.formulas import FORMULAS
from ..diagnostics.theory.universal import Approximator, ContextualMap, SelectiveShift, collisions, token_sets
from ..record import RecordWriter


@dataclass(frozen=True)
class Target:
    """A permutation-equivariant function on [0, 1]^(n x 2), and its modulus of continuity in the maximum norm."""

    fn: Callable[[Tensor], Tensor]
    modulus: Callable[[float], float]


def pool(x: Tensor) -> Tensor:
    """f(X)_i = (x_i + max_k x_k) / 2, coordinate by coordinate: omega(h) = h."""
    return 0.5 * (x + x.amax(-2, keepdim=True))


def lopsided(x: Tensor) -> Tensor:
    """f(X)_i = (x_i1 mean_k x_k2, sin(3 x_i2) - min_k x_k1): omega(h) <= max(2 h, 3 h + h) = 4 h."""
    first, second = x.unbind(-1)
    return torch.stack(
        [first * second.mean(-1, keepdim=True), torch.sin(3 * second) - first.amin(-1, keepdim=True)], -1
    )


TARGETS = {"pool": Target(pool, lambda h: h), "lopsided": Target(lopsided, lambda h: 4.0 * h)}


def bias(out_dir: str | Path, *, quick: bool = False, command: str | None = None) -> Path:
    """The b closest to softmax beside the closed forms, for n and the spread of the scores; the mass of a row.

    Args:
        out_dir: folder of the study.
        quick: seconds on a CPU; else a minute.
        command: how this came about. Default: that of the process.

    Returns:
        out_dir/bias.jsonl: closest_bias, unit_mass_bias, log_n_bias, normal_bias and distance, with tags n and std,
        distance also with that of the b; row_mass with tags n, a and c.
    """
    path = Path(out_dir) / "bias.jsonl"
    lengths = (16, 256, 4096) if quick else (16, 64, 256, 1024, 4096, 16384)
    scores_per_n = 2**17 if quick else 2**21
    with RecordWriter(path, {"theory": "bias", "quick": quick, "scores_per_n": scores_per_n}, command) as writer:
        for n in lengths:
            for std in (0.25, 0.5, 1.0, 1.5, 2.0):
                scores = biases.normal_scores(n, std, scores_per_n // n)
                found = {
                    "closest_bias": biases.closest_bias(scores),
                    "unit_mass_bias": biases.unit_mass_bias(n, std),
                    "log_n_bias": biases.log_n_bias(n),
                    "normal_bias": biases.normal_bias(n, std),
                }
                for name, b in found.items():
                    writer.write(name, b, n=n, std=std)
                    writer.write("distance", biases.distance_to_softmax(scores, b), n=n, std=std, bias=name)
        for a, c in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0), (0.0, 0.5), (0.5, 1.0)):
            for power in range(2, 21, 2):
                writer.write("row_mass", biases.scaled_row_mass(2**power, a, c), n=2**power, a=a, c=c)
    return path


def regularity(out_dir: str | Path, *, quick: bool = False, command: str | None = None) -> Path:
    """The bound at random points; the worst norm in a ball for sigmoid and softmax, by one search budget, against R.

    Args:
        out_dir: folder of the study.
        quick: half a minute on a CPU; else more tokens, steps, restarts and seeds, five minutes.
        command: how this came about. Default: that of the process.

    Returns:
        out_dir/regularity.jsonl: norm_over_bound/max and /median over random points; worst_norm and bound with tags
        kind, n, radius and seed (of the weights). The bounds are those of tokens of norm R.
    """
    path = Path(out_dir) / "regularity.jsonl"
    lengths, seeds = ((8, 32), 1) if quick else ((8, 32, 64), 3)
    radii = [0.5 * 2.0**i for i in range(7)]
    budget = {"restarts": 6, "steps": 60} if quick else {"restarts": 8, "steps": 100}
    settings = {"theory": "regularity", "quick": quick, "dim": 4, "nheads": 1, "bias": "-log n", **budget}
    with RecordWriter(path, settings, command) as writer:
        ratios: list[float] = []
        for seed in range(20 if quick else 100):
            n = (2, 4, 8, 12)[seed % 4]
            weights = regular.random_weights(4, 2, 2, -math.log(n), seed)
            x = worst.starts(n, 4, 1.0, 100, seed) * torch.logspace(-1, 1.5, 100, dtype=torch.float64)[:, None, None]
            ratios += (regular.jacobian_norms(x, weights) / regular.jacobian_bound(x, weights, "scores")).tolist()
        writer.write("norm_over_bound/max", max(ratios), count=len(ratios))
        writer.write("norm_over_bound/median", statistics.median(ratios), count=len(ratios))
        for seed in range(seeds):
            for n in lengths:
                weights = regular.random_weights(4, 1, 4, -math.log(n), seed)
                for kind in ("sigmoid", "softmax"):
                    norms = worst.worst_norms(weights, n, radii, kind, seed=seed, **budget)
                    for radius, norm in zip(radii, norms, strict=True):
                        x = torch.full((n, 4), radius / 2.0, dtype=torch.float64)  # tokens of norm R
                        if kind == "sigmoid":
                            bound = regular.jacobian_bound(x, weights, "scores")
                        else:
                            bound = regular.softmax_jacobian_bound(x, weights)
                        tags = {"kind": kind, "n": n, "radius": radius, "seed": seed}
                        writer.write("worst_norm", norm.value, **tags)
                        writer.write("bound", bound, **tags)
    return path


# regimes: one token, one channel, many heads, heads wider than the stream; b of -log n, 0 and beyond
SHAPES = [
    (1, 3, 1, 3),
    (2, 1, 1, 1),
    (3, 4, 2, 2),
    (5, 2, 1, 4),
    (8, 4, 4, 1),
    (12, 3, 2, 2),
]  # n, dim, heads, head_dim
BIASES = (None, 0.0, 3.0, -8.0)  # None: -log n


def tightness(out_dir: str | Path, *, quick: bool = False, command: str | None = None) -> Path:
    """The norm of the Jacobian over its bound, at random points and at points that a search has made bad.

    Args:
        out_dir: folder of the study.
        quick: 1,000 random and 8 adversarial cases, a few seconds; else 10,000 and 200, five minutes.
        command: how this came about. Default: that of the process.

    Returns:
        out_dir/tightness.jsonl: with the tags cases, random or adversarial, and over, the suprema of the bound:
        norm_over_bound at shares 0, 0.01 ... 1 of the cases in order; violations, those above 1 but for rounding; with
        both count.
    """
    path = Path(out_dir) / "tightness.jsonl"
    random, adversarial = (1000, 8) if quick else (10_000, 200)
    ratios: dict[tuple[str, str], list[float]] = {}

    def compare(cases: str, norms: Tensor, x: Tensor, weights: regular.Weights) -> None:
        for over in ("scores", "reals"):
            ratios.setdefault((cases, over), []).extend((norms / regular.jacobian_bound(x, weights, over)).tolist())

    regimes = [(shape, b) for shape in SHAPES for b in BIASES]
    for seed in range(random // 100):
        (n, dim, nheads, head_dim), b = regimes[seed % len(regimes)]
        x = torch.randn(100, n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x *= torch.logspace(-1, 1.5, 100, dtype=torch.float64)[:, None, None]  # of length 0.1 to 30
        weights = regular.random_weights(dim, nheads, head_dim, -math.log(n) if b is None else b, seed)
        compare("random", regular.jacobian_norms(x, weights), x, weights)
    for seed in range(adversarial):
        (n, dim, nheads, head_dim), b = SHAPES[1 + seed % (len(SHAPES) - 1)], BIASES[seed % len(BIASES)]
        weights = regular.random_weights(dim, nheads, head_dim, -math.log(n) if b is None else b, seed)
        norm, x = worst.worst_point(weights, n, 0.5 * 2.0 ** (seed % 6), restarts=4, steps=60, seed=seed)
        compare("adversarial", torch.tensor([norm.value], dtype=torch.float64), x[None], weights)

    settings = {"theory": "tightness", "quick": quick, "radius": "0.5 to 16"}
    with RecordWriter(path, settings, command) as writer:
        for (cases, over), values in ratios.items():
            tags = {"cases": cases, "over": over, "count": len(values)}
            shares = [i / 100 for i in range(101)]
            found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(shares, dtype=torch.float64))
            for share, value in zip(shares, found.tolist(), strict=True):
                writer.write("norm_over_bound", value, share=share, **tags)
            writer.write("violations", sum(value > 1 + 1e-12 for value in values), **tags)
    return path


def universal(out_dir: str | Path, *, quick: bool = False, command: str | None = None) -> Path:
    """The shift's error against lambda, collisions of the contextual map, the approximator's error against the grid.

    Args:
        out_dir: folder of the study.
        quick: seconds on a CPU; else a grid step more, a minute.
        command: how this came about. Default: that of the process.

    Returns:
        out_dir/universal.jsonl: shift_error and shift_error_allowed with tag steepness; collisions with tags n, levels
        and threshold; error/max, error/mean, modulus and contexts with tags target and cells.
    """
    path = Path(out_dir) / "universal.jsonl"
    points = 1000 if quick else 5000
    with RecordWriter(
        path, {"theory": "universal", "quick": quick, "n": 3, "dim": 2, "points": points}, command
    ) as writer:
        x = torch.arange(1.0, 9.0, dtype=torch.float64)[None, :, None]
        exact = torch.where(x == 4.0, x[x > 4.5].sum(), 0.0)
        for power in range(0, 9):
            steepness = 2.0**power
            with torch.no_grad():
                added = SelectiveShift(1, 0, 3.5, 4.5, steepness=steepness)(x) - x
            allowed = float(x.sum()) * (math.exp(-steepness / 4) + math.exp(-steepness / 2))
            writer.write("shift_error", (added - exact).abs().max(), steepness=steepness)
            writer.write("shift_error_allowed", allowed, steepness=steepness)
        for n, levels in ((2, 16), (3, 9), (3, 16), (4, 9), (5, 8)):
            tokens = token_sets(n, levels)
            for threshold, repeats in (("lower", True), ("upper", False)):
                with torch.no_grad():
                    ids = ContextualMap(n, levels, repeats=repeats)(tokens.double())
                writer.write("collisions", collisions(tokens, ids), n=n, levels=levels, threshold=threshold)
        x = torch.rand(points, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for name, target in TARGETS.items():
            for cells in (2, 3, 4) if quick else (2, 3, 4, 5):
                model = Approximator(target.fn, 3, 2, cells)
                with torch.no_grad():
                    error = torch.cat([(model(some) - target.fn(some)).abs() for some in x.split(100)])
                tags = {"target": name, "cells": cells}
                writer.write("error/max", error.max(), **tags)
                writer.write("error/mean", error.mean(), **tags)
                writer.write("modulus", target.modulus(0.5 / cells), **tags)
                writer.write("contexts", len(model.value_map.thresholds) + 1, **tags)
    return path


def numerics(out_dir: str | Path, *, quick: bool = False, command: str | None = None) -> Path:
    """How far the weights are off by which a formula of the sigmoid is computed, against n, for b = -log n.

    Args:
        out_dir: folder of the study.
        quick: fewer n, a second; else a few.
        command: how this came about. Default: that of the process.

    Returns:
        out_dir/numerics.jsonl: weight_error, the rms of the relative error of a weight for scores N(0, 1), and
        mass_error, how far the mass of all of them is off, relatively; both with tags formula and n.
    """
    path = Path(out_dir) / "numerics.jsonl"
    scores = torch.randn(2**18, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with RecordWriter(path, {"theory": "numerics", "quick": quick, "scores": len(scores)}, command) as writer:
        for power in range(4, 21, 4 if quick else 1):
            n = 2**power
            exact = torch.sigmoid(scores - math.log(n))
            for name, compute in FORMULAS.items():
                weights = compute(scores, -math.log(n)).double()
                writer.write("weight_error", (weights / exact - 1).square().mean().sqrt(), formula=name, n=n)
                writer.write("mass_error", (weights.sum() / exact.sum() - 1).abs(), formula=name, n=n)
    return path


THEORIES: dict[str, Callable[..., Path]] = {
    "bias": bias,
    "regularity": regularity,
    "tightness": tightness,
    "universal": universal,
    "numerics": numerics,
}
