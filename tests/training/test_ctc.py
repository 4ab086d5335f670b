"""Training a speech recogniser: it learns, resumes to the same bits, counts errors, and says what does not fit."""

from __future__ import annotations

import itertools
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from rounding import assert_rounded
from safetensors.torch import load_file
from training.test_audio import manifest, tone
from training.tiny import differences

from flashsigmoid.models.speech import SpeechConfig
from flashsigmoid.record import read_records
from flashsigmoid.training.audio import AudioConfig, SpecAugmentConfig, load_audio, read_audio
from flashsigmoid.training.baseline import best_constant
from flashsigmoid.training.callbacks import Interrupted, Progress
from flashsigmoid.training.checkpoint import TRAINER, WEIGHTS, find_checkpoint
from flashsigmoid.training.ctc import (
    FINAL,
    SpeechModule,
    SpeechRun,
    error_rates,
    load_recogniser,
    train_speech,
    transcribe,
)
from flashsigmoid.training.optim import OptimConfig

RUN = SpeechRun(
    name="tiny",
    model=SpeechConfig(vocab_size=29, seqlen=48, nlayers=2, dim=16, nheads=2, mels=20, dropout_p=0.2),
    data=AudioConfig(mels=20),
    augment=SpecAugmentConfig(),
    optim=OptimConfig(lr=3e-3, warmup=2),
    steps=8,
    batch=4,
    accumulate=2,
    val_every=4,
    save_every=2,
    log_every=1,
)


def quiet(progress: Progress) -> None:
    """Show nothing."""


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    """Of the embedded sample the first 20 and 6 utterances: an epoch is two and a half steps."""
    from flashsigmoid.training import ctc

    def load(config, positions):
        data = load_audio(config, positions)
        for part, count in ((data.train, 20), (data.val, 6)):
            if config.source == "sample":
                part.utterances, part.tokens = part.utterances[:count], part.tokens[:count]
        return data

    monkeypatch.setattr(ctc, "load_audio", load)


def remains(out_dir):
    path = find_checkpoint(out_dir)
    trainer = torch.load(path / TRAINER, weights_only=True)
    del trainer["flashsigmoid"]["time_s"]
    return {"name": path.name, "weights": load_file(path / WEIGHTS), "trainer": trainer}


def numbers(out_dir, name):
    return [(r.step, r.value) for r in read_records(out_dir / "records.jsonl").records if r.name == name]


@pytest.mark.parametrize(
    ("attention", "signum", "step", "code"),
    [
        ("sigmoid", signal.SIGINT, 3, 130),
        ("softmax", signal.SIGTERM, 4, 143),
        pytest.param("sigmoid", signal.SIGTERM, 4, 143, marks=pytest.mark.long),
        pytest.param("softmax", signal.SIGINT, 3, 130, marks=pytest.mark.long),
    ],
)
def test_a_signal_saves_and_resuming_ends_with_the_same_bits(tmp_path, attention, signum, step, code) -> None:
    """With dropout, CAPE and SpecAugment drawing, inside an epoch."""

    def stop(progress: Progress) -> None:
        if progress.step == step and not progress.validated:
            os.kill(os.getpid(), signum)

    run = RUN.with_attention(attention)
    whole = train_speech(run, tmp_path / "whole", device="cpu", show=quiet)
    assert set(whole) == set(FINAL)
    with pytest.raises(Interrupted) as stopped:
        train_speech(run, tmp_path / "halves", device="cpu", show=stop)
    assert (stopped.value.code, stopped.value.step) == (code, step)
    halves = train_speech(run, tmp_path / "halves", resume=True, device="cpu", show=quiet)
    assert halves == whole
    assert differences(remains(tmp_path / "whole"), remains(tmp_path / "halves")) == []
    for name in ("train/loss", "val/cer", "val/loss", "attn_norm/layer_1"):
        assert numbers(tmp_path / "whole", name) == numbers(tmp_path / "halves", name)
    assert [step for step, _ in numbers(tmp_path / "whole", "val/cer")] == [0, 4, 8]
    assert len(numbers(tmp_path / "whole", "baseline/constant_cer")) == 1
    assert numbers(tmp_path / "whole", "data/skipped") == [(8, 0.0)]
    (record,) = [r for r in read_records(tmp_path / "whole/records.jsonl").records if r.name == "hearing"]
    with np.load(tmp_path / "whole" / (record.artifact or "")) as seen:
        positions, said = len(seen["path"]), str(seen["said"])
        assert positions == run.model.positions(len(seen["features"]))
        assert [said[i] for i in dict.fromkeys(seen["path"].tolist()) if i >= 0] == list(said)
        assert seen["maps"].shape == (2, 2, positions, positions)
        masses = seen["maps"].astype("f4").sum(-1)
        # float16 rounds a weight by at most 2^-12 of the power of two above it
        assert (abs(masses - 1.0).max() <= 2**-11) == (attention == "softmax")
    with pytest.raises(ValueError, match=r"run\.seed must stay as the run began to resume it, 0, got 1"):
        train_speech(replace(run, seed=1), tmp_path / "whole", resume=True, device="cpu", show=quiet)


def test_packed_training_goes_on_to_the_same_bits(tmp_path) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 3 and not progress.validated:
            os.kill(os.getpid(), signal.SIGINT)

    run = replace(RUN, model=replace(RUN.model, packing=True, position="alibi", alibi_bias=True))
    whole = train_speech(run, tmp_path / "whole", device="cpu", show=quiet)
    with pytest.raises(Interrupted):
        train_speech(run, tmp_path / "halves", device="cpu", show=stop)
    assert train_speech(run, tmp_path / "halves", resume=True, device="cpu", show=quiet) == whole
    assert differences(remains(tmp_path / "whole"), remains(tmp_path / "halves")) == []
    assert load_recogniser(tmp_path / "whole")[0].config == run.model
    plain = replace(run, model=replace(run.model, alibi_bias=None))
    with pytest.raises(ValueError, match=r"model\.alibi_bias must stay as the run began to resume it, True, got None"):
        train_speech(plain, tmp_path / "whole", resume=True, device="cpu", show=quiet)


def test_workers_read_the_same(tmp_path) -> None:
    results = []
    for workers in (0, 2):
        run = replace(RUN, workers=workers, steps=4)
        results.append(train_speech(run, tmp_path / str(workers), device="cpu", show=quiet))
    assert results[0] == results[1]
    assert differences(remains(tmp_path / "0")["weights"], remains(tmp_path / "2")["weights"]) == []


@pytest.mark.parametrize("attention", ["sigmoid", pytest.param("softmax", marks=pytest.mark.long)])
def test_it_learns_to_tell_tones_apart(tmp_path, attention) -> None:
    """Words of a letter for each pitch, no two alike side by side; the checkpoint then hears those it has not seen."""
    letters = {"A": 300.0, "B": 900.0, "C": 2500.0}
    words = ["".join(w) for w in itertools.product("ABC", repeat=4) if all(a != b for a, b in itertools.pairwise(w))]
    lines = []
    for number, word in enumerate(words):
        parts = [tone(tmp_path / "part.wav", 0.2, letters[letter]) for letter in word]
        soundfile.write(tmp_path / f"{number}.wav", torch.cat([torch.tensor(p) for p in parts]).numpy(), 16_000)
        lines.append(f"{'val' if number % 5 == 2 else 'train'}|{number}.wav|{word}")
    data = AudioConfig(source="manifest", root=str(manifest(tmp_path, *lines)), characters="ABC", mels=20)
    model = replace(RUN.model, vocab_size=4, dropout_p=0.0, layer_scale=1.0, dim=32, seqlen=20)
    run = replace(
        RUN, data=data, model=model, augment=SpecAugmentConfig(time_masks=0, channel_masks=0), batch=19, accumulate=1,
        steps=150, val_every=150, save_every=150, optim=OptimConfig(lr=5e-3, warmup=10), log_every=150,
    ).with_attention(attention)  # fmt: skip
    results = train_speech(run, tmp_path / "run", device="cpu", show=quiet)
    assert results["val/cer"] < 0.1 < 0.3 < results["baseline/constant_cer"]
    encoder, audio = load_recogniser(tmp_path / "run")
    assert audio == data
    heard = [transcribe(encoder, audio, tmp_path / f"{number}.wav") for number in range(24)]
    assert sum(a == b for a, b in zip(heard, words, strict=True)) > 20
    assert transcribe(encoder, audio, tmp_path / "7.wav", beam=8) == heard[7]


def test_the_loss_is_that_of_every_utterance_alone() -> None:
    """Nats per character, without augmentation: padding and the batch change nothing."""
    run = replace(RUN, augment=SpecAugmentConfig(time_masks=0, channel_masks=0))
    torch.manual_seed(0)
    module = SpeechModule(run, load_audio(run.data, run.model.positions)).eval()
    batch = next(iter(module.train_dataloader()))
    assert batch.position == {"sample": 4}
    audio, nats = batch.audio, 0.0
    for i in range(4):
        n, m = int(audio.lengths[i]), int(audio.token_lengths[i])
        logits, lengths = module.model(audio.features[i : i + 1, :n], audio.lengths[i : i + 1])
        loss = torch.nn.functional.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), audio.tokens[i : i + 1, :m], lengths,
            audio.token_lengths[i : i + 1], reduction="sum",
        )  # fmt: skip
        nats += float(loss.detach())
    loss = float(module.batch_loss(batch).detach())
    assert_rounded(loss, nats / int(audio.token_lengths.sum()), dtype=torch.float32)
    assert math.isfinite(loss)
    padded = SpeechModule(replace(run, pad_frames=700), module.data).eval()
    padded.load_state_dict(module.state_dict())
    longer = next(iter(padded.train_dataloader()))
    assert longer.audio.features.shape[1] == 700 > audio.features.shape[1]
    assert_rounded(float(padded.batch_loss(longer).detach()), loss, dtype=torch.float32)


def test_a_step_does_not_wait_to_know_lengths(monkeypatch) -> None:
    """torch's CTC loss copies lengths to the CPU, where it finds them then: the meta device would fail at that."""
    module = SpeechModule(RUN, load_audio(RUN.data, RUN.model.positions)).to("meta")
    batch = module.transfer_batch_to_device(next(iter(module.train_dataloader())), torch.device("meta"), 0)
    assert {x.device.type for x in batch.audio} == {"meta"}
    seen = []

    def loss(log_probs, targets, input_lengths, target_lengths, **options):
        seen.append((input_lengths, target_lengths))
        return log_probs.new_zeros(log_probs.shape[1])

    monkeypatch.setattr(torch.nn.functional, "ctc_loss", loss)
    assert module.batch_loss(batch).is_meta
    ((positions, characters),) = seen
    assert positions.tolist() == [RUN.model.positions(frames) for frames in batch.frames.tolist()]
    assert {positions.device.type, characters.device.type} == {"cpu"}


@pytest.mark.parametrize(
    "model",
    [
        {"position": "cape"},
        {"position": "rope", "attention": "softmax"},
        {"position": "sincos", "norm": "hybrid"},
        {"position": "alibi", "attention": "softmax"},
        {"position": "alibi", "alibi_bias": True},
    ],
    ids=str,
)
def test_compiled_it_is_the_same_loss_without_a_break(model, monkeypatch) -> None:
    """By the compiler's first half, which would name what it cannot take; a run of the second half takes minutes.

    Batches of another shape, and validation, run as they are.
    """
    calls, modes = [], []

    def compiled(function, **options):
        modes.append(options["mode"])
        fast = torch._dynamo.optimize("aot_eager", nopython=True)(function)
        return lambda *tensors: calls.append(1) or fast(*tensors)

    monkeypatch.setattr(torch, "compile", compiled)
    run = replace(RUN, accumulate=1, pad_frames=640, model=replace(RUN.model, **model))
    data = load_audio(run.data, run.model.positions)
    plain, fast = (SpeechModule(replace(run, compile=each, cuda_graphs=each), data) for each in (False, True))
    assert modes == ["reduce-overhead"]
    fast.load_state_dict(plain.state_dict())
    batch = next(iter(fast.train_dataloader()))
    for module in (plain, fast):
        module.train()
        torch.manual_seed(0)
        module.batch_loss(batch).backward()
    assert calls == [1]
    for (name, a), (_, b) in zip(plain.model.named_parameters(), fast.model.named_parameters(), strict=True):
        assert_rounded(a.grad, b.grad, name=name)
    audio = batch.audio._replace(features=torch.nn.functional.pad(batch.audio.features, (0, 0, 0, 1)))
    with torch.no_grad():
        fast.batch_loss(batch._replace(audio=audio))
        fast.eval()
        fast.batch_loss(batch)
    assert calls == [1]


def test_corrupt_audio_is_left_out_counted_and_remembered(tmp_path, capsys) -> None:
    lines = [f"{'train' if number < 12 else 'val'}|{number}.wav|NO" for number in range(15)]
    for number in range(15):
        tone(tmp_path / f"{number}.wav", pitch=300.0 + number)
    for number in (3, 13):
        (tmp_path / f"{number}.wav").write_bytes(b"")
    data = AudioConfig(source="manifest", root=str(manifest(tmp_path, *lines)), mels=20, on_corrupt="skip")

    def stop(progress: Progress) -> None:
        if progress.step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    run = replace(RUN, data=data)
    with pytest.raises(Interrupted):
        train_speech(run, tmp_path / "run", device="cpu", show=stop)
    assert capsys.readouterr().err.count("left out, not usable audio") == 2
    train_speech(run, tmp_path / "run", resume=True, device="cpu", show=quiet)
    assert "left out" not in capsys.readouterr().err
    assert numbers(tmp_path / "run", "data/skipped") == [(8, 2.0)]
    with pytest.raises(ValueError, match=r"audio must be usable, got .*\d+\.wav: "):
        train_speech(replace(run, data=replace(data, on_corrupt="fail")), tmp_path / "other", device="cpu", show=quiet)


def distance(a: str, b: str) -> int:
    """Levenshtein's, by its recursion."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def test_error_rates_are_sums_over_sums_with_a_standard_error() -> None:
    said = ["ONE TWO", "GO", "HELP ME"]
    heard = ["ONE TO", "", "HELP ME"]
    e, n = [distance(a, b) for a, b in zip(heard, said, strict=True)], [len(text) for text in said]
    rates = error_rates(heard, said)
    rate = sum(e) / sum(n)
    assert rates["cer"] == rate == 3 / 16
    assert rates["wer"] == 2 / 5
    assert rates["cer_se"] == pytest.approx(
        math.sqrt(3 / 2 * sum((a - rate * b) ** 2 for a, b in zip(e, n, strict=True))) / sum(n)
    )
    assert error_rates(said, said) == {"cer": 0.0, "cer_se": 0.0, "wer": 0.0, "wer_se": 0.0}


def test_the_best_constant_answer_is_the_best() -> None:
    """Against all answers of at most four letters."""
    said = ["ABA", "BA", "AABA", "CA"]
    every = ("".join(letters) for n in range(5) for letters in itertools.product("ABC", repeat=n))
    least = min(sum(distance(answer, text) for text in said) for answer in every)
    for start in ([], ["CCCC"], ["ABA"]):
        found = best_constant(said, start, "ABC")
        assert sum(distance(found, text) for text in said) == least
    assert best_constant(["A", "B", "C", "D"], ["AB"], "ABCD") in ("A", "B", "C", "D")


def test_a_resampled_file_or_no_speech_model_is_one_clear_error(tmp_path) -> None:
    from flashsigmoid.models.speech import SpeechEncoder

    tone(tmp_path / "slow.wav", rate=8000)
    with pytest.raises(ValueError, match=r"audio must be usable, got .*slow.wav: its rate is 8000 Hz"):
        transcribe(SpeechEncoder(RUN.model).eval(), RUN.data, tmp_path / "slow.wav")
    with pytest.raises(ValueError, match="beam must be at least 1, got 0"):
        transcribe(SpeechEncoder(RUN.model).eval(), RUN.data, tmp_path / "slow.wav", beam=0)
    with pytest.raises(ValueError, match="there is no such file"):
        read_audio(tmp_path / "nowhere.wav", 16_000)
    with pytest.raises(ValueError, match="a checkpoint, or a run with one, must be at the path"):
        load_recogniser(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"pad_frames": 0}, "pad_frames must be positive or None, got 0"),
        ({"compile": True}, "compile needs pad_frames and model.packing=False, got None, False"),
        (
            {"compile": True, "pad_frames": 640, "model": replace(RUN.model, packing=True)},
            "compile needs pad_frames and model.packing=False, got 640, True",
        ),
        ({"cuda_graphs": True}, "cuda_graphs needs compile=True and accumulate=1, got False, 2"),
        ({"data": AudioConfig()}, "model.mels must be data.mels=80, got 20"),
        ({"data": AudioConfig(characters="AB")}, "model.vocab_size must be the number of .* blank, 3, got 29"),
    ],
)
def test_bad_fields_are_one_clear_error(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RUN, **change)
