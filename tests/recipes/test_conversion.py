"""A Llama that softmax has trained, to sigmoid: every weight kept, the bias set, losses before and after, a control."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rounding import assert_rounded
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from flashsigmoid.__main__ import main  # noqa: E402
from flashsigmoid.recipes.conversion import MODEL, ConversionRun, convert, llama_recovery, train_arm  # noqa: E402
from flashsigmoid.record import RECORDS_NAME, read_records  # noqa: E402
from flashsigmoid.report.conversion import conversion_rows  # noqa: E402
from flashsigmoid.training.tokenizer import ByteTokenizer  # noqa: E402

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def fresh_llama(folder: Path, **changed) -> Path:
    """A checkpoint of a Llama of bytes, as transformers starts it."""
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
            "bos_token_id": None, "eos_token_id": 256, "tie_word_embeddings": False, **changed,
        }
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(ByteTokenizer().to_library_json(), "utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def short(run: ConversionRun, **changed) -> ConversionRun:
    data, optim = replace(run.data, val_windows=4), replace(run.optim, warmup=1)
    return replace(run, data=data, optim=optim, **{"steps": 4, "batch": 2, "val_every": 2, **changed})


def quiet(progress) -> None:
    """Show nothing."""


def losses(folder: Path) -> list[float]:
    return [r.value for r in read_records(folder / RECORDS_NAME).records if r.name == "val/loss"]


@pytest.mark.parametrize("tied", [False, True])
def test_both_arms_begin_with_every_weight(tmp_path, tied):
    path = fresh_llama(tmp_path / "llama", tie_word_embeddings=tied)
    run = llama_recovery(path, 16)
    weights = load_file(path / "model.safetensors")
    models = {arm: run.with_attention(arm).model.load() for arm in ("sigmoid", "softmax")}
    for model in models.values():
        assert len(weights) == len(list(model.parameters()))
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[name]), name
    assert models["sigmoid"].config.sigmoid_bias == -2.772588722239781
    assert models["sigmoid"].config._attn_implementation == "sigmoid"
    assert not hasattr(models["softmax"].config, "sigmoid_bias")
    tokens = torch.randint(256, (1, 9))
    assert not torch.allclose(models["sigmoid"](tokens).logits, models["softmax"](tokens).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_conversion_leaves(tmp_path, tied):
    path, out = fresh_llama(tmp_path / "llama", tie_word_embeddings=tied), tmp_path / "out"
    run = short(llama_recovery(path, 16), save_every=2)
    folders = convert(run, out, device="cpu", show=quiet)
    original = run.with_attention("softmax").model.load().eval()
    windows = torch.from_numpy(read_windows(run)).long()
    with torch.no_grad():
        logits = original(windows[:, :-1]).logits
    before = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert_rounded(losses(folders["softmax"])[0], float(before), dtype=torch.float32)
    assert losses(folders["sigmoid"])[0] != losses(folders["softmax"])[0]
    settings = read_records(folders["sigmoid"] / RECORDS_NAME).settings
    assert settings["path"] == "llama"
    converted = transformers.AutoModelForCausalLM.from_pretrained(folders["sigmoid"] / MODEL).eval()
    assert converted.config._attn_implementation == "sigmoid"
    assert converted.config.sigmoid_bias == run.model.bias
    with torch.no_grad():
        logits = converted(windows[:, :-1]).logits
    after = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert_rounded(losses(folders["sigmoid"])[-1], float(after), dtype=torch.float32)
    assert transformers.AutoTokenizer.from_pretrained(folders["sigmoid"] / MODEL)("a")["input_ids"] == [97]
    assert [row["attention"] for row in conversion_rows(out)] == ["sigmoid", "softmax"]


@pytest.mark.long
def test_a_process_that_has_not_registered_does_not_take_it_for_softmax(tmp_path):
    path = fresh_llama(tmp_path / "llama")
    train_arm(short(llama_recovery(path, 16), steps=1), tmp_path / "arm", device="cpu", show=quiet)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'arm' / MODEL)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert 'Specified `attn_implementation="sigmoid"` is not supported' in done.stderr


def read_windows(run: ConversionRun):
    from flashsigmoid.recipes.conversion import _load_data

    return _load_data(run).val_windows.numpy()


@pytest.mark.parametrize("tied", [False, True])
def test_a_conversion_goes_on_where_it_stopped(tmp_path, tied):
    path = fresh_llama(tmp_path / "llama", tie_word_embeddings=tied)
    run = short(llama_recovery(path, 16), save_every=2, keep_last=9)
    train_arm(run, tmp_path / "whole", device="cpu", show=quiet)
    stopped = tmp_path / "stopped"
    train_arm(run, stopped, device="cpu", show=quiet)
    (stopped / "checkpoints/step-00000004").rename(tmp_path / "gone")
    train_arm(run, stopped, device="cpu", show=quiet, resume=True)
    one, other = (load_file(tmp_path / name / MODEL / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def run_command(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code in (None, 0)


def test_the_command(tmp_path, capsys):
    path = fresh_llama(tmp_path / "llama")
    words = ["convert", str(path), "--seqlen", "16", "--steps", "2", "--batch-size", "2", "--sigmoid-bias=-2.5"]
    words += ["--set", "data.val_windows=2", "--set", "warmup=1", "--out", str(tmp_path / "out"), "--device", "cpu"]
    run_command(words)
    said = capsys.readouterr().out
    assert re.search(r"sigmoid +│ -2\.5000 +│ \d\.\d{3} +│", said), said
    run_command([*words, "--resume"])


def test_errors(tmp_path):
    path = fresh_llama(tmp_path / "llama")
    run = short(llama_recovery(path, 16))
    with pytest.raises(ValueError, match="seqlen must be at most max_position_embeddings=64, got 65"):
        llama_recovery(path, 65).model.load()
    with pytest.raises(ValueError, match=r"model.attention has no effect: both arms are trained, got softmax"):
        convert(run.with_attention("softmax"), tmp_path / "out")
    with pytest.raises(ValueError, match="sigmoid_bias must be a finite number or None, got nan"):
        replace(run.model, sigmoid_bias=float("nan"))
    with pytest.raises(ValueError, match=r"data.tokenizer has no effect: the checkpoint has one, got 'bpe'"):
        replace(run, data=replace(run.data, tokenizer="bpe"))
    with pytest.raises(ValueError, match="seqlen must be a positive integer, got 0"):
        llama_recovery(path, 0)
    transformers.GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"model_type of .* must be 'llama', got 'gpt2'"):
        llama_recovery(tmp_path / "gpt2", 16).model.load()


@pytest.mark.long
def test_a_llama_trained_on_text(tmp_path):
    """Trained with softmax, converted, trained on: what was lost comes back, but for what the record says."""
    path = fresh_llama(
        tmp_path / "fresh", hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    first = llama_recovery(path, 128)
    first = replace(first.with_attention("softmax"), steps=500, optim=replace(first.optim, lr=3e-3, warmup=50))
    trained = train_arm(first, tmp_path / "softmax-llama", device="cpu", show=quiet)["val/loss"]
    run = llama_recovery(tmp_path / "softmax-llama" / MODEL, 128)
    command = "python -m pytest -m long tests/recipes/test_conversion.py"
    folders = convert(run, tmp_path / "out", device="cpu", show=quiet, command=command)
    sigmoid, softmax = (losses(folders[arm]) for arm in ("sigmoid", "softmax"))
    assert softmax[0] == pytest.approx(trained, rel=1e-4)
    assert sigmoid[0] > softmax[0]
    assert sigmoid[-1] < sigmoid[0]
    for arm, folder in folders.items():
        kept = RESULTS / "conversion" / arm / RECORDS_NAME
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes((folder / RECORDS_NAME).read_bytes())


def test_code_of_a_checkpoint_is_not_asked_about(tmp_path, capfd):
    """transformers would ask on the terminal whether to run it, before anyone knows that it is no Llama."""
    fresh_llama(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "other.OtherConfig"}}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "other"), "--seqlen", "16", "--steps", "1", "--out", str(tmp_path / "out")])
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: model_type of .* must be 'llama', got 'other'\n", err), err
