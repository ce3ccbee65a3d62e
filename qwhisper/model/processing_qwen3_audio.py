"""The processor: text with audio placeholders and clips in, token ids and log-mel features out."""

from pathlib import Path

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.tokenization_utils_base import AddedToken, PreTrainedTokenizerBase

from qwhisper.data.audio import clip_windows, load_audio
from qwhisper.data.template import AUDIO_TOKEN, listening_template, refuse_costly
from qwhisper.frames import FrameArithmetic
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.mel import packed_log_mel


def add_audio_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Makes the placeholder a token and returns its id: the next free one.

    Qwen3 has 151,669 tokens in 151,936 rows, so this takes a spare row; where an LM has none the id lies outside its
    vocabulary, which the model allows for.
    """
    tokenizer.add_tokens(AddedToken(AUDIO_TOKEN, special=True, normalized=False), special_tokens=True)
    return tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)


class Qwen3AudioProcessor(ProcessorMixin):
    """Feature extractor + tokenizer + the lengths that the model was trained with.

    `processor(text=..., audio=...)` takes texts with one `<|audio_pad|>` a clip and as many clips, each a file or a
    waveform at 16 kHz, of any length; returns input_ids, attention_mask (left-padded), input_features [windows, mel
    bins, frames] and input_features_mask [windows, frames]. `apply_chat_template` takes messages with `{"type":
    "audio", "audio" | "path": ...}` parts. It trusts its texts, as transformers does: a `<|im_end|>` in them becomes
    that token (the collator's does not).
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
        self.audio_token = AUDIO_TOKEN
        self.audio_token_id = add_audio_token(tokenizer)
        self.projector_stack = projector_stack
        self.max_encoder_frames = max_encoder_frames
        self.audio_lead_silence = audio_lead_silence
        self.audio_tail_silence = audio_tail_silence
        if chat_template is None:
            chat_template, _ = listening_template(tokenizer)
        else:
            refuse_costly(chat_template)
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; code that lies in the folder is never run, nor asked about on stdin."""
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs | {"trust_remote_code": False})

    @classmethod
    def for_model(
        cls, feature_extractor, tokenizer, config: Qwen3AudioConfig, chat_template: str
    ) -> "Qwen3AudioProcessor":
        """The processor whose lengths are those of `config`."""
        return cls(
            feature_extractor,
            tokenizer,
            chat_template=chat_template,
            projector_stack=config.projector_stack,
            max_encoder_frames=config.audio_config.max_source_positions,
            audio_lead_silence=config.audio_lead_silence,
            audio_tail_silence=config.audio_tail_silence,
        )

    @property
    def frames(self) -> FrameArithmetic:
        return FrameArithmetic(
            stack=self.projector_stack,
            max_encoder_frames=self.max_encoder_frames,
            lead_silence_s=self.audio_lead_silence,
            tail_silence_s=self.audio_tail_silence,
        )

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "input_features", "input_features_mask"]

    def __call__(self, text=None, audio=None, **kwargs) -> BatchFeature:
        kwargs.setdefault("padding", True)
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("return_tensors", "pt")
        return super().__call__(text=text, audio=None if audio is None else _as_waveforms(audio), **kwargs)

    def apply_chat_template(
        self,
        conversation,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """Text, or with `tokenize` input_ids, or with `return_dict` as well all that the model takes.

        Arguments as in transformers. Its own way of reading audio parts needs librosa or torchcodec; here every file
        that soundfile knows is read. A prompt has the empty think block that every answer was trained behind.
        """
        return_tensors = kwargs.pop("return_tensors", "pt")
        kwargs.setdefault("enable_thinking", False)
        text = super().apply_chat_template(conversation, tokenize=False, **kwargs)
        if not tokenize:
            return text
        dialogues = [conversation] if isinstance(conversation[0], dict) else conversation
        clips = [clip for dialogue in dialogues for message in dialogue for clip in _clips(message)]
        inputs = self(
            text=text,
            audio=clips or None,
            return_tensors=return_tensors,
            add_special_tokens=False,
            **(processor_kwargs or {}),
        )
        return inputs if return_dict else inputs["input_ids"]

    def _process_audio(self, audio, **kwargs) -> tuple[dict, list[str]]:
        clips = [np.asarray(clip, dtype=np.float32) for clip in audio]
        windows = [window for clip in clips for window in clip_windows(clip, self.frames)]
        waveforms = torch.from_numpy(np.concatenate(windows))
        mel, lengths = packed_log_mel(waveforms, [len(w) for w in windows], self.feature_extractor.feature_size)
        features = torch.nn.utils.rnn.pad_sequence(mel.split(lengths), batch_first=True).transpose(1, 2)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        replacements = [AUDIO_TOKEN * self.frames.num_tokens(len(clip)) for clip in clips]
        return {"input_features": features, "input_features_mask": mask.long()}, replacements


def _clips(message: dict) -> list:
    """The audio parts of a message: files or waveforms."""
    parts = [] if isinstance(message["content"], str) else message["content"]
    return [part.get("audio", part.get("path")) for part in parts if part["type"] == "audio"]


def _as_waveforms(audio) -> list[np.ndarray]:
    """One clip or several, each a file or a waveform, as waveforms."""
    one = isinstance(audio, str | Path) or (not isinstance(audio[0], str | Path) and np.ndim(audio[0]) == 0)
    return [
        load_audio(clip) if isinstance(clip, str | Path) else np.asarray(clip) for clip in ([audio] if one else audio)
    ]
