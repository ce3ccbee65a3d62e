import os
import shutil

import numpy as np
import pytest
import soundfile

from qwhisper.data.audio import load_audio
from qwhisper.data.clips import AudioClip, load_clip
from qwhisper.data.files import Pieces, opened
from qwhisper.errors import BadClipError
from tests.data.test_audio import tone


@pytest.fixture
def clip(tmp_path):
    """A clip as checked, and a private file beside its root."""
    folder = tmp_path.resolve() / "root/speech"
    folder.mkdir(parents=True)
    soundfile.write(folder / "a.wav", tone(0.2, 16_000), 16_000)
    (tmp_path / "private").mkdir()
    soundfile.write(tmp_path / "private/a.wav", tone(0.3, 16_000), 16_000)
    return AudioClip(str(folder / "a.wav"))


def test_file_as_it_was_checked_is_read(clip):
    np.testing.assert_array_equal(load_clip(clip), load_audio(clip.path))


@pytest.mark.parametrize("swapped", ["the file", "its folder", "the folder above"])
@pytest.mark.parametrize("relative", [False, True])
def test_what_was_swapped_for_a_link_after_the_check_is_not_read(clip, tmp_path, swapped, relative):
    level = {"the file": 0, "its folder": 1, "the folder above": 2}[swapped]
    path = os.path.join(clip.path, *[".."] * level)
    path, private = os.path.normpath(path), tmp_path.resolve() / "private"
    target = {0: private / "a.wav", 1: private, 2: private.parent / "other"}[level]
    if level == 2:
        shutil.copytree(private, target / "speech")
    os.rename(path, f"{path}.before")
    os.symlink(os.path.relpath(target, os.path.dirname(path)) if relative else target, path)
    with pytest.raises(BadClipError, match="a link appeared in this path after it was checked"):
        load_clip(clip)
    assert len(load_audio(clip.path)) == 4_800  # a path of the user's own may have links


def test_fifo_put_there_after_the_check_blocks_nobody(clip):
    os.unlink(clip.path)
    os.mkfifo(clip.path)
    with pytest.raises(BadClipError, match="is a FIFO, not a file"):
        load_clip(clip)


def test_descriptors_are_closed(clip, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    load_clip(clip)
    for source in (tmp_path / "bad.wav", tmp_path, tmp_path / "none", b"RIFF"):
        with pytest.raises(BadClipError):
            load_audio(source)
    assert len(os.listdir("/proc/self/fd")) == before


def test_pieces_are_one_file():
    content = bytes(range(200))
    with opened(content) as descriptor:
        file = Pieces(descriptor, [b"head", (10, 20), b"", (150, 190), b"end"])
        expected = b"head" + content[10:20] + content[150:190] + b"end"
        assert file.read() == expected
        for start in (0, 2, 4, 13, 14, 50, 56, 57, 70):
            file.seek(start)
            assert file.read(7) == expected[start : start + 7]
        assert file.seek(-3, os.SEEK_END) == len(expected) - 3
        assert file.read(10) == b"end"
