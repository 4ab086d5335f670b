"""Steps on a fake process group send and hold what the formulas say, and what real ranks send."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from distributed import language
from distributed.crew import Crew

from flashsigmoid.distributed import scaling
from flashsigmoid.distributed.cost import Sizes, choose_scheme, cost
from flashsigmoid.distributed.layout import Layout
from flashsigmoid.distributed.processes import MeshSizes
from flashsigmoid.distributed.simulate import simulate, simulate_layers
from flashsigmoid.models.gpt import GPT, GPTConfig
from flashsigmoid.record import RecordWriter

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("name", "sizes", "recompute"),
    [
        ("alibi", (1, 2, 1), "none"),
        pytest.param("rope", (1, 2, 1), "full", marks=pytest.mark.long),
        pytest.param("alibi", (2, 1, 1), "none", marks=pytest.mark.long),
    ],
)
@pytest.mark.long
def test_real_ranks_send_what_is_simulated(crew: Crew, name: str, sizes, recompute) -> None:
    config = language.MODELS[name]
    found = crew.run(language.sent_of, name, sizes, recompute)
    for rank, sent in enumerate(found):
        simulated = simulate(lambda: GPT(config), config.seqlen, MeshSizes(*sizes), rank, recompute=recompute)
        assert sent == (simulated.attention_bytes, simulated.weights_bytes)
    assert (found[0][0] > 0) == (sizes[1] > 1)


def test_what_cannot_be_simulated_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="tp must be 1 in a simulation, got dp=1,cp=1,tp=2"):
        simulate(lambda: GPT(language.TINY), language.SEQLEN, MeshSizes(tp=2), 0)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_table_of_large_models_is_simulated() -> None:
    """Leaves benchmarks/results/simulated.jsonl. Attention to the byte; the formulas leave out norms and padding."""
    command = f"python -m pytest -m long {Path(__file__).relative_to(RESULTS.parents[1])}"
    with RecordWriter(
        RESULTS / "simulated.jsonl", {"dtype": "bfloat16", "order": "zigzag", "batch": 1}, command
    ) as out:
        for name, model in scaling.MODELS.items():
            for n, ranks in scaling.LENGTHS:
                config = GPTConfig(
                    vocab_size=model.vocab_size, seqlen=n, nlayers=model.nlayers, dim=model.dim, nheads=model.nheads,
                    nheads_k=model.nheads_k, mlp_dim=model.hidden,
                )  # fmt: skip
                head_dim = model.dim // model.nheads
                sizes = Sizes(1, model.nheads, model.nheads_k, head_dim, head_dim, 2)
                layout = Layout(ranks, "zigzag", n, n, (0, n), (0, n), (None, 0))
                scheme = choose_scheme(layout, sizes)
                sent = [cost(layout, sizes, scheme, rank).sent_bytes for rank in range(ranks)]
                rank = sent.index(max(sent))
                formula = scaling.token_cost(model, n, ranks)

                def make(nlayers: int, config: GPTConfig = config) -> GPT:
                    return GPT(replace(config, nlayers=nlayers))

                x = simulate_layers(make, model.nlayers, n, MeshSizes(cp=ranks), rank)
                tags = {"model": name, "seqlen": n, "ranks": ranks, "rank": rank, "scheme": scheme}
                out.write("attention_sent", x.attention_bytes, unit="bytes", **tags)
                out.write("weights_sent", x.weights_bytes, unit="bytes", **tags)
                out.write("states", x.states_bytes, unit="bytes", **tags)
                assert x.attention_bytes == model.nlayers * max(sent)
                rel = 1e-4 if model.hidden % ranks == 0 else 1e-2  # rows that ranks do not divide are padded
                assert x.weights_bytes == pytest.approx(formula.fsdp_bytes * n / ranks, rel=rel)
                assert x.states_bytes == pytest.approx(formula.states_bytes, rel=rel)
