import pickle

import numpy as np
import pytest
import soundfile

from qwhisper.data import dialogue_audio, held_out
from qwhisper.data.clips import AudioClip
from qwhisper.data.dialogue import Dialogue
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.held_out import hold_out
from qwhisper.data.loader import encode_all
from qwhisper.errors import DataError
from tests.data.conftest import reply, user
from tests.small import small_tokenizer, tone

SECONDS = 3.0


@pytest.fixture
def encoder(frames):
    tokenizer = small_tokenizer()
    return DialogueEncoder(tokenizer, frames, audio_token_id=len(tokenizer))


@pytest.fixture
def dialogues(tmp_path):
    """Twenty of one clip of 3 s each, the last with reasoning in two turns; the third one's clip is silent."""
    found = []
    for n in range(20):
        path = tmp_path.resolve() / f"{n}.wav"
        soundfile.write(path, tone(200 + 10 * n, SECONDS) * (n != 2), 16_000)
        messages = (user(AudioClip(str(path)), "Pitch?"), reply(str(n)))
        if n == 19:
            messages = (user(AudioClip(str(path)), "Pitch?"), reply("1", "hm"), user("Sure?"), reply("2", "ah"))
        found.append(Dialogue(f"d{n}", messages, f"t.jsonl:{n + 1}"))
    return found


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_audio_is_kept_and_portions_are_all_samples(encoder, dialogues, monkeypatch, num_workers):
    expected, rejected = encode_all(dialogues, encoder)
    audio_bytes = sum(window.nbytes for sample in expected for window in sample.windows)
    held, rejections = hold_out(dialogues, encoder, num_workers)
    assert rejections == rejected and [rejection.id for rejection in rejections] == ["d2"]
    assert (len(held), held.num_rows) == (19, 20)
    assert len(pickle.dumps(held.dialogues)) < audio_bytes / 50

    (portion,) = held.portions(num_workers)
    monkeypatch.setattr(held_out, "PORTION_SAMPLES", 5 * SECONDS * 16_000)
    divided = list(held.portions(num_workers))
    assert list(map(len, divided)) == [16, 4]  # what a worker reads at a time isn't divided
    for samples in (portion, [*divided[0], *divided[1]]):
        assert [sample.id for sample in samples] == [sample.id for sample in expected]
        for sample, other in zip(samples, expected, strict=True):
            np.testing.assert_array_equal(sample.labels, other.labels)
            np.testing.assert_array_equal(sample.windows, other.windows)


def test_audio_is_decoded_as_portions_are_asked_for(encoder, dialogues, monkeypatch):
    held, _ = hold_out(dialogues, encoder)
    decoded, load = [], dialogue_audio.load_clip
    monkeypatch.setattr(dialogue_audio, "load_clip", lambda clip, **how: decoded.append(clip) or load(clip, **how))
    monkeypatch.setattr(held_out, "PORTION_SAMPLES", 1)
    portions = held.portions()
    assert decoded == []
    next(portions)
    assert len(decoded) == 16
    next(portions)
    assert len(decoded) == 19  # the rows of one dialogue come from one decode
    assert next(portions, None) is None


def test_a_dialogue_that_is_gone_is_named(encoder, dialogues, tmp_path):
    held, _ = hold_out(dialogues, encoder)
    (tmp_path / "5.wav").unlink()
    with pytest.raises(DataError, match=r"^a held-out dialogue can't be read any more: t\.jsonl:6: .*5\.wav does not"):
        list(held.portions())


def test_a_clip_that_is_another_one_now_is_laid_out_again(encoder, dialogues, tmp_path):
    held, _ = hold_out(dialogues, encoder)
    soundfile.write(tmp_path / "5.wav", tone(300, 1.0), 16_000)
    (samples,) = held.portions()
    now, _ = encode_all(dialogues, encoder)
    assert [sample.input_ids.tolist() for sample in samples] == [sample.input_ids.tolist() for sample in now]
    assert {sample.id: sample.events for sample in samples if sample.events} == {
        "d5": [f"laid out again: {tmp_path.resolve()}/5.wav has 16000 samples at 16 kHz, and was laid out with 48000"]
    }
