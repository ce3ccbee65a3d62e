import errno

import pytest

from qwhisper import disk
from qwhisper.disk import write_whole
from tests.test_faults.kill_shim import fail


def test_write_whole_replaces_and_leaves_nothing_else(tmp_path):
    for text in ("one", "two"):
        write_whole(tmp_path / "config.yaml", text)
        assert (tmp_path / "config.yaml").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_write_whole_leaves_what_was_there_where_the_disk_is_full(tmp_path, monkeypatch):
    write_whole(tmp_path / "config.yaml", "one")
    monkeypatch.setattr(disk, "flush", lambda path: fail(errno.ENOSPC)())
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "config.yaml", "two")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.yaml", "one")]
