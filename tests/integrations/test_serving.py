"""`transformers serve` of an exported SigmoidGPT: nothing lost or different, memory flat, bad requests refused."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra hf")

from integrations import serving
from integrations.trained import small_model

from flashsigmoid.integrations.sigmoid_gpt import export
from flashsigmoid.models.gpt import GPT, GPTConfig
from flashsigmoid.training.tokenizer import ByteTokenizer

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
needs_server = pytest.mark.skipif(bool(serving.missing()), reason=f"needs transformers[serving]: {serving.missing()}")


def check(found: dict) -> None:
    assert found["lost"] == found["different_from_offline"] == 0, found["problems"]
    assert found["requests"] > 0
    assert found["malformed_refused"] == len(serving.MALFORMED), found["malformed"]
    assert found["answered_after"] > 0
    assert found["listens_elsewhere_than_loopback"] == 0


@needs_server
def test_a_few_streams(tmp_path):
    model = GPT(GPTConfig(vocab_size=257, seqlen=48, nlayers=1, dim=32, nheads=2))
    model.head.weight.data[128:] = 0.0  # says ASCII only: a stream leaves out bytes that are not UTF-8
    check(serving.measure(export(model, ByteTokenizer().to_library_json(), tmp_path / "out"), 4, 4.0))


@needs_server
@pytest.mark.long
def test_a_hundred_streams_for_two_minutes(tmp_path):
    model, tokenizer, loss = small_model(tmp_path / "run")
    folder = export(model, tokenizer.to_library_json(), tmp_path / "out")
    found = serving.measure(folder, 100, 120.0, RESULTS / "serving.jsonl", loss)
    check(found)
    assert abs(found["resident_last_over_first"] - 1.0) <= 0.05


def test_the_architecture_is_a_name_of_transformers(tmp_path):
    """What the server loads by; it has no other way to a model of ours."""
    import transformers

    model = GPT(GPTConfig(vocab_size=257, seqlen=48, nlayers=1, dim=32, nheads=2))
    config = transformers.AutoConfig.from_pretrained(export(model, ByteTokenizer().to_library_json(), tmp_path / "out"))
    assert getattr(transformers, config.architectures[0]) is transformers.AutoModelForCausalLM


def test_a_server_that_answers_otherwise_is_seen():
    """The comparison and the count of refusals find what they are for."""
    found = dict.fromkeys(("lost", "different_from_offline", "listens_elsewhere_than_loopback"), 0)
    found |= {"requests": 1, "malformed_refused": len(serving.MALFORMED), "answered_after": 1}
    found |= {"problems": [], "malformed": {}}
    check(found)
    for name in ("lost", "different_from_offline", "listens_elsewhere_than_loopback"):
        with pytest.raises(AssertionError):
            check({**found, name: 1})
    for name in ("requests", "malformed_refused", "answered_after"):
        with pytest.raises(AssertionError):
            check({**found, name: 0})
