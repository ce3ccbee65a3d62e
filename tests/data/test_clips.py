import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from qwhisper.data.audio import load_audio
from qwhisper.data.check import check_dataset
from qwhisper.data.clips import AudioClip, load_clip, own_roots, parse_content, parse_part, read_own_audio
from qwhisper.data.collator import ConversationCollator
from qwhisper.data.dialogue import parse_dialogue, parse_own, read_dialogues, to_record
from qwhisper.errors import BadClipError, DataError
from tests.audio_parts import chirp, parts_of, write_chirp


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_chirp(tmp_path / "a.wav")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(part, roots=None):
    """(what a part is read as, faults, keys that are not used)."""
    faults, unused = [], []
    return parse_part(part, "message 1, part 2", roots or own_roots(), faults, unused), faults, unused


def audio(**keys):
    return {"type": "audio", "audio": "a.wav", **keys}


def record(*parts, answer="One.", **more):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}], **more}


def test_every_form_is_the_same_sound(folder):
    expected = load_audio("a.wav")
    different = {}
    for name, part in parts_of(folder / "a.wav").items():
        clip, faults, _ = read(part)
        if faults or not np.array_equal(load_clip(clip), expected):
            different[name] = faults
    assert different == {}


def test_a_stretch_of_every_form_is_the_same_stretch(folder):
    expected = load_audio("a.wav", 0.25, 0.5)
    stretches = (
        {"start": 0.25, "end": 0.5},
        {"offset": 0.25, "duration": 0.25},
        {"audio_start": 0.25, "audio_end": 0.5},
    )
    different = {}
    for number, (name, part) in enumerate(parts_of(folder / "a.wav").items()):
        part = {key: value for key, value in part.items() if value is not None}
        clip, faults, _ = read(part | stretches[number % 3])
        if faults or not np.array_equal(load_clip(clip), expected):
            different[name] = faults
    assert different == {}


@pytest.mark.parametrize(
    ("keys", "start", "end"),
    [
        ({"offset": 0.5}, 0.5, None),
        ({"duration": 0.5}, None, 0.5),
        ({"start": np.float32(0.25), "end": np.int64(1)}, 0.25, 1.0),
        ({"start": None, "offset": 0.5, "duration": None}, 0.5, None),
        ({"audio_end": 1}, None, 1),
        ({"start": 0}, 0, None),
        ({"start": np.array(0.25), "end": torch.tensor(0.5)}, 0.25, 0.5),
    ],
)
def test_a_stretch_is_taken_in_seconds_by_either_pair_of_keys(folder, keys, start, end):
    clip, faults, _ = read(audio(**keys))
    assert (faults, clip.start, clip.end) == ([], start, end)


def test_a_channel_is_taken_from_files_bytes_and_arrays(folder):
    left, right = chirp(0.3), chirp(0.3)[::-1]
    both = np.stack([left, right], axis=1)
    soundfile.write("two.wav", both, 16_000, subtype="FLOAT")
    data = Path("two.wav").read_bytes()
    for source in ({"audio": "two.wav"}, {"audio": data}, {"audio": both.T, "sampling_rate": 16_000}):
        for channel, expected in ((np.int64(0), left), (1, right)):
            clip, faults, _ = read({"type": "audio", "channel": channel, **source})
            assert faults == []
            np.testing.assert_array_equal(load_clip(clip), expected)
        clip, _, _ = read({"type": "audio", "channel_selector": 2, **source})
        with pytest.raises(BadClipError, match="2"):
            load_clip(clip)


@pytest.mark.parametrize(
    "part",
    [
        "Hi",
        {"type": "text", "text": "Hi"},
        {"type": "input_text", "text": "Hi"},
        {"type": "output_text", "text": "Hi", "audio": None, "start": None},
        {"text": "Hi"},
    ],
)
def test_every_form_of_text_is_read(part):
    assert read(part) == ("Hi", [], [])


REFUSED = {
    "no source": ({"type": "audio"}, "audio placeholder without audio"),
    "empty source": (audio(audio=""), "audio placeholder without audio"),
    "source that is None": (audio(audio=None), "audio placeholder without audio"),
    "empty object": (audio(audio={}), "`audio` is an object without audio"),
    "object in an object": (audio(audio={"url": {"url": "a.wav"}}), "`audio` is an object without audio"),
    "object without data": ({"type": "input_audio", "input_audio": {"format": "wav"}}, "`input_audio` is an object"),
    "two sources": (audio(url="b.wav"), "`audio` and `url` are two sources"),
    "two sources in one": (audio(audio={"url": "a.wav", "data": "UklGR"}), "`url` and `data` are two sources"),
    "key given twice": (audio(audio={"array": [0.1], "sr": 8000}, sr=1), "beside `audio` and inside it"),
    "http": (audio(audio="https://host/a.wav"), "'https://host/a.wav' is not a local file, and nothing is downloaded"),
    "s3": (audio(audio="s3://bucket/a.wav"), "nothing is downloaded: download it"),
    "http under data": ({"input_audio": {"data": "http://host/a.wav"}}, "nothing is downloaded"),
    "no such file": (audio(audio="gone.wav"), "audio file 'gone.wav' does not exist"),
    "no such file by URL": (audio(audio="file:///gone.wav"), "'file:///gone.wav' does not exist"),
    "pipe": (audio(audio="cat a.wav |"), "Kaldi pipe"),
    "number": (audio(audio=7), "`audio` is of type int"),
    "no base64": ({"input_audio": {"data": "a.wav"}}, "`data` is not the base64"),
    "integers": (audio(audio=[1, 2, 3]), "`audio` has samples of type int64"),
    "rate text": (audio(audio=[0.1, 0.2], sampling_rate="8k"), "`audio` has the sampling rate 8k"),
    "two rates": (audio(audio=([0.1, 0.2], 8000), sampling_rate=16_000), "two sampling rates, 8000 and 16000"),
    "both stretches": (audio(start=0, offset=1), "`start`, `offset` give the stretch twice"),
    "start and duration": (audio(start=0, duration=1), "`start`, `duration` give the stretch twice"),
    "duration 0": (audio(duration=0), "offset None and duration 0 must be seconds"),
    "offset text": (audio(offset="1"), "must be seconds with 0 <= offset"),
    "offset true": (audio(offset=True), "must be seconds with 0 <= offset"),
    "start NaN": (audio(start=float("nan")), "must be seconds with 0 <= start < end"),
    "start huge": (audio(start=10**400), "must be seconds with 0 <= start < end"),
    "channel text": (audio(channel="left"), "`channel` must be one whole number"),
    "channel below 0": (audio(channel=-1), "`channel` must be one whole number"),
    "channel list": (audio(channel=[0]), "`channel` must be one whole number"),
    "channel true": (audio(channel=True), "`channel` must be one whole number"),
    "misspelled start": (audio(strat=1), "unknown key `strat`; did you mean `start`?"),
    "misspelled transcript": (audio(trainscript="x"), "unknown key `trainscript`; did you mean `transcript`?"),
    "misspelled rate": (audio(audio=[0.1], samplingRate=8000), "did you mean `sampling_rate`?"),
    "transcript of another type": (audio(transcript=7), "`transcript` must be a text"),
    "text in audio": (audio(text="seven"), "`text` in an audio part; write `transcript`"),
    "audio in text": ({"type": "text", "text": "Hi", "audio": "a.wav"}, "`audio` in a text part"),
    "start in text": ({"type": "text", "text": "Hi", "start": 1}, "`start` in a text part"),
    "text that is none": ({"type": "text", "text": 7}, "`text` must be a text, not int"),
    "image": ({"type": "image_url", "image_url": {"url": "a.png"}}, "nor an audio part (type 'image_url')"),
    "no type": ({"image": "a.png"}, "neither a text nor an audio part (type None)"),
    "type of another type": ({"type": ["audio"], "audio": "a.wav"}, "neither a text nor an audio part"),
    "no part": (7, "neither a text nor an audio part (int)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_part_that_cannot_be_read_is_named(folder, name):
    part, sentence = REFUSED[name]
    _, faults, _ = read(part)
    assert faults and all(fault.startswith("message 1, part 2: ") for fault in faults)
    assert sentence in "\n".join(faults)


def test_metadata_is_noted_as_not_used(folder):
    clip, faults, unused = read(audio(speaker="f1", language="en", sampling_rate=8000, format="wav", gender=None))
    assert faults == [] and clip.path == str(folder / "a.wav")
    assert sorted(unused) == [f"`{key}` in a part" for key in ("language", "sampling_rate", "speaker")]


def test_a_file_of_dialogues_reads_nothing_outside_its_folder_in_any_form(folder):
    inside = folder / "data"
    inside.mkdir()
    for part in (audio(audio="../a.wav"), {"audio": (folder / "a.wav").as_uri()}, {"audio_url": {"url": "../a.wav"}}):
        (_, faults, _) = read(part, [inside])
        assert f"lies outside {inside}: move it there or give --data_root" in faults[0]
        assert read(part | {"audio": "../a.wav"} if "audio" in part else part, [inside, folder])[1] == []


def test_a_dialogue_of_datasets_with_tuples_is_read(folder):
    """datasets gives each part the keys of all parts, with None for what it does not have."""
    nothing = dict.fromkeys(("text", "audio", "start", "end", "sampling_rate", "transcript"))
    user = {"role": "user", "kind": None, "content": (
        nothing | {"type": "audio", "audio": {"bytes": None, "path": "a.wav"}, "start": 0.25},
        nothing | {"type": "text", "text": "Which?"},
    )}  # fmt: skip
    answer = {"role": "assistant", "content": (nothing | {"type": "text", "text": "One."},), "reasoning_content": None}
    dialogue = parse_own({"id": None, "messages": (user, answer), "audios": None}, "here")
    assert [message.text for message in dialogue.messages] == ["Which?", "One."]
    np.testing.assert_array_equal(load_clip(dialogue.clips[0]), load_audio("a.wav", 0.25))


def test_sound_in_memory_is_a_key_is_pickled_and_is_named_by_its_place(folder):
    parts = [parts_of(folder / "a.wav")[name] for name in ("bytes", "BytesIO", "datasets: bytes")]
    clips = parse_content(parts, "message 1", own_roots(), [], [])
    assert len(set(clips)) == 1
    again = pickle.loads(pickle.dumps(clips[1]))
    assert again == clips[1] and {clips[1]: "known"}[again] == "known"
    assert clips[1].name == "message 1, part 2, `audio`" and clips[2].name == "message 1, part 3, `bytes`"
    assert AudioClip("/a.wav").name == "/a.wav"
    nan = read_own_audio({"array": np.full(800, np.nan, np.float32)}, "message 3, part 1")
    with pytest.raises(BadClipError, match=r"message 3, part 1, `array`: .*NaN or Inf"):
        load_clip(nan)


def test_forms_that_json_holds_are_read_from_a_file_and_written_into_one(folder):
    forms = {
        name: part for name, part in parts_of(folder / "a.wav").items()
        if is_json(part) and name != "transformers: path"
    }  # fmt: skip
    assert len(forms) > 15
    keys = {"start": 0.25, "end": 0.5, "channel": 0, "transcript": "one"}
    lines = [record({**{k: v for k, v in part.items() if v is not None}, **keys}) for part in forms.values()]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    dialogues = read_dialogues(folder / "data.jsonl")
    expected = load_audio("a.wav", 0.25, 0.5)
    assert all(np.array_equal(load_clip(c.clips[0]), expected) for c in dialogues)
    written = [to_record(dialogue, folder) for dialogue in dialogues]
    again = [parse_dialogue(line, c.source, folder) for line, c in zip(written, dialogues, strict=True)]
    assert again == dialogues
    assert all(part.items() >= keys.items() for line in written for part in line["messages"][0]["content"])
    assert check_dataset(folder / "data.jsonl")["ok"]


def is_json(value) -> bool:
    if isinstance(value, dict | list):
        return all(is_json(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, str | int | float | None) and not isinstance(value, np.generic)


def test_audios_may_be_in_every_form_too(folder):
    parts = parts_of(folder / "a.wav")
    audios = [
        "a.wav",
        parts["datasets: bytes"]["audio"],
        parts["Qwen-Omni: data URL"]["audio"],
        {"path": "a.wav", "end": 0.5},
    ]
    dialogue = parse_own(record("<audio><audio><audio><audio>Which?", audios=audios), "here")
    expected = load_audio("a.wav")
    assert [len(load_clip(clip)) for clip in dialogue.clips] == [*[len(expected)] * 3, 8000]
    with pytest.raises(DataError, match=r"audio 2: audio file 'gone\.wav' does not exist"):
        parse_own(record("<audio><audio>Which?", audios=["a.wav", "gone.wav"]), "here")


def test_a_collator_takes_dicts_with_files_anywhere_and_sets_aside_sound_that_cannot_be_used(
    folder, chatml_tokenizer, frames, monkeypatch
):
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    collator = ConversationCollator(chatml_tokenizer, frames, audio_token_id=len(chatml_tokenizer))
    good = record(audio(audio=str(folder / "a.wav"), end=0.5), "Which?", id="good")
    bad = record(audio(audio=np.full(800, np.nan)), "Which?", id="bad")
    batch = collator([good, bad])
    assert batch["input_ids"].shape[0] == 1 and (
        batch["input_ids"] == len(chatml_tokenizer)
    ).sum() == frames.num_tokens(8000)
    ((identity, reason),) = collator.rejected
    assert identity == "bad" and "message 1, part 1, `audio`: " in reason and "NaN or Inf" in reason
    with pytest.raises(DataError, match=r"good: message 1, part 1: audio file 'a\.wav' does not exist"):
        collator.encoder.encode(record(audio(), "Which?", id="good"))


def test_arrays_of_objects_are_lists_as_pandas_gives_them(folder):
    parts = np.array([audio(end=0.5), {"type": "text", "text": "Which?"}], dtype=object)
    messages = np.array([{"role": "user", "content": parts}, {"role": "assistant", "content": "One."}], dtype=object)
    dialogue = parse_own({"messages": messages}, "here")
    assert dialogue == parse_own({"messages": [messages[0] | {"content": list(parts)}, messages[1]]}, "here")
    assert parse_own(record("<audio>?", audios=np.array(["a.wav"], dtype=object)), "here").clips == (
        AudioClip(str(folder / "a.wav")),
    )


def test_a_persons_own_call_is_warned_of_keys_that_are_not_used(folder):
    with pytest.warns(UserWarning, match="not used: `speaker` in a part"):
        parse_own(record(audio(speaker="f1"), "Which?"), "here")
    with pytest.warns(UserWarning, match="not used: `speaker` in a part"):
        read_own_audio(audio(speaker="f1"), "clip 1")


def test_a_decoder_of_torchcodec_is_an_array_with_its_own_rate(folder):
    """datasets gives one for each entry of an Audio column."""
    decoders = pytest.importorskip("torchcodec.decoders", exc_type=ImportError)
    clip, faults, _ = read(audio(audio=decoders.AudioDecoder("a.wav"), start=0.25))
    assert faults == []
    np.testing.assert_array_equal(load_clip(clip), load_audio("a.wav", 0.25))
