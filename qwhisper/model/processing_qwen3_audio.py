"""The processor: text with audio placeholders and clips in, token ids and log-mel features out."""

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.tokenization_utils_base import AddedToken, PreTrainedTokenizerBase

from qwhisper.data.audio import clip_windows
from qwhisper.data.template import AUDIO_TOKEN, listening_template
from qwhisper.frames import FrameArithmetic
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.mel import packed_log_mel


def add_audio_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Makes the placeholder a token and returns its id: the next free one.

    Qwen3 has 151,669 tokens in 151,936 rows, so this takes a spare row; where an LM has none the id lies outside its vocabulary,
    which the model allows for.
    """
    tokenizer.add_tokens(AddedToken(AUDIO_TOKEN, special=True, normalized=False), special_tokens=True)
    return tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)


class Qwen3AudioProcessor(ProcessorMixin):
    """Feature extractor + tokenizer + the lengths that the model was trained with.

    `processor(text=..., audio=...)` takes texts with one `<|audio_pad|>` a clip and clips of any length at 16 kHz; returns
    input_ids, attention_mask (left-padded), input_features [windows, mel bins, frames] and input_features_mask [windows, frames].
    `apply_chat_template` takes messages with `{"type": "audio", "audio" | "path": ...}` parts.
    """

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        chat_template=None,
        projector_stack: int = 4,
        max_encoder_frames: int = 1500,
        audio_lead_silence: float = 0.0,
        audio_tail_silence: float = 0.0,
    ):
        self.audio_token = AUDIO_TOKEN
        self.audio_token_id = add_audio_token(tokenizer)
        self.projector_stack = projector_stack
        self.max_encoder_frames = max_encoder_frames
        self.audio_lead_silence = audio_lead_silence
        self.audio_tail_silence = audio_tail_silence
        if chat_template is None:
            chat_template, _ = listening_template(tokenizer)
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @classmethod
    def for_model(cls, feature_extractor, tokenizer, config: Qwen3AudioConfig, chat_template: str) -> "Qwen3AudioProcessor":
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

    def _process_audio(self, audio, **kwargs) -> tuple[dict, list[str]]:
        clips = [np.asarray(clip, dtype=np.float32) for clip in audio]
        windows = [window for clip in clips for window in clip_windows(clip, self.frames)]
        waveforms = torch.from_numpy(np.concatenate(windows))
        mel, lengths = packed_log_mel(waveforms, [len(w) for w in windows], self.feature_extractor.feature_size)
        features = torch.nn.utils.rnn.pad_sequence(mel.split(lengths), batch_first=True).transpose(1, 2)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        replacements = [AUDIO_TOKEN * self.frames.num_tokens(len(clip)) for clip in clips]
        return {"input_features": features, "input_features_mask": mask.long()}, replacements
