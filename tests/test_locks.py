"""What a run folder is refused for before anything is made in it."""

import os
from pathlib import Path

import pytest

from qwhisper.errors import UsageError
from qwhisper.locks import run_lock


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
