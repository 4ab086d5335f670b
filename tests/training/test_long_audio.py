"""Utterances of one speaker joined: the same audio at every length, and errors on it as records."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from training.test_audio import manifest, tone
from training.test_ctc import RUN, quiet

from flashsigmoid.models.speech import SpeechEncoder
from flashsigmoid.record import read_records
from flashsigmoid.training.audio import AudioConfig, Utterance, log_mel, read_audio
from flashsigmoid.training.ctc import SpeechRun, train_speech, transcribe
from flashsigmoid.training.long_audio import hear_joined, joined, long_audio


def utterances(**counts: int) -> list[Utterance]:
    return [Utterance(Path(f"{who}{i}"), f"{i}", who) for i in range(9) for who, n in counts.items() if i < n]


def test_groups_are_of_one_speaker_and_the_same_audio() -> None:
    found = utterances(a=9, b=5, c=3)
    groups = {factor: joined(found, factor, 4) for factor in (1, 2, 4)}
    assert [[str(each.path) for each in group] for group in groups[4]] == [
        ["a0", "a1", "a2", "a3"], ["a4", "a5", "a6", "a7"], ["b0", "b1", "b2", "b3"],
    ]  # fmt: skip
    for factor, each in groups.items():
        assert all(len(group) == factor and len({u.speaker for u in group}) == 1 for group in each)
        assert [*itertools.chain(*each)] == [*itertools.chain(*groups[4])]
    with pytest.raises(ValueError, match="a speaker must have at least 16 utterances, the largest factor, got 9"):
        joined(found, 4, 16)
    with pytest.raises(ValueError, match="factor must divide the largest factor, 8, got 3"):
        joined(found, 3, 8)


@pytest.fixture
def run(tmp_path) -> SpeechRun:
    """Tones of two speakers who validate, each four times; one file has two utterances."""
    lines = []
    for number in range(12):
        tone(tmp_path / f"{number}.wav", seconds=0.4 + 0.02 * number, pitch=300.0 + 100 * number)
        lines.append(f"{'train' if number < 4 else 'val'}|{number}.wav|{'NO' if number % 2 else 'YES'}|{number % 2}|0|")
    root = manifest(tmp_path, *lines, columns="split path text speaker start frames")
    data = AudioConfig(source="manifest", root=str(root), mels=20)
    return SpeechRun(
        name="tones", model=RUN.model, data=data, optim=RUN.optim, steps=2, batch=4, val_every=2, save_every=2
    )


def test_what_is_heard_is_the_joined_samples(tmp_path, run) -> None:
    from flashsigmoid.training.audio import load_audio

    torch.manual_seed(0)
    model = SpeechEncoder(run.model).eval()
    val = load_audio(run.data, run.model.positions).val.utterances
    found = hear_joined(model, run.data, val, 2, 2)
    assert [said for _, said, _ in found] == ["YES YES", "YES YES", "NO NO", "NO NO"]
    both = torch.cat([torch.from_numpy(read_audio(tmp_path / f"{n}.wav", 16_000)) for n in (4, 6)]).numpy()
    soundfile.write(tmp_path / "both.wav", both, 16_000, subtype="FLOAT")
    assert found[0][0] == transcribe(model, run.data, tmp_path / "both.wav")
    assert found[0][2] == pytest.approx(0.48 + 0.52)
    assert len(log_mel(both, 16_000, 20)) == 98
    (tmp_path / "6.wav").unlink()
    with pytest.raises(ValueError, match=r"audio must be usable, got .*4\.wav, .*6\.wav: there is no such file"):
        hear_joined(model, run.data, val, 2, 2)


def test_it_leaves_records(tmp_path, run) -> None:
    run = replace(run, model=replace(run.model, position="alibi", alibi_bias=True))
    train_speech(run, tmp_path / "run", device="cpu", show=quiet)
    said: list[str] = []
    path = long_audio(tmp_path / "run", factors=(1, 2, 4), show=said.append)
    file = read_records(path)
    assert path == tmp_path / "run/long-audio.jsonl"
    assert {name: file.settings[name] for name in ("attention", "position", "alibi_bias")} == {
        "attention": "sigmoid", "position": "alibi", "alibi_bias": True,
    }  # fmt: skip
    for factor, groups in ((1, 8), (2, 4), (4, 2)):
        found = {r.name: r for r in file.records if r.tags["factor"] == factor}
        assert {*found} == {"long/cer", "long/cer_se", "long/wer", "long/wer_se", "long/seconds"}
        assert {r.tags["groups"] for r in found.values()} == {groups}
        assert {r.step for r in found.values()} == {2}
    assert len(said) == 3
    assert re.match(r"4 x: 2 of 2\.\d s, CER ", said[2])
    long_audio(tmp_path / "run", factors=(1, 2), show=quiet_text)  # anew, not on top
    assert len(read_records(path).records) == 10
    with pytest.raises(ValueError, match="a checkpoint, or a run with one, must be at the path"):
        long_audio(tmp_path / "nowhere")
    for factors in ((), (0,), (-2, 2)):
        with pytest.raises(ValueError, match=r"factors must be positive, at least one, got \("):
            long_audio(tmp_path / "run", factors=factors)
    assert len(read_records(path).records) == 10  # those of before


def test_what_cannot_be_used_is_left_out_as_in_the_run(tmp_path, run, capsys) -> None:
    (tmp_path / "6.wav").write_bytes(b"")
    train_speech(replace(run, data=replace(run.data, on_corrupt="skip")), tmp_path / "run", device="cpu", show=quiet)
    capsys.readouterr()
    file = read_records(long_audio(tmp_path / "run", factors=(1, 2), show=quiet_text))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out, not usable audio: {tmp_path / '6.wav'}: ")
    assert {r.tags["factor"]: r.tags["groups"] for r in file.records} == {
        1: 6,
        2: 3,
    }  # 4 of one speaker, 3 of the other


def quiet_text(line: str) -> None:
    """Show nothing."""
