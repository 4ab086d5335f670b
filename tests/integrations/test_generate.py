"""200 prompts of random length through a trained model: every way to generate gives the same tokens and logits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra hf")

from integrations.serving import prompts_of
from integrations.trained import small_model, small_run
from models.test_generation import reordered

from flashsigmoid.integrations.sigmoid_gpt import SigmoidGPTForCausalLM
from flashsigmoid.models import generation
from flashsigmoid.models.gpt import GPT
from flashsigmoid.record import RecordWriter
from flashsigmoid.testing import errors_over_budget

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
OWN = {"own": {}, "own, no cache": {"use_cache": False}}
THEIRS = {
    "transformers, dynamic cache": {},
    "transformers, static cache": {"cache_implementation": "static"},
    "transformers, no cache": {"use_cache": False},
}
Found = tuple[Tensor, Tensor]  # (prompts, new) tokens, (prompts, new, vocab_size) logits


def padded(prompts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """(batch, seqlen) tokens, and (batch,) lengths."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    # padding is text, too, so that a mask that is forgotten shows
    tokens = torch.randint(256, (len(prompts), int(lengths.max())))
    for row, prompt in zip(tokens, prompts, strict=True):
        row[slice(0, len(prompt)) if side == "right" else slice(len(row) - len(prompt), None)] = prompt
    return tokens, lengths


def own(model: GPT, prompts: list[Tensor], new: int, monkeypatch: pytest.MonkeyPatch, **options) -> Found:
    tokens, lengths = padded(prompts, "right")
    logits, draw = [], generation._Draw.__call__
    with monkeypatch.context() as patch:
        patch.setattr(generation._Draw, "__call__", lambda self, x: (logits.append(x), draw(self, x))[1])
        drawn = list(generation.stream(model, tokens, new, lengths=lengths, temperature=0.0, **options))
    return torch.stack(drawn, dim=1), torch.stack(logits, dim=1)


def theirs(model: SigmoidGPTForCausalLM, prompts: list[Tensor], new: int, **options) -> Found:
    tokens, lengths = padded(prompts, "left")
    mask = (torch.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]).long()
    said = model.generate(
        tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return said.sequences[:, tokens.shape[1] :], torch.stack(said.logits, dim=1)


def joined(parts: list[Found]) -> Found:
    tokens, logits = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logits)


def full(model: GPT, prompts: list[Tensor], new: Tensor) -> Tensor:
    """Logits (prompts, new, vocab_size) of the full forward of each text with its continuation."""
    with torch.no_grad():
        texts = [torch.cat([prompt, tokens])[None, :-1] for prompt, tokens in zip(prompts, new, strict=True)]
        return torch.stack([model(text)[0, -new.shape[1] :] for text in texts])


def ways(model: GPT, prompts: list[Tensor], new: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Found]:
    """Tokens and logits by every way, alone and in padded batches."""
    hf = SigmoidGPTForCausalLM.from_gpt(model)
    found = {}
    for size, how in ((1, "alone"), (batch, "batched")):
        parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        for name, options in OWN.items():
            found[f"{name}, {how}"] = joined([own(model, part, new, monkeypatch, **options) for part in parts])
        for name, options in THEIRS.items():
            found[f"{name}, {how}"] = joined([theirs(hf, part, new, **options) for part in parts])
    return found


def compare(model: GPT, prompts: list[Tensor], found: dict[str, Found], draws: int) -> dict[str, tuple[float, ...]]:
    """Of each way: tokens that are not those of "own, no cache, alone", and logits' rms and largest error over budget.

    The budget is the error of the full forward with the channels in `draws` random orders, against float64.
    """
    reference = found["own, no cache, alone"][0]
    exact = full(copy.deepcopy(model).double(), prompts, reference)
    near = torch.stack([full(reordered(model), prompts, reference) for _ in range(draws)])
    return {
        name: (int((tokens != reference).sum()), *errors_over_budget(logits, exact, near))
        for name, (tokens, logits) in found.items()
    }


def test_a_few_prompts_and_a_forgotten_mask(monkeypatch):
    """The comparison on a fresh model, and that it sees the padding where a mask is left out."""
    model = GPT(small_run().model).eval()
    prompts = [torch.tensor([*text.encode()]) for text in prompts_of(6, 40)]
    found = ways(model, prompts, 5, 3, monkeypatch)
    numbers = compare(model, prompts, found, 8)
    assert all(different == 0 and max(errors) <= 1.0 for different, *errors in numbers.values()), numbers
    tokens, lengths = padded(prompts, "left")
    with torch.no_grad():
        unmasked = model(tokens)[:, -1]
    name = "transformers, no cache, batched"
    found[name] = found[name][0], torch.cat([unmasked[:, None], found[name][1][:, 1:]], dim=1)
    assert int(lengths.min()) < int(lengths.max())
    assert max(compare(model, prompts, found, 8)[name][1:]) > 1.0


@pytest.mark.long
def test_two_hundred_prompts(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, _, loss = small_model(tmp_path / "run")
    count, new, batch, draws = 200, 24, 20, 8
    prompts = [torch.tensor([*text.encode()]) for text in prompts_of(count, model.config.seqlen - new)]
    numbers = compare(model, prompts, ways(model, prompts, new, batch, monkeypatch), draws)
    lengths = [len(prompt) for prompt in prompts]
    settings = {**small_run().settings(), "val_loss": loss, "prompts": count, "new_tokens": new, "batch_size": batch}
    settings |= {"shortest": min(lengths), "longest": max(lengths), "witness_draws": draws}
    with RecordWriter(RESULTS / "generate.jsonl", settings) as writer:
        for name, (different, rms, largest) in numbers.items():
            writer.write("different_tokens", different, way=name)
            writer.write("rms_error_over_budget", rms, way=name)
            writer.write("largest_error_over_budget", largest, way=name)
    assert all(different == 0 and max(errors) <= 1.0 for different, *errors in numbers.values()), numbers
