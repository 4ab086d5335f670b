"""The evaluation harness on an exported SigmoidGPT: its number for a task of our own is that of our model."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from rounding import assert_rounded

pytest.importorskip("transformers", reason="needs the extra hf")

from integrations.serving import prompts_of

from flashsigmoid.integrations.sigmoid_gpt import export
from flashsigmoid.models.gpt import GPT, GPTConfig
from flashsigmoid.training.tokenizer import ByteTokenizer

TASK = """task: own_bits
dataset_path: json
dataset_kwargs:
  data_files: {{test: {texts}}}
  cache_dir: {cache}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval[hf]")
def test_the_likelihood_of_texts(tmp_path):
    model = GPT(GPTConfig(vocab_size=257, seqlen=48, nlayers=2, dim=32, nheads=2)).eval()
    model.head.weight.data *= 8.0  # a fresh model finds all texts alike
    folder = export(model, ByteTokenizer().to_library_json(), tmp_path / "out")
    texts = prompts_of(6, 40)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(rows, "utf-8")
    (tmp_path / "tasks").mkdir()
    task = TASK.format(texts=tmp_path / "texts.jsonl", cache=tmp_path / "cache")
    (tmp_path / "tasks/own.yaml").write_text(task, "utf-8")
    words = ["--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"]
    words += ["--tasks", "own_bits", "--include_path", str(tmp_path / "tasks"), "--device", "cpu"]
    words += ["--batch_size", "3", "--output_path", str(tmp_path / "said")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words], capture_output=True, text=True, env=env, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (said,) = (tmp_path / "said").rglob("*.json")
    found = json.loads(said.read_text("utf-8"))["results"]["own_bits"]["bits_per_byte,none"]
    nats = 0.0
    for text in texts:
        tokens = torch.tensor([[256, *text.encode()]])  # the harness begins a text with the end of one
        with torch.no_grad():
            logits = model(tokens[:, :-1])[0]
        nats += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
    assert_rounded(found, nats / math.log(2.0) / sum(len(text.encode()) for text in texts), dtype=torch.float32)
