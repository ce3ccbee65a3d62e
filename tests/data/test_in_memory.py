"""Dialogues from memory are read back from their files as they were given."""

import json

import numpy as np
import pytest
import soundfile

from qwhisper.data.clips import load_clip
from qwhisper.data.dialogue import parse_own, read_dialogues
from qwhisper.data.in_memory import DialoguesInMemory
from qwhisper.errors import DataError
from tests.small import tone

RATE = 22_050
WAVE = tone(300, 0.2, RATE)


def record(audio, **more) -> dict:
    parts = [{"type": "audio", "audio": audio, "transcript": "low"}, {"type": "text", "text": "音高？"}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "low"}], **more}


def array(samples) -> dict:
    return {"array": samples, "sampling_rate": RATE}


@pytest.mark.parametrize(
    ("samples", "subtype"),
    [
        (WAVE, "FLOAT"),
        (WAVE.astype(np.float64) * 3, "FLOAT"),  # above full scale
        (np.stack([WAVE, -WAVE / 2]), "FLOAT"),
        ((WAVE * 2**15).astype(np.int16), "PCM_16"),
        ((WAVE * 2**31).astype(np.int32), "PCM_32"),
        ((WAVE * 100 + 128).astype(np.uint8), "PCM_16"),
    ],
)
def test_an_array_is_a_wav_file_that_is_heard_as_the_array_is(tmp_path, samples, subtype):
    given = record(array(samples))
    stored = DialoguesInMemory.check([given], tmp_path, "train")
    stored.write()
    (clip,) = read_dialogues(stored.path)[0].clips
    assert soundfile.info(clip.path).format == "WAV" and soundfile.info(clip.path).subtype == subtype
    (memory,) = parse_own(given, "memory").clips
    assert np.array_equal(load_clip(clip), load_clip(memory)) and clip.transcript == "low"


def test_bytes_of_a_file_are_that_file(tmp_path):
    soundfile.write(tmp_path / "a.flac", WAVE, RATE)
    data = (tmp_path / "a.flac").read_bytes()
    stored = DialoguesInMemory.check([record(data)], tmp_path / "new/data", "train")
    stored.write()
    (file,) = (tmp_path / "new/data/audio").iterdir()
    assert file.suffix == ".flac" and file.read_bytes() == data


def test_a_file_stays_where_it_is(tmp_path):
    soundfile.write(tmp_path / "a.wav", WAVE, RATE)
    stored = DialoguesInMemory.check([record(str(tmp_path / "a.wav"))], tmp_path / "data", "train")
    stored.write()
    assert stored.folders == {str(tmp_path)} and list((tmp_path / "data/audio").iterdir()) == []
    assert read_dialogues(stored.path, data_root=tmp_path)[0].clips[0].path == str(tmp_path / "a.wav")


def test_equal_dialogues_are_equal_files_and_others_are_beside_them(tmp_path):
    first = DialoguesInMemory.check([record(array(WAVE))], tmp_path, "train")
    first.write()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "audio").iterdir()}
    again = DialoguesInMemory.check([record(array(WAVE.copy()))], tmp_path, "train")
    again.write()
    other = DialoguesInMemory.check([record(array(WAVE), id="b")], tmp_path, "train")
    other.write()
    assert again.path == first.path != other.path and first.path.is_file() and other.path.is_file()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "audio").iterdir()} == before


class Lazy:
    """Dialogues that are made when they are asked for, as a data set on disk has them."""

    def __init__(self):
        self.made = 0

    def __len__(self):
        return 2

    def __iter__(self):
        for n in range(2):
            self.made += 1
            yield record(array(tone(200 + n, 0.1)))


def test_dialogues_with_a_length_are_read_again_rather_than_kept(tmp_path):
    lazy = Lazy()
    stored = DialoguesInMemory.check(lazy, tmp_path, "train")
    assert lazy.made == 2 and not list(tmp_path.iterdir())
    stored.write()
    assert lazy.made == 4 and len(read_dialogues(stored.path)) == 2


def test_everything_else_of_a_dialogue_is_kept_in_readable_text(tmp_path):
    messages = [
        {"role": "system", "content": "简短"},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "add", "loss": False},
        {"role": "user", "content": "2+2?", "kind": "sum"},
        {"role": "assistant", "content": "4"},
    ]
    given = {"id": 7, "messages": messages}
    stored = DialoguesInMemory.check([given], tmp_path, "train")
    stored.write()
    (dialogue,) = read_dialogues(stored.path)
    assert (dialogue.id, dialogue.messages) == ("7", parse_own(given, "memory").messages)
    assert "简短" in stored.path.read_text(encoding="utf-8") and json.loads(stored.text)["id"] == "7"


def test_keys_that_are_not_used_are_named(tmp_path):
    stored = DialoguesInMemory.check([record(array(WAVE), speaker="ann")], tmp_path, "train")
    assert stored.notes == ["dialogues with the key `speaker`, which is not used: 1; first at train:1"]


class Once(list):
    """Has a length and can be read once, as tqdm around a generator."""

    def __iter__(self):
        while self:
            yield self.pop(0)


class DrawnAnew(list):
    def __iter__(self):
        return (record(array(WAVE * np.random.uniform(0.5, 1))) for _ in range(len(self)))


@pytest.mark.parametrize("kind", [Once, DrawnAnew])
def test_sound_that_is_gone_at_the_second_reading_is_named(tmp_path, kind):
    stored = DialoguesInMemory.check(kind([record(array(WAVE)), record(array(WAVE / 2))]), tmp_path, "train")
    with pytest.raises(DataError, match=r"train: 2 of 2 sounds were not there .* give a list"):
        stored.write()
    assert not stored.path.exists() and list((tmp_path / "audio").iterdir()) == []
