import os

import numpy as np
import pytest
import soundfile

from qwhisper.errors import BadClipError, DataError
from qwhisper.infer.assistant import Assistant
from qwhisper.infer.chat import Chat, converse, split_line
from tests.small import tone


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Folder with a.wav, "b c.wav", sound (WAV without an ending), silent.wav and notes.txt."""
    folder = tmp_path_factory.mktemp("chat")
    for name, frequency in (("a.wav", 300), ("b c.wav", 900), ("sound.wav", 700)):
        soundfile.write(folder / name, tone(frequency, 0.3), 16_000)
    (folder / "sound.wav").rename(folder / "sound")
    soundfile.write(folder / "silent.wav", np.zeros(16_000), 16_000)
    (folder / "notes.txt").write_text("no audio")
    return folder


@pytest.fixture(autouse=True)
def in_folder(clips, monkeypatch):
    monkeypatch.chdir(clips)


class ScriptedChat:
    """Remembers what it was asked."""

    def __init__(self):
        self.asked, self.resets = [], 0

    def ask(self, clips, text):
        self.asked.append(([clip.path.rsplit("/", 1)[-1] for clip in clips], text))

    def reset(self):
        self.resets += 1


def lines(*script):
    rest = iter(script)

    def read_line():
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return read_line


@pytest.mark.parametrize(
    ("line", "names", "text"),
    [
        ("What is this?", [], "What is this?"),
        ("it's fine, isn't it", [], "it's fine, isn't it"),
        ("a.wav", ["a.wav"], ""),
        ("a.wav What's that?", ["a.wav"], "What's that?"),
        ("./sound hm", ["sound"], "hm"),
        ("sound is what I hear", [], "sound is what I hear"),
        ("notes.txt is a file", [], "notes.txt is a file"),
        ("a.wav 'b c.wav'  Which came first?", ["a.wav", "b c.wav"], "Which came first?"),
        ('"b c.wav" a.wav', ["b c.wav", "a.wav"], ""),
        (r"b\ c.wav hm", ["b c.wav"], "hm"),
        ("/audio sound Which?", ["sound"], "Which?"),
        ("/audio a.wav /audio 'b c.wav'", ["a.wav", "b c.wav"], ""),
        ("say a.wav", [], "say a.wav"),
        ("'quoted' text", [], "'quoted' text"),
        ("", [], ""),
    ],
)
def test_line_is_split_into_files_and_text(line, names, text):
    found, rest = split_line(line)
    assert ([clip.path.rsplit("/", 1)[-1] for clip in found], rest) == (names, text)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nope.wav what?", "nope.wav: no such file"),
        ("/audio nope", "nope: no such file"),
        ("/audio notes.txt", "notes.txt: unreadable"),
        ("silent.wav", "silent"),
        ("~nosuchuser/a.wav what?", "~nosuchuser/a.wav: no such file"),
        ("https://host/a.wav what?", "https://host/a.wav: .* nothing is downloaded"),
        ("file:///nope.wav what?", "'file:///nope.wav' does not exist"),
        ("/help", "/help: no such command"),
        ("/" + "x" * 5000, "no such command"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(line, reason):
    with pytest.raises(DataError, match=reason):
        split_line(line)


def test_files_wait_for_text_or_an_empty_line():
    chat = ScriptedChat()
    converse(
        chat,
        lines("hi", "", "a.wav", "'b c.wav'", "which?", "a.wav", "", "/audio a.wav", "/reset", "so?", "/quit", "no"),
    )
    assert chat.asked == [([], "hi"), (["a.wav", "b c.wav"], "which?"), (["a.wav"], ""), ([], "so?")]
    assert chat.resets == 1


def test_conversation_goes_on_after_a_mistake(capsys):
    chat = ScriptedChat()
    converse(chat, lines("nope.wav", "/what", "still here"))
    assert chat.asked == [([], "still here")]
    assert "nope.wav: no such file" in capsys.readouterr().out


@pytest.fixture
def assistant(small_model, monkeypatch) -> Assistant:
    """One that remembers its prompts, in `asked`."""
    assistant = Assistant(*small_model)
    assistant.asked = []
    stream = assistant.stream

    def remembered(messages, **request):
        assistant.asked.append(assistant.encoder.encode_prompt(messages))
        return stream(messages, **request)

    monkeypatch.setattr(assistant, "stream", remembered)
    return assistant


def test_history_is_what_was_said(assistant, capsys):
    chat = Chat(assistant, system="Be brief.", max_new_tokens=4)
    (clip,), _ = split_line("a.wav")
    first = chat.ask([clip], "Pitch?")
    assert first and capsys.readouterr().out == first + "\n"
    chat.ask([], "Sure?")
    assert [message.role for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message.text for message in chat.messages[:4]] == ["Be brief.", "Pitch?", first, "Sure?"]
    before, after = assistant.asked
    assert (after.input_ids[: len(before.input_ids)] == before.input_ids).all()  # what was served stays in front
    assert len(after.windows) == 1
    chat.reset()
    assert chat.ask([clip], "Pitch?") == first
    assert (assistant.asked[2].input_ids == before.input_ids).all()


def test_clips_of_every_form_are_asked_about(assistant, clips):
    chat = Chat(assistant, max_new_tokens=1)
    samples, rate = soundfile.read("a.wav", dtype="float32")
    (by_url,), _ = split_line(f"{(clips / 'a.wav').as_uri()} Pitch?")
    stretch = {"offset": 0.1, "duration": 0.1}
    forms = ["a.wav", clips / "a.wav", by_url, (samples, rate), (clips / "a.wav").read_bytes()]
    for form in [*forms, {"audio": "a.wav", **stretch}, {"array": samples, **stretch}]:
        chat.reset()
        chat.ask([form], "Pitch?")
    asked = assistant.asked
    whole, part = [sample.windows[0] for sample in asked[:5]], [sample.windows[0] for sample in asked[5:]]
    assert all(np.array_equal(window, whole[0]) for window in whole)
    assert np.array_equal(part[0], part[1]) and len(whole[0]) - len(part[0]) == 0.2 * 16_000
    assert all((sample.input_ids == asked[0].input_ids).all() for sample in asked[:5])


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        ({"audio": "a.wav", "strat": 1}, "clip 1: unknown key `strat`; did you mean `start`?"),
        ([1, 2, 3], "clip 1: `audio` has samples of type int64"),
        (np.full(800, np.nan), "clip 1, `audio`: .*NaN or Inf"),
    ],
)
def test_clip_that_cannot_be_used_is_named_and_nothing_was_said(assistant, clip, reason):
    chat = Chat(assistant)
    with pytest.raises(DataError, match=reason):
        chat.ask([clip], "Pitch?")
    assert chat.messages == []


def test_turn_that_cannot_be_heard_leaves_no_trace(assistant):
    chat = Chat(assistant)
    (clip,), _ = split_line("a.wav")
    with pytest.raises(BadClipError):
        chat.ask([type(clip)("gone.wav")], "Pitch?")
    assert chat.messages == []


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    (clip,), _ = split_line("~/a.wav")
    assert clip.path == os.path.realpath("a.wav")
