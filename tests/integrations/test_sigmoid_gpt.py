"""SigmoidGPT: the numbers of our GPT, tokens of generate by every way, padding, saving, what it refuses."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from rounding import LAYER, assert_rounded

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


MODES = {
    "beams": {"num_beams": 3},
    "several of each": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
    "drawn": {"do_sample": True, "top_k": 9, "top_p": 0.9, "temperature": 0.7},
    "drawn beams": {"do_sample": True, "num_beams": 2, "min_p": 0.001},
    "repetition": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "an end": {"eos_token_id": list(range(1, 60))},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_mode_of_generate_is_that_without_a_cache(mode, cache):
    model = SigmoidGPTForCausalLM.from_gpt(gpt(position="rope", nheads_k=1, window_size=(6, None)).double())
    tokens = torch.randint(1, 257, (3, 8))
    mask = torch.stack([torch.arange(8) >= 8 - length for length in (8, 3, 1)]).long()
    found = []
    for options in ({"cache_implementation": cache}, {"use_cache": False}):
        torch.manual_seed(0)
        found.append(model.generate(tokens * mask, attention_mask=mask, **{**GREEDY, **mode}, **options))
    assert torch.equal(*found)


@shapes
def test_drafts_and_chunks_change_no_token(shape):
    """A cache that is cut back, and one that takes several tokens at a time."""
    model = SigmoidGPTForCausalLM.from_gpt(gpt(**shape).double())
    tokens = torch.randint(1, 257, (1, 8))
    own = model.generate(tokens, **GREEDY, use_cache=False)
    other = SigmoidGPTForCausalLM.from_gpt(gpt(**shape).double())
    for options in (
        {"assistant_model": other},
        {"assistant_model": model},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 3},
    ):
        assert torch.equal(model.generate(tokens, **GREEDY, **options), own), options


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


def test_a_loss_in_parts_is_that_of_the_batch():
    """A trainer that accumulates says by how many labels to divide, and divides by nothing else."""
    tokens = torch.randint(257, (4, 12))
    labels = tokens.masked_fill(torch.rand(4, 12) < torch.linspace(0.1, 0.8, 4)[:, None], -100)
    model = SigmoidGPTForCausalLM.from_gpt(gpt().double()).train()
    count = (labels[:, 1:] != -100).sum()
    parts = [model(x[None], labels=y[None], num_items_in_batch=count).loss for x, y in zip(tokens, labels, strict=True)]
    assert_rounded(torch.stack(parts).sum(), model(tokens, labels=labels).loss)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate")
def test_a_trainer_that_accumulates_takes_the_steps_of_whole_batches(tmp_path):
    texts = [{"input_ids": tokens, "labels": tokens.clone()} for tokens in torch.randint(257, (8, 12))]
    found, fresh = [], SigmoidGPTForCausalLM.from_gpt(gpt().double())
    for batch in (4, 1):
        model = copy.deepcopy(fresh)
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(batch)), per_device_train_batch_size=batch, max_steps=2, use_cpu=True,
            gradient_accumulation_steps=4 // batch, optim="sgd", learning_rate=0.1, report_to=[], save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no",
        )  # fmt: skip
        transformers.Trainer(model, options, train_dataset=texts).train()
        found.append(model.state_dict())
    for name, parameter in found[0].items():
        assert_rounded(found[1][name], parameter, 4 * LAYER, name=name)


def test_positions_may_start_anywhere_but_not_anew():
    model = SigmoidGPTForCausalLM.from_gpt(gpt(position="rope").double())
    tokens = torch.randint(257, (2, 6))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    position = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    logits = model(tokens, attention_mask=mask).logits
    assert torch.equal(model(tokens, attention_mask=mask, position_ids=position).logits, logits)
    assert torch.equal(model(tokens, attention_mask=mask, position_ids=torch.arange(7, 13)[None]).logits, logits)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match=r"position_ids must rise by one, .* got \[\[0, 1, 2, 0, 1, 2\]\]"):
        model(tokens, position_ids=packed)
    with pytest.raises(ValueError, match="cu_seq_lens_q must not be given to a SigmoidGPT"):
        model(tokens[:1], cu_seq_lens_q=torch.tensor([0, 3, 6]))


def test_logits_of_chosen_places():
    model = SigmoidGPTForCausalLM.from_gpt(gpt())
    tokens = torch.randint(257, (2, 6))
    logits = model(tokens).logits
    assert torch.equal(model(tokens, logits_to_keep=2).logits, logits[:, 4:])
    assert torch.equal(model(tokens, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])


def test_hidden_states_and_embeddings_in_place_of_tokens():
    model = SigmoidGPTForCausalLM.from_gpt(gpt(nlayers=2).double())
    tokens = torch.randint(257, (2, 6))
    plain = model(tokens)
    assert plain.hidden_states is None
    seen = model(tokens, output_hidden_states=True)
    embeds = model.get_input_embeddings()(tokens)
    assert len(seen.hidden_states) == 3
    assert torch.equal(seen.hidden_states[0], embeds)
    assert torch.equal(model.model.head(seen.hidden_states[-1]), plain.logits)
    assert torch.equal(model(inputs_embeds=embeds).logits, plain.logits)
    for given, how_many in (({}, "neither"), ({"input_ids": tokens, "inputs_embeds": embeds}, "both")):
        with pytest.raises(ValueError, match=f"one of input_ids and inputs_embeds must be given, got {how_many}"):
            model(**given)


def test_another_vocabulary_is_saved_and_read(tmp_path):
    model = SigmoidGPTForCausalLM.from_gpt(gpt())
    tokens = torch.randint(257, (1, 6))
    logits = model(tokens).logits
    model.resize_token_embeddings(260)
    assert model.config.vocab_size == model.model.config.vocab_size == 260
    assert_rounded(model(tokens).logits[..., :257], logits)
    model.save_pretrained(tmp_path)
    again = SigmoidGPTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("is_padded", [False, True])
def test_a_static_cache_has_one_mask_for_every_token(is_padded):
    """Of one layout, or a compiler compiles anew at every token; transformers passes None where nothing is padding."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, -1] = 0
    masks = [
        SigmoidGPTForCausalLM.create_masks_for_generate(torch.empty(2, 1, 0), mask[:, :n] if is_padded else None)
        for n in (7, 8, 9)
    ]
    assert {(x.shape, x.stride(), x.dtype) for x in masks} == {((2, 1), (1, 1), torch.bool)}
    assert masks[2].tolist() == ([[False], [True]] if is_padded else [[True], [True]])


def test_a_config_says_whether_there_is_a_cache():
    model = SigmoidGPTForCausalLM(SigmoidGPTConfig(dim=32, nlayers=1, use_cache=False)).eval()
    tokens = torch.randint(257, (1, 6))
    assert len(model(tokens)) == 1  # logits and nothing else
    assert len(model(tokens, use_cache=True)) == 2
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (None, None, None)


def tokenizers():
    return [ByteTokenizer(), train_bpe([b"to be or not to be, that is the question"] * 3, 280)]


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=lambda x: type(x).__name__)
def test_an_exported_directory_is_the_model(tmp_path, tokenizer, capsys):
    ours = gpt(vocab_size=tokenizer.vocab_size, position="rope")
    folder = export(ours, tokenizer.to_library_json(), tmp_path / "out")
    assert (folder / "model.safetensors").is_file()
    card = (folder / "README.md").read_text("utf-8")
    assert "context 24, rope" in card
    exec(
        textwrap.dedent(card[card.index("    from flash") : card.index("Prompt and")]).replace(
            "this directory", str(folder)
        )
    )
    assert capsys.readouterr().out.startswith("Once")
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
    with pytest.raises(ValueError, match="tie_word_embeddings must be False"):
        SigmoidGPTConfig(tie_word_embeddings=True)
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
