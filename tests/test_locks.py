"""What a run folder is refused for before anything is made in it, and what is left of a start that wrote nothing."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwhisper.errors import UsageError
from qwhisper.locks import LOCK_FILE, hold, run_lock

HOLDER = """
import sys
from pathlib import Path
from qwhisper.locks import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["run", "训练", "with space\nand line"])
def test_a_folder_is_made_and_held(tmp_path, name):
    with run_lock(tmp_path / name):
        assert (tmp_path / name).is_dir()


def test_a_name_that_no_tokenizer_can_be_saved_under_is_refused(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff"))
    with pytest.raises(UsageError, match=r"run-\\udcff': the name is not UTF-8"), run_lock(folder):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_into_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="nothing can be written there"), run_lock(tmp_path / "file/run"):
        pass
    assert (tmp_path / "file").read_text() == ""


def test_of_a_start_that_writes_nothing_nothing_is_left(tmp_path):
    with run_lock(tmp_path / "runs/first"):
        assert (tmp_path / "runs/first" / LOCK_FILE).exists()
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_all_be_made_are_not_left_half_made(tmp_path):
    with pytest.raises(UsageError, match="nothing can be written there"), run_lock(tmp_path / "runs" / ("n" * 300)):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("present", [[], ["notes.txt"], [LOCK_FILE], ["config.yaml", LOCK_FILE]])
def test_a_folder_that_was_there_is_left_as_it_was(tmp_path, present):
    for name in present:
        (tmp_path / name).write_text("")
    with run_lock(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(present)


def test_what_a_start_has_written_is_kept_with_its_lock(tmp_path):
    with run_lock(tmp_path / "run"):
        (tmp_path / "run/config.yaml").write_text("")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {LOCK_FILE, "config.yaml"}


def test_a_start_that_is_refused_leaves_the_lock_of_another_process(tmp_path):
    folder = tmp_path / "run"
    holder = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(UsageError, match="another trainer writes into it"), run_lock(folder):
                pass
        assert (folder / LOCK_FILE).exists()
        process.stdin.close()
    assert process.returncode == 0 and not folder.exists()


def test_a_lock_file_that_its_holder_removes_before_it_is_locked_is_no_lock(tmp_path):
    """Else a third process would lock a new file, and two would write into the folder."""
    file = tmp_path / LOCK_FILE
    names = {"name": "run", "place": "run", "writer": "trainer", "another": "folder"}
    with file.open("w") as opened:
        file.unlink()
        with pytest.raises(UsageError, match="run: another trainer writes into it"):
            hold(opened.fileno(), fcntl.lockf, file, **names)
        with file.open("w"), pytest.raises(UsageError, match="run: another trainer"):
            hold(opened.fileno(), fcntl.lockf, file, **names)
        with file.open("w") as new:
            hold(new.fileno(), fcntl.lockf, file, **names)
