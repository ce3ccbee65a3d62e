"""`qwhisper data check`: what it prints, and its exit code. `data answer` is in tests/infer/test_answer.py."""

import pytest

from qwhisper.commands.data import DataCheckArguments
from qwhisper.commands.data import check as main
from qwhisper.errors import DataError, UsageError
from tests.dialogue_files import record


def test_every_fault_and_bad_clip_is_listed(write, capsys):
    path = write(record("a.wav"), record("none.wav"), record("silent.wav"), record("a.wav", reply=""))
    assert main(DataCheckArguments(file=str(path))) == 3
    printed = capsys.readouterr().out
    for line, fault in ((2, "does not exist"), (3, "silent"), (4, "reply is empty")):
        assert any(f"{path}:{line}: " in text and fault in text for text in printed.splitlines())
    assert "not ready to train on" in printed


def test_command_reads_the_real_tokenizer_and_encoder(write, shared, capsys):
    arguments = DataCheckArguments(
        file=str(write(record("a.wav"))),
        text_model=str(shared / "models" / "qwen3-tokenizer"),
        audio_model=str(shared / "models" / "whisper-tiny.en"),
    )
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "with its think block in every assistant turn" in printed
    assert "supervised tokens an answer: 3 to 3, median 3" in printed


def test_what_is_not_there_is_named(write, tmp_path):
    path = str(write(record("a.wav")))
    with pytest.raises(DataError, match="does not exist"):
        main(DataCheckArguments(file=str(tmp_path / "none.jsonl")))
    with pytest.raises(UsageError, match="no tokenizer can be read there"):
        main(DataCheckArguments(file=path, text_model=str(tmp_path)))
    with pytest.raises(UsageError, match="--max_length counts tokens"):
        main(DataCheckArguments(file=path, max_length=10))
    with pytest.raises(UsageError, match="--audio_model decides how many tokens"):
        main(DataCheckArguments(file=path, audio_model="openai/whisper-tiny"))
