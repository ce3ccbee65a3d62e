"""`qwhisper chat`: a conversation in the terminal over text and audio files; with --audio or --text a single answer."""

import contextlib
import sys
from dataclasses import dataclass

from qwhisper.commands.shared_flags import (
    AUDIO_MODEL_HELP,
    CHECKPOINT_HELP,
    DEVICE_HELP,
    DTYPE_HELP,
    MOST_NEW_TOKENS,
    TEXT_MODEL_HELP,
    Dtype,
)
from qwhisper.flags import Arguments, flag, required


@dataclass(frozen=True, kw_only=True)
class ChatArguments(Arguments):
    checkpoint: str = required(CHECKPOINT_HELP)
    audio: list[str] = flag([], "Audio files of the first turn.")
    text: str | None = flag(
        None, "Text of the first turn. With --audio or --text one answer is given and the command ends."
    )
    system: str | None = flag(None, "System prompt.")
    max_new_tokens: int = flag(256, "Maximum number of tokens in an answer.", at_least=1, at_most=MOST_NEW_TOKENS)
    audio_model: str | None = flag(None, AUDIO_MODEL_HELP)
    text_model: str | None = flag(None, TEXT_MODEL_HELP)
    device: str | None = flag(None, DEVICE_HELP)
    dtype: Dtype = flag("auto", DTYPE_HELP)


def main(arguments: ChatArguments) -> None:
    """One answer to --audio and --text, or a conversation until the input ends."""
    from qwhisper.infer.assistant import Assistant
    from qwhisper.infer.chat import HELP, Chat, converse, read_clip
    from qwhisper.report.terminal import quieten_transformers

    quieten_transformers()
    clips = [read_clip(path) for path in arguments.audio]
    assistant = Assistant.from_pretrained(
        arguments.checkpoint,
        arguments.device,
        arguments.dtype,
        audio_model=arguments.audio_model,
        text_model=arguments.text_model,
    )
    chat = Chat(assistant, system=arguments.system, max_new_tokens=arguments.max_new_tokens)
    if clips or arguments.text is not None:
        chat.ask(clips, arguments.text or "")
        return
    if sys.stdin.isatty():
        print(HELP)
        with contextlib.suppress(ImportError):  # not every Python has it
            import readline  # noqa: F401  (input() then edits lines and remembers them)
    converse(chat, lambda: input("> " if sys.stdin.isatty() else ""))
