"""watch.py: every number against plain autograd, a training that goes on to the same bits, a model left as it was.

python -m pytest tests/diagnostics/test_watch.py -m long    writes the record of what it costs
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diagnostics.test_probes import llama, timm_model, torch_encoder
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flashsigmoid import sigmoid_attention
from flashsigmoid.diagnostics import probe_attention
from flashsigmoid.diagnostics.watch import Watch
from flashsigmoid.models.gpt import GPT, GPTConfig
from flashsigmoid.nn import SigmoidAttention
from flashsigmoid.record import RecordWriter

EPS = torch.finfo(torch.float32).eps

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
CONFIG = GPTConfig(vocab_size=11, seqlen=8, nlayers=2, dim=16, nheads=2, nheads_k=1, position="rope")


class Notes:
    """What was written: {(name, layer, step): (value, max, min)}."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, int], tuple[float, ...]] = {}

    def __call__(self, name: str, value: float, *, step: int, layer: str, **spread: float) -> None:
        assert (name, layer, step) not in self.found
        self.found[name, layer, step] = (value, *spread.values())
        assert list(spread) == (["max", "min"] if spread else [])

    def names(self, step: int) -> set[str]:
        return {name for name, _, at in self.found if at == step}


def loss_of(model: Any, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), x.flatten())


def batch(seed: int = 0, size: int = 3) -> Tensor:
    return torch.randint(0, 11, (size, 8), generator=torch.Generator().manual_seed(seed))


def made(attention: str = "sigmoid", **fields: Any) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(CONFIG), "attention": attention, **fields}))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    optimizer.zero_grad()
    loss_of(model, batch(seed)).backward()
    optimizer.step()


def spread(x: Tensor) -> Any:
    """Mean, largest and least norm of the vectors along the last dimension."""
    norms = x.detach().norm(dim=-1).flatten() if x.dim() > 1 else x.detach().norm()[None]
    return pytest.approx((norms.mean().item(), norms.max().item(), norms.min().item()), rel=32 * EPS, abs=0.0)


@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
def test_norms_are_those_of_plain_autograd(attention: str) -> None:
    model, optimizer = made(attention)
    outs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.retain_grad()
                outs[name] = out

        return hook

    kept = [(name, module) for name, module in model.named_modules() if name and not isinstance(module, nn.Identity)]
    hooks = [module.register_forward_hook(keep(name)) for name, module in kept]
    notes = Notes()
    with Watch(model, optimizer, write=notes, every=3):
        step(model, optimizer)
    for hook in hooks:
        hook.remove()
    assert len(outs) > 20
    for name, out in outs.items():
        if name.endswith("rope"):  # of queries and of keys: both count, the last alone is here
            continue
        assert notes.found["probe_output", name, 1] == spread(out), name
        assert out.grad is not None
        assert notes.found["probe_output_grad", name, 1] == spread(out.grad), name
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        expected = {"param": parameter, "param_grad": parameter.grad, **state}
        del expected["step"]
        assert expected.keys() == {"param", "param_grad", "exp_avg", "exp_avg_sq"}
        for key, x in expected.items():
            if x is not None:  # softmax has no gradient of b, and there is no such parameter here
                assert notes.found[f"probe_{key}", name, 1] == spread(x), (key, name)
    assert {layer for name, layer, _ in notes.found if name == "probe_param"} == {*dict(model.named_parameters())}


@pytest.mark.parametrize("attention", ["sigmoid", "softmax"])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_numbers_of_attention_are_those_of_a_probe(attention: str, position: str) -> None:
    model, optimizer = made(attention, position=position)
    probes = probe_attention(model, batch()[:1])
    notes = Notes()
    with Watch(model, optimizer, write=notes):
        optimizer.zero_grad()
        loss_of(model, batch(size=1)).backward()
        optimizer.step()
    for i, probe in enumerate(probes):
        expected = {
            "attn_norm": probe.attention_norm, "row_mass": probe.row_mass, "sink": probe.sink_mass,
            "effective_keys": probe.effective_keys, "saturation": probe.saturation,
        }  # fmt: skip
        for name, value in expected.items():
            found = notes.found[f"probe_{name}/layer_{i}", f"blocks.{i}.attention", 1]
            assert found == (pytest.approx(value, rel=32 * EPS, abs=0.0),), name
        assert 0.0 < notes.found[f"probe_attn_grad/layer_{i}", f"blocks.{i}.attention", 1][0] < math.inf


def test_gain_is_what_the_jacobian_does_to_the_gradient_and_below_its_norm_and_the_bound() -> None:
    torch.manual_seed(0)
    attend = sigmoid_attention
    model = nn.Sequential(nn.Linear(8, 8), SigmoidAttention(8, 2, causal=True, sigmoid_bias=-1.0, attention_fn=attend))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, direction = 3 * torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    notes = Notes()
    with Watch(model, optimizer, write=notes):
        (model(x) * direction).sum().backward()
        optimizer.step()
    layer: Any = model[1]
    layer.attention_fn = functools.partial(sigmoid_attention, backend="reference")
    inputs = model[0](x).detach()
    jacobian = torch.autograd.functional.jacobian(layer, inputs).reshape(48, 48)
    pulled = jacobian.T @ direction.flatten()
    (gain,), (bound,), (share,) = (
        notes.found[f"probe_{key}/layer_0", "1", 1] for key in ("gain", "bound", "bound_share")
    )
    assert gain == pytest.approx(float(pulled.norm() / direction.norm()), rel=32 * EPS)
    assert gain <= float(torch.linalg.matrix_norm(jacobian, 2)) * (1 + 32 * EPS) <= bound
    assert share == pytest.approx(gain / bound, rel=32 * EPS)


def test_training_goes_on_to_the_same_bits_and_nothing_is_left() -> None:
    states = []
    for watched in (False, True):
        model, optimizer = made()
        functions = [block.attention.attention_fn for block in model.blocks]
        random = torch.get_rng_state()
        notes = Notes()
        if watched:
            with Watch(model, optimizer, write=notes, every=2) as watch:
                for i in range(5):
                    step(model, optimizer, i)
                    # in place for a step's own forward only
                    assert [block.attention.attention_fn for block in model.blocks] == functions
                assert watch.step == 5
        else:
            for i in range(5):
                step(model, optimizer, i)
        assert torch.equal(torch.get_rng_state(), random)
        states.append(model.state_dict())
        every = list(model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in every)
        assert not optimizer._optimizer_step_post_hooks
    assert {at for _, _, at in notes.found} == {1, 3, 5}
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_all_batches_of_a_step_count_and_no_validation_does() -> None:
    model, optimizer = made()
    whole, parts = Notes(), Notes()
    with Watch(model, optimizer, write=whole, only=("blocks.0",)):
        (loss_of(model, batch(1)) + loss_of(model, batch(2))).backward()
        optimizer.step()
    model, optimizer = made()
    with Watch(model, optimizer, write=parts, only=("blocks.0",)):
        loss_of(model, batch(1)).backward()
        with torch.no_grad():
            model(batch(5))
        model.eval()
        loss_of(model, batch(6))
        model.train()
        loss_of(model, batch(2)).backward()
        optimizer.step()
    assert whole.found.keys() == parts.found.keys()
    for key, values in whole.found.items():
        assert parts.found[key] == pytest.approx(values, rel=32 * EPS, abs=0.0), key
    assert {layer for name, layer, _ in whole.found if name == "probe_output"} == {"blocks.0"}


def test_a_fault_leaves_the_model_as_it_was() -> None:
    model, optimizer = made()
    function = model.blocks[0].attention.attention_fn

    def fail() -> None:
        with Watch(model, optimizer, write=Notes()):
            loss_of(model, batch()).backward()
            assert model.blocks[0].attention.attention_fn is not function
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.blocks[0].attention.attention_fn is function
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize("make", [timm_model, llama, torch_encoder])
def test_models_of_others_are_watched(make: Any) -> None:
    model, inputs, names = make()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    notes = Notes()
    with Watch(model, optimizer, write=notes):
        out = model(*inputs)
        getattr(out, "logits", out).square().mean().backward()
        optimizer.step()
    for i, name in enumerate(names):
        assert notes.found[f"probe_row_mass/layer_{i}", name, 1][0] == pytest.approx(1.0, rel=32 * EPS)
        assert notes.found[f"probe_attn_grad/layer_{i}", name, 1][0] > 0.0
    assert {"probe_output", "probe_output_grad", "probe_param", "probe_param_grad"} <= notes.names(1)
    assert "probe_momentum_buffer" in notes.names(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"sequences": 0}, "sequences must be at least 1, got 0"),
        ({"only": ("block.*",)}, "only must be patterns of modules or parameters, got 'block"),
    ],
)
def test_bad_arguments_are_one_clear_error(options: dict[str, Any], message: str) -> None:
    model, optimizer = made()
    with pytest.raises(ValueError, match=message):
        Watch(model, optimizer, write=Notes(), **options)
    with pytest.raises(ValueError, match="model must not be compiled"):
        Watch(torch.compile(model), optimizer, write=Notes())  # pyright: ignore[reportArgumentType]
    model.blocks[1].compile()
    with pytest.raises(ValueError, match="model must not be compiled, got a "):
        Watch(model, optimizer, write=Notes())
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="model must be on one device, got cpu and meta"):
        Watch(model, optimizer, write=Notes())


class Direct(nn.Module):
    """torch's attention called by its bare name from a module that is nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Checkpointed(nn.Module):
    """Two layers within modules within modules, recomputed in the backward if asked to."""

    def __init__(self, layers: list[nn.Module], reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.layers, self.reentrant = nn.Linear(16, 16), nn.ModuleList(layers), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + (layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant))
        return x


@pytest.mark.parametrize("make", [Direct, lambda: SigmoidAttention(16, 4, causal=True, sigmoid_bias=-1.0)])
def test_activation_checkpointing_changes_no_number(make: Callable[[], nn.Module]) -> None:
    found = {}
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        model = Checkpointed([nn.Sequential(make()), nn.Sequential(make())], reentrant)
        notes, x = Notes(), torch.randn(2, 5, 16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Watch(model, optimizer, write=notes):
            model(x).square().mean().backward()
            optimizer.step()
        found[reentrant] = notes.found
    assert {name for name, _, _ in found[None]} >= {"probe_attn_norm/layer_0", "probe_attn_grad/layer_1"}
    assert found[False].keys() == found[None].keys()
    for key, values in found[None].items():
        assert found[False][key] == pytest.approx(values, rel=32 * EPS, abs=0.0), key
    # reentrant, the attention of others runs where nobody looks
    seen = {layer for name, layer, _ in found[True] if name.startswith("probe_attn_norm")}
    assert seen == (set() if make is Direct else {"layers.0.0", "layers.1.0"})


@pytest.mark.long
def test_what_watching_every_tenth_step_costs(tmp_path) -> None:
    """Recorded, not judged: a step that is measured, one that is not, and one without a watch take turns.

    On a CPU by the seconds of the process itself, its writers' threads with it. Numbers go to records and TensorBoard,
    as those of a run. The record's `overhead` is that of one measured step and nine others.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    small: dict[str, Any] = {"nlayers": 6, "dim": 192, "nheads": 6}
    size = {"nlayers": 12, "dim": 768, "nheads": 12} if on_gpu else small
    seqlen, sequences = (1024, 16) if on_gpu else (256, 4)
    command = "python -m pytest tests/diagnostics/test_watch.py -m long"
    record = RESULTS / ("probes-overhead-cuda.jsonl" if on_gpu else "probes-overhead.jsonl")
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    settings = {**size, "seqlen": seqlen, "batch": sequences, "every": 10, "clock": clock.__name__}
    with RecordWriter(record, settings, command) as writer, RecordWriter(tmp_path / "seen.jsonl", {}, command) as seen:

        def write(name: str, value: float, *, step: int, **tags: Any) -> None:
            seen.write(name, value, step=step, **tags)
            logger.log_metrics({f"{name}/{tags['layer']}": value}, step=step)

        for attention in ("sigmoid", "softmax"):
            model = GPT(GPTConfig(vocab_size=256, seqlen=seqlen, attention=attention, **size)).to(device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            tokens = torch.randint(0, 256, (sequences, seqlen), device=device)
            times: dict[str, list[float]] = {"plain": [], "between": [], "measured": []}
            for round_ in range(30):
                for kind in random.Random(round_).sample(list(times), len(times)):
                    start = clock()
                    every = Watch(model, optimizer, write=write, start=0 if kind == "measured" else 1)
                    with contextlib.nullcontext() if kind == "plain" else every:
                        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                            loss = loss_of(model, tokens)
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                    float(loss.detach())
                    times[kind].append(clock() - start)
            medians = {kind: statistics.median(spent[3:]) for kind, spent in times.items()}
            for kind, median in medians.items():
                writer.write(kind, 1e3 * median, unit="ms_per_step", attention=attention)
            overhead = (medians["measured"] + 9 * medians["between"]) / (10 * medians["plain"]) - 1
            writer.write("overhead", overhead, attention=attention)
            print(f"{attention}: {1e3 * medians['plain']:.1f} ms a step, {100 * overhead:.1f} % more")
