"""Held-out dialogues of a training: laid out once, and their audio decoded for each evaluation, in portions."""

from collections.abc import Iterator, Sequence

from qwhisper.data.dialogue import Dialogue
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.loader import EncodedDialogues, Rejection, encode_all, read_in_order, sort_items
from qwhisper.data.rows import Layout, Sample
from qwhisper.errors import DataError
from qwhisper.frames import SAMPLE_RATE

# Of audio that is in memory at once, silence around the clips included: 115 MB, some 20,000 tokens, which are several
# packs. What fits into one portion is packed as if it were one list.
PORTION_SAMPLES = 1800 * SAMPLE_RATE


class HeldOut(EncodedDialogues):
    """Item i: the samples of dialogue i, whose audio is decoded now, or its rejection."""

    def __init__(self, layouts: Sequence[list[Layout]], dialogues: Sequence[Dialogue], encoder: DialogueEncoder):
        super().__init__(dialogues, encoder)
        self.layouts = layouts

    def rows(self, index: int) -> list[Sample]:
        audio = self.encoder.dialogue_audio()
        return [self.encoder.add_audio(layout, audio) for layout in self.layouts[index]]

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.layouts))

    def portions(self, num_workers: int = 0) -> Iterator[list[Sample]]:
        """All samples, in their order. Raises DataError if a dialogue can no longer be read: a loss over the others is
        another number.
        """
        portion: list[Sample] = []
        num_samples = 0
        for items in read_in_order(self, num_workers):
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
    dialogues: Sequence[Dialogue], encoder: DialogueEncoder, num_workers: int = 0
) -> tuple[HeldOut, list[Rejection]]:
    """Decode all dialogues once, and keep what was laid out: those that can be used, and the rejections of the rest."""
    found, rejections = encode_all(_LaidOut(dialogues, encoder), num_workers)
    chosen = [index for index, _ in found]
    return HeldOut([layouts for _, layouts in found], [dialogues[index] for index in chosen], encoder), rejections


class _LaidOut(EncodedDialogues):
    """Item i: [(i, the layouts of dialogue i)], each of its clips decoded, or its rejection."""

    def rows(self, index: int) -> list[tuple[int, list[Layout]]]:
        return [(index, self.encoder.layout_rows(self.dialogues[index], self.encoder.dialogue_audio().lengths))]
