"""`qwhisper demo`: the command lines that it prints. The demo itself runs in benchmarks/demo_seeds.py."""

import shlex

import pytest

from qwhisper.cli import load
from qwhisper.commands import VERBS, demo
from qwhisper.demo.prepare import DemoPaths
from qwhisper.errors import DataError, QwhisperError
from qwhisper.parsing import parse


@pytest.fixture
def received(monkeypatch) -> list:
    """What the commands that train and evaluate are given; they do nothing."""
    found: list = []
    monkeypatch.setattr(demo.train, "main", found.append)
    monkeypatch.setattr(demo.evaluate, "main", found.append)
    return found


def parsed(line: str):
    program, *words = shlex.split(line)
    assert program == "qwhisper"
    return parse(words[0], VERBS[words[0]], load(VERBS[words[0]].arguments), words[1:])


def test_lines_that_are_printed_parse_to_what_is_run(received, tmp_path, capsys):
    commands: list[str] = []
    paths = DemoPaths(*(tmp_path / name for name in ("train", "eval", "swapped", "a model", "text")), {})
    demo.train_model(commands, paths, tmp_path / "run", 3)
    (tmp_path / "eval.json").write_text('{"loss": 1}')
    assert demo.evaluated(commands, tmp_path, paths.eval_file.with_suffix(".jsonl")) == {"loss": 1}
    assert [parsed(line) for line in commands] == received and len(received) == 2
    printed = capsys.readouterr().out
    assert all(f"$ {line}\n" in printed for line in commands)
    assert commands[0].startswith(f"qwhisper train --train_file {tmp_path}/train --output_dir {tmp_path}/run ")
    assert commands[1].startswith(f"qwhisper eval {tmp_path}/run --eval_file {tmp_path}/eval.jsonl --no_swap_audio ")


def test_a_list_is_typed_after_its_flag():
    line = demo.command_line("chat", {"checkpoint": "run", "audio": ["a b.wav"], "text": "Which?"})
    assert line == "qwhisper chat run --audio 'a b.wav' --text 'Which?'"


def test_a_command_that_fails_ends_the_demo_with_its_exit_code(capsys):
    def fails(arguments):
        raise DataError("no audio")

    values = {"file": "d.jsonl"}
    with pytest.raises(QwhisperError, match=r"ended with exit code 3: qwhisper data check d\.jsonl") as error:
        demo.run_command([], "data check", fails, demo.data.DataCheckArguments, **values)
    assert type(error.value) is QwhisperError and capsys.readouterr().err == "qwhisper: error: no audio\n"
