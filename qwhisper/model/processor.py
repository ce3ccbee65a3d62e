"""The processor of the package: all forms of messages and audio, a template that can listen, and a run's folder.

The whole package, and transformers' Auto classes, use this class.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import BatchFeature
from transformers.audio_utils import AudioInput
from transformers.processing_utils import AudioKwargs, TextKwargs
from transformers.tokenization_utils_base import TextInput

from qwhisper.checkpoint.names import MODEL_CONFIG, PROCESSOR_CONFIG
from qwhisper.checkpoint.reading import read_run
from qwhisper.data.clips import (
    AudioClip,
    is_list,
    load_clip,
    own_roots,
    parse_content,
    quoted,
    raise_or_warn,
    read_own_audio,
)
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.keys import unknown_keys
from qwhisper.data.messages import KNOWN as MESSAGE_KEYS
from qwhisper.data.messages import ROLES, parse_reasoning
from qwhisper.data.template import listening_template, refuse_costly, template_fault
from qwhisper.data.tools import parse_tool_calls
from qwhisper.data.waveform import is_one_clip, whole_rate
from qwhisper.errors import CheckpointError, UsageError
from qwhisper.files import files_of, read_json_object
from qwhisper.frames import DEFAULT_LEAD_SILENCE_S, DEFAULT_TAIL_SILENCE_S, SAMPLE_RATE
from qwhisper.model import processing_qwen3_audio
from qwhisper.model.assistant_mask import add_assistant_masks, assistant_spans
from qwhisper.model.trained_folder import check_processor, frames_of, reading

# Arguments of a call, which `apply_chat_template` takes among those of the chat template as well.
CALL_KEYWORDS = {*TextKwargs.__annotations__, *AudioKwargs.__annotations__} | {
    "text_kwargs", "audio_kwargs", "common_kwargs", "return_mm_token_type_ids", "return_text_replacement_offsets",
}  # fmt: skip
# Other arguments of transformers' processors, and what to do instead.
REFUSED_OPTIONS = {
    "load_audio_from_video": "this model reads text and audio; take the sound out of a video first",
    "sanitize_control_tokens": "`DialogueEncoder.encode_prompt` makes no control token of a text; use it instead",
}
# Fields by which the tokens of answers are found, and the argument that asks for each.
OFFSETS = {"offset_mapping": "return_offsets_mapping", "text_replacement_offsets": "return_text_replacement_offsets"}


class Qwen3AudioProcessor(processing_qwen3_audio.Qwen3AudioProcessor):
    """Feature extractor + tokenizer + the lengths that the model was trained with.

    `processor(text=..., audio=...)` takes texts with one `<|audio_pad|>` a clip and as many clips of any length: files,
    data URLs, bytes, arrays (at 16 kHz, or at `sampling_rate`, or as a pair with their rate) or any other form that
    `qwhisper.data.clips` reads. It returns input_ids, attention_mask (left-padded), input_features [clips, mel bins,
    frames] and input_features_mask [clips, frames]; a row holds the windows of its clip, see
    `processing_qwen3_audio`. `apply_chat_template` takes messages whose parts are read, and
    refused, as those of a file of dialogues are, except that paths start in the current folder and lead anywhere. It
    trusts its texts, as transformers does: a `<|im_end|>` in them becomes that token (`DialogueEncoder` makes none).

    Both raise DataError for what is no audio, and BadClipError for sound that can't be used, naming its place.
    """

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        projector_stack: int = 4,
        max_encoder_frames: int = 1500,
        audio_lead_silence: float = DEFAULT_LEAD_SILENCE_S,
        audio_tail_silence: float = DEFAULT_TAIL_SILENCE_S,
        chat_template: str | dict[str, str] | None = None,
    ):
        lengths = (projector_stack, max_encoder_frames, audio_lead_silence, audio_tail_silence)
        super().__init__(feature_extractor, tokenizer, *lengths, chat_template)
        if chat_template is None:
            self.chat_template, _ = listening_template(tokenizer)
        for template in chat_template.values() if isinstance(chat_template, dict) else [chat_template]:
            if template is not None:
                refuse_costly(template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; of a run's folder it is the best checkpoint's, see the model's `from_pretrained`.

        Never runs code from the folder, and never asks on stdin.
        """
        kwargs["trust_remote_code"] = False
        inherited = super().from_pretrained

        def load(folder):
            check_processor(folder)
            return inherited(folder, *args, **kwargs)

        name = pretrained_model_name_or_path
        if os.path.isdir(name) and (subfolder := kwargs.pop("subfolder", None)):
            name = os.path.join(name, subfolder)
        return read_run(name, load)

    def __call__(
        self,
        text: TextInput | list[TextInput] | None = None,
        audio: AudioInput | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        keywords = dict(kwargs)
        rate = _taken_rate(keywords)
        clips = [read_own_audio(clip, f"audio {n}", rate) for n, clip in enumerate(_each_clip(audio), 1)]
        return super().__call__(text=text, audio=[load_clip(clip) for clip in clips] or None, **keywords)

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "auto",
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """Return text; with `tokenize` input_ids, as lists; with `return_dict` as well all inputs of the model, as
        PyTorch tensors. return_tensors: another form of these.

        return_assistant_tokens_mask: add `assistant_masks`, 1 for the tokens that the template marks with
        `{% generation %}`; of a template without such marks for those that training supervises: each answer, with the
        token that ends it. Raises ValueError if they can't be found.

        Other arguments as in transformers, whose own reader of audio parts supports no stretches and no silence. A
        prompt has the empty think block that precedes every answer in training.
        """
        for name in REFUSED_OPTIONS:
            if kwargs.pop(name, None):
                raise UsageError(f"`{name}` can't be used: {REFUSED_OPTIONS[name]}")
        template = self.named_template(chat_template)
        call = {name: kwargs.pop(name) for name in CALL_KEYWORDS & kwargs.keys()} | (processor_kwargs or {})
        is_batch = bool(len(conversation)) and is_list(conversation[0])
        rate = _taken_rate(call)
        dialogues, clips = _read_dialogues(conversation if is_batch else [conversation], is_batch, rate)
        inherited = super().apply_chat_template

        def render(dialogue: list[dict], **changed: Any) -> str:
            return inherited(dialogue, template, tokenize=False, **{**kwargs, **changed})

        texts = [render(dialogue) for dialogue in dialogues]
        if not tokenize:
            return texts if is_batch else texts[0]
        wanted = {**(call.get("common_kwargs") or {}), **(call.get("text_kwargs") or {}), **call}
        if "return_tensors" not in wanted and (return_tensors != "auto" or not return_dict):
            call["return_tensors"] = None if return_tensors == "auto" else return_tensors
        if return_assistant_tokens_mask:
            call |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        inputs = self(text=texts, audio=clips, sampling_rate=rate, **{"add_special_tokens": False, **call})
        if return_assistant_tokens_mask:
            spans = [
                assistant_spans(self.tokenizer, template, dialogue, text, render, kwargs)
                for dialogue, text in zip(dialogues, texts, strict=True)
            ]
            add_assistant_masks(inputs, spans)
            for name, asked in OFFSETS.items():
                if not wanted.get(asked):
                    del inputs[name]
        return inputs if return_dict else inputs["input_ids"]


def load_processor(folder: str | os.PathLike) -> Qwen3AudioProcessor:
    """The processor of a folder of trained weights; its lengths must agree with those of its model.

    Raises CheckpointError, also for a chat template that can't be rendered, or not in a reasonable time.
    """
    folder = Path(folder)
    files = files_of(folder)
    for needed, hint in ((MODEL_CONFIG, ""), (PROCESSOR_CONFIG, "; write it with the processor's save_pretrained")):
        if needed not in files:
            raise CheckpointError(f"{folder}: {needed} is missing{hint}")
    config = read_json_object(files[MODEL_CONFIG])
    with reading(folder, "its processor can't be loaded"):
        processor = Qwen3AudioProcessor.from_pretrained(folder)
        lengths = (processor.frames, processor.audio_token_id)
        expected = (frames_of(config), config["audio_token_id"])
        fault = template_fault(processor.tokenizer, processor.named_template())
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
        chat_template=processor.named_template(),
        **rows,
    )


def _read_dialogues(dialogues: Sequence, is_batch: bool, rate: int) -> tuple[list[list[dict]], list[AudioClip]]:
    """(dialogues with bare audio parts, as a chat template takes them; their clips). Raises DataError."""
    faults: list[str] = []
    unused: list[str] = []
    clips: list[AudioClip] = []

    def read(message: Any, where: str) -> dict:
        message = _as_mapping(message)
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
        if isinstance(content, list | tuple):
            content = [_as_mapping(part) for part in content]
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


def _as_mapping(value: Any) -> Any:
    """A message or part that is an object of Pydantic or a dataclass as a dict; anything else as it is."""
    if hasattr(value, "model_dump"):
        return value.model_dump(exclude_none=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type | AudioClip):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def _taken_rate(keywords: dict) -> int:
    """Take the sampling rate of bare arrays out of keywords, which may be transformers' nested ones."""
    rates = [keywords.pop("sampling_rate", None)]
    for group in ("audio_kwargs", "common_kwargs"):
        if keywords.get(group):
            keywords[group] = dict(keywords[group])
            rates.append(keywords[group].pop("sampling_rate", None))
    try:
        stated = {whole_rate(rate) for rate in rates if rate is not None}
    except ValueError as error:
        raise UsageError(f"the audio {error}") from error
    if len(stated) > 1:
        raise UsageError(f"the audio has two sampling rates, {' and '.join(map(str, sorted(stated)))}; give one")
    return next(iter(stated), SAMPLE_RATE)


def _each_clip(audio: Any) -> Iterator:
    """One clip, several, or transformers' list of a list for each text, as one clip after another."""
    if audio is None:
        return
    if isinstance(audio, list | tuple) and not is_one_clip(audio):
        for clip in audio:
            yield from _each_clip(clip)
    else:
        yield audio
