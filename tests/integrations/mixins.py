"""python mixins.py CHECKOUT --out mixins.jsonl    transformers' own model tests, with a SigmoidGPT and their models.

CHECKOUT is a source tree of the transformers that is installed, or its sdist unpacked: what the sdist leaves out
(tests/generation, tests/exporters) can be copied into it from a tree of another version, which the record is told by
--note. A mixin that is not there is not run, and named. Needs `parameterized`, which those tests import.

The mixins are those of models, of generation, of exporting and of training. That of pipelines downloads its models.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import os
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface

from flashsigmoid.integrations.sigmoid_gpt import SigmoidGPTConfig, SigmoidGPTForCausalLM
from flashsigmoid.integrations.transformers import register, sigmoid_attention_forward, sigmoid_mask
from flashsigmoid.record import RecordWriter

# a part of a message, and why a test that fails with it tells nothing against the model
REASONS = {
    "attn_implementation of a SigmoidGPT must be 'sigmoid'": "sigmoid is what a SigmoidGPT is",
    "test_can_set_attention_dynamically AssertionError": "sigmoid is what a SigmoidGPT is",
    "test_model_get_set_embeddings AssertionError: ViTPatch": "of a ViT they are a convolution",
    "test_custom_4d_attention_mask ValueError: attention_mask must be (batch, at least seqlen)": (
        "a SigmoidGPT is told of padding and of no other mask"
    ),
    "generate_dynamic_static_cache ValueError: attention_mask must be (batch, at least seqlen)": (
        "two steps are merged by masks of four dimensions, and a SigmoidGPT has the mask of the new tokens only"
    ),
    "test_save_load AssertionError": "transformers does not save the name of an attention: it must be given again",
}

PADDED = ("test_left_padding_compatibility", "test_custom_4d_attention_mask")

MODELS: dict[str, Any] = {
    "SigmoidGPT": SigmoidGPTForCausalLM,
    "Llama": transformers.LlamaForCausalLM,
    "Qwen3": transformers.Qwen3ForCausalLM,
    "ViT": transformers.ViTForImageClassification,
}


def mixins(checkout: Path) -> tuple[Any, Any, Any, list[str]]:
    """The mixins of models, generation and training, and what of their imports the checkout does not have."""
    common = checkout / "tests/test_modeling_common.py"
    if not common.is_file():
        raise SystemExit(f"CHECKOUT must have tests/test_modeling_common.py, got {checkout}")
    package = sys.modules["tests"] = types.ModuleType("tests")
    package.__path__ = [str(checkout / "tests")]
    missing = []
    for node in ast.walk(ast.parse(common.read_text("utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.level != 1 or node.module is None:
            continue
        if (checkout / "tests" / (node.module.replace(".", "/") + ".py")).is_file():
            continue
        parts = node.module.split(".")
        for depth in range(1, len(parts) + 1):
            module = sys.modules.setdefault(name := ".".join(["tests", *parts[:depth]]), types.ModuleType(name))
        for alias in node.names:
            setattr(module, alias.name, type(alias.name, (), {}))
            missing.append(alias.name)
    common_module: Any = importlib.import_module("tests.test_modeling_common")
    training: Any = importlib.import_module("tests.test_training_mixin")
    return (
        common_module.ModelTesterMixin, common_module.GenerationTesterMixin, training.TrainingTesterMixin, missing,
    )  # fmt: skip


def let_eager_be_sigmoid() -> None:
    """Tests that force "eager", which they take every model to have, run sigmoid too."""
    AttentionInterface.register("eager", sigmoid_attention_forward)
    AttentionMaskInterface.register("eager", sigmoid_mask)
    correct = SigmoidGPTForCausalLM.get_correct_attn_implementation

    def take_eager(self: Any, requested_attention: str | None, is_init_check: bool = False) -> str:
        return correct(self, None if requested_attention == "eager" else requested_attention, is_init_check)

    SigmoidGPTForCausalLM.get_correct_attn_implementation = take_eager


class Tester:
    """What the mixins ask a model's tester for."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, kind: str) -> None:
        self.kind = kind
        if kind == "ViT":
            self.seq_length = 37  # patches and the class token

    def get_config(self) -> Any:
        if self.kind == "SigmoidGPT":
            return SigmoidGPTConfig(vocab_size=99, seqlen=64, nlayers=2, dim=32, nheads=4, pad_token_id=0)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        if self.kind == "ViT":
            return transformers.ViTConfig(
                **shape, image_size=12, patch_size=2, sigmoid_bias=-math.log(37), attn_implementation="sigmoid"
            )
        return getattr(transformers, f"{self.kind}Config")(
            **shape, vocab_size=99, head_dim=8, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, sigmoid_bias=-math.log(64), attn_implementation="sigmoid",
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        if self.kind == "ViT":
            return self.get_config(), {"pixel_values": torch.rand(self.batch_size, 3, 12, 12)}
        tokens = torch.randint(1, 99, (self.batch_size, self.seq_length))
        mask = torch.ones_like(tokens)
        mask[0, :2] = 0
        return self.get_config(), {"input_ids": tokens, "attention_mask": mask}

    def prepare_config_and_inputs_for_model_class(self, model_class: type) -> tuple[Any, dict[str, torch.Tensor]]:
        return self.prepare_config_and_inputs_for_common()


def case(kind: str, model_class: type, bases: tuple[type, ...]) -> type[unittest.TestCase]:
    """A test case of one model."""

    def set_up(self: Any) -> None:
        self.config_tester = None

    def prepare(self: Any, inputs: dict[str, Any], model_class: type, return_labels: bool = False) -> dict[str, Any]:
        # labels are known by the names of classes that transformers has
        labels = inputs["input_ids"] if "input_ids" in inputs else torch.zeros(len(inputs["pixel_values"])).long()
        return {**inputs, **({"labels": labels} if return_labels else {})}

    members = {
        "setUp": set_up,
        "model_tester": Tester(kind),
        "_prepare_for_class": prepare,
        "all_model_classes": (model_class,),
        "pipeline_model_mapping": {},
        # it gives no attentions out, but pads and takes masks, which some tests ask for by the same name
        "has_attentions": property(lambda self: self._testMethodName in PADDED),
    }
    if kind == "ViT":
        members["test_resize_embeddings"] = False  # it has no vocabulary
    return type(f"{kind}Test", (*dict.fromkeys(bases), unittest.TestCase), members)


class Outcome(unittest.TestResult):
    """Every test's name, outcome, and the last line of what it said."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []

    def addSuccess(self, test: unittest.TestCase) -> None:
        self.found.append((test._testMethodName, "passed", ""))

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.found.append((test._testMethodName, "skipped", reason))

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        said = " ".join(f"{err[0].__name__}: {err[1]}".split())
        why = next((reason for part, reason in REASONS.items() if part in f"{test._testMethodName} {said}"), "")
        self.found.append((test._testMethodName, "excepted" if why else "failed", why or said[:300]))

    addFailure = addError


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("    ")[2].partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, help="records")
    parser.add_argument("--test", help="of this name only")
    parser.add_argument("--note", default="", help="of where the checkout comes from")
    given = parser.parse_args()
    os.environ["RUN_SLOW"] = "1"  # of exporting all tests are
    register()
    let_eager_be_sigmoid()
    model_mixin, generation_mixin, training_mixin, missing = mixins(given.checkout.absolute())
    found = []
    for kind, model_class in MODELS.items():
        bases = (model_mixin,) if kind == "ViT" else (model_mixin, generation_mixin, training_mixin)
        outcome = Outcome()
        for test in unittest.defaultTestLoader.loadTestsFromTestCase(case(kind, model_class, bases)):
            if given.test in (None, test._testMethodName):
                torch.manual_seed(0)
                test(outcome)
        found += [(kind, *row) for row in outcome.found]
    for kind, name, outcome, why in found:
        if outcome in ("failed", "excepted"):
            print(f"{outcome}: {kind} {name}: {why}")
    count = {(kind, how): 0 for kind in MODELS for how in ("passed", "skipped", "excepted", "failed")}
    for kind, _, outcome, _ in found:
        count[kind, outcome] += 1
    print({f"{kind} {how}": number for (kind, how), number in count.items()}, "not in the checkout:", missing)
    if given.out is not None:
        with RecordWriter(given.out, {"not_in_the_checkout": missing, "note": given.note}) as writer:
            for (kind, how), number in count.items():
                writer.write(how, number, model=kind)
            for kind, name, outcome, why in found:
                if outcome != "passed":
                    writer.write("test", 0.0, model=kind, test=name, outcome=outcome, why=why)


if __name__ == "__main__":
    main()
