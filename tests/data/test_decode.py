"""What only FFmpeg reads: through the program, from the open file, and from nothing else."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from qwhisper.data import audio, decode
from qwhisper.data.audio import load_audio
from qwhisper.errors import BadClipError
from tests.data.test_audio import tone

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the program ffmpeg is not there")


def ffmpeg(*arguments) -> None:
    subprocess.run(["ffmpeg", "-nostdin", "-loglevel", "error", "-y", *map(str, arguments)], check=True)


@pytest.fixture
def wav(tmp_path):
    path = tmp_path / "two.wav"
    soundfile.write(path, np.stack([tone(2.0, 16_000), 0.5 * tone(2.0, 16_000, 1000.0)], axis=1), 16_000)
    return path


@needs_ffmpeg
@pytest.mark.parametrize("name", ["a.m4a", "a.aac", "a.webm", "a.wma", "a.mkv"])
def test_what_phones_and_browsers_write_is_read(tmp_path, wav, name):
    path = tmp_path / name
    ffmpeg("-i", wav, path)
    waveform = load_audio(path)
    assert abs(len(waveform) - 32_000) < 3_000  # a codec's padding
    assert np.abs(np.fft.rfft(waveform[:16_000])).argmax() == 440
    assert np.abs(np.fft.rfft(load_audio(path, channel=1)[:16_000])).argmax() == 1000
    stretch = load_audio(path.read_bytes(), 0.5, 1.5)
    np.testing.assert_allclose(stretch[500:-500], waveform[8_500:23_500], atol=1e-3)  # Opus is resampled


@needs_ffmpeg
def test_lossless_m4a_gives_the_very_samples_and_a_cut_one_a_reason(tmp_path, wav):
    path = tmp_path / "a.m4a"
    ffmpeg("-i", wav, "-c:a", "alac", "-movflags", "+faststart", path)
    np.testing.assert_array_equal(load_audio(path), load_audio(wav))
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(BadClipError, match="FFmpeg: "):
        load_audio(path)


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["m3u8", "concat"])
@pytest.mark.parametrize("suffix", [".m4a", ".m3u8"])
def test_playlist_makes_no_other_file_be_read(tmp_path, wav, kind, suffix):
    path = tmp_path / f"list{suffix}"
    lists = {
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{wav}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{wav}'\n",
    }
    path.write_text(lists[kind])
    with pytest.raises(BadClipError, match="a playlist, or another format that names further files"):
        load_audio(path)


@needs_ffmpeg
def test_second_track_is_said(tmp_path, wav):
    path, notes = tmp_path / "two.mka", []
    ffmpeg("-i", wav, "-i", wav, "-map", "0", "-map", "1", path)
    load_audio(path, notes=notes)
    assert notes == ["the first of its 2 audio tracks is read"]


def test_without_ffmpeg_the_message_says_what_brings_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    (tmp_path / "a.webm").write_bytes(b"\x1aE\xdf\xa3" + bytes(1_000))
    with pytest.raises(BadClipError, match="install the program `ffmpeg` or `pip install imageio-ffmpeg`"):
        load_audio(tmp_path / "a.webm")


class Program:
    """Stands in for ffmpeg: a script."""

    def __init__(self, folder, monkeypatch):
        self.path = folder / "ffmpeg"
        monkeypatch.setattr(audio, "find_ffmpeg", lambda: str(self.path))

    def does(self, script: str) -> None:
        self.path.write_text(f"#!{sys.executable}\nimport json, os, signal, struct, sys, time\n{script}")
        self.path.chmod(0o700)


@pytest.fixture
def program(tmp_path, monkeypatch):
    return Program(tmp_path, monkeypatch)


AU = "out = sys.stdout.buffer; out.write(struct.pack('>4s5I', b'.snd', 24, 0xFFFFFFFF, 6, 16000, 1))\n"


def test_program_that_stalls_is_ended(tmp_path, monkeypatch, program):
    monkeypatch.setattr(decode, "STALLED_SECONDS", 0.2)
    program.does(
        f"with open({str(tmp_path / 'pid')!r}, 'w') as f: f.write(str(os.getpid()))\n{AU}out.flush()\nsignal.pause()"
    )
    with pytest.raises(BadClipError, match=r"FFmpeg: no sound for 0\.2 s"):
        load_audio(b"something")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_endless_sound_is_stopped(program):
    program.does(AU + "block = struct.pack('>f', 0.1) * 2**18\nwhile True: out.write(block)")
    with pytest.raises(BadClipError, match=r"goes on after \S+ s .*\(at most 20 s"):
        load_audio(b"something", at_most_s=20)


def test_error_of_the_program_is_no_end(program):
    program.does(AU + "out.write(struct.pack('>f', 0.1) * 16000); out.flush()\nsys.exit('[aac @ 0x1] [error] bad')")
    with pytest.raises(BadClipError, match="FFmpeg: bad"):
        load_audio(b"something")


def test_program_gets_the_open_file_and_no_network(tmp_path, program):
    program.does(f"json.dump(sys.argv[1:], open({str(tmp_path / 'arguments')!r}, 'w'))")
    with pytest.raises(BadClipError, match="no sound in it"):
        load_audio(b"something; touch ran")
    arguments = json.loads((tmp_path / "arguments").read_text())
    assert arguments[arguments.index("-protocol_whitelist") + 1] == "file,pipe"
    assert arguments[arguments.index("-i") + 1].startswith("/proc/self/fd/")
    demuxers = arguments[arguments.index("-format_whitelist") + 1].split(",")
    assert not {"hls", "concat", "dash", "sdp", "image2", "lavfi", "tedcaptions"} & set(demuxers)
