"""Plain torch on a CUDA device: inside the budget, in O(seqlen) memory, compiled, in graphs, in training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from rounding import LAYER, assert_rounded

from flashsigmoid import nn, sigmoid_attention
from flashsigmoid.backends import NAMES, blocked
from flashsigmoid.functional import sigmoid_attention_shard
from flashsigmoid.testing import Options, assert_within_budget, compute, make_qkv, oracle, witness

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "head_dim"), [(65, 127, 40), (1000, 1000, 64), (700, 1, 128)])
def test_inside_the_budget(dtype, causal, dropout_p, seqlen_q, seqlen_k, head_dim) -> None:
    tensors = make_qkv(2, seqlen_q, seqlen_k, 4, 2, head_dim, 48, dtype=dtype, device="cuda")
    side = torch.float64 if dtype == torch.float64 else torch.float32
    options = Options(
        causal=causal,
        window_size=(600, 3),
        sigmoid_bias=torch.randn(2, 4, seqlen_q, dtype=side, device="cuda") - 4.0,
        alibi_slopes=torch.rand(4, dtype=side, device="cuda") * 0.2,
    )
    if dropout_p:
        options |= Options(dropout_p=dropout_p, seed=torch.tensor([2**40 + 3], device="cuda"), origin=(1, 2, 3, 4))
    expected, seen = (
        oracle(*tensors, **options),
        witness(*tensors, draws=8 if dtype == torch.float32 else 32, **options),
    )
    names = [name for name in NAMES if name != "hopper"]  # test_hopper.py
    for backend in names if dtype != torch.float64 else ("blocked", "reference"):
        for name, result in compute(*tensors, backend=backend, **options).items():
            assert_within_budget(f"{backend} {name}", result, expected[name], seen[name])


def test_a_slab_that_is_not_everything(monkeypatch) -> None:
    tensors = make_qkv(3, 300, 300, 4, 4, 32, device="cuda")
    options = Options(sigmoid_bias=-math.log(300), causal=True)
    expected, seen = oracle(*tensors, **options), witness(*tensors, **options)
    for heads in (1, 3, 4, 8):
        monkeypatch.setattr(blocked, "_scores", lambda problem, heads=heads: heads * 300 * 300)
        for name, result in compute(*tensors, backend="blocked", **options).items():
            assert_within_budget(f"{name} of {heads} heads at a time", result, expected[name], seen[name])


def test_dropout_is_that_of_the_cpu() -> None:
    q, k, v, _ = make_qkv(2, 130, 70, 4, 2, 16, dtype=torch.float64)
    call = {"sigmoid_bias": 0.0, "q_offset": 0, "dropout_p": 0.5}
    seed = torch.tensor([-(2**50)])
    here = sigmoid_attention_shard(q, k, v, seed=seed, **call)
    there = sigmoid_attention_shard(q.cuda(), k.cuda(), v.cuda(), seed=seed.cuda(), **call)
    assert_rounded(there.cpu(), here)


@pytest.mark.large(2)
def test_memory_is_linear_in_seqlen() -> None:
    """At 65,536 tokens one head's weights would be 16 GiB; forward and backward stay below 1.5."""
    q, k, v, dout = make_qkv(1, 65_536, 65_536, 1, 1, 64, dtype=torch.bfloat16, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(sigmoid_attention(*leaves, causal=True), leaves, dout)
    assert torch.cuda.max_memory_allocated() < 1.5 * 2**30


@pytest.mark.parametrize("options", [{}, {"causal": True, "window_size": (30, None)}, {"dropout_p": 0.25}])
def test_compiles_with_inductor(options) -> None:
    def call(q, k, v, bias):
        return sigmoid_attention(q * 2, k, v, sigmoid_bias=bias, **options).sin()

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True)
    q, k, v, dout = make_qkv(2, 50, 70, 4, 2, 16, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(4, device="cuda"))]
    results = []
    for function in (call, compiled):
        torch.manual_seed(1)
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    if "dropout_p" not in options:  # inductor draws the seed by its own generator
        for eager, traced in zip(*results, strict=True):
            assert_rounded(traced, eager)
    assert all(x.isfinite().all() for x in results[1])


def test_replays_in_a_cuda_graph() -> None:
    q, k, v, _ = make_qkv(2, 300, 300, 4, 2, 32, device="cuda")
    call = {"causal": True, "sigmoid_bias": -5.0}
    sigmoid_attention(q, k, v, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sigmoid_attention(q, k, v, **call)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, sigmoid_attention(q, k, v, **call))


def test_inside_torchs_encoder_with_padding() -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    layer.self_attn = nn.MultiheadAttention(32, 4, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).cuda()
    x, ignore = torch.randn(3, 9, 32, device="cuda"), torch.zeros(3, 9, dtype=torch.bool, device="cuda")
    ignore[1, 5:] = True
    with torch.no_grad():
        trained = encoder.train()(x, src_key_padding_mask=ignore)
        evaluated = encoder.eval()(x, src_key_padding_mask=ignore)
        alone = encoder(x[1:2, :5])
    assert_rounded(evaluated[~ignore], trained[~ignore], terms=2 * LAYER)
    assert_rounded(evaluated[1:2, :5], alone, terms=2 * LAYER)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_that_is_stopped_goes_on(precision, tmp_path) -> None:
    """Mixed precision on the device, a checkpoint, and a resumed run: the one that was not stopped, up to rounding."""
    pytest.importorskip("pytorch_lightning")
    from distributed.runs import far, losses
    from training.tiny import tiny_run, write_text

    from flashsigmoid.training.checkpoint import checkpoints, load_model
    from flashsigmoid.training.language import train

    def trained(run: Any, folder: str, **options: Any) -> list[float | None]:
        train(run, tmp_path / folder, device="cuda", show=lambda progress: None, **options)
        return losses(tmp_path / folder) + losses(tmp_path / folder, "val/loss")

    run = replace(tiny_run(write_text(tmp_path / "text.txt")), precision=precision)
    whole = trained(run, "whole")
    for path in checkpoints(tmp_path / "whole")[1:]:
        path.rename(path.with_name("moved-" + path.name))
    resumed = trained(run, "whole", resume=True)
    # a resumed step rounds as the first one did: what the order of the device's own sums does, in the same run again
    rounding = max(far(trained(run, f"again-{index}"), whole) for index in range(2))
    assert len(resumed) == len(whole) == 12 + 3
    assert far(resumed, whole) <= 4.0 * max(rounding, EPS)
    assert load_model(tmp_path / "whole", "cuda")[0].embedding.weight.device.type == "cuda"


# of torch's compiler: advice for float32, what it does with a tensor's .grad, and the graph that opens its pool
@pytest.mark.filterwarnings(
    "ignore:TensorFloat32 tensor cores",
    "ignore:The .grad attribute of a Tensor that is not",
    "ignore:The CUDA Graph is empty",
)
@pytest.mark.parametrize("kind", ["language", "speech"])
@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
def test_a_training_by_cuda_graphs_is_the_same_training(kind, attention, tmp_path) -> None:
    """Twelve steps: losses and norms of gradients as in eager mode, up to rounding; validation is there too."""
    from distributed.runs import far, losses

    from flashsigmoid.recipes import language, speech

    run = (language.demo if kind == "language" else speech.an4_sample)().with_attention(attention)
    model = replace(run.model, nlayers=2, dropout_p=0.0)
    run = replace(run, model=model, steps=12, val_every=6, save_every=12, log_every=1)
    graphs = {"compile": True, "cuda_graphs": True} | ({"pad_frames": 360} if kind == "speech" else {})
    # sums in another order; speech draws for a whole micro-batch, so there it is another padding
    other = {"batch": run.batch // 2, "accumulate": 2} if kind == "language" else {"pad_frames": 480}
    folders = {"eager": {}, "other": other, "graphs": graphs}
    for folder, changes in folders.items():
        replace(run, **changes).train(tmp_path / folder, device="cuda", show=lambda _: None)
    for name, length in (("train/loss", 12), ("grad_norm", 12), ("val/loss", 3)):
        eager, near, found = (losses(tmp_path / folder, name) for folder in folders)
        assert len(eager) == len(found) == length
        # compiled code rounds otherwise in all of a layer: at least what the roundings of two layers leave
        allowed = max(4.0 * far(near, eager), 2.0 * math.sqrt(2 * LAYER) * EPS)
        assert far(found, eager) <= allowed, f"{name}: {found} by graphs, {eager} in eager mode"
