"""How the op is checked, here and downstream: inputs, a float64 oracle, a witness in the input dtype, one error budget.

No absolute tolerance: with b = -log n outputs shrink with n, and at n = 4096 a kernel of zeros passes `atol=4e-2`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypedDict, Unpack, cast

import torch
from torch import Tensor

from .backends import reference
from .backends.philox import keep_mask
from .backends.problem import Problem, make_problem
from .backends.rules import split_bias
from .functional import sigmoid_attention_shard

RMS_FACTOR, MAX_FACTOR, FLOOR = 1.5, 2.0, 1e-6


class Options(TypedDict, total=False):
    """Keywords of a call that change its value; `seed` is the dropout seed, an int64 tensor of one element."""

    sigmoid_bias: float | Tensor
    scale: float
    causal: bool
    window_size: tuple[int | None, int | None]
    alibi_slopes: Tensor
    dropout_p: float
    seed: Tensor
    q_offset: int
    origin: tuple[int, int, int, int]


def make_qkv(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    nheads: int,
    nheads_k: int,
    head_dim: int,
    head_dim_v: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    score_std: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout of independent normals; scale * q k^T has standard deviation `score_std` at the default scale."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    tensors = (
        score_std * normal(batch, seqlen_q, nheads, head_dim),
        normal(batch, seqlen_k, nheads_k, head_dim),
        normal(batch, seqlen_k, nheads_k, head_dim_v),
        normal(batch, seqlen_q, nheads, head_dim_v),
    )
    q, k, v, dout = (x.to(device, dtype) for x in tensors)
    return q, k, v, dout


def compute(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *, backend: str, **options: Unpack[Options]
) -> dict[str, Tensor]:
    """out, dq, dk, dv, and db, dslopes where those are tensors, by one backend in the dtype of its inputs."""
    leaves = {"dq": q, "dk": k, "dv": v}
    given: dict[str, Any] = dict(options)
    for name, option in (("db", "sigmoid_bias"), ("dslopes", "alibi_slopes")):
        if isinstance(given.get(option), Tensor):
            leaves[name] = given[option]
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    for name, option in (("db", "sigmoid_bias"), ("dslopes", "alibi_slopes")):
        if name in leaves:
            given[option] = leaves[name]
    given.setdefault("sigmoid_bias", -math.log(max(1, k.shape[1])))
    given.setdefault("q_offset", k.shape[1] - q.shape[1])
    out = sigmoid_attention_shard(leaves["dq"], leaves["dk"], leaves["dv"], backend=backend, **given)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def oracle(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **options: Unpack[Options]) -> dict[str, Tensor]:
    """The results of `compute`, by the reference in float64 from the same (already rounded) inputs."""
    return compute(q.double(), k.double(), v.double(), dout.double(), backend="reference", **_double(options))


def witness(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *, draws: int = 4, **options: Unpack[Options]
) -> dict[str, Tensor]:
    """What a good kernel in the input dtype gets: the error of these results is the unit of the budget.

    Scores, sigmoid and accumulation in float32 (float64 for float64 inputs); A and dS rounded to the input dtype, as
    tensor cores take them; results rounded. Written out by hand, without autograd.

    Every result is stacked (draws, ...), and what is rounded in float32 is rounded anew in every draw: each sums in a
    random order of its own, and has its scores in a unit of its own (one, and from there down to a half; a kernel's is
    1 / log2 e), since the last rounding of a score near b is the same in every order. A sum runs into one accumulator
    wherever a kernel has one: dK and dV over all rows of all query heads of a key head.

    `draws` is how often chance must be asked. A result as good as one draw, of M elements with independent errors of
    one size, has a maximum beyond twice that of all draws this often (normal errors):

        draws      2        4        8        16       32
        M = 1      13 %     3.9 %    0.83 %   0.13 %   0.015 %
        M = 4      3.0 %    0.49 %   0.061 %  0.006 %  0.0006 %
        M = 16     0.24 %   0.025 %  0.002 %  0.0002 %

    Large results have M in the hundreds. M is about 1 where errors have one source, as with a single key and row, and
    where one sum is far larger than the others. That is a matter of float32: results in 16 bits round alike.

    db and dslopes are a few sums over all rows, each a single draw of its error: there the witness is the exact sum off
    by three times the root of the rows' summed squared errors.
    """
    orders = [torch.Generator().manual_seed(draw) for draw in range(draws)]
    units = [2.0 ** (draw / draws) for draw in range(draws)]
    pairs = [_by_hand(q, k, v, dout, order, unit, **options) for order, unit in zip(orders, units, strict=True)]
    results, rows = zip(*pairs, strict=True)
    stacked = {name: torch.stack([result[name] for result in results]) for name in results[0]}
    if rows[0]:
        _, exact = _by_hand(q.double(), k.double(), v.double(), dout.double(), orders[0], 1.0, **_double(options))
        for name, like in (("db", options.get("sigmoid_bias")), ("dslopes", options.get("alibi_slopes"))):
            if name in exact:
                assert isinstance(like, Tensor)
                squares = torch.stack([(row[name].double() - exact[name]).square() for row in rows]).mean(0)
                stacked[name] = (_reduce(exact[name], like) + 3.0 * _reduce(squares, like).sqrt())[None]
    return stacked


def _double(options: Options) -> Options:
    """The same options with their floating-point tensors in float64."""
    exact: dict[str, Any] = dict(options)
    for name, x in options.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            exact[name] = x.double()
    return cast(Options, exact)


def _reduce(rows: Tensor, like: Tensor) -> Tensor:
    """(batch, nheads, seqlen_q) summed to the shape of a bias or of slopes."""
    return (rows if like.dim() == 3 else rows.sum(-1)).sum_to_size(like.shape)


def _by_hand(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, order: torch.Generator, unit: float, **options: Unpack[Options]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({out, dq, dk, dv}, {db, dslopes} of every row): the equations of docs/semantics.md with a kernel's roundings.

    `order` draws the order in which each product sums; scores are rounded as multiples of 1 / unit.
    """

    def product(x: Tensor, y: Tensor) -> Tensor:
        # as a kernel does, into one accumulator: 16 terms at a time by tensor cores, else one after the other
        index = torch.randperm(y.shape[-2], generator=order).to(y.device)
        total = x.new_zeros(*x.shape[:-1], y.shape[-1])
        for terms in index.split(16 if q.dtype.itemsize == 2 else 1):
            total += x[..., terms] @ y[..., terms, :]
        return total

    bias, number = split_bias(options.get("sigmoid_bias"))
    slopes = options.get("alibi_slopes")
    left, right = options.get("window_size", (None, None))
    shared = ("scale", "causal", "q_offset", "dropout_p", "origin")
    same: Any = {name: value for name, value in options.items() if name in shared}
    problem = make_problem(
        q, k, v, bias=bias, slopes=slopes, sigmoid_bias=number, window_left=left, window_right=right, **same
    )
    dtype, group = problem.compute_dtype, problem.group

    def rounded(x: Tensor) -> Tensor:
        return x.to(q.dtype).to(dtype)

    def dense(x: Tensor) -> Tensor:  # (batch, nheads, seqlen, dim) -> (batch, seqlen, nheads, dim)
        return x.transpose(1, 2).to(q.dtype)

    def of_key_head(x: Tensor) -> Tensor:  # (batch, nheads_k, group * seqlen_q, ...): the rows that its gradients sum
        return x.unflatten(1, (problem.nheads_k, group)).flatten(2, 3)

    q_, dout_ = (x.to(dtype).transpose(1, 2) for x in (q, dout))
    k_, v_ = (x.to(dtype).repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    features = torch.randperm(problem.head_dim, generator=order).to(q.device)
    a = _weights(problem, q[..., features], k[..., features], bias, slopes, unit)
    keep = torch.ones((), dtype=dtype, device=q.device)
    if "seed" in options and problem.dropout_p > 0:
        kept = keep_mask(options["seed"], problem.dropout_p, problem.origin, tuple(a.shape))
        keep = kept.to(dtype) / (1.0 - problem.dropout_p)
    dropped = rounded(a * keep)
    ds = rounded(product(dout_, v_.mT) * keep * a * (1.0 - a))
    results = {
        "out": dense(product(dropped, v_)),
        "dq": dense(problem.scale * product(ds, k_)),
        "dk": dense(problem.scale * product(of_key_head(ds).mT, of_key_head(q_))),
        "dv": dense(product(of_key_head(dropped).mT, of_key_head(dout_))),
    }
    rows = {}
    keys = torch.randperm(problem.seqlen_k, generator=order).to(q.device)
    if bias is not None:
        rows["db"] = ds[..., keys].sum(-1)
    if slopes is not None:
        p = torch.arange(problem.seqlen_q, device=q.device) + problem.q_offset
        distance = (p[:, None] - torch.arange(problem.seqlen_k, device=q.device)).abs()
        rows["dslopes"] = -(ds * distance)[..., keys].sum(-1)
    return results, rows


def _weights(problem: Problem, q: Tensor, k: Tensor, bias: Tensor | None, slopes: Tensor | None, unit: float) -> Tensor:
    """A = 1 / (1 + e), e = exp(-S), from scores that are computed and rounded as unit * S."""
    b, dtype = problem.sigmoid_bias, problem.compute_dtype
    in_units = replace(problem, scale=unit * problem.scale, sigmoid_bias=None if b is None else unit * b)
    bias, slopes = (None if x is None else unit * x.to(dtype) for x in (bias, slopes))
    # the unit is taken back exactly: a kernel's exponential has it built in
    e = torch.exp(reference.scores(in_units, q, k, bias, slopes).double() / -unit).to(dtype)
    keep = reference.visible(problem, q.device)
    a = 1.0 / (1.0 + e)
    return a if keep is None else torch.where(keep, a, 0.0)


def errors_over_budget(actual: Tensor, oracle: Tensor, witness: Tensor) -> tuple[float, float]:
    """(rms, maximum) error of `actual` against the oracle, each divided by what the budget allows: at most 1 is inside.

    Allowed: 1.5 times the witness's rms error and 2.0 times its maximum, each plus 1e-6 of the oracle's rms, where the
    witness has the oracle's shape, or several draws stacked in front of it: then the rms is that of all of them, the
    maximum the largest of any, and what a draw has a result may have. (One rounding decides the rms where one of a few
    16-bit weights is by far the largest; it may be off by sqrt(3) times its rms.) How many draws a maximum needs,
    `witness` says. A NaN or an infinity is inf times over.
    """
    exact = oracle.double()
    if actual.shape != exact.shape:
        raise ValueError(f"actual must have the oracle's shape {tuple(exact.shape)}, got {tuple(actual.shape)}")
    if exact.numel() == 0:
        return 0.0, 0.0

    def errors(x: Tensor) -> Tensor:  # a row for each draw
        return (x.double() - exact).abs().reshape(-1, exact.numel())

    found, seen = errors(actual), errors(witness)
    rms, largest = found.square().mean().sqrt().item(), found.max().item()
    of_draws = seen.square().mean(1)
    rms_allowed = max(RMS_FACTOR * of_draws.mean().sqrt().item(), of_draws.max().sqrt().item())
    floor = FLOOR * exact.square().mean().sqrt().item()
    if not (math.isfinite(rms) and math.isfinite(largest)):
        return math.inf, math.inf

    def over(error: float, allowed: float) -> float:
        return error / allowed if allowed else (0.0 if error == 0.0 else math.inf)

    return over(rms, rms_allowed + floor), over(largest, MAX_FACTOR * seen.max().item() + floor)


def assert_within_budget(name: str, actual: Tensor, oracle: Tensor, witness: Tensor) -> None:
    """The one error budget: see `errors_over_budget`.

    Raises:
        AssertionError: outside the budget, with both ratios.
    """
    rms, largest = errors_over_budget(actual, oracle, witness)
    assert rms <= 1.0 and largest <= 1.0, (  # noqa: PT018
        f"{name} must be inside the error budget, got {rms:.3g} of the allowed rms and {largest:.3g} of the maximum"
    )
