"""Held-out dialogues of a training: laid out once, and their audio decoded for each evaluation, in portions."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import chain

from qwhisper.data.dialogue import Dialogue
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.loader import Rejection, read_in_order, sort_items
from qwhisper.data.processes import Poll, nothing
from qwhisper.data.rows import Layout, Sample
from qwhisper.errors import DataError
from qwhisper.frames import SAMPLE_RATE

# Audio in memory at once, silence around the clips included: 115 MB, some 20,000 tokens, which are several packs. What
# fits into one portion is packed as if it were one list.
PORTION_SAMPLES = 1800 * SAMPLE_RATE


@dataclass(eq=False)
class LaidOut:
    """The rows of one dialogue, without their audio."""

    id: str
    source: str
    layouts: list[Layout]


@dataclass(eq=False)
class HeldOut:
    """The dialogues that can be used, laid out."""

    dialogues: list[LaidOut]
    encoder: DialogueEncoder

    def __len__(self) -> int:
        return len(self.dialogues)

    @property
    def num_rows(self) -> int:
        """Rows of all dialogues: one for each dialogue or answer, see `DialogueEncoder.layout_rows`."""
        return sum(len(dialogue.layouts) for dialogue in self.dialogues)

    def portions(self, num_workers: int = 0, poll: Poll = nothing) -> Generator[list[Sample]]:
        """Yield all samples, in order, in portions. Raises DataError if a dialogue can no longer be read: the loss of
        the others can't be compared. poll: as in `read_in_order`.
        """
        portion: list[Sample] = []
        num_samples = 0
        for items in read_in_order(self.dialogues, self.encoder, num_workers, rows=_with_audio, poll=poll):
            samples, rejections = sort_items(items)
            if rejections:
                raise DataError(f"a held-out dialogue can't be read any more: {rejections[0].reason}")
            portion += samples
            num_samples += sum(len(window) for sample in samples for window in sample.windows)
            if num_samples >= PORTION_SAMPLES:
                yield portion
                portion, num_samples = [], 0
        if portion:
            yield portion


def hold_out(
    dialogues: Sequence[Dialogue], encoder: DialogueEncoder, num_workers: int = 0, poll: Poll = nothing
) -> tuple[HeldOut, list[Rejection]]:
    """Decode every dialogue once; return the layouts of the usable ones, and the rejections of the rest. poll: as in
    `read_in_order`.
    """
    items = chain.from_iterable(read_in_order(dialogues, encoder, num_workers, rows=_laid_out, poll=poll))
    usable, rejections = sort_items(items)
    return HeldOut(usable, encoder), rejections


def _laid_out(encoder: DialogueEncoder, dialogue: Dialogue) -> list[LaidOut]:
    layouts = encoder.layout_rows(dialogue, encoder.dialogue_audio().lengths)
    return [LaidOut(dialogue.id, dialogue.source, layouts)]


def _with_audio(encoder: DialogueEncoder, dialogue: LaidOut) -> list[Sample]:
    audio = encoder.dialogue_audio()
    return [encoder.add_audio(layout, audio) for layout in dialogue.layouts]
