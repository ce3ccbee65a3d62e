import base64
import json
import shutil

import pytest
import soundfile

from qwhisper.data import leakage
from qwhisper.data.clips import AudioClip
from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.leakage import notes, overlap
from tests.small import tone


def dialogue(identity, audio=None, question="Pitch?", answer="low", **stretch):
    parts = [{"type": "audio", "audio": audio, **stretch}] if audio else []
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages} | ({"id": identity} if identity else {})


@pytest.fixture
def compare(tmp_path):
    """The notes on held-out and training dialogues; four clips of one length, of which b.wav is a copy of a.wav."""
    for name, pitch in {"a": 200, "c": 300, "d": 400}.items():
        soundfile.write(tmp_path / f"{name}.wav", tone(pitch, 3.0), 16_000)
    shutil.copy(tmp_path / "a.wav", tmp_path / "b.wav")

    def write(name, records):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path, read_dialogues(path)

    def compared(held_out, trained):
        found = notes(*write("held.jsonl", held_out), *write("train.jsonl", trained))
        return [note.replace(f"{tmp_path}/", "") for note in found]

    return compared


def test_what_is_apart_is_not_noted(compare):
    held_out = [dialogue("x1", "a.wav"), dialogue(None, question="Hi"), dialogue("7", "d.wav", end=1.0)]
    trained = [dialogue("x2", "c.wav"), dialogue(None, question="Hello"), dialogue("7", "d.wav", start=1.0)]
    assert compare(held_out, trained) == []


def test_the_same_file_is_one_note(compare):
    records = [dialogue("x1", "a.wav")]
    assert compare(records, records) == ["held.jsonl is the training data: its scores say what was learned by heart"]


def test_a_dialogue_is_the_same_under_another_id_and_with_its_audio_under_another_name(compare):
    held_out = [dialogue("x1", "c.wav"), dialogue("x2", "b.wav"), dialogue("x3", question="Hi")]
    trained = [dialogue("y1", "d.wav"), dialogue("y2", "a.wav"), dialogue("y3", question="Hi")]
    assert compare(held_out, trained) == [
        "2 of 3 held-out dialogues are in the training data as they are, the first: held.jsonl:2 (train.jsonl:2)"
    ]


def test_audio_is_the_same_under_another_name_and_with_another_question(compare):
    held_out = [dialogue("x1", "c.wav"), dialogue("x2", "b.wav", "Low?", "yes"), dialogue("x3", "d.wav", end=1.0)]
    trained = [dialogue("y1", "a.wav"), dialogue("y2", "d.wav", start=0.25, end=1.25)]
    assert compare(held_out, trained) == [
        "2 of 3 held-out dialogues have audio that is in the training data, the first: held.jsonl:2 (b.wav is a.wav of "
        "train.jsonl:1)"
    ]


def test_sound_in_the_line_itself_is_compared_as_well(compare, tmp_path):
    sound = base64.b64encode((tmp_path / "a.wav").read_bytes()).decode()
    held_out = [dialogue("x1", f"data:audio/wav;base64,{sound}"), dialogue("x2", "c.wav")]
    assert compare(held_out, [dialogue("y1", "a.wav")]) == [
        "1 of 2 held-out dialogues are in the training data as they are, the first: held.jsonl:1 (train.jsonl:1)"
    ]


def test_an_id_is_noted_unless_it_is_a_number_in_its_file(compare):
    held_out = [dialogue("17", "c.wav"), dialogue("speaker3-17", "c.wav"), dialogue(None, "c.wav")]
    trained = [dialogue("17", "d.wav"), dialogue("speaker3-17", "d.wav"), dialogue(None, "d.wav")]
    assert compare(held_out, trained) == [
        "1 of 3 held-out dialogues have an id that another dialogue of the training data has too, the first: "
        "held.jsonl:2 (id 'speaker3-17', train.jsonl:2)"
    ]


def test_how_much_was_compared_is_said_where_not_all_was(compare, monkeypatch):
    monkeypatch.setattr(leakage, "MAX_FILES_READ", 1)
    found = compare([dialogue("x1", "b.wav")], [dialogue("y1", "d.wav"), dialogue("y2", "a.wav")])
    assert found == [
        "only 1 of 2 training files were compared by their bytes with held-out files of the same size and another name"
    ]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ((None, None), (None, None), True),
        ((5.0, None), (None, None), True),
        ((0.0, 2.0), (2.0, 4.0), False),
        ((0.0, 2.0), (1.9, 4.0), False),
        ((0.0, 2.0), (1.0, 9.0), True),
        ((0.0, 9.0), (4.0, 5.0), True),
    ],
)
def test_overlap(first, second, same):
    assert overlap(AudioClip("a", *first), AudioClip("a", *second)) is same
    assert overlap(AudioClip("a", *second), AudioClip("a", *first)) is same


def test_the_two_speakers_of_a_call_are_not_the_same_audio():
    assert not overlap(AudioClip("a", channel=0), AudioClip("a", channel=1))
    assert overlap(AudioClip("a", channel=0), AudioClip("a"))
