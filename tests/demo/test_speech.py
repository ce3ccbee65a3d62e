import numpy as np
import pytest
import soundfile

from qwhisper.demo import speech
from qwhisper.demo.speech import draw_utterances, speak, write_clips
from qwhisper.errors import UsageError


def fundamental_hz(waveform: np.ndarray) -> float:
    """The strongest period between 70 and 400 Hz in the loudest 100 ms."""
    middle = int(np.argmax(np.convolve(waveform**2, np.ones(1600), "valid")))
    stretch = waveform[middle : middle + 1600]
    correlation = np.correlate(stretch, stretch, "full")[len(stretch) - 1 :]
    return 16_000 / (40 + int(np.argmax(correlation[40:229])))


def test_a_clip_is_16_khz_float32_with_peak_one_half_and_cut_silence():
    waveform = speak("seven", "en-us", "m1", 50, 140)

    assert waveform.dtype == np.float32
    assert 0.25 * 16_000 < len(waveform) < 1.0 * 16_000
    assert np.abs(waveform).max() == pytest.approx(0.5, abs=0.02)
    loud = np.flatnonzero(np.abs(waveform) > 0.02 * np.abs(waveform).max())
    assert loud[0] == pytest.approx(480, abs=480)
    assert len(waveform) - 1 - loud[-1] <= 480


def test_pitch_and_speed_are_heard():
    low, high = (fundamental_hz(speak("one", "en-us", "f1", pitch, 140)) for pitch in (10, 90))
    slow, fast = (len(speak("one", "en-us", "f1", 50, speed)) for speed in (100, 200))

    assert low == pytest.approx(114, rel=0.1)
    assert high > 2 * low
    assert slow > 1.5 * fast


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("one", "en-gb", "f1", 50, 140), "en-gb"),  # a language of espeak-ng without a voice
        (("one", "en-us", "nobody", 50, 140), "nobody"),  # espeak-ng would speak on with the plain voice
        (("one", "en-us", "f1", 100, 140), "pitch 100"),
        (("one", "en-us", "f1", 50, 20), "speed 20"),
        (("", "en-us", "f1", 50, 140), "says nothing"),
    ],
)
def test_what_espeak_lacks_is_refused_by_name(arguments, named):
    with pytest.raises(UsageError, match=named):
        speak(*arguments)


def test_no_voice_setting_is_on_both_sides():
    for train, held_out in (
        (speech.TRAIN_VARIANTS, speech.HELD_OUT_VARIANTS),
        (speech.TRAIN_PITCHES, speech.HELD_OUT_PITCHES),
        (speech.TRAIN_SPEEDS, speech.HELD_OUT_SPEEDS),
    ):
        assert len(set(train)) == len(train)
        assert not set(train) & set(held_out)
    assert len(speech.TRAIN_VARIANTS) == 42
    assert len(speech.HELD_OUT_VARIANTS) == 12


@pytest.mark.parametrize("held_out", [False, True])
def test_every_word_and_variant_is_drawn_equally_often_and_every_voice_exists(held_out):
    variants = speech.HELD_OUT_VARIANTS if held_out else speech.TRAIN_VARIANTS
    utterances = draw_utterances(["zero", "one"], 4 * len(variants), held_out=held_out, seed=1)

    assert [utterances.count(u) for u in utterances].count(1) > len(utterances) // 2
    for variant in variants:
        assert sorted(u.text for u in utterances if u.variant == variant) == ["one", "one", "zero", "zero"]
        first = next(u for u in utterances if u.variant == variant)
        assert len(speak(first.text, first.voice, first.variant, first.pitch, first.speed)) > 1600
    assert utterances == draw_utterances(["zero", "one"], 4 * len(variants), held_out=held_out, seed=1)
    assert utterances != draw_utterances(["zero", "one"], 4 * len(variants), held_out=held_out, seed=2)


def test_the_same_utterances_give_the_same_bytes_in_fresh_processes(tmp_path):
    utterances = draw_utterances(["three", "eight"], 2 * 42, held_out=False, seed=0)[:24]
    first, again = ([tmp_path / f"{run}{n}.wav" for n in range(len(utterances))] for run in "ab")
    write_clips(utterances, first)
    write_clips(utterances, again)

    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, again, strict=True))
    info = soundfile.info(first[0])
    assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
