"""Meshes of 2 processes train as one process does; those of 4, for 100 steps, in `make test-long`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import language
from distributed.crew import Crew
from distributed.language import MODELS, losses_alone, rounding_alone
from torch.distributed.fsdp import MixedPrecisionPolicy

from flashsigmoid.distributed.initialize import initialize
from flashsigmoid.distributed.plans import AXES
from flashsigmoid.record import RecordWriter

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STEPS = 10


def largest_difference(losses: list[float], alone: list[float]) -> float:
    """Relative."""
    return max(abs(x - y) / abs(y) for x, y in zip(losses, alone, strict=True))


@pytest.mark.parametrize(
    ("name", "sizes", "layout"),
    [
        ("alibi", (2, 1, 1), {}),
        ("alibi", (1, 2, 1), {"scheme": "ring"}),
        ("rope", (1, 2, 1), {"scheme": "reduce_scatter", "recompute": "selective"}),
        ("rope", (1, 1, 2), {}),
        ("gelu", (1, 1, 2), {"recompute": "full"}),
        ("bias of heads", (1, 1, 2), {}),
        ("bias of slopes", (1, 1, 2), {}),
        ("bias of slopes", (1, 2, 1), {}),
        ("normed heads", (1, 1, 2), {}),
        ("softmax", (1, 1, 2), {}),
        ("softmax, rope", (1, 2, 1), {}),
    ],
)
def test_two_processes_train_as_one(crew: Crew, name: str, sizes: tuple[int, int, int], layout: dict) -> None:
    alone = losses_alone(name, STEPS, torch.float64)
    assert alone[-1] < alone[0]
    both = crew.run(language.losses_of, name, sizes, STEPS, torch.float64, **layout)
    assert both[0] == both[1]
    assert largest_difference(both[0], alone) <= 4.0 * rounding_alone(name, STEPS, torch.float64)


@pytest.mark.parametrize(("name", "sizes"), [("rope", (2, 1, 1)), ("gelu", (1, 1, 2))])
def test_a_model_from_the_meta_device_has_the_weights_of_one_process(crew: Crew, name: str, sizes) -> None:
    assert crew.run(language.weights_from_meta, name, sizes) == [[], []]


def test_a_parameter_that_nobody_initialises_is_an_error() -> None:
    with torch.device("meta"):
        model = language.GPT(MODELS["alibi"])
        model._attentions()[1].sigmoid_bias = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"no parameters of other kinds, got \['blocks.1.attention.sigmoid_bias'\]"):
        initialize(model, "cpu")


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "sizes", "layout", "graphs"),
    [
        ("alibi", (2, 1, 1), {}, 1),
        ("one bias", (2, 1, 1), {"recompute": "full"}, 1),
        ("one bias", (2, 1, 1), {"recompute": "selective"}, 1),
        ("rope", (1, 2, 1), {}, 4),  # before and after the attention
    ],
)
def test_compiled_blocks_train_as_one(crew: Crew, name: str, sizes, layout: dict, graphs: int) -> None:
    """Blocks are alike, and compiled once or twice."""
    alone = losses_alone(name, STEPS, torch.float64)
    for losses, found in crew.run(language.losses_compiled, name, sizes, STEPS, torch.float64, **layout):
        assert largest_difference(losses, alone) <= 4.0 * rounding_alone(name, STEPS, torch.float64)
        assert 1 <= found <= graphs


def test_a_mixed_precision_policy_rounds_and_trains(crew: Crew) -> None:
    """bfloat16 weights in the blocks: 2^-9 of rounding in each, and no more than a few of them in the loss."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    alone = losses_alone("one bias", STEPS, torch.float32)
    both = crew.run(language.losses_of, "one bias", (1, 2, 1), STEPS, torch.float32, mp_policy=policy)[0]
    assert both[-1] < both[0]
    assert 0.0 < largest_difference(both[:1], alone[:1]) <= 4 * 2**-9


@pytest.mark.parametrize(("fault", "name", "sizes"), language.FAULTS)
def test_a_planted_fault_changes_the_loss(crew: Crew, fault: str, name: str, sizes: tuple[int, int, int]) -> None:
    alone = losses_alone(name, 2, torch.float64)
    wrong = crew.run(language.losses_with_fault, fault, name, sizes, 2, torch.float64)
    assert largest_difference(wrong[0], alone) > 1000.0 * rounding_alone(name, 2, torch.float64)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("no bias", (1, 2, 1), "sigmoid_bias must be given, -log of the training context length, got None"),
        ("three heads", (1, 1, 2), "nheads must be a multiple of tp=2, got 3"),
        ("compiled, tp", (1, 1, 2), "compile must be False with tp above 1, whose tensors break its graphs, got tp=2"),
        ("compiled, cp", (1, 2, 1), "recompute must be 'none' with compile and cp=2, got 'full'"),
        ("odd vocabulary", (1, 1, 2), "vocab_size must be a multiple of tp=2, got 65"),
    ],
)
def test_what_a_mesh_cannot_divide_is_one_clear_error(crew: Crew, name: str, sizes, message: str) -> None:
    options = {"compile": True, "recompute": "full"} if "compiled" in name else {}
    with pytest.raises(AssertionError, match=message):
        crew.run(language.losses_of, name.partition(",")[0], sizes, 1, torch.float64, **options)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_meshes_of_four_processes_train_as_one_for_a_hundred_steps() -> None:
    """Leaves benchmarks/results/parallel-losses.jsonl: the largest relative difference from the single process."""
    crew = Crew(4)
    assert crew.run(language.weights_from_meta, "alibi", (2, 1, 2)) == [[]] * 4
    command = f"python -m pytest -m long {Path(__file__).relative_to(RESULTS.parents[1])}"
    meshes = ((4, 1, 1), (1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2))
    with RecordWriter(RESULTS / "parallel-losses.jsonl", {"steps": 100, "dtype": "float64"}, command) as writer:
        for name in MODELS:
            alone = losses_alone(name, 100, torch.float64)
            for sizes in meshes if name == "alibi" else meshes[-3::2]:
                losses = crew.run(language.losses_of, name, sizes, 100, torch.float64)[0]
                difference = largest_difference(losses, alone)
                tags = {"model": name, **dict(zip(AXES, sizes, strict=True))}
                writer.write("largest_relative_difference", difference, step=100, **tags)
                writer.write("loss", losses[-1], unit="nats_per_token", step=100, **tags)
                # over 100 steps rounding grows along one direction, by a factor that each mesh draws anew
                assert difference <= 16.0 * rounding_alone(name, 100, torch.float64), (name, sizes)
        first = crew.run(language.losses_of, "alibi", (1, 2, 2), 1, torch.float32)[0]
        difference = largest_difference(first, losses_alone("alibi", 1, torch.float32))
        writer.write("first_step_float32", difference, step=1, model="alibi", dp=1, cp=2, tp=2)
        assert difference <= 4.0 * rounding_alone("alibi", 1, torch.float32)
    crew.run(language.release)
    crew.close()
