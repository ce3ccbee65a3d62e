"""A conversation in the terminal, with text and audio files.

> question.wav                     attaches a file; an empty line then sends it
> a.wav b.wav Which came first?    attaches two and sends them with the text
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from qwhisper.data.clips import URL, AudioClip, load_clip, read_own_audio
from qwhisper.data.dialogue import Message
from qwhisper.errors import BadClipError, DataError
from qwhisper.infer.assistant import Assistant

FIRST_WORD = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|((?:\\.|\S)*))\s*(.*)""", re.DOTALL)
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aiff", ".aif")
HELP = """A line is sent as text. A line that begins with audio files (`a.wav b.wav Which came first?`) or with
/audio PATH attaches them; if nothing follows, an empty line sends them.
/reset forgets the conversation, /quit (or Ctrl-D) ends it."""


class Chat:
    """The messages so far of a dialogue with an assistant."""

    def __init__(self, assistant: Assistant, *, system: str | None = None, max_new_tokens: int = 256):
        self.assistant = assistant
        self.max_new_tokens = max_new_tokens
        self.opening = [Message("system", (system,))] if system else []
        self.messages = list(self.opening)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = list(self.opening)

    def ask(self, clips: Sequence, text: str) -> str:
        """Print the answer to one turn as the model writes it, and return it.

        clips: AudioClips, or anything that an audio part may hold. Raises DataError, or BadClipError for a clip that
        can't be used; the messages are then unchanged.
        """
        heard = [read_own_audio(clip, f"clip {n}") for n, clip in enumerate(clips, 1)]
        question = Message("user", (*heard, text) if text else tuple(heard))
        answer = ""
        for piece in self.assistant.stream([*self.messages, question], max_new_tokens=self.max_new_tokens):
            print(piece, end="", flush=True)
            answer += piece
        print()
        self.messages += [question, Message("assistant", (answer,))]
        return answer


def converse(chat: Chat, read_line: Callable[[], str]) -> None:
    """Read lines as turns until /quit or the end of the input. Print errors of the user and continue."""
    attached: list[AudioClip] = []
    while True:
        try:
            line = read_line().strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
            attached = []
            print("(a new conversation)")
            continue
        try:
            clips, text = split_line(line)
            attached += clips
            if text or (attached and not clips):
                sent, attached = attached, []
                chat.ask(sent, text)
            elif attached:
                print(f"({len(attached)} attached; add text or files, or send with an empty line)")
        except DataError as error:
            print(error)


def split_line(line: str) -> tuple[list[AudioClip], str]:
    """The audio files at the beginning of a line, and the text after them.

    A path with spaces must be quoted; one without a slash is recognised by its extension. Raises DataError for a file
    that is missing or not audio, and for an unknown command.
    """
    clips = []
    while line:
        is_command = line.startswith("/audio ")
        rest = line.removeprefix("/audio ").lstrip() if is_command else line
        word, after = _first_word(rest)
        is_path = word.lower().endswith(AUDIO_SUFFIXES) or ("/" in word and os.path.isfile(os.path.expanduser(word)))
        if not is_command and not is_path:
            break
        clips.append(read_clip(word))
        line = after
    if line.startswith("/") and not clips:
        raise DataError(f"{line.split()[0]}: no such command or file. {HELP}")
    return clips, line


def _first_word(text: str) -> tuple[str, str]:
    """The first word, in quotes or with its spaces escaped if it has any, and the rest."""
    match = FIRST_WORD.match(text)
    assert match, "every part of the pattern may be empty"
    double, single, plain, rest = match.groups(default="")
    return double or single or re.sub(r"\\(.)", r"\1", plain), rest


def read_clip(path: str) -> AudioClip:
    """A file as a clip, decoded once so that a fault is reported now. Raises BadClipError."""
    location = os.path.expanduser(path)
    if not URL.match(path) and not os.path.isfile(location):
        raise BadClipError(f"{path}: no such file; give the path of an audio file")
    clip = read_own_audio(Path(location) if not URL.match(path) else path, path)
    load_clip(clip)
    return clip
