"""The processor: text with audio placeholders and waveforms in, token ids and log-mel features out.

Arrays at 16 kHz and a chat template that is given; `processor` adds all other forms of audio and their checks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.audio_utils import AudioInput
from transformers.tokenization_utils_base import AddedToken, PreTrainedTokenizerBase, TextInput

from qwhisper.data.template_texts import AUDIO_TOKEN
from qwhisper.data.windows import clip_windows
from qwhisper.frames import DEFAULT_LEAD_SILENCE_S, DEFAULT_TAIL_SILENCE_S, SAMPLE_RATE, FrameArithmetic
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.mel import packed_log_mel


def add_audio_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Makes the placeholder a token and returns its id: the next free one.

    Qwen3 has 151,669 tokens in 151,936 rows, so this takes a spare row; if an LM has none, the id lies outside its
    vocabulary, which the model allows for.
    """
    tokenizer.add_tokens(AddedToken(AUDIO_TOKEN, special=True, normalized=False), special_tokens=True)
    return tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)


# Defaults of a call that differ from the tokenizer's. Prompts of different lengths are padded on the left.
TEXT_DEFAULTS = {"padding": True, "padding_side": "left", "return_tensors": "pt"}


class Qwen3AudioProcessor(ProcessorMixin):
    """Feature extractor + tokenizer + the lengths that the model was trained with.

    `processor(text=..., audio=...)` takes texts with one `<|audio_pad|>` a clip and as many clips of any length, as
    arrays at 16 kHz. It returns input_ids, attention_mask (left-padded), input_features [clips, mel bins, frames] and
    input_features_mask [clips, frames], 1 for a frame. A clip's row holds its windows one after another, with one
    frame between them and any number behind them that are no frames: zeros, with mask 0.
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

    def __call__(
        self,
        text: TextInput | list[TextInput] | None = None,
        audio: AudioInput | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        _refuse_other_inputs(kwargs)
        if kwargs.get("padding_side", "left") is None:
            del kwargs["padding_side"]
        own = dict(kwargs.pop("text_kwargs", None) or {})
        given = {*kwargs, *own, *(kwargs.get("common_kwargs") or {})}
        given |= self.tokenizer.init_kwargs.keys() - {"padding_side"}  # that one is for training
        texts = own | {name: value for name, value in TEXT_DEFAULTS.items() if name not in given}
        return super().__call__(text=text, audio=audio, text_kwargs=texts, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs) -> None:
        """As in transformers, whose older versions don't compare the numbers of placeholders and clips."""
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        placeholders = sum(sample.count(AUDIO_TOKEN) for sample in text or ())
        clips = 0 if audio is None else len(audio)
        if text is not None and placeholders != clips:
            raise ValueError(
                f"The total number of {AUDIO_TOKEN} tokens in the prompts should be the same as the number of audio "
                f"inputs passed. Found total {placeholders} {AUDIO_TOKEN} tokens and {clips} audio inputs."
            )

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        """As in transformers. A prompt has the empty think block that precedes every answer in training."""
        template = self.named_template(chat_template)
        if "enable_thinking" in template:
            kwargs.setdefault("enable_thinking", False)
        call = {"add_special_tokens": False, **(processor_kwargs or {})}
        return super().apply_chat_template(conversation, template, processor_kwargs=call, **kwargs)

    def named_template(self, name: str | None = None) -> str:
        """The chat template of that name, or the default one; a name that none has is a template itself."""
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        found = templates.get("default") if name is None else templates.get(name, name)
        if found is None:
            raise ValueError(f"no chat template is named default ({', '.join(templates)}): give `chat_template`")
        return found

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs) -> str:
        """The placeholders of a clip: as many as the model makes tokens of its row."""
        windows = _window_lengths(audio_inputs["input_features_mask"][audio_idx])
        return AUDIO_TOKEN * sum(map(self.frames.mel_tokens, windows))

    def _process_audio(self, audio, sampling_rate: int | None = None, **kwargs) -> tuple[dict, list[str]]:
        if sampling_rate not in (None, SAMPLE_RATE):
            raise ValueError(f"arrays at {sampling_rate} Hz: resample them to {SAMPLE_RATE} Hz first")
        rows = [_row(clip_windows(clip, self.frames), self.feature_extractor.feature_size) for clip in audio]
        longest = max(len(mask) for _, mask in rows)
        inputs = {  # lists, of which transformers makes the tensors that are asked for
            "input_features": [np.pad(features, [(0, 0), (0, longest - len(mask))]) for features, mask in rows],
            "input_features_mask": [np.pad(mask, (0, longest - len(mask))) for _, mask in rows],
        }
        return inputs, [self.replace_audio_token(inputs, clip) for clip in range(len(rows))]


def _row(windows: Sequence[np.ndarray], num_mel_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """A clip's features [mel bins, frames] float32 and mask [frames] int64, of its windows [samples] each."""
    waveform = torch.from_numpy(np.concatenate(windows))
    mel, lengths = packed_log_mel(waveform, [len(window) for window in windows], num_mel_bins)
    num_frames = sum(lengths) + len(lengths) - 1
    mask = np.ones(num_frames, dtype=np.int64)
    mask[np.cumsum([n + 1 for n in lengths[:-1]], dtype=np.int64) - 1] = 0
    features = np.zeros((num_mel_bins, num_frames), dtype=np.float32)
    features[:, mask == 1] = mel.numpy().T
    return features, mask


def _window_lengths(mask: np.ndarray) -> list[int]:
    """Mel frames of each window of a row: the runs of ones in its mask [frames]."""
    edges = np.flatnonzero(np.diff(np.pad(np.asarray(mask), 1)))
    return (edges[1::2] - edges[::2]).tolist()


def _refuse_other_inputs(kwargs: Any) -> None:
    """Refuse what transformers' processors of other models take, and this one would ignore."""
    for name in ("images", "videos", "load_audio_from_video"):
        value = kwargs.get(name)
        if value is not None and value is not False:
            raise ValueError(
                f"`{name}` can't be used: this model reads text and audio; take the sound out of a video first"
            )
    if (kwargs.get("audio_kwargs") or {}).get("truncation"):
        raise ValueError("`truncation` of audio: clips are never cut; give the part to hear as an array")
