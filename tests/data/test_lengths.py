import os
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwhisper.data import lengths
from qwhisper.data.audio import TooLongError, claimed_seconds
from qwhisper.data.clips import AudioClip, load_clip
from qwhisper.data.lengths import ClipLengths, exact_length, length_by_header
from qwhisper.data.waveform import sound_of_bytes
from qwhisper.data.windows import clip_windows
from qwhisper.errors import BadClipError
from qwhisper.frames import FrameArithmetic
from tests.data.test_containers import encoded, patched

RATES = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000)
FRAMES = FrameArithmetic(lead_silence_s=0.1, tail_silence_s=0.2)
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * 48_000)


def in_memory(content: bytes, **stretch) -> AudioClip:
    return AudioClip("", **stretch, sound=sound_of_bytes(content, "here"))


@pytest.mark.parametrize("container", ["WAV", "FLAC"])
@pytest.mark.parametrize("rate", RATES)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_header_alone_tells_what_a_decoded_clip_has(rate, container, data):
    num_frames = data.draw(st.integers(100, 3 * rate))
    seconds = num_frames / rate
    start = data.draw(st.one_of(st.none(), st.floats(0.0, 0.5 * seconds)))
    end = data.draw(st.one_of(st.none(), st.floats(0.6 * seconds, seconds + 0.09)))
    clip = in_memory(encoded(NOISE[:num_frames], container, rate=rate), start=start, end=end)
    waveform = load_clip(clip)
    assert exact_length(clip) == len(waveform)
    if start is None and end is None:
        assert len(waveform) == -(-num_frames * 16_000 // rate)
    placeholders = sum(FRAMES.window_tokens(len(window)) for window in clip_windows(waveform, FRAMES))
    assert FRAMES.num_tokens(exact_length(clip)) == placeholders


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("container", ["WAV", "WAVEX"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_plain_wav_is_exact(container, subtype, channels):
    clip = in_memory(encoded(NOISE[: 1_001 * channels].reshape(-1, channels), container, subtype, 11_025))
    assert exact_length(clip) == len(load_clip(clip)) == 1_453


def test_a_file_on_disk_is_exact_too_and_a_link_is_not_followed(tmp_path):
    path = tmp_path.resolve() / "a.flac"
    path.write_bytes(encoded(NOISE[:44_100], "FLAC", rate=44_100))
    assert exact_length(AudioClip(str(path), 0.25, 0.75)) == 8_000
    path.with_name("link.flac").symlink_to(path)
    assert exact_length(AudioClip(str(path.with_name("link.flac")))) is None


WAV = encoded(NOISE[:16_000], "WAV")
FLAC = encoded(NOISE[:16_000], "FLAC")
UNSURE = {
    "MP3": encoded(NOISE[:16_000], "MP3"),
    "Ogg": encoded(NOISE[:16_000], "OGG"),
    "AIFF": encoded(NOISE[:16_000], "AIFF"),
    "a law": encoded(NOISE[:16_000], "WAV", "ALAW"),
    "written to a pipe": patched(WAV, 40, "<I", 0xFFFFFFFF),
    "joined WAV": WAV + WAV,
    "joined FLAC": FLAC + FLAC,
    "FLAC that claims less": patched(FLAC, 22, ">I", 12_000),
    "FLAC that claims a little more": patched(FLAC, 22, ">I", 16_100),
    "FLAC without a length": FLAC[:21] + bytes([FLAC[21] & 0xF0, 0, 0, 0, 0]) + FLAC[26:],
}


@pytest.mark.parametrize("content", UNSURE.values(), ids=UNSURE)
def test_where_a_header_gives_an_estimate_the_clip_is_decoded_once(content, monkeypatch):
    decoded, load = [], lengths.load_clip
    monkeypatch.setattr(lengths, "load_clip", lambda *args, **options: decoded.append(1) or load(*args, **options))
    clip, index = in_memory(content), ClipLengths()
    assert exact_length(clip) is None
    assert index([clip, clip]) == index([clip]) * 2 == [len(load(clip))] * 2
    assert decoded == [1]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("num_frames", [1, 191, 4_096, 4_097, 200_000, 600_000])
def test_last_frame_of_a_flac_file_is_found(num_frames, channels):
    noise = np.random.default_rng(num_frames).uniform(-0.5, 0.5, (num_frames, channels))
    tag = b"TAG" + bytes(125)
    for content in (encoded(noise, "FLAC", rate=16_000), encoded(noise, "FLAC", "PCM_24") + tag):
        assert exact_length(in_memory(content)) == num_frames
        half = exact_length(in_memory(content[: len(content) // 2]))
        assert half is None or num_frames <= 4_096  # what is cut within its only frame shows when it is decoded


def test_a_file_that_was_cut_is_not_believed():
    assert exact_length(in_memory(WAV[: len(WAV) // 2])) is None
    with pytest.raises(BadClipError, match=r"cut short, the sound ends at 0\.499 s and should go on to 1\.000 s"):
        ClipLengths()([in_memory(WAV[: len(WAV) // 2])])
    assert exact_length(in_memory(b"RIFF" + struct.pack("<I", 4) + b"WAVE")) is None
    assert exact_length(in_memory(encoded(np.zeros(0), "WAV"))) is None
    assert exact_length(in_memory(patched(WAV, 32, "<H", 3))) is None  # a frame of 3 bytes


def test_a_length_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path.resolve() / "a.mp3"
    path.write_bytes(UNSURE["MP3"])
    decoded, load = [], lengths.load_clip
    monkeypatch.setattr(lengths, "load_clip", lambda clip, **options: decoded.append(clip) or load(clip, **options))
    clip, part, index = AudioClip(str(path)), AudioClip(str(path), end=0.5), ClipLengths()
    before = index([clip, part, clip])
    assert index([part, clip]) == before[1::-1] and decoded == [clip, part]
    changed = os.stat(path).st_mtime_ns + 10**9
    os.utime(path, ns=(changed, changed))
    assert index([clip]) == before[:1] and decoded == [clip, part, clip]
    path.write_bytes(encoded(NOISE[:32_000], "MP3"))
    os.utime(path, ns=(changed, changed))  # another size alone
    assert index([clip])[0] > before[0] and len(decoded) == 4


def test_index_refuses_what_a_dialogue_may_not_have(monkeypatch):
    monkeypatch.setattr("qwhisper.data.dialogue_audio.MAX_DIALOGUE_SECONDS", 2.5)
    with pytest.raises(TooLongError, match=r"3 s of audio in 3 clips, and a dialogue may have 2\.5: divide it"):
        ClipLengths()([in_memory(WAV)] * 3)


@pytest.mark.parametrize("kind", UNSURE)
def test_a_length_without_decoding_is_exact_or_what_the_header_claims(kind, monkeypatch):
    monkeypatch.setattr(lengths, "load_clip", None)
    assert length_by_header(in_memory(WAV)) == 16_000
    assert length_by_header(in_memory(WAV, start=0.25, end=0.75)) == 8_000
    unsure = in_memory(UNSURE[kind])
    claimed = claimed_seconds(unsure.source, None, None, follow_links=False)
    assert exact_length(unsure) is None and length_by_header(unsure) == round(16_000 * claimed)
    assert length_by_header(AudioClip("/no/such.wav")) == 0


def test_missing_file_is_named():
    with pytest.raises(BadClipError, match=r"/no/such\.wav does not exist"):
        ClipLengths()([AudioClip("/no/such.wav")])
