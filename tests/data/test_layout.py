"""A row is laid out before its audio is decoded, as it is with it."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from qwhisper.data import dialogue_audio, lengths
from qwhisper.data.audio import load_audio
from qwhisper.data.dialogue import AudioClip
from qwhisper.data.dialogue_audio import DialogueAudio
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.lengths import ClipLengths
from qwhisper.data.rows import Layout, Sample
from qwhisper.errors import DataError
from tests.data.conftest import dialogue_of, reply, user
from tests.data.drawn import PROPERTY, any_dialogue


def same_row(layout: Layout, sample: Sample) -> bool:
    """Whether a layout has the ids, labels and spans of a sample, as its teacher has."""
    if layout.teacher is not None or sample.teacher is not None:
        assert same_row(layout.teacher, sample.teacher)
    assert layout.input_ids.tolist() == sample.input_ids.tolist()
    assert layout.labels.tolist() == sample.labels.tolist()
    assert (layout.answer_spans, layout.events) == (sample.answer_spans, sample.events)
    return layout.num_supervised == sample.num_supervised


@pytest.fixture(scope="session")
def laying_out(frames, qwen3_tokenizer):
    """By train_on and max_length; with teachers."""
    return {
        (train_on, max_length): DialogueEncoder(
            qwen3_tokenizer, frames, audio_token_id=151669, train_on=train_on, max_length=max_length, teach=True
        )
        for train_on in ("assistant", "last", "all")
        for max_length in (None, 60, 130)
    }


@settings(PROPERTY, max_examples=30)
@given(data=st.data())
def test_layout_without_any_decode_is_that_of_the_sample(laying_out, recordings, frames, data):
    encoder = laying_out[data.draw(st.sampled_from(sorted(laying_out, key=str)))]
    dialogue = data.draw(any_dialogue(recordings, reasoning=True))
    typed = [
        replace(m, content=tuple(replace(p, transcript="x y") if isinstance(p, AudioClip) else p for p in m.content))
        for m in dialogue.messages
    ]
    dialogue = data.draw(st.sampled_from([dialogue, replace(dialogue, messages=tuple(typed))]))
    with pytest.MonkeyPatch.context() as patch:
        for module in (lengths, dialogue_audio):
            patch.setattr(module, "load_clip", lambda *_, **__: pytest.fail("decoded"))
        try:
            layouts = encoder.layout_rows(dialogue, ClipLengths())
            whole = encoder.layout(dialogue, ClipLengths())
        except DataError as error:
            layouts, refused = [], error
    if not layouts:
        with pytest.raises(type(refused)) as raised:
            [encoder.encode_rows(dialogue), encoder.encode(dialogue)]
        assert str(raised.value) == str(refused)
        return
    samples = encoder.encode_rows(dialogue)
    assert len(layouts) == len(samples)
    for layout, sample in zip([*layouts, whole], [*samples, encoder.encode(dialogue)], strict=True):
        assert same_row(layout, sample)
        is_audio = np.zeros(len(layout.input_ids), dtype=bool)
        for slot in layout.slots:
            is_audio[slot.start : slot.start + frames.num_tokens(slot.num_samples)] = True
        assert is_audio.tolist() == (layout.input_ids == 151669).tolist()
        heard = [length for slot in layout.slots for length in frames.window_lengths(slot.num_samples)]
        assert heard == [len(window) for window in sample.windows]
        assert layout.audio_samples == sum(len(load_audio(slot.clip.path)) for slot in layout.slots)
        later = encoder.add_audio(layout)
        assert same_row(layout, later) and later.notes == sample.notes
        for mine, expected in zip(later.windows, sample.windows, strict=True):
            np.testing.assert_array_equal(mine, expected)


def test_row_whose_clip_has_another_length_is_laid_out_again_and_says_so(encoders, recordings):
    encoder, clip = encoders["qwen3"], AudioClip(str(recordings[1]))
    dialogue = dialogue_of(user(clip, "Hm?", clip), reply("Yes."))
    layout = encoder.layout(dialogue, lambda clips: [9_000] * len(clips))
    sample, expected = encoder.add_audio(layout), encoder.encode(dialogue)
    assert len(layout.input_ids) > len(expected.input_ids)
    assert sample.input_ids.tolist() == expected.input_ids.tolist()
    assert sample.labels.tolist() == expected.labels.tolist()
    assert list(map(len, sample.windows)) == list(map(len, expected.windows))
    assert sample.events == [f"laid out again: {clip.path} has 6400 samples at 16 kHz, and was laid out with 9000"]
    assert expected.events == []


def test_every_row_of_a_dialogue_comes_from_one_decode_of_each_clip(encoders, recordings, monkeypatch):
    clips = [AudioClip(str(path)) for path in recordings]
    dialogue = dialogue_of(
        user(clips[0]), reply("1", "hm"), user(clips[1], clips[0]), reply("2", "hm"), user(clips[2]), reply("3", "hm")
    )
    decoded, load = [], dialogue_audio.load_clip
    monkeypatch.setattr(dialogue_audio, "load_clip", lambda clip, **how: decoded.append(clip) or load(clip, **how))
    rows = encoders["qwen3"].encode_rows(dialogue)
    assert [len(row.windows) for row in rows] == [1, 3, 4] and decoded == clips
    encoders["qwen3"].encode_rows(dialogue, audio := encoders["qwen3"].dialogue_audio())
    encoders["qwen3"].encode(dialogue, audio)
    assert decoded == clips * 2


def test_clip_longer_than_a_row_is_not_decoded_for_its_length(frames, recordings, monkeypatch):
    monkeypatch.setattr(dialogue_audio, "LARGE_FILE", 1_000)
    monkeypatch.setattr(dialogue_audio, "load_clip", lambda *_, **__: pytest.fail("decoded"))
    clip = AudioClip(str(recordings[2]))
    assert DialogueAudio(frames, max_length=8).lengths([clip, clip]) == [16_000, 16_000] == ClipLengths()([clip, clip])


def test_files_whose_headers_lie_are_laid_out_by_what_they_have(encoders, recordings, tmp_path):
    encoder, path = encoders["qwen3"], tmp_path.resolve() / "a.flac"
    soundfile.write(path, soundfile.read(recordings[2])[0], 16_000)
    for claimed in (8_000, 16_100):
        content = bytearray(path.read_bytes())
        content[22:26] = claimed.to_bytes(4, "big")
        path.write_bytes(content)
        dialogue = dialogue_of(user(AudioClip(str(path)), "Hm?"), reply("Yes."))
        sample = encoder.encode(dialogue)
        assert same_row(encoder.layout(dialogue, ClipLengths()), sample) and len(sample.windows[0]) == 16_000 + 4_800
