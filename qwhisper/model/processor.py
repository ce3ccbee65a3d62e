"""The processor of the package: all forms of messages and audio, a template that can listen, and a run's folder.

The whole package, and transformers' Auto classes, use this class.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import BatchFeature

from qwhisper.checkpoint.names import MODEL_CONFIG, PROCESSOR_CONFIG
from qwhisper.checkpoint.reading import is_run_folder, read_checkpoint
from qwhisper.data.clips import AudioClip, load_clip, own_roots, parse_content, quoted, raise_or_warn, read_own_audio
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.keys import unknown_keys
from qwhisper.data.messages import KNOWN as MESSAGE_KEYS
from qwhisper.data.messages import ROLES, parse_reasoning
from qwhisper.data.template import listening_template, refuse_costly, template_fault
from qwhisper.data.tools import parse_tool_calls
from qwhisper.data.waveform import is_one_clip, whole_rate
from qwhisper.errors import CheckpointError, UsageError
from qwhisper.files import files_of, read_json_object
from qwhisper.frames import SAMPLE_RATE
from qwhisper.model import processing_qwen3_audio
from qwhisper.model.trained_folder import check_processor, frames_of, reading

# Arguments of a call, which transformers takes among those of the chat template as well.
CALL_KEYWORDS = (
    "sampling_rate", "padding", "padding_side", "truncation", "max_length", "pad_to_multiple_of",
    "return_attention_mask", "text_kwargs", "audio_kwargs", "common_kwargs",
)  # fmt: skip


class Qwen3AudioProcessor(processing_qwen3_audio.Qwen3AudioProcessor):
    """Feature extractor + tokenizer + the lengths that the model was trained with.

    `processor(text=..., audio=...)` takes texts with one `<|audio_pad|>` a clip and as many clips of any length: files,
    data URLs, bytes, arrays (at 16 kHz, or at `sampling_rate`, or as a pair with their rate) or any other form that
    `qwhisper.data.clips` reads. It returns input_ids, attention_mask (left-padded), input_features [windows, mel bins,
    frames] and input_features_mask [windows, frames]. `apply_chat_template` takes messages whose parts are read, and
    refused, as those of a file of dialogues are, except that paths start in the current folder and lead anywhere. It
    trusts its texts, as transformers does: a `<|im_end|>` in them becomes that token (`DialogueEncoder` makes none).

    Both raise DataError for what is no audio, and BadClipError for sound that can't be used, naming its place.
    """

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        projector_stack: int,
        max_encoder_frames: int,
        audio_lead_silence: float,
        audio_tail_silence: float,
        chat_template: str | None = None,
    ):
        lengths = (projector_stack, max_encoder_frames, audio_lead_silence, audio_tail_silence)
        super().__init__(feature_extractor, tokenizer, *lengths, chat_template)
        if chat_template is None:
            self.chat_template, _ = listening_template(tokenizer)
        else:
            refuse_costly(chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; of a run's folder it is the best checkpoint's, see the model's `from_pretrained`.

        Never runs code from the folder, and never asks on stdin.
        """
        kwargs["trust_remote_code"] = False
        inherited = super().from_pretrained

        def load(folder, *args, **kwargs):
            check_processor(folder)
            return inherited(folder, *args, **kwargs)

        if is_run_folder(pretrained_model_name_or_path):
            return read_checkpoint(pretrained_model_name_or_path, lambda folder: load(folder, *args, **kwargs))
        return load(pretrained_model_name_or_path, *args, **kwargs)

    def __call__(self, text=None, audio=None, **kwargs) -> BatchFeature:
        kwargs.setdefault("padding", True)
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("return_tensors", "pt")
        rate = _taken_rate(kwargs)
        clips = [read_own_audio(clip, f"audio {n}", rate) for n, clip in enumerate(_each_clip(audio), 1)]
        return super().__call__(text=text, audio=[load_clip(clip) for clip in clips] or None, **kwargs)

    def apply_chat_template(
        self,
        conversation,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """Return text; with `tokenize` input_ids; with `return_dict` as well all inputs of the model.

        Arguments as in transformers, whose own reader of audio parts supports no stretches and no silence. A prompt
        has the empty think block that precedes every answer in training.
        """
        return_tensors = kwargs.pop("return_tensors", "pt")
        kwargs.setdefault("enable_thinking", False)
        call = {name: kwargs.pop(name) for name in CALL_KEYWORDS if name in kwargs} | (processor_kwargs or {})
        is_batch = isinstance(conversation[0], list | tuple)
        dialogues, clips = _read_dialogues(conversation if is_batch else [conversation], is_batch, _taken_rate(call))
        text = super().apply_chat_template(dialogues if is_batch else dialogues[0], tokenize=False, **kwargs)
        if not tokenize:
            return text
        defaults = {"return_tensors": return_tensors, "add_special_tokens": False}
        inputs = self(text=text, audio=clips, **(defaults | call))
        return inputs if return_dict else inputs["input_ids"]


def load_processor(folder: str | os.PathLike) -> Qwen3AudioProcessor:
    """The processor of a folder of trained weights; its lengths must agree with those of its model.

    Raises CheckpointError, also for a chat template that can't be rendered, or not in a reasonable time.
    """
    folder = Path(folder)
    files = files_of(folder)
    for needed in (MODEL_CONFIG, PROCESSOR_CONFIG):
        if needed not in files:
            raise CheckpointError(f"{folder}: {needed} is missing")
    config = read_json_object(files[MODEL_CONFIG])
    with reading(folder, "its processor can't be loaded"):
        processor = Qwen3AudioProcessor.from_pretrained(folder)
        lengths = (processor.frames, processor.audio_token_id)
        expected = (frames_of(config), config["audio_token_id"])
        fault = template_fault(processor.tokenizer, processor.chat_template)
    if lengths != expected:
        raise CheckpointError(f"{folder}: its processor counts {lengths}, its model {expected}")
    if fault is not None:
        raise CheckpointError(f"{folder}: its chat template can't be used ({fault})")
    return processor


def encoder_of(processor: Qwen3AudioProcessor, **rows: Any) -> DialogueEncoder:
    """The encoder whose prompts and labels are those of a processor. rows: train_on, max_length and teach of
    `DialogueEncoder`, for rows to train on.
    """
    return DialogueEncoder(
        processor.tokenizer,
        processor.frames,
        audio_token_id=processor.audio_token_id,
        chat_template=processor.chat_template,
        **rows,
    )


def _read_dialogues(dialogues: Sequence, is_batch: bool, rate: int) -> tuple[list[list[dict]], list[AudioClip]]:
    """(dialogues with bare audio parts, as a chat template takes them; their clips). Raises DataError."""
    faults: list[str] = []
    unused: list[str] = []
    clips: list[AudioClip] = []

    def read(message: Any, where: str) -> dict:
        if not isinstance(message, Mapping):
            faults.append(f"{where} is not an object with `role` and `content`")
            return {}
        wrong_keys, others = unknown_keys(message, MESSAGE_KEYS, where)
        faults.extend(wrong_keys)
        unused.extend(f"`{key}` in a message" for key in others)
        known: dict[str, Any] = {"role": ROLES.get(str(message.get("role")), message.get("role"))}
        if known["role"] not in ROLES.values() and not wrong_keys:
            faults.append(f"{where}: unknown role {quoted.repr(known['role'])}; known are {', '.join(ROLES)}")
        if calls := parse_tool_calls(message.get("tool_calls"), where, faults):
            known["tool_calls"] = [call.record for call in calls]
        if reasoning := parse_reasoning(message, where, faults):
            known["reasoning_content"] = reasoning
        content = message.get("content")
        if content is None:
            if not (wrong_keys or calls or known["role"] == "tool"):
                faults.append(f"{where} has no `content`")
            return {**message, **known}
        parts = parse_content(content, where, own_roots(), faults, unused, rate)
        clips.extend(part for part in parts if isinstance(part, AudioClip))
        bare = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "audio"} for part in parts]
        return {**message, **known, "content": content if isinstance(content, str) else bare}

    def place(dialogue: int, message: int) -> str:
        return f"dialogue {dialogue}, message {message}" if is_batch else f"message {message}"

    read_dialogues = [
        [read(message, place(d, m)) for m, message in enumerate(dialogue, 1)] for d, dialogue in enumerate(dialogues, 1)
    ]
    raise_or_warn(faults, unused)
    return read_dialogues, clips


def _taken_rate(keywords: dict) -> int:
    """Takes the sampling rate of bare arrays out of keywords, which may be transformers' nested ones."""
    nested = dict(keywords.get("audio_kwargs") or {})
    rates = [rate for rate in (nested.pop("sampling_rate", None), keywords.pop("sampling_rate", None)) if rate]
    if "audio_kwargs" in keywords:
        keywords["audio_kwargs"] = nested
    try:
        return whole_rate(rates[-1]) if rates else SAMPLE_RATE
    except ValueError as error:
        raise UsageError(f"the audio {error}") from error


def _each_clip(audio: Any) -> Iterator:
    """One clip, several, or transformers' list of a list for each text, as one clip after another."""
    if audio is None:
        return
    if isinstance(audio, list | tuple) and not is_one_clip(audio):
        for clip in audio:
            yield from _each_clip(clip)
    else:
        yield audio
