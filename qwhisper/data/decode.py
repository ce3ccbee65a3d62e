"""Decoders: libsndfile for the formats that it reads, the `ffmpeg` program for others. Both return blocks of frames.

FFmpeg runs as a separate process, so a file that crashes it does not crash this one. It reads a descriptor that is
already open, may use no protocols but files and pipes, and only demuxers that open no further files: a playlist can't
make it read another file.
"""

import io
import os
import re
import selectors
import shutil
import struct
import subprocess
from contextlib import suppress
from typing import Protocol

import numpy as np
import soundfile

from qwhisper.data.containers import Stream, is_unknown
from qwhisper.data.files import BLOCK, Pieces
from qwhisper.errors import BadClipError

# libsndfile reads a cut file as a short one: only its log has the number of bytes that the header claims.
CLAIM = re.compile(r"(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)")
UNKNOWN_FRAMES = 2**62  # libsndfile's value for an unknown length is 2^63 - 1

# Demuxers that read only the one file (no playlists, `concat`, `dash`, image sequences).
DEMUXERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,g722,gsm,loas,matroska,webm,mov,mp3,mpeg,"
    "mpegts,mpc,mpc8,ogg,rm,shn,sox,tak,tta,voc,w64,wav,wv"
)
FFMPEG_SECONDS = 900  # of processor time, for the longest file
STALLED_SECONDS = 60  # without a byte
FFMPEG_MEMORY = 4 * 2**30
LOG_BYTES = 2**16
ERROR = re.compile(r"(?!\[(?:mjpeg|png|h264|hevc|av1|vp[89]|swscaler) )(?:\[[^]]* @ [^]]*\] )?\[(?:error|fatal)\]")


class UnreadableError(BadClipError):
    """FFmpeg can't read it."""


class Decoder(Protocol):
    """An open stream of sound. num_frames: the header's claim, None if unknown."""

    rate: int
    channels: int
    num_frames: int | None
    seeks: bool

    def read(self, num_frames: int) -> np.ndarray:
        """The next frames, float32 [frames, channels]; none at the end."""
        ...

    def seek(self, frame: int) -> int:
        """Go to a frame, or to the end if there are fewer; return the position."""
        ...


class _InOrder(soundfile.SoundFile):
    """soundfile seeks after every read of a seekable file: it fails if the length is unknown, and is inexact in MP3."""

    def seekable(self) -> bool:
        return False


class SndfileDecoder:
    """A stream through libsndfile. Raises LibsndfileError for an unknown format or damaged bytes."""

    def __init__(self, descriptor: int, stream: Stream):
        os.lseek(descriptor, 0, os.SEEK_SET)
        source = descriptor if stream.pieces is None else io.BufferedReader(Pieces(descriptor, stream.pieces), BLOCK)
        self._file = _InOrder(source, closefd=False)
        self.rate, self.channels = self._file.samplerate, self._file.channels
        self.num_frames = self._claimed_frames(stream)
        self.seeks = stream.seeks and super(_InOrder, self._file).seekable() and self._file.frames < UNKNOWN_FRAMES
        self._position = 0
        if stream.skip:
            self._file.read(stream.skip)

    def read(self, num_frames: int) -> np.ndarray:
        left = 0 if self.num_frames is None else self.num_frames - self._position
        if self._position >= self._file.frames:
            return np.empty((0, self.channels), dtype=np.float32)  # libsndfile would fill a block with zeros first
        try:
            block = self._file.read(min(num_frames, left) if left > 0 else num_frames, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:
            if self.num_frames is None or left > 0:
                raise
            return np.empty((0, self.channels), dtype=np.float32)  # the bytes after the sound are not sound
        self._position += len(block)
        return block

    def seek(self, frame: int) -> int:
        self._position = self._file.seek(min(frame, self._file.frames))
        return self._position

    def close(self) -> None:
        self._file.close()

    def _claimed_frames(self, stream: Stream) -> int | None:
        """The length by the header, even if the file is shorter."""
        if stream.num_frames is not None:
            return stream.num_frames
        if self._file.frames >= UNKNOWN_FRAMES:
            return None
        claim = CLAIM.search(self._file.extra_info)
        if claim is None or is_unknown(int(claim[1])):
            return self._file.frames
        return round(self._file.frames * int(claim[1]) / max(int(claim[2]), 1))


def find_ffmpeg() -> str | None:
    """The program on the PATH, or the one from the package imageio-ffmpeg."""
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg
    except ImportError:
        return None
    return imageio_ffmpeg.get_ffmpeg_exe()


class FfmpegDecoder:
    """The first audio track of a file through `ffmpeg`, as an AU stream: 24 bytes of header, then float32.

    Raises UnreadableError if it reports an error, stops early or takes too long.
    """

    num_frames: int | None = None
    seeks = False

    def __init__(self, program: str, descriptor: int, path: str):
        self._path = path
        self._log = b""
        command = [program, "-hide_banner", "-nostdin", "-nostats", "-loglevel", "repeat+level+info"]
        command += ["-protocol_whitelist", "file,pipe", "-format_whitelist", DEMUXERS]
        command += ["-i", f"/proc/self/fd/{descriptor}", "-map", "0:a:0", "-map_metadata", "-1"]
        command += ["-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(descriptor,),
            start_new_session=True,  # Ctrl-C is for the run, which ends this process itself
        )
        try:
            self._limit()
            self._selector = selectors.DefaultSelector()
            for pipe in (self._process.stdout, self._process.stderr):
                assert pipe is not None
                self._selector.register(pipe, selectors.EVENT_READ)
            self._pending = bytearray()
            self._decoded = 0
            self._fill(24)
            if len(self._pending) < 24:
                raise self._fault("no sound in it")
            magic, offset, _, _, self.rate, self.channels = struct.unpack(">4s5I", self._pending[:24])
            if magic != b".snd" or not self.rate or not self.channels:
                raise self._fault("no sound in it")
            self._fill(offset)
            del self._pending[:offset]
        except BaseException:
            self.close()
            raise

    def read(self, num_frames: int) -> np.ndarray:
        width = 4 * self.channels
        self._fill(num_frames * width)
        whole = min(len(self._pending) // width, num_frames)
        block = np.frombuffer(bytes(self._pending[: whole * width]), dtype=">f4").astype(np.float32)
        del self._pending[: whole * width]
        self._decoded += whole
        if whole < num_frames:
            self._check_ended()
        return block.reshape(-1, self.channels)

    def seek(self, frame: int) -> int:
        raise NotImplementedError("FFmpeg's seeks are not exact")

    def notes(self) -> list[str]:
        tracks = len(set(re.findall(rb"Stream #0:(\d+)[^\n]*: Audio:", self._log.partition(b"Output #0")[0])))
        return [f"the first of its {tracks} audio tracks is read"] if tracks > 1 else []

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        if hasattr(self, "_selector"):
            self._selector.close()

    def _limit(self) -> None:
        try:
            import resource

            resource.prlimit(self._process.pid, resource.RLIMIT_CPU, (FFMPEG_SECONDS, FFMPEG_SECONDS))
            resource.prlimit(self._process.pid, resource.RLIMIT_AS, (FFMPEG_MEMORY, FFMPEG_MEMORY))
        except (ImportError, AttributeError, OSError):
            pass  # not on this system, or it has already ended

    def _fill(self, num_bytes: int) -> None:
        """Wait for this many bytes, or for the end."""
        while len(self._pending) < num_bytes and self._selector.get_map():
            ready = self._selector.select(STALLED_SECONDS)
            if not ready:
                raise self._fault(f"no sound for {STALLED_SECONDS} s")
            for key, _ in ready:
                content = os.read(key.fd, 2**20)
                if not content:
                    self._selector.unregister(key.fileobj)
                elif key.fileobj is self._process.stdout:
                    self._pending += content
                elif len(self._log) < LOG_BYTES:
                    self._log += content

    def _check_ended(self) -> None:
        """Check that everything was decoded: without an error, and to about the container's end."""
        self._fill(len(self._pending) + 1)  # the rest of the log
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STALLED_SECONDS)
        seconds, claimed = self._decoded / self.rate, self._claimed_seconds()
        if self._process.returncode != 0 or self._errors():
            reason = next(iter(self._errors()), f"it ended with {self._process.returncode}")
            claim = "" if claimed is None else f", and its header claims {claimed:.3f} s"
            raise UnreadableError(
                f"{self._path}: unreadable audio (FFmpeg: {reason}): damaged or cut short, {seconds:.1f} s could be "
                f"decoded{claim}; copy it again, or set `end`"
            )
        if claimed is not None and claimed - seconds > 0.5:
            raise UnreadableError(
                f"{self._path}: cut short, the sound ends at {seconds:.3f} s and should go on to {claimed:.3f} s; "
                "copy it again, or set `end`"
            )

    def _claimed_seconds(self) -> float | None:
        """The container's duration, if it is no estimate and no other track may be longer."""
        log = self._log.partition(b"Output #0")[0]
        duration = re.search(rb"Duration: (\d+):(\d\d):(\d\d\.\d+)", log)
        if duration is None or b"Estimating duration" in log or len(re.findall(rb"Stream #0:", log)) > 1:
            return None
        hours, minutes, seconds = duration.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)

    def _errors(self) -> list[str]:
        """Reported errors of the sound; a picture may be broken."""
        lines = self._log.decode(errors="replace").splitlines()
        return [re.sub(r"^(\[[^]]*\] )+|/proc/self/fd/\d+: ", "", line) for line in lines if ERROR.match(line)]

    def _fault(self, what: str) -> "UnreadableError":
        reason = next(iter(self._errors()), what)
        if reason.startswith("Format not on whitelist"):
            reason = "a playlist, or another format that names further files"
        if "moov atom not found" in reason:
            return UnreadableError(
                f"{self._path}: unreadable audio (FFmpeg: {reason}): its index is missing, as in a file that was cut "
                "short or whose recorder was stopped; copy it again, or leave it out"
            )
        return UnreadableError(
            f"{self._path}: unreadable audio (FFmpeg: {reason}); convert it to WAV or FLAC, or leave it out"
        )
