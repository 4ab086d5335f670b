"""What a case must give: the oracle of the whole problem and its witness, packed rows sequence by sequence."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from distributed.cases import Case
from torch import Tensor

from flashsigmoid.testing import errors_over_budget, oracle, witness


@functools.lru_cache(maxsize=4)
def expected(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(oracle, witness) of out and every gradient."""
    q, k, v, dout, options = case.tensors()
    if case.dropout_p:
        options["seed"] = case.seed
    if not case.cu_seqlens:
        return oracle(q, k, v, dout, **options), witness(q, k, v, dout, **options)
    exact, drawn = [], []
    for s, (start, stop) in enumerate(itertools.pairwise(case.cu_seqlens)):
        first, last = case.ends_k[s : s + 2]
        parts = [q[:, start:stop], k[:, first:last], v[:, first:last], dout[:, start:stop]]
        given = {**options, "origin": (s, 0, 0, 0)}
        if case.bias == "rows":
            given["sigmoid_bias"] = options["sigmoid_bias"][start:stop].T[None]
        for name, kind in (("sigmoid_bias", case.bias), ("alibi_slopes", case.slopes)):
            if kind == "batch":
                given[name] = options[name][s : s + 1]
        exact.append(oracle(*parts, **given))
        drawn.append(witness(*parts, **given))
    return _packed(case, exact, 0), _packed(case, drawn, 1)


def _packed(case: Case, parts: list[dict[str, Tensor]], draws: int) -> dict[str, Tensor]:
    """Results of the sequences as the packed call has them, `draws` dimensions in front of each."""
    found: dict[str, Tensor] = {}
    for name in parts[0]:
        xs = [part[name] for part in parts]
        kind = {"db": case.bias, "dslopes": case.slopes}.get(name, "")
        if not kind:
            x = torch.cat(xs, dim=draws + 1).squeeze(draws)
            # rows behind the last sequence
            rows = case.rows_k if name in ("dk", "dv") else case.n
            rest = x.new_zeros(*x.shape[:draws], rows - x.shape[draws], *x.shape[draws + 1 :])
            found[name] = torch.cat([x, rest], dim=draws)
        elif kind == "rows":
            x = torch.cat(xs, dim=draws + 2).squeeze(draws).mT
            rest = x.new_zeros(*x.shape[:draws], case.n - x.shape[draws], *x.shape[draws + 1 :])
            found[name] = torch.cat([x, rest], dim=draws)
        else:
            found[name] = torch.cat(xs, dim=draws) if kind == "batch" else sum(xs[1:], xs[0])
    return found


def over_budget(case: Case, results: dict[str, Any]) -> dict[str, float]:
    """Of each tensor the larger of its two errors, as a part of what the budget allows."""
    exact, drawn = expected(case)
    return {name: max(errors_over_budget(results[name], exact[name], drawn[name])) for name in exact}
