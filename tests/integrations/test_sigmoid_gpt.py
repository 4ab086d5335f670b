"""SigmoidGPT: the numbers of our GPT, tokens of generate by every way, padding, saving, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from rounding import assert_rounded

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from flashsigmoid.integrations.sigmoid_gpt import (  # noqa: E402
    SigmoidGPTConfig,
    SigmoidGPTForCausalLM,
    export,
)
from flashsigmoid.integrations.transformers import register  # noqa: E402
from flashsigmoid.models.generation import generate  # noqa: E402
from flashsigmoid.models.gpt import GPT, GPTConfig  # noqa: E402
from flashsigmoid.training.tokenizer import ByteTokenizer, train_bpe  # noqa: E402

register()
SHAPES = [
    {},
    {"position": "rope", "nheads_k": 1, "gate": True, "norm": "hybrid"},
    {"window_size": (4, None), "sigmoid_bias": -2.0},
    {"alibi_bias": True},
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


def gpt(**shape) -> GPT:
    return GPT(GPTConfig(**{"vocab_size": 257, "seqlen": 24, "nlayers": 2, "dim": 32, "nheads": 2, **shape})).eval()


@shapes
def test_logits_and_tokens_are_those_of_our_own(shape):
    ours = gpt(**shape)
    model = SigmoidGPTForCausalLM.from_gpt(ours)
    tokens = torch.randint(257, (3, 7))
    with torch.no_grad():
        assert torch.equal(model(tokens, use_cache=False).logits, ours(tokens))
    own = generate(ours, tokens, 9, temperature=0.0)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(tokens, **GREEDY, **options), own), options
    assert model.generate(tokens, **GREEDY, num_beams=3).shape == (3, 16)


@shapes
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_a_padded_prompt_continues_as_it_does_alone(shape, cache):
    model = SigmoidGPTForCausalLM.from_gpt(gpt(**shape))
    tokens, lengths = torch.randint(1, 257, (3, 8)), [8, 3, 1]  # 0 pads, also where no mask is given
    mask = torch.stack([torch.arange(8) >= 8 - length for length in lengths]).long()
    batch = model.generate(tokens * mask, attention_mask=mask, **GREEDY, **cache)
    for row, prompt, length in zip(batch, tokens, lengths, strict=True):
        alone = model.generate(prompt[None, 8 - length :], **GREEDY)[0]
        assert torch.equal(row[8 - length :], alone)


@shapes
def test_a_static_cache_under_torch_compile(shape):
    model = SigmoidGPTForCausalLM.from_gpt(gpt(**shape))
    tokens = torch.randint(257, (2, 10))
    cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    step = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        logits = [model(tokens[:, :7], cache=cache).logits]
        logits += [step(tokens[:, t : t + 1], cache=cache).logits for t in range(7, 10)]
        assert_rounded(torch.cat(logits, dim=1), model(tokens, use_cache=False).logits)


def test_training_with_checkpointing():
    tokens = torch.randint(257, (2, 12))
    labels = tokens.masked_fill(torch.rand(2, 12) < 0.2, -100)
    model = SigmoidGPTForCausalLM.from_gpt(gpt()).train()
    loss = model(tokens, labels=labels).loss
    expected = torch.nn.functional.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_rounded(loss, expected)
    loss.backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    enable = "activation_checkpointing_enable"  # of 5.24, before it gradient_checkpointing_enable
    getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
    model(tokens, labels=labels).loss.backward()
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        assert_rounded(parameter.grad, grad)


def tokenizers():
    return [ByteTokenizer(), train_bpe([b"to be or not to be, that is the question"] * 3, 280)]


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda x: type(x).__name__)
def test_an_exported_directory_is_the_model(tmp_path, tokenizer):
    ours = gpt(vocab_size=tokenizer.vocab_size, position="rope")
    folder = export(ours, tokenizer.to_library_json(), tmp_path / "out")
    assert (folder / "model.safetensors").is_file()
    assert "context 24, rope" in (folder / "README.md").read_text("utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("to be, or not", "Grüße \N{SNOWMAN}\n\t ", " two  spaces "):
        assert theirs(text)["input_ids"] == tokenizer.encode(text.encode()).tolist()
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == tokenizer.eot
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is SigmoidGPTForCausalLM
    assert model.config.sigmoid_bias == ours.config.bias
    for name, parameter in ours.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], parameter), name
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=theirs)
    said = pipe("to be", max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    tokens = torch.from_numpy(tokenizer.encode(b"to be"))[None]
    own = generate(ours, tokens, 5, temperature=0.0)[0, tokens.shape[1] :].tolist()
    assert said == tokenizer.decode(own[: own.index(tokenizer.eot)] if tokenizer.eot in own else own)


def test_a_process_that_knows_nothing_loads_it(tmp_path):
    folder = export(gpt(), ByteTokenizer().to_library_json(), tmp_path / "out")
    code = (
        "import sys, torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "print(type(model).__name__, model(torch.ones(1, 3, dtype=torch.long)).logits.shape[-1])\n"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout == "SigmoidGPTForCausalLM 257\n", done.stderr


def test_outputs_as_a_tuple_and_other_embeddings():
    model = SigmoidGPTForCausalLM.from_gpt(gpt())
    tokens = torch.randint(257, (2, 5))
    logits, _ = model(tokens, return_dict=False)
    assert torch.equal(logits, model(tokens).logits)
    embedding, head = torch.nn.Embedding(257, 32), torch.nn.Linear(32, 257, bias=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is model.model.embedding is embedding
    assert model.get_output_embeddings() is model.model.head is head
    assert not torch.allclose(model(tokens).logits, logits)


def test_a_fresh_model_starts_as_ours():
    model = transformers.AutoModelForCausalLM.from_config(SigmoidGPTConfig(dim=64, nlayers=2))
    assert abs(model.model.head.weight.std() - 0.5 * 64**-0.5) < 0.005
    assert (model.model.norm.weight == 1.0).all()


def test_the_config_comes_back(tmp_path):
    config = SigmoidGPTConfig(dim=64, window_size=(5, None), sigmoid_bias=-3.0, alibi_bias=True)
    config.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.gpt() == config.gpt() == GPTConfig(
        vocab_size=257, seqlen=128, nlayers=4, dim=64, nheads=4, window_size=(5, None), sigmoid_bias=-3.0,
        alibi_bias=True,
    )  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text())["sigmoid_bias"] == -3.0
    with pytest.raises(ValueError, match="position must be 'alibi' with alibi_bias=True, got 'rope'"):
        SigmoidGPTConfig(position="rope", alibi_bias=True)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "flex_attention"])
def test_another_attention_raises(tmp_path, name):
    rule = f"attn_implementation of a SigmoidGPT must be 'sigmoid', got '{name}'"
    config = SigmoidGPTConfig()
    with pytest.raises(ValueError, match=rule):
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name)
    model = SigmoidGPTForCausalLM(SigmoidGPTConfig())
    with pytest.raises(ValueError, match=rule):
        model.set_attn_implementation(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rule):
        SigmoidGPTForCausalLM.from_pretrained(tmp_path, attn_implementation=name)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="attention of the model must be 'sigmoid', got 'softmax'"):
        SigmoidGPTForCausalLM.from_gpt(gpt(attention="softmax"))
    with pytest.raises(ValueError, match="dim must be a multiple of nheads=4, got 30"):
        SigmoidGPTConfig(dim=30)
    model = SigmoidGPTForCausalLM.from_gpt(gpt())
    tokens = torch.zeros(1, 20, dtype=torch.long)
    with pytest.raises(ValueError, match="input and cache must have at most seqlen=24 tokens, got 25"):
        model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(tokens, attention_mask=torch.ones(1, 1, 20, 20))
    with pytest.raises(ValueError, match="output_attentions must not be given"):
        model(tokens, output_attentions=True)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="out_dir must be new or empty"):
        export(gpt(), ByteTokenizer().to_library_json(), tmp_path)
