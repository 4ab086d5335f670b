"""Plain torch on a CUDA device: inside the budget, in O(seqlen) memory, compiled, in graphs, in training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from rounding import LAYER, assert_rounded

from flashsigmoid import nn, sigmoid_attention
from flashsigmoid.backends import NAMES, blocked
from flashsigmoid.functional import sigmoid_attention_shard
from flashsigmoid.testing import Options, assert_within_budget, compute, make_qkv, oracle, witness

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    """Mixed precision on the device, a checkpoint, and a resumed run close to the one that was not stopped."""
    pytest.importorskip("pytorch_lightning")
    from training.tiny import tiny_run, write_text

    from flashsigmoid.training.checkpoint import checkpoints, load_model
    from flashsigmoid.training.language import train

    run = replace(tiny_run(write_text(tmp_path / "text.txt")), precision=precision)
    whole = train(run, tmp_path / "whole", device="cuda", show=lambda progress: None)
    for path in checkpoints(tmp_path / "whole")[1:]:
        path.rename(path.with_name("moved-" + path.name))
    resumed = train(run, tmp_path / "whole", device="cuda", resume=True, show=lambda progress: None)
    assert resumed["val/loss"] == pytest.approx(whole["val/loss"], rel=1e-3)
    assert load_model(tmp_path / "whole", "cuda")[0].embedding.weight.device.type == "cuda"


@pytest.mark.parametrize("kind", ["language", "speech"])
@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
def test_a_training_by_cuda_graphs_is_the_same_training(kind, attention, tmp_path) -> None:
    """Twelve steps: losses and norms of gradients as in eager mode, up to rounding; validation is there too."""
    from flashsigmoid.recipes import language, speech
    from flashsigmoid.record import read_records

    run = (language.demo if kind == "language" else speech.an4_sample)().with_attention(attention)
    model = replace(run.model, nlayers=2, dropout_p=0.0)
    run = replace(run, model=model, steps=12, val_every=6, save_every=12, log_every=1)
    graphs = {"compile": True, "cuda_graphs": True} | ({"pad_frames": 360} if kind == "speech" else {})
    found = []
    for name, changes in (("eager", {}), ("graphs", graphs)):
        replace(run, **changes).train(tmp_path / name, device="cuda", show=lambda _: None)
        records = read_records(tmp_path / name / "records.jsonl").records
        found.append([r.value for r in records if r.name in ("train/loss", "grad_norm", "val/loss")])
    assert len(found[0]) == len(found[1]) == 2 * 12 + 3
    assert found[1] == pytest.approx(found[0], rel=1e-3)
