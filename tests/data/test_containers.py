"""Every sample that is there is read, whatever a header claims; what is not there is said. Without FFmpeg."""

import io
import struct

import numpy as np
import pytest
import soundfile

from qwhisper.data import audio
from qwhisper.data.audio import load_audio
from qwhisper.data.mpeg import read_frame
from qwhisper.errors import BadClipError

RATE = 16_000


@pytest.fixture(autouse=True)
def no_ffmpeg(monkeypatch):
    monkeypatch.setattr(audio, "find_ffmpeg", lambda: None)


def chirp(seconds: float, low: float = 200.0, loud: float = 0.5) -> np.ndarray:
    """No two stretches of it are alike: what is left out or repeated shows."""
    t = np.arange(round(seconds * RATE)) / RATE
    return loud * np.sin(2 * np.pi * (low + 40 * t) * t)


def encoded(samples: np.ndarray, container: str, subtype: str | None = None, rate: int = RATE, **how) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype, **how)
    return file.getvalue()


def mp3(samples: np.ndarray) -> bytes:
    """With a variable bit rate, and the Xing header that says so."""
    return encoded(samples, "MP3", bitrate_mode="VARIABLE", compression_level=0.6)


def without_header(content: bytes) -> bytes:
    """An MP3 as written to a pipe: its first frame, which holds the count, is missing."""
    frame = read_frame(content[:4])
    assert content[frame.info_at : frame.info_at + 4] in (b"Xing", b"Info")
    return content[frame.length :]


def similar(heard: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two sounds agree but for a codec's errors."""
    return bool(np.abs(heard - expected).mean() < 0.02)


def patched(content: bytes, offset: int, layout: str, *values: int) -> bytes:
    content = bytearray(content)
    struct.pack_into(layout, content, offset, *values)
    return bytes(content)


SPEECH = np.concatenate([chirp(3.0, loud=0.02), chirp(6.0, 900.0)])  # what begins quietly misleads a guess by bit rate


class TestMpeg:
    def test_variable_bit_rate_without_a_header_is_read_to_its_end(self):
        content = without_header(mp3(SPEECH))
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            assert abs(file.frames - len(SPEECH)) > RATE  # what libsndfile takes for its length
        waveform = load_audio(content)
        assert 0 <= len(waveform) - len(SPEECH) <= 3 * 576
        assert similar(waveform[1105 : len(SPEECH)], SPEECH[: len(SPEECH) - 1105])  # the delay of encoder and decoder

    def test_header_leaves_out_the_delay(self):
        waveform = load_audio(mp3(SPEECH))
        assert len(waveform) == len(SPEECH)
        assert similar(waveform, SPEECH)

    @pytest.mark.parametrize("between", ["nothing", "ID3v2", "ID3v1", "no header"])
    def test_joined_files_are_read_one_after_the_other(self, between):
        first, second = mp3(SPEECH), mp3(chirp(2.0))
        tags = {"ID3v2": b"ID3\x03\0\0\0\0\0\x0a" + bytes(10), "ID3v1": b"TAG" + b"a" * 125}
        expected = np.concatenate([load_audio(first), load_audio(second)])
        if between == "no header":
            first, second = without_header(first), without_header(second)
        waveform = load_audio(first + tags.get(between, b"") + second)
        if between == "no header":
            assert 0 <= len(waveform) - len(expected) <= 6 * 576
        else:
            np.testing.assert_array_equal(waveform, expected)

    def test_joined_files_of_other_rates_and_channels_are_read(self):
        stereo = np.repeat(np.sin(np.arange(44_100) / 9)[:, None] / 2, 2, axis=1)
        other = encoded(stereo, "MP3", rate=44_100)
        waveform = load_audio(mp3(SPEECH) + other)
        np.testing.assert_array_equal(waveform, np.concatenate([load_audio(mp3(SPEECH)), load_audio(other)]))
        assert abs(len(waveform) - len(SPEECH) - RATE) <= 1

    def test_header_that_claims_less_is_not_believed(self):
        content = mp3(SPEECH)
        at = read_frame(content[:4]).info_at + 8
        frames = int.from_bytes(content[at : at + 4], "big")
        assert len(load_audio(patched(content, at, ">I", frames // 2))) == len(SPEECH)

    def test_header_that_claims_more_is_a_file_that_was_cut(self):
        content = mp3(SPEECH)
        with pytest.raises(BadClipError, match=r"cut short, the sound ends at 4\.\d+ s and should go on to 9\.\d+ s"):
            load_audio(content[: len(content) // 2])

    def test_frame_that_was_cut_is_said(self):
        content = without_header(mp3(SPEECH))
        with pytest.raises(BadClipError, match=r"its last frame lacks 10 of \d+ bytes.* up to 9\.\d+ s"):
            load_audio(content[:-10])
        assert len(load_audio(content[:-10], end=8.5)) == 8.5 * RATE

    @pytest.mark.parametrize("header", [True, False])
    def test_stretch_is_the_one_of_the_full_decode(self, header):
        content = mp3(SPEECH) if header else without_header(mp3(SPEECH))
        whole = load_audio(content)
        for start, end in [(0.1, 0.9), (2.7, 3.3), (5.0, 8.0)]:
            np.testing.assert_array_equal(load_audio(content, start, end), whole[int(start * RATE) : int(end * RATE)])

    def test_damage_between_frames_is_skipped_and_said(self):
        content, notes = mp3(SPEECH), []
        half = len(content) // 2
        waveform = load_audio(content[:half] + b"\x01" * 500 + content[half:], notes=notes)
        assert len(waveform) > len(SPEECH) - 3 * 576
        assert notes == [f"skipped {notes[0].split()[1]} bytes that are neither MPEG frames nor tags"]

    def test_mp3_in_a_wav_is_read_by_its_frames(self):
        frames = without_header(mp3(SPEECH))
        form = struct.pack("<HHIIHHH", 0x55, 1, RATE, 2_000, 1, 0, 0)
        chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(frames)) + frames
        np.testing.assert_array_equal(
            load_audio(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks), load_audio(frames)
        )


class TestOgg:
    @pytest.mark.parametrize(("first", "second"), [("VORBIS", "VORBIS"), ("OPUS", "OPUS"), ("VORBIS", "OPUS")])
    def test_chained_streams_are_read_one_after_the_other(self, first, second):
        links = [encoded(SPEECH, "OGG", first), encoded(chirp(2.0), "OGG", second)]
        waveform = load_audio(links[0] + links[1])
        np.testing.assert_array_equal(waveform, np.concatenate([load_audio(link) for link in links]))
        assert abs(len(waveform) - len(SPEECH) - 2 * RATE) <= 2
        assert similar(waveform[: len(SPEECH)], SPEECH)

    def test_one_file_twice_and_another_rate(self):
        link, slow = encoded(chirp(1.0), "OGG", "VORBIS"), encoded(chirp(1.0)[::2], "OGG", "VORBIS", rate=8_000)
        assert len(load_audio(link + link)) == 2 * RATE
        assert abs(len(load_audio(link + slow)) - 2 * RATE) <= 1

    def test_stretch_of_a_chain_is_the_one_of_the_full_decode(self):
        chain = encoded(chirp(1.0), "OGG", "VORBIS") + encoded(chirp(1.5, 500.0), "OGG", "VORBIS")
        whole = load_audio(chain)
        for start, end in [(0.2, 0.9), (0.9, 1.1), (1.2, 2.0), (1.0, 2.5)]:
            np.testing.assert_array_equal(load_audio(chain, start, end), whole[int(start * RATE) : int(end * RATE)])
        with pytest.raises(BadClipError, match=r"nothing from 3 s to 4 s, the file ends at 2\.500 s"):
            load_audio(chain, 3.0, 4.0)

    @pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
    def test_stream_that_was_cut_is_said_and_its_beginning_can_be_used(self, codec):
        content = encoded(np.tile(SPEECH, 2), "OGG", codec)
        cut = content[: len(content) * 4 // 5]
        with pytest.raises(BadClipError, match=r"cut short, its last page .* up to \d+\.\d+ s"):
            load_audio(cut)
        np.testing.assert_array_equal(load_audio(cut, end=2.0), load_audio(content, end=2.0))

    def test_stream_without_an_end_mark_is_used_and_said(self):
        content, notes = encoded(SPEECH, "OGG", "OPUS"), []
        last = content.rindex(b"OggS")
        whole_pages = content[:last]
        assert len(load_audio(whole_pages, notes=notes)) > 4 * RATE
        assert notes == ["its Ogg stream has no end mark: perhaps its recorder was stopped"]


class TestFlac:
    @staticmethod
    def claiming(content: bytes, num_frames: int) -> bytes:
        return patched(content, 21, ">BI", content[21] & 0xF0 | num_frames >> 32, num_frames & 0xFFFFFFFF)

    @pytest.mark.parametrize("claimed", [0, 1_000, 9 * RATE])
    def test_all_of_it_is_read_whatever_the_header_claims(self, claimed):
        content = encoded(SPEECH, "FLAC")
        np.testing.assert_array_equal(load_audio(self.claiming(content, claimed)), load_audio(content))
        np.testing.assert_allclose(load_audio(content), SPEECH, atol=1e-4)

    def test_joined_files_are_read_one_after_the_other(self):
        first, second = encoded(SPEECH, "FLAC"), encoded(chirp(1.0), "FLAC")
        waveform = load_audio(self.claiming(first, 0) + second)
        np.testing.assert_allclose(waveform, np.concatenate([SPEECH, chirp(1.0)]), atol=1e-4)
        np.testing.assert_array_equal(load_audio(first + second, 8.5, 9.5), waveform[int(8.5 * RATE) : int(9.5 * RATE)])

    @pytest.mark.parametrize("behind", [bytes(5_000), np.random.default_rng(0).bytes(5_000), b"TAG" + b"a" * 125])
    def test_what_follows_the_sound_is_left_out(self, behind):
        content = encoded(SPEECH, "FLAC")
        np.testing.assert_array_equal(load_audio(content + behind), load_audio(content))

    @pytest.mark.parametrize("claimed", [0, 9 * RATE])
    def test_file_that_was_cut_says_where_it_ends(self, claimed):
        content = self.claiming(encoded(SPEECH, "FLAC"), claimed)
        says = r"its header claims 9\.000 s" if claimed else "without a length in its header"
        with pytest.raises(BadClipError, match=rf"cut short, the sound ends at about [3-8]\.\d s, .*{says}"):
            load_audio(content[: len(content) * 2 // 3])

    def test_stretch_of_a_header_without_a_length(self):
        content = self.claiming(encoded(SPEECH, "FLAC"), 0)
        np.testing.assert_array_equal(load_audio(content, 4.0, 5.0), load_audio(content)[4 * RATE : 5 * RATE])


class TestRiff:
    WAV = encoded(SPEECH, "WAV", "PCM_16")

    @pytest.mark.parametrize("claimed", [0, 2_000_000_000, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    def test_length_that_a_pipe_can_not_know_is_measured(self, claimed):
        content = patched(patched(self.WAV, 4, "<I", min(claimed + 36, 0xFFFFFFFF)), 40, "<I", claimed)
        np.testing.assert_array_equal(load_audio(content), load_audio(self.WAV))

    @pytest.mark.parametrize(
        ("subtype", "rate"), [("GSM610", 8_000), ("IMA_ADPCM", RATE), ("MS_ADPCM", RATE), ("ULAW", RATE)]
    )
    def test_compressed_wav_from_a_pipe(self, subtype, rate):
        content = encoded(chirp(2.0), "WAV", subtype, rate=rate)
        whole = load_audio(content)
        assert len(whole) >= 2 * RATE * RATE // rate - 800
        at = content.index(b"data") + 4
        for claimed in (0, 0xFFFFFFFF):
            np.testing.assert_array_equal(load_audio(patched(content, at, "<I", claimed)), whole)
        np.testing.assert_allclose(load_audio(content, 0.5, 1.0), whole[RATE // 2 : RATE], atol=0.02)

    def test_rf64_from_a_pipe(self):
        content = encoded(SPEECH, "RF64", "PCM_16")
        np.testing.assert_array_equal(load_audio(content), load_audio(self.WAV))
        piped = patched(content, content.index(b"ds64") + 8, "<QQQ", 0, 0, 0)
        np.testing.assert_array_equal(load_audio(piped), load_audio(self.WAV))

    def test_joined_files_are_read_one_after_the_other(self):
        second = encoded(chirp(1.0), "WAV", "PCM_16")
        piped = patched(self.WAV, 40, "<I", 0xFFFFFFFF)
        for first in (self.WAV, piped):
            np.testing.assert_allclose(load_audio(first + second), np.concatenate([SPEECH, chirp(1.0)]), atol=1e-4)

    def test_claim_of_less_says_what_is_there(self):
        content = patched(self.WAV, 40, "<I", 32_000)
        with pytest.raises(BadClipError, match="claims 32000 bytes of sound, but 256000 more follow that are no chunk"):
            load_audio(content)
        np.testing.assert_array_equal(load_audio(content, end=1.0), load_audio(self.WAV, end=1.0))

    def test_chunks_behind_the_sound_are_none_of_it(self):
        chunk = b"LIST" + struct.pack("<I", 50_000) + bytes(range(200)) * 250
        np.testing.assert_array_equal(load_audio(self.WAV + chunk), load_audio(self.WAV))
        with pytest.raises(BadClipError, match="a second chunk of sound, of 1000 bytes, follows the first"):
            load_audio(self.WAV + b"data" + struct.pack("<I", 1_000) + bytes(range(200)) * 5)

    def test_no_sound_is_empty_and_not_of_unknown_length(self):
        with pytest.raises(BadClipError, match="empty, no samples in it"):
            load_audio(encoded(np.zeros(0), "WAV") + b"LIST" + struct.pack("<I", 4) + b"abcd")


@pytest.mark.parametrize("claimed", [0, 0x7F000008, 0xFFFFFFFF])
def test_aiff_from_a_pipe(claimed):
    content = encoded(SPEECH, "AIFF", "PCM_16")
    at = content.index(b"SSND") + 4
    np.testing.assert_array_equal(load_audio(patched(content, at, ">I", claimed)), load_audio(content))
    with pytest.raises(BadClipError, match="claims 32008 bytes of sound"):
        load_audio(patched(content, at, ">I", 32_008))


def test_au_from_a_pipe():
    content = encoded(SPEECH, "AU", "PCM_16")
    np.testing.assert_array_equal(load_audio(patched(content, 8, ">I", 0xFFFFFFFF)), load_audio(content))
    with pytest.raises(BadClipError, match="claims 32000 bytes of sound"):
        load_audio(patched(content, 8, ">I", 32_000))


@pytest.mark.parametrize("container", ["W64", "CAF", "VOC", "NIST"])
def test_other_containers(container):
    np.testing.assert_allclose(load_audio(encoded(SPEECH, container, "PCM_16")), SPEECH, atol=1e-4)


@pytest.mark.parametrize("container", ["RF64", "W64", "CAF", "VOC", "NIST"])
def test_other_containers_that_were_cut(container):
    content = encoded(SPEECH, container, "PCM_16")
    begins = len(content) - 2 * len(SPEECH) - (container == "VOC")  # VOC ends with a block of one byte
    cut = content[: begins + 160_000]
    with pytest.raises(BadClipError, match=r"cut short, its header claims 2880.. bytes of sound, 1600.. are there"):
        load_audio(cut)
    if container != "CAF":  # of which libsndfile opens none that was cut
        np.testing.assert_allclose(load_audio(cut, end=4.0), SPEECH[: 4 * RATE], atol=1e-4)


def test_w64_from_a_pipe():
    content = encoded(SPEECH, "W64", "PCM_16")
    piped = patched(content, content.index(b"data") + 16, "<Q", 2**63 - 1)
    np.testing.assert_array_equal(load_audio(piped), load_audio(content))


def test_unknown_format_says_what_brings_it():
    with pytest.raises(
        BadClipError, match=r"Format not recognised.*install the program `ffmpeg` or `pip install imageio-"
    ):
        load_audio(b"\0\0\0\x18ftypM4A " + bytes(1_000))
