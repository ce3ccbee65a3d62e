"""`qwhisper chat`: one answer, or a conversation. What a turn does is in tests/infer/test_chat.py."""

import io
from pathlib import Path

import pytest
import soundfile

from qwhisper.commands.chat import ChatArguments, main
from qwhisper.errors import BadClipError
from qwhisper.infer.chat import Chat
from tests.small import tone


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    """The current folder holds a.wav."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", tone(300, 0.3), 16_000)


def test_one_question_one_answer(finished_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("not read\n"))
    asked = []
    monkeypatch.setattr(Chat, "ask", lambda self, found, text: asked.append(([clip.path for clip in found], text)))
    main(ChatArguments(checkpoint=str(finished_run), audio=["a.wav"], text="Pitch?"))
    assert asked == [([str((Path("a.wav")).resolve())], "Pitch?")]


def test_piped_lines_are_a_conversation(finished_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\na.wav Pitch?\n"))
    asked = []
    monkeypatch.setattr(Chat, "ask", lambda self, found, text: asked.append((len(found), text)))
    main(ChatArguments(checkpoint=str(finished_run)))
    assert asked == [(0, "hello"), (1, "Pitch?")]
    assert "> " not in capsys.readouterr().out


def test_missing_file_is_found_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr("qwhisper.infer.assistant.load_chosen", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(BadClipError, match=r"nope\.wav: no such file") as caught:
        main(ChatArguments(checkpoint="run", audio=["nope.wav"]))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("path", ["~nosuchuser/x.wav", "~/nosuch.wav", "", ".", "a\0.wav", "x" * 5000, "\udcff.wav"])
def test_a_path_that_leads_to_no_file_is_one_sentence(monkeypatch, path):
    monkeypatch.setattr("qwhisper.infer.assistant.load_chosen", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(BadClipError) as error:
        main(ChatArguments(checkpoint="run", audio=[path]))
    assert str(error.value) == f"{path}: no such file; give the path of an audio file"
