"""Text and audio of a dialogue to tokens."""

from collections.abc import Sequence

from qwhisper.data.clips import AudioClip
from qwhisper.data.dialogue_audio import DialogueAudio
from qwhisper.data.messages import Message
from qwhisper.data.rows import Part
from qwhisper.data.template import Piece, render_pieces
from qwhisper.data.text_tokens import added_token_ids, encode_text
from qwhisper.errors import DataError
from qwhisper.frames import FrameArithmetic

TRAIN_ON = ("assistant", "last", "all")


class NoLabelsError(DataError):
    """Nothing of a sample is left to learn from."""


class PartEncoder:
    """Tokenises pieces; the scaffold's few texts are remembered. max_length: as the collator's."""

    def __init__(
        self,
        tokenizer,
        frames: FrameArithmetic,
        audio_token_id: int,
        chat_template: str,
        max_length: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.frames = frames
        self.max_length = max_length
        self.audio_token_id = audio_token_id
        self.chat_template = chat_template
        self.added_ids = added_token_ids(tokenizer)
        self._scaffold_ids: dict[str, list[int]] = {}

    def parts(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[str] = ()
    ) -> list[Part]:
        """All parts of a dialogue, audio decoded. Raises BadClipError, and DataError where the template refuses it."""
        pieces = self.pieces(messages, add_generation_prompt, tools)
        clips = [piece.clip for piece in pieces if piece.clip is not None]
        audio = DialogueAudio(clips, self.frames, self.max_length)
        return [self._part(piece, audio) for piece in pieces]

    def pieces(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[str] = ()
    ) -> list[Piece]:
        return render_pieces(messages, self.tokenizer, self.chat_template, add_generation_prompt, tools)

    def _part(self, piece: Piece, audio: DialogueAudio) -> Part:
        if piece.clip is not None:
            return self._audio_part(piece, piece.clip, audio)
        if piece.kind == "text":
            return Part(piece, encode_text(self.tokenizer, piece.text))
        if piece.text not in self._scaffold_ids:
            self._scaffold_ids[piece.text] = self.tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        return Part(piece, self._scaffold_ids[piece.text])

    def _audio_part(self, piece: Piece, clip: AudioClip, audio: DialogueAudio) -> Part:
        heard = audio.hear(clip)
        return Part(piece, [self.audio_token_id] * heard.num_tokens, heard.windows, heard.window_tokens, heard.notes)
