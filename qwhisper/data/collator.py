"""ConversationCollator: the `data_collator` of a plain Hugging Face Trainer. `qwhisper train` does not use it."""

from collections.abc import Sequence

from qwhisper.data.dialogue import Dialogue
from qwhisper.data.encode import DialogueEncoder, NoLabelsError, require_labels
from qwhisper.data.packing import Batch, pack_samples, pad_samples
from qwhisper.data.rows import Sample
from qwhisper.errors import BadClipError, DataError, UsageError
from qwhisper.frames import FrameArithmetic


class ConversationCollator:
    """Makes a batch of dialogues, or of encoded samples.

    packed: makes one packed row, not one padded row per sample. The other arguments are DialogueEncoder's.
    `encoder` encodes; `rejected` collects (id, reason) of samples that a batch leaves out.
    """

    def __init__(
        self,
        tokenizer,
        frames: FrameArithmetic,
        *,
        audio_token_id: int,
        chat_template: str | None = None,
        train_on: str = "assistant",
        max_length: int | None = None,
        packed: bool = False,
    ):
        self.encoder = DialogueEncoder(
            tokenizer,
            frames,
            audio_token_id=audio_token_id,
            chat_template=chat_template,
            train_on=train_on,
            max_length=max_length,
        )
        self.packed = packed
        self.rejected: list[tuple[str, str]] = []

    def __call__(self, features: Sequence[Sample | Dialogue | dict]) -> Batch:
        """A batch of all that can be encoded; the rest goes to `rejected`. Raises DataError if nothing is left,
        UsageError for dialogues without fields.
        """
        if any(isinstance(feature, dict) and not feature for feature in features):
            raise UsageError(
                "the dialogues have no fields left: Trainer removes those that are no arguments of the model's "
                "forward, unless you set TrainingArguments(remove_unused_columns=False)"
            )
        samples: list[Sample] = []
        rejected: list[tuple[str, str]] = []
        for feature in features:
            try:
                rows = [feature] if isinstance(feature, Sample) else self.encoder.encode_rows(feature)
                for row in rows:
                    require_labels(row.source, row)
                samples += rows
            except (BadClipError, NoLabelsError) as error:
                name = feature.get("id", "?") if isinstance(feature, dict) else feature.id
                rejected.append((str(name), str(error)))
        self.rejected += rejected
        if not samples:
            reasons = "; ".join(reason for _, reason in rejected[:3])
            raise DataError(f"none of {len(features)} samples of this batch can be trained on: {reasons}")
        return pack_samples(samples) if self.packed else pad_samples(samples, self.encoder.pad_token_id)
