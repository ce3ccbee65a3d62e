import shutil
import tracemalloc

import numpy as np
import pytest
import soundfile

from qwhisper.data import dialogue_audio
from qwhisper.data.check import check_dataset
from qwhisper.data.clips import AudioClip
from qwhisper.data.dialogue import Dialogue, Message
from qwhisper.data.dialogue_audio import check_dialogue_seconds
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.feature_store import FeatureFolder, FeatureWriter, InMemory
from qwhisper.data.features import FeatureReader, kept
from qwhisper.errors import BadClipError
from qwhisper.frames import FrameArithmetic
from tests.data.test_audio import tone
from tests.small import small_tokenizer

FRAMES = FrameArithmetic()


@pytest.fixture
def clip(tmp_path):
    path = tmp_path.resolve() / "a.wav"
    soundfile.write(path, tone(1.0, 16_000), 16_000)
    return AudioClip(str(path))


@pytest.fixture
def hours(tmp_path):
    """Four hours that are 14 MB of zeros on no disk block."""
    path = tmp_path.resolve() / "hours.wav"
    soundfile.write(path, np.zeros(1), 1_000, subtype="PCM_U8")
    content = bytearray(path.read_bytes())
    content[40:44] = (4 * 3600 * 1_000).to_bytes(4, "little")
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(44 + 4 * 3600 * 1_000)
    return AudioClip(str(path))


def dialogue_of(*clips, source="talk.jsonl:7"):
    return Dialogue("a", (Message("user", (*clips, "Say it.")), Message("assistant", ("Yes.",))), source)


def encoder(**options):
    tokenizer = small_tokenizer()
    return DialogueEncoder(tokenizer, FRAMES, audio_token_id=len(tokenizer), **options)


def test_what_headers_claim_is_refused_before_it_is_decoded(hours):
    tracemalloc.start()
    with pytest.raises(
        BadClipError, match=r"^talk.jsonl:7: 1\.152e\+05 s of audio in 8 clips, .* may have 7200: divide"
    ):
        encoder().encode(dialogue_of(*[hours] * 8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_what_headers_do_not_tell_is_counted_while_it_is_decoded(clip, monkeypatch):
    monkeypatch.setattr(dialogue_audio, "MAX_DIALOGUE_SECONDS", 2.5)
    others = [AudioClip(clip.path, end=end) for end in (0.9, 0.8, 0.7)]
    assert len(encoder().encode(dialogue_of(*others[:3])).windows) == 3
    with pytest.raises(BadClipError, match=r"talk.jsonl:7: .*\(at most 0\.1\)"):
        encoder().encode(dialogue_of(*others, clip))
    with pytest.raises(BadClipError, match=r"talk.jsonl:7: 3 s of audio in 3 clips, and a dialogue may have 2\.5"):
        encoder().encode(dialogue_of(clip, clip, clip))


def test_clip_is_decoded_once_however_often_it_is_heard(clip, monkeypatch):
    calls, load = [], dialogue_audio.load_clip
    monkeypatch.setattr(dialogue_audio, "load_clip", lambda *a, **k: calls.append(a) or load(*a, **k))
    sample = encoder().encode(dialogue_of(clip, clip, AudioClip(clip.path, end=0.5), clip))
    assert len(calls) == 2
    assert [len(window) for window in sample.windows] == [16_000 + FRAMES.silence_samples] * 2 + [
        FRAMES.window_lengths(8_000)[0],
        16_000 + FRAMES.silence_samples,
    ]


def test_clip_that_no_row_has_room_for_is_not_decoded(hours, clip, monkeypatch):
    monkeypatch.setattr(dialogue_audio, "MAX_DIALOGUE_SECONDS", 5 * 3600)
    load = dialogue_audio.load_clip
    monkeypatch.setattr(
        dialogue_audio, "load_clip", lambda c, **k: load(c, **k) if c == clip else pytest.fail("decoded")
    )
    with pytest.raises(BadClipError, match="180000 tokens of audio and the reply do not fit into max_length"):
        encoder(max_length=200).encode(dialogue_of(hours))
    messages = (*dialogue_of(clip).messages, *dialogue_of(hours).messages)
    sample = encoder(max_length=200).encode(Dialogue("a", messages, "talk"))
    assert len(sample.windows) == 1
    assert sample.events[0].startswith("cut to 1 of 2 turns")


def test_running_out_of_memory_names_the_dialogue(clip, monkeypatch):
    def run_out(*_):
        raise MemoryError

    monkeypatch.setattr(dialogue_audio, "clip_windows", run_out)
    made = encoder()
    with pytest.raises(BadClipError, match=r"^talk.jsonl:7: out of memory while it was read, with 2 clips"):
        made.encode(dialogue_of(clip, clip))


def test_data_check_says_the_same(hours, clip, tmp_path):
    part = '{"type": "audio", "audio": "hours.wav"}'
    line = '{"id": "%s", "messages": [{"role": "user", "content": [%s]}, {"role": "assistant", "content": "Yes."}]}'
    path = tmp_path.resolve() / "talk.jsonl"
    path.write_text("\n".join([line % ("a", ", ".join([part] * 8)), line % ("b", part.replace("hours", "a"))]))
    report = check_dataset(path)
    assert report["bad_clips"] == [
        f"{path}:1: 1.152e+05 s of audio in 8 clips, and a dialogue may have 7200: divide it, or choose stretches with "
        "`start` and `end`"
    ]
    assert not report["ok"]


def test_how_a_clip_was_read_is_said_by_sample_and_check(tmp_path):
    path = tmp_path.resolve() / "b.wav"
    soundfile.write(path, np.stack([tone(0.5, 16_000), -tone(0.5, 16_000)], axis=1), 16_000)
    said = f"{path}: its channels cancel each other in their mean: channel 0 alone is read"
    sample = encoder().encode(dialogue_of(AudioClip(str(path)), AudioClip(str(path))))
    assert (sample.notes, sample.events) == ([said], [])
    (tmp_path / "t.jsonl").write_text(
        '{"messages": [{"role": "user", "content": [{"type": "audio", "audio": "b.wav"}]}, '
        '{"role": "assistant", "content": "Yes."}]}'
    )
    report = check_dataset(tmp_path / "t.jsonl")
    assert report["notes"] == [f"{tmp_path / 't.jsonl'}:1: {said}"]
    assert report["ok"]


def test_cached_notes_name_the_clip_of_the_dialogue_and_not_the_first_one_with_its_bytes(tmp_path):
    first, second = (tmp_path.resolve() / name for name in ("a.wav", "b.wav"))
    soundfile.write(first, np.stack([tone(0.5, 16_000), -tone(0.5, 16_000)], axis=1), 16_000)
    shutil.copy(first, second)
    found = FeatureFolder(tmp_path / "cache", 2, "fp16")
    caching, said = encoder().with_features(FeatureReader(found, FRAMES, b"")), "its channels cancel each other in"
    sample = caching.encode(dialogue_of(AudioClip(str(first))))
    assert [note.split(" their ")[0] for note in sample.notes] == [f"{first}: {said}"]
    (clip,) = sample.uncached
    count = sum(frames for _, frames in kept(clip.num_samples, FRAMES))
    writer = FeatureWriter(found)
    writer.append(clip.missing.key, clip.num_samples, InMemory(np.zeros((count, 2), dtype=np.float16)), clip.notes)
    writer.close()
    again = caching.encode(dialogue_of(AudioClip(str(second))))
    assert not again.uncached and [note.split(" their ")[0] for note in again.notes] == [f"{second}: {said}"]


def test_bound_is_the_sum():
    check_dialogue_seconds([3_600.0, 3_600.0])
    with pytest.raises(BadClipError):
        check_dialogue_seconds([3_600.0, 3_600.5])
