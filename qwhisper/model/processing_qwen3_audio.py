"""The processor: text with audio placeholders and waveforms in, token ids and log-mel features out.

Arrays at 16 kHz and a chat template that is given; `processor` adds all other forms of audio and their checks.
"""

from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.tokenization_utils_base import AddedToken, PreTrainedTokenizerBase

from qwhisper.data.template_texts import AUDIO_TOKEN
from qwhisper.data.windows import clip_windows
from qwhisper.frames import SAMPLE_RATE, FrameArithmetic
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.mel import packed_log_mel


def add_audio_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Makes the placeholder a token and returns its id: the next free one.

    Qwen3 has 151,669 tokens in 151,936 rows, so this takes a spare row; if an LM has none, the id lies outside its
    vocabulary, which the model allows for.
    """
    tokenizer.add_tokens(AddedToken(AUDIO_TOKEN, special=True, normalized=False), special_tokens=True)
    return tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)


class Qwen3AudioProcessor(ProcessorMixin):
    """Feature extractor + tokenizer + the lengths that the model was trained with.

    `processor(text=..., audio=...)` takes texts with one `<|audio_pad|>` a clip and as many clips of any length, as
    arrays at 16 kHz. It returns input_ids, attention_mask (left-padded), input_features [windows, mel bins, frames] and
    input_features_mask [windows, frames].
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
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

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
        return super().__call__(text=text, audio=audio, **kwargs)

    def apply_chat_template(self, conversation, *, processor_kwargs: dict[str, Any] | None = None, **kwargs):
        """As in transformers. A prompt has the empty think block that precedes every answer in training."""
        kwargs.setdefault("enable_thinking", False)
        call = {"add_special_tokens": False, **(processor_kwargs or {})}
        return super().apply_chat_template(conversation, processor_kwargs=call, **kwargs)

    def _process_audio(self, audio, sampling_rate: int = SAMPLE_RATE, **kwargs) -> tuple[dict, list[str]]:
        if sampling_rate != SAMPLE_RATE:
            raise ValueError(f"arrays at {sampling_rate} Hz: resample them to {SAMPLE_RATE} Hz first")
        windows = [window for waveform in audio for window in clip_windows(waveform, self.frames)]
        waveforms = torch.from_numpy(np.concatenate(windows))
        mel, lengths = packed_log_mel(waveforms, [len(w) for w in windows], self.feature_extractor.feature_size)
        features = torch.nn.utils.rnn.pad_sequence(mel.split(lengths), batch_first=True).transpose(1, 2)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        replacements = [AUDIO_TOKEN * self.frames.num_tokens(len(waveform)) for waveform in audio]
        return {"input_features": features, "input_features_mask": mask.long()}, replacements
