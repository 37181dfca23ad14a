"""Speech: decoded, resampled, spelled, and read in clips of about the same length."""

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.tiny_models import tones
from trainer import data
from trainer.config import TrainingConfig
from trainer.data.speech import RATE, decode, spelled, written
from trainer.errors import ConfigError, TrainingError
from trainer.volume import Volume


def config(dataset: str, root: Path, **values: Any) -> TrainingConfig:
    places = {"run_dir": root, "dataset_cache_dir": root / "d", "model_cache_dir": root / "m"}
    base = {"model": "wav2vec2:test", "dataset": dataset, "validation_fraction": 0.3, "device": "cpu"}
    return TrainingConfig.from_flat({**base, **{name: str(place) for name, place in places.items()}, **values})


def precached(chosen: TrainingConfig) -> data.Dataset:
    data.precache(chosen, Volume.of(chosen), lambda line: None)
    return data.open_dataset(data.directory(chosen, Path(chosen.dataset_cache_dir)))


def sound(seconds: float, rate: int = 8000, pitch: float = 440, form: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    wave = 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)
    soundfile.write(buffer, np.stack([wave, wave], axis=1), rate, format=form)
    return buffer.getvalue()


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_a_tone_keeps_its_pitch_and_loudness_at_16_khz(rate: int, form: str) -> None:
    found = decode(sound(1.0, rate, form=form)).astype(float) / 32768
    assert found.shape == (RATE,)
    spectrum = np.abs(np.fft.rfft(found))
    assert spectrum.argmax() == 440
    assert np.sqrt(np.mean(found[2000:-2000] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)


def test_what_is_too_high_for_the_new_rate_does_not_alias() -> None:
    found = decode(sound(1.0, 44100, pitch=15000)).astype(float) / 32768
    assert np.sqrt(np.mean(found[2000:-2000] ** 2)) < 0.01


def test_no_audio_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        decode(b"no audio")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Please, don't   hang up!", "PLEASE DON'T HANG UP"),
        ("call-forwarding…", "CALL FORWARDING"),
        ("the year 1984", None),
        ("…", None),
        ("it’s", "IT'S"),
        ("Half of it — “gone”!", "HALF OF IT GONE"),
        ("R&D", None),
        ("five €", None),
        ("lost \ufffd text", None),
        ("Le café est fermé, hélas", None),
        ("Straße", None),
        ("cafe\u0301", None),
        ("\ufeffﬁne", "FINE"),
    ],
)
def test_transcripts_are_spelled_as_librispeechs(text: str, expected: str | None) -> None:
    found = spelled(text)
    assert (None if found is None else written(found)) == expected


def test_clips_and_transcripts_from_a_folder(tmp_path: Path) -> None:
    folder = tones(tmp_path / "tones")
    (folder / "unsaid.wav").write_bytes(sound(1.0))
    (folder / "long.wav").write_bytes(sound(21.0))
    (folder / "long.txt").write_text("too long")
    found = precached(config(f"files:{folder}", tmp_path))
    assert 32 <= len(found.train) + len(found.validation) <= 40, "groups of 4"
    assert len(found.train) % 4 == 0
    everything = found.train[np.arange(len(found.train))]
    lengths = everything["audio_length"]
    assert (np.diff(lengths) >= 0).all(), "in the order of their length"
    assert everything["audio"].shape[1] % (RATE // 2) == 0
    for audio, length, text, size in zip(*(everything[name] for name in everything), strict=True):
        assert not audio[length:].any()
        assert written(text[:size]) in found.manifest.facts["transcripts"]
        # A letter is 0.15 s; spaces at an end are not spelled.
        assert length == pytest.approx(size * 0.15 * RATE, abs=0.3 * RATE + 1)


def test_prompts_from_the_unpacked_packages(tmp_path: Path) -> None:
    share = tmp_path / "unpacked" / "usr" / "share"
    sounds, texts = share / "asterisk/sounds/en_US_f_Allison", share / "doc/asterisk-core-sounds-en"
    texts.mkdir(parents=True)
    lines = ["; Core Sounds", "", "beep: [a beep]"]
    for number in range(30):
        (sounds / "digits").mkdir(parents=True, exist_ok=True)
        (sounds / f"digits/{number}.wav").write_bytes(sound(1.0, pitch=200 + number))
        lines.append(f"digits/{number}: number {'abcdefghij'[number % 10]}.")
    (sounds / "beep.wav").write_bytes(sound(1.0))
    (texts / "core-sounds-en.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    found = precached(config(f"prompts:{tmp_path / 'unpacked'}", tmp_path))
    assert len(found.train) + len(found.validation) in range(24, 31)
    assert all(text.startswith("NUMBER ") for text in found.manifest.facts["transcripts"])


def test_librispeech_from_a_folder_of_its_layout(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = datasets.Features({"audio": datasets.Audio(RATE), "text": datasets.Value("string")})
    rows = {
        "audio": [{"bytes": sound(1.0, RATE, 200 + n, "FLAC"), "path": f"{n}.flac"} for n in range(24)],
        "text": ["IT WAS"] * 24,
    }
    shard = tmp_path / "copy/all/train.clean.100/0000.parquet"
    shard.parent.mkdir(parents=True)
    pq.write_table(pa.table(rows).cast(features.arrow_schema), shard)
    found = precached(config(f"librispeech:{tmp_path / 'copy'}", tmp_path))
    assert len(found.train) + len(found.validation) in range(18, 25)
    assert set(found.manifest.facts["transcripts"]) == {"IT WAS"}


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        ("files:{root}", "holds no audio"),
        ("files:{root}/nowhere", "no such folder"),
        ("prompts:{root}", "apt-get install asterisk-core-sounds-en asterisk-core-sounds-en-wav"),
        ("librispeech:{root}", "holds no all/train"),
    ],
)
def test_speech_that_is_not_there_is_refused_early(dataset: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        data.check(config(dataset.format(root=tmp_path), tmp_path))


def test_a_file_that_is_no_audio_is_named(tmp_path: Path) -> None:
    folder = tones(tmp_path / "tones")
    (folder / "7.wav").write_bytes(b"torn")

    with pytest.raises(TrainingError, match=r"7\.wav is not audio"):
        precached(config(f"files:{folder}", tmp_path))


@pytest.mark.parametrize(
    ("form", "subtype"), [("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("OGG", "VORBIS")]
)
def test_every_kind_of_sample_is_decoded(form: str, subtype: str) -> None:
    buffer, wave = io.BytesIO(), np.full((22050, 2), 0.25)
    if subtype in ("FLOAT", "DOUBLE"):
        wave[:4] = [[np.nan, np.nan], [np.inf, np.inf], [-np.inf, -np.inf], [0.25, 0.25]]
    soundfile.write(buffer, wave, 22050, format=form, subtype=subtype)
    found = decode(buffer.getvalue())
    assert len(found) == RATE
    assert found[RATE // 2] == pytest.approx(0.25 * 32768, rel=0.05)


def test_what_is_left_out_is_counted_and_hidden_files_are_no_data(tmp_path: Path) -> None:
    folder = tones(tmp_path / "tones")
    (folder / "accents.wav").write_bytes(sound(1.0))
    (folder / "accents.txt").write_text("Le café est fermé, hélas", encoding="utf-8")
    (folder / "long.wav").write_bytes(sound(21.0))
    (folder / "long.txt").write_text("too long")
    (folder / "._00.wav").write_bytes(b"of a Mac")
    (folder / "._00.txt").write_bytes(b"of a Mac")
    chosen, lines = config(f"files:{folder}", tmp_path), []
    data.precache(chosen, Volume.of(chosen), lines.append)
    (left_out,) = [line for line in lines if "left out" in line]
    assert "1 without a transcript in the letters A to Z" in left_out
    assert "shorter than 0.4 s or longer than 20 s" in left_out


def test_a_transcript_in_another_encoding_is_named(tmp_path: Path) -> None:
    folder = tones(tmp_path / "tones")
    first = min(folder.glob("*.txt"))
    first.write_bytes("café".encode("latin-1"))
    chosen = config(f"files:{folder}", tmp_path)
    with pytest.raises(ConfigError, match=f"{first.name} is not UTF-8"):
        data.precache(chosen, Volume.of(chosen), lambda line: None)


def test_a_file_that_is_no_audio_has_its_name_in_the_error(tmp_path: Path) -> None:
    folder = tones(tmp_path / "tones")
    first = min(folder.glob("*.wav"))
    first.write_bytes(b"")
    chosen = config(f"files:{folder}", tmp_path)
    with pytest.raises(TrainingError) as error:
        data.precache(chosen, Volume.of(chosen), lambda line: None)
    assert f"{first.name} is not audio" in str(error.value) and "BytesIO" not in str(error.value)


@pytest.mark.parametrize("form", ["WAV", "FLAC", "MP3"])
def test_a_recording_that_is_cut_off_is_refused(form: str) -> None:
    """The library reads what is there, and the whole transcript would be for a part of it."""
    whole = sound(2.0, 16000, form=form)
    assert len(decode(whole)) == pytest.approx(2 * RATE, rel=0.05)
    with pytest.raises(ValueError, match=r"cut off|lost sync"):
        decode(whole[: len(whole) // 2])


def test_a_wav_file_from_a_pipe_does_not_state_its_size() -> None:
    content = bytearray(sound(1.0))
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    assert len(decode(bytes(content))) == RATE


def test_an_impossible_rate_is_refused() -> None:
    content = bytearray(sound(1.0))
    content[24:28] = (1_845_509_760).to_bytes(4, "little")
    with pytest.raises(ValueError, match="its rate of 1845509760 Hz is not between"):
        decode(bytes(content))


def test_endings_are_of_any_case_and_a_test_split_is_left_out(tmp_path: Path) -> None:
    for split in ("train", "test"):
        tones(tmp_path / split)
        for path in list((tmp_path / split).iterdir()):
            path.rename(path.with_suffix(path.suffix.upper()))
    family: Any = data.resolve(config(f"files:{tmp_path}", tmp_path))
    family.check()
    count = len(list((tmp_path / "train").glob("*.WAV")))
    assert family.count() == len(list(family.clips(""))) == count
    assert family.notes() == [f"{2 * count} files of another split are left out of training beside train/"]
