"""Audio and its text: every source, what cannot be used, features, SpecAugment, batches."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from rounding import assert_rounded

from flashsigmoid.samples import an4
from flashsigmoid.training.audio import (
    AudioConfig,
    SpecAugmentConfig,
    collate,
    load_audio,
    log_mel,
    read_audio,
    spec_augment,
)


def quarter(frames: int) -> int:
    return -(-frames // 4)


def tone(path: Path, seconds: float = 0.5, pitch: float = 440.0, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    """Write a tone as 16-bit audio; returns its samples."""
    samples = 0.5 * np.sin(2 * math.pi * pitch * np.arange(int(seconds * rate)) / rate)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([samples] * channels, -1), rate, subtype="PCM_16")
    return samples


def manifest(folder: Path, *lines: str, columns: str = "split path text") -> Path:
    path = folder / "manifest.tsv"
    path.write_text("\n".join("\t".join(line.split("|")) for line in (columns.replace(" ", "|"), *lines)) + "\n")
    return path


def test_the_sample_is_real_speech_of_speakers_apart() -> None:
    data = load_audio(AudioConfig(), quarter)
    assert (len(data.train), len(data.val)) == (102, 25)
    speakers = [{utterance.speaker for utterance in part.utterances} for part in (data.train, data.val)]
    assert list(map(len, speakers)) == [51, 14]
    assert not speakers[0] & speakers[1]
    for part in (data.train, data.val):
        for i in range(len(part)):
            features, tokens = part[i]
            assert features.shape[1] == 80
            assert 60 < len(features) < 370
            assert torch.isfinite(features).all()
            assert part.config.decode(tokens.tolist()) == part.utterances[i].text
    files = [an4(), *(an4().with_name(f"an4-{part}.flac") for part in ("train", "val"))]
    assert sum(file.stat().st_size for file in files) < 4 * 2**20


def test_a_manifest_has_parts_of_files_and_splits(tmp_path) -> None:
    samples = tone(tmp_path / "a" / "long.flac", seconds=2.0)
    root = manifest(
        tmp_path, "train|a/long.flac|0|8000|  hello  there", "dev|a/long.flac|8000|8000|YES", "other|a/long.flac|||NO",
        columns="split path start frames text",
    )  # fmt: skip
    data = load_audio(AudioConfig(source="manifest", root=str(root), train="train,other", val="dev"), quarter)
    assert [utterance.text for utterance in data.train.utterances] == ["HELLO THERE", "NO"]
    assert [len(data.train[i][0]) for i in range(2)] == [48, 198]
    assert torch.equal(data.val[0][0], log_mel(read_audio(tmp_path / "a/long.flac", 16_000, 8000, 8000), 16_000, 80))
    part = read_audio(tmp_path / "a/long.flac", 16_000, 8000, 800)
    assert part.shape == (800,)
    assert np.abs(part - samples[8000:8800]).max() <= 2.0**-15  # a step of 16 bits


def test_a_folder_of_audio_beside_its_text(tmp_path) -> None:
    for name, text in (("train/ann/1.wav", " oh\n no\n"), ("train/bob/2.FLAC", "YES"), ("val/3.wav", "GO")):
        tone(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(text)
    config = AudioConfig(source="folder", root=str(tmp_path))
    data = load_audio(config, quarter)
    assert [(each.speaker, each.text) for each in data.train.utterances] == [("ann", "OH NO"), ("bob", "YES")]
    assert torch.equal(data.val[0][0], log_mel(read_audio(tmp_path / "val/3.wav", 16_000), 16_000, 80))
    with pytest.raises(FileNotFoundError, match="root must hold the folder dev, got none in"):
        load_audio(replace(config, val="dev"), quarter)
    (tmp_path / "val/3.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"a text must have a character, got none in .*3\.txt"):
        load_audio(config, quarter)
    (tmp_path / "val/3.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"audio must have its text beside it, got no 3\.txt for .*3\.wav"):
        load_audio(config, quarter)
    (tmp_path / "val/3.wav").unlink()
    with pytest.raises(ValueError, match=r"must hold audio, \.wav, \.flac, \.ogg, in val, got none"):
        load_audio(config, quarter)


def test_librispeech_as_downloaded(tmp_path) -> None:
    for part, speaker in (("train-clean-100", 19), ("train-clean-360", 20), ("dev-clean", 84)):
        folder = tmp_path / part / str(speaker) / "198"
        for number in range(2):
            tone(folder / f"{speaker}-198-000{number}.flac")
        lines = [f"{speaker}-198-0000 OH NO\n", f"{speaker}-198-0001 IT'S {part[:2].upper()}\n"]
        (folder / f"{speaker}-198.trans.txt").write_text("".join(lines))
    config = AudioConfig(
        source="librispeech", root=str(tmp_path), train="train-clean-100,train-clean-360", val="dev-clean"
    )
    data = load_audio(config, quarter)
    assert [(each.speaker, each.text) for each in data.train.utterances] == [
        ("19", "OH NO"), ("19", "IT'S TR"), ("20", "OH NO"), ("20", "IT'S TR"),
    ]  # fmt: skip
    assert [each.text for each in data.val.utterances] == ["OH NO", "IT'S DE"]
    assert len(data.val[1][0]) == 48
    with pytest.raises(FileNotFoundError, match="root must hold the folder test-clean of LibriSpeech"):
        load_audio(replace(config, val="test-clean"), quarter)


def test_speakers_are_held_out() -> None:
    config = AudioConfig(hold_out=10)
    data, all_of_them = load_audio(config, quarter), load_audio(AudioConfig(), quarter).train.utterances
    held = {utterance.speaker for utterance in data.val.utterances}
    assert held == set(sorted({utterance.speaker for utterance in all_of_them})[::10])
    assert not held & {utterance.speaker for utterance in data.train.utterances}
    assert len(data.train) + len(data.val) == len(all_of_them)


def damaged(path: Path, how: str) -> None:
    if how == "empty":
        path.write_bytes(b"")
    elif how == "no audio":
        path.write_bytes(b"no audio" * 100)
    elif how == "no samples":
        soundfile.write(path, np.zeros(0), 16_000)
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:1500])
    elif how == "too short":
        soundfile.write(path, np.zeros(399), 16_000)
    elif how == "another rate":
        soundfile.write(path, np.zeros(8000), 8000)
    elif how == "not finite":
        soundfile.write(path, np.full(8000, np.nan), 16_000, subtype="FLOAT", format="WAV")
    elif how == "too fast":
        soundfile.write(path, np.zeros(900), 16_000)
    else:
        path.unlink()


DAMAGE = {
    "empty": "", "no audio": "", "no samples": "", "cut short": "", "too short": "it has 399 samples",
    "another rate": "its rate is 8000 Hz where data.rate is 16000", "not finite": "no finite number",
    "too fast": "1 positions for a text that needs 5, 'BOOK'", "not there": "there is no such file",
}  # fmt: skip


# not a WAV that was cut short: libsndfile takes it for a whole one of what is there
USED = [(how, suffix) for how in DAMAGE for suffix in ("flac", "wav") if (how, suffix) != ("cut short", "wav")]


@pytest.mark.parametrize(("how", "suffix"), USED)
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, capsys, how, suffix) -> None:
    for number in range(3):
        tone(tmp_path / f"{number}.{suffix}")
    root = manifest(tmp_path, *(f"train|{number}.{suffix}|BOOK" for number in range(3)), f"val|0.{suffix}|GO")
    damaged(tmp_path / f"1.{suffix}", how)
    config = AudioConfig(source="manifest", root=str(root))
    data = load_audio(config, quarter)
    with pytest.raises(ValueError, match=rf"audio must be usable, got .*1\.{suffix}: .*{DAMAGE[how]}") as error:
        data.train[1]
    assert "\n" not in str(error.value)
    assert data.train[0] is not None
    data = load_audio(replace(config, on_corrupt="skip"), quarter)
    for _ in range(2):
        assert [data.train[i] is None for i in range(3)] == [False, True, False]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out, not usable audio: {tmp_path / f'1.{suffix}'}: ")
    assert data.skipped == [[1], []]
    assert len(collate([data.train[i] for i in range(3)]).lengths) == 2
    assert collate([data.train[1]]) is None


@pytest.mark.parametrize(
    ("lines", "columns", "message"),
    [
        ([], "split path text", "a manifest must have utterances of the split train, got none"),
        (["a.wav|YES"], "file text", "a manifest must have the columns path and text, got file, text"),
        (["train|a.wav| "], "split path text", "a line of a manifest must have a text, got none in line 2"),
        (["a.wav|YES"], "path text", "validation must be on other utterances than training, got .*a.wav in both"),
        (["train|a.wav|4"], "split path text", "text must consist of .*, got '4' in '4'"),
        (["YES|train", "NO|val|a.wav"], "text split path", "a line of a manifest must have a path, got none in line 2"),
        (["train||YES"], "split path text", "a line of a manifest must have a path, got none in line 2"),
        (["train|a.wav|x|YES"], "split path start text", "start and frames must be whole numbers, got line 2"),
    ],
)  # fmt: skip
def test_a_bad_manifest_is_one_clear_error(tmp_path, lines, columns, message) -> None:
    if message.startswith("text must"):
        lines = [*lines, "val|a.wav|YES"]
    root = manifest(tmp_path, *lines, columns=columns)
    with pytest.raises(ValueError, match=message):
        load_audio(AudioConfig(source="manifest", root=str(root)), quarter)


def test_a_manifest_of_a_spreadsheet(tmp_path) -> None:
    """With a byte order mark; in another encoding it is named."""
    for name in ("a", "b"):
        tone(tmp_path / f"{name}.wav")
    root = manifest(tmp_path, "train|a.wav|ÉTÉ", "val|b.wav|NO")
    text = root.read_text("utf-8")
    root.write_text(text, "utf-8-sig")
    config = AudioConfig(source="manifest", root=str(root), characters="ÉTNO")
    assert [each.text for each in load_audio(config, quarter).train.utterances] == ["ÉTÉ"]
    root.write_text(text, "latin-1")
    with pytest.raises(ValueError, match=r"a text must be UTF-8, got .*manifest.tsv: .*can't decode"):
        load_audio(config, quarter)


def test_a_folder_is_no_audio(tmp_path) -> None:
    with pytest.raises(ValueError, match="it is a folder"):
        read_audio(tmp_path, 16_000)


def test_a_header_that_promises_too_much_is_corrupt(tmp_path, monkeypatch) -> None:
    tone(tmp_path / "a.wav")

    def read(*args, **options):
        raise MemoryError("Unable to allocate 4 TiB")

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    with pytest.raises(ValueError, match="Unable to allocate 4 TiB"):
        read_audio(tmp_path / "a.wav", 16_000)


def test_no_manifest_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"root must be a manifest, .*, got none at"):
        load_audio(AudioConfig(source="manifest", root=str(tmp_path)), quarter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "mp3"}, "source must be sample, folder, manifest or librispeech, got 'mp3'"),
        ({"source": "manifest"}, "root must be where the data are for source='manifest', got None"),
        ({"on_corrupt": "cry"}, "on_corrupt must be 'fail' or 'skip', got 'cry'"),
        ({"characters": "AA"}, "characters must be different ones, at least one, got 'AA'"),
        ({"characters": "a"}, "characters must be in upper case, as the text becomes, got 'a'"),
        ({"mels": 200, "rate": 8000}, "mels must be as few as rate=8000 has bands for, got 200"),
        ({"mels": 0}, "mels must be at least 1, got 0"),
        ({"hold_out": 1}, "hold_out must be 0 or at least 2, so that a speaker is left to train on, got 1"),
    ],
)
def test_bad_fields_are_one_clear_error(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        AudioConfig(**change)


def test_features_are_normalised_and_know_the_pitch(tmp_path) -> None:
    low, high = (log_mel(tone(tmp_path / "x.wav", pitch=pitch).astype("f4"), 16_000, 40) for pitch in (300.0, 3000.0))
    speech = load_audio(AudioConfig(mels=40), quarter).val[0][0]
    assert_rounded(speech.mean(0), torch.zeros(40), len(speech), of=1.0)
    assert_rounded(speech.std(0, correction=0), torch.ones(40), len(speech))
    assert low.shape == high.shape == (48, 40)
    # half low and half high: the channel of each is loud in its half only
    both = log_mel(
        np.concatenate([tone(tmp_path / "x.wav", pitch=p) for p in (300.0, 3000.0)]).astype("f4"), 16_000, 40
    )
    contrast = both[:45].mean(0) - both[-45:].mean(0)
    assert contrast.argmax() < 10 < 20 < contrast.argmin()
    assert torch.equal(log_mel(np.zeros(800, "f4"), 16_000, 40), torch.zeros(3, 40))  # silence: no NaN


def test_two_channels_are_averaged(tmp_path) -> None:
    tone(tmp_path / "one.wav")
    tone(tmp_path / "two.wav", channels=2)
    assert np.array_equal(read_audio(tmp_path / "one.wav", 16_000), read_audio(tmp_path / "two.wav", 16_000))


def test_the_fingerprint_is_that_of_the_data(tmp_path) -> None:
    for name in ("a", "b"):
        tone(tmp_path / f"{name}.wav")
    prints = []
    for texts, mels in ((("YES", "NO"), 80), (("YES", "GO"), 80), (("YES", "NO"), 40)):
        root = manifest(tmp_path, f"train|a.wav|{texts[0]}", f"val|b.wav|{texts[1]}")
        prints.append(load_audio(AudioConfig(source="manifest", root=str(root), mels=mels), quarter).fingerprint)
    tone(tmp_path / "a.wav", seconds=0.6)
    root = manifest(tmp_path, "train|a.wav|YES", "val|b.wav|NO")
    prints.append(load_audio(AudioConfig(source="manifest", root=str(root)), quarter).fingerprint)
    assert len(set(prints)) == 4


def test_batches_are_padded_with_zeros() -> None:
    data = load_audio(AudioConfig(), quarter)
    batch = collate([data.val[i] for i in range(4)])
    assert batch.features.shape == (4, int(batch.lengths.max()), 80)
    for i in range(4):
        features, tokens = data.val[i]
        assert torch.equal(batch.features[i, : len(features)], features)
        assert not batch.features[i, len(features) :].any()
        assert torch.equal(batch.tokens[i, : batch.token_lengths[i]], tokens)
    longest = batch.features.shape[1]
    longer, same = (collate([data.val[i] for i in range(4)], frames=longest + extra) for extra in (5, -5))
    assert longer.features.shape[1] == longest + 5
    assert torch.equal(longer.features[:, :longest], batch.features)
    assert not longer.features[:, longest:].any()
    assert torch.equal(same.features, batch.features)
    assert torch.equal(longer.lengths, batch.lengths)


def test_spec_augment_hides_stripes_within_their_bounds() -> None:
    features, lengths = torch.ones(500, 60, 80), torch.tensor([60, 20]).repeat(250)

    def drawn(**changes) -> torch.Tensor:
        config = SpecAugmentConfig(**{"channel_masks": 0, "time_masks": 0, **changes})
        return spec_augment(features, lengths, config) == 0

    assert not drawn().any()
    time = drawn(time_masks=1, time_width=100, time_share=0.5)
    rows = time.all(2)
    assert torch.equal(rows, time.any(2))  # whole frames
    for part, length in ((rows[::2], 60), (rows[1::2], 20)):
        widths = part.sum(1)
        assert 0.4 * length < widths.max() <= 0.5 * length + 1
        assert widths.float().mean() == pytest.approx(length / 4, rel=0.15)
        assert not part[:, length:].any()
        assert part[:, 2 : length - 2].any(0).all()  # everywhere, at the ends seldom
        assert ((part[:, 1:] & ~part[:, :-1]).sum(1) + part[:, 0] <= 1).all()  # one stripe
    assert drawn(time_masks=1, time_width=4, time_share=1.0).all(2).sum(1).max() in (4, 5)
    channels = drawn(channel_masks=2, channel_width=20)
    columns = channels.all(1)
    assert torch.equal(columns, channels.any(1))
    assert 20 < columns.sum(1).max() <= 42
    torch.manual_seed(3)
    first = drawn(time_masks=2, channel_masks=2)
    torch.manual_seed(3)
    assert torch.equal(first, drawn(time_masks=2, channel_masks=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_masks": -1}, "time_masks must be at least 0, got -1"),
        ({"time_share": 1.5}, r"time_share must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_spec_augment_is_one_clear_error(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        SpecAugmentConfig(**change)
