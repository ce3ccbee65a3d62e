"""From audio to embeddings that the language model reads: log-mel, encoder and projector, laid over the placeholders.

Three forms of audio take this path: waveforms, a processor's features, and output of the encoder that was kept.
"""

import itertools

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, torch_compilable_check

from qwhisper.frames import encoder_frames
from qwhisper.model.audio_layout import (
    EncoderLayout,
    MelLayout,
    encoder_layout,
    on_device,
    stack_groups,
    window_lengths,
)
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from qwhisper.model.mel import log_mel, packed_log_mel
from qwhisper.model.projector import AudioProjection

AUDIO_INPUTS = ("audio_waveforms", "input_features", "audio_features")


def device_of(module: nn.Module) -> torch.device:
    """Where a module with a weight computes; accelerate's hook knows it while the weight is offloaded."""
    device: torch.device = module.weight.device  # type: ignore[assignment]
    if device.type != "meta":
        return device
    hook = getattr(module, "_hf_hook", None)
    known = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", (hook,))]
    return next((torch.device(found) for found in known if found is not None), device)


class AudioEmbedding(PreTrainedModel):
    """The part of `Qwen3AudioModel` that embeds audio and text."""

    config: Qwen3AudioConfig
    audio_tower: TrueLengthWhisperEncoder
    multi_modal_projector: AudioProjection

    @property
    def encoder_is_trained(self) -> bool:
        """Whether any parameter of the encoder is trained, LoRA on it included."""
        return any(parameter.requires_grad for parameter in self.audio_tower.parameters())

    def train(self, mode: bool = True) -> "AudioEmbedding":
        """A frozen encoder stays in evaluation mode: its dropout would blur features that nothing learns from."""
        super().train(mode)
        if not self.encoder_is_trained:
            self.audio_tower.eval()
        return self

    @property
    def audio_device(self) -> torch.device:
        return device_of(self.audio_tower.conv1)

    @property
    def text_device(self) -> torch.device:
        return device_of(self.get_input_embeddings())

    def encode_audio(self, waveforms: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """waveforms: [sum(lengths)] float32 at 16 kHz, windows end to end.

        Returns as `encode_mel`.
        """
        mel, mel_lengths = packed_log_mel(
            waveforms.to(self.audio_device), lengths, self.config.audio_config.num_mel_bins
        )
        return self.encode_mel(mel, mel_lengths)

    def encode_mel(self, mel: Tensor, mel_lengths: list[int]) -> tuple[Tensor, list[int]]:
        """mel: [sum(mel_lengths), num_mel_bins], each window with the configuration's silence around its speech.

        Returns ([frames, d_model], frames of each window): of the speech and a short rest after it, see
        `FrameArithmetic.kept_frames`.
        """
        return self._kept(self._encode_windows(mel, mel_lengths).last_hidden_state, mel_lengths)

    def _encode_windows(self, mel: Tensor, mel_lengths: list[int], **kwargs) -> BaseModelOutput:
        device = self.audio_device
        return self._encode(mel.to(device), on_device(encoder_layout(mel_lengths), device), **kwargs)

    def _kept(self, hidden_states: Tensor, mel_lengths: list[int]) -> tuple[Tensor, list[int]]:
        """hidden_states: [encoder frames, d_model] of all windows. Returns as `encode_mel`."""
        arithmetic = self.config.frames
        windows = hidden_states.split([encoder_frames(n) for n in mel_lengths])
        kept = [frames[arithmetic.kept_frames(len(frames))] for frames in windows]
        return torch.cat(kept), [len(frames) for frames in kept]

    def _encode(self, mel: Tensor, layout: EncoderLayout, **kwargs) -> BaseModelOutput:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_is_trained):
            return self.audio_tower(mel, layout, return_dict=True, **kwargs)

    def encoded_row(self, row: Tensor, mel: MelLayout, encoder: EncoderLayout) -> Tensor:
        """The encoder's output [encoder frames, d_model] for a row of samples. Waits for no device.

        row: see `audio_layout.waveform_row`; mel, encoder: see `AudioLayout`. All lie on the encoder's device.
        """
        return self._encode(log_mel(row, mel, self.config.audio_config.num_mel_bins), encoder).last_hidden_state

    def projected(self, frames: Tensor, groups: Tensor) -> Tensor:
        """Audio tokens [tokens, hidden_size], in the projector's dtype, of the encoder's output [frames, d_model].

        groups: int64 [tokens, stack], see `AudioLayout`. Waits for a device only to move the frames to another one.
        """
        device = device_of(self.multi_modal_projector.linear_1)
        return self.multi_modal_projector(frames.to(device), groups.to(device))

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        audio_waveforms: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Projected audio tokens of all clips, in order; exactly one of the three inputs.

        input_features: [clips, num_mel_bins, mel_frames] with input_features_mask [clips, mel_frames], the processor's:
        each run of ones is a window of its clip. Without a mask each row is one window.
        audio_waveforms: [samples] float32, windows end to end, audio_lengths [windows] their samples, the collator's.
        audio_features: [frames, d_model], cached output of `encode_audio`, audio_lengths [windows] their frames.
        Returns last_hidden_state [frames, d_model] and pooler_output [tokens, hidden_size] in the projector's dtype;
        from input_features also hidden_states and attentions of the encoder if output_hidden_states and
        output_attentions ask for them, see `TrueLengthWhisperEncoder.forward`.
        """
        encoded = BaseModelOutput()
        if audio_waveforms is not None:
            frames, lengths = self.encode_audio(audio_waveforms, audio_lengths.tolist())
        elif input_features is not None:
            mel, mel_lengths = self._windows(input_features, input_features_mask)
            encoded = self._encode_windows(mel, mel_lengths, **kwargs)
            frames, lengths = self._kept(encoded.last_hidden_state, mel_lengths)
        elif audio_features is not None:
            if self.training and self.encoder_is_trained and not audio_features.requires_grad:
                raise ValueError("an encoder that is trained learns nothing from cached audio_features: pass its input")
            frames, lengths = audio_features, audio_lengths.tolist()
        else:
            raise ValueError(f"no audio: pass one of {', '.join(AUDIO_INPUTS)}")
        device = device_of(self.multi_modal_projector.linear_1)
        ends = list(itertools.accumulate(lengths, initial=0))
        groups = stack_groups(list(itertools.pairwise(ends)), self.config.projector_stack, nothing=ends[-1])
        tokens = self.multi_modal_projector(frames.to(device), groups.to(device))
        return BaseModelOutputWithPooling(
            last_hidden_state=frames,
            pooler_output=tokens,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _windows(self, input_features: Tensor, mask: Tensor | None) -> tuple[Tensor, list[int]]:
        """([mel frames, num_mel_bins] of all windows end to end, mel frames of each); see `get_audio_features`."""
        most = 2 * self.config.audio_config.max_source_positions
        if mask is None:
            mask = torch.ones(input_features.shape[::2], dtype=torch.bool)
            found = "input_features_mask is missing, so each row is one window"
        else:
            found = "input_features_mask has no 0 where one window of a clip ends and the next begins"
        mask = mask.to(input_features.device).bool()
        lengths = window_lengths(mask.cpu())
        if max(lengths, default=0) > most:
            raise ValueError(
                f"a window of {max(lengths)} mel frames is longer than the {most} of the encoder: {found}; pass both "
                "fields of this model's processor"
            )
        if not mask.any(-1).all():
            raise ValueError("a row of input_features_mask has no 1, so its clip is empty: leave the clip out")
        return input_features.transpose(1, 2)[mask], lengths

    def get_placeholder_mask(
        self, input_ids: Tensor | None, audio_tokens: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """[batch, tokens], True at placeholders; their number must equal that of the audio tokens.

        inputs_embeds: [batch, tokens, hidden_size], where a placeholder's own embedding marks it, if there are no
        input_ids.
        """
        if input_ids is not None:
            mask = input_ids == self.config.audio_token_id
        else:
            assert inputs_embeds is not None
            if self.config.audio_token_id >= self.config.get_text_config().vocab_size:
                raise ValueError("no embedding marks this model's placeholder: pass input_ids with the audio")
            placeholder = torch.tensor(self.config.audio_token_id, device=self.text_device)
            mask = (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)
        wanted = 0 if audio_tokens is None else audio_tokens.shape[0]
        equal = mask.sum() == wanted
        if torch.compiler.is_compiling():  # torch 2.11 can't compile transformers' check
            torch._assert_async(equal, "input_ids have more or fewer placeholders than audio tokens")
            return mask
        torch_compilable_check(
            equal,
            lambda: (
                f"{int(mask.sum())} audio placeholders in input_ids, but the audio gives {wanted} tokens: both must "
                "come from the same processor, whose configuration holds silence, stack and audio_token_id"
            ),
        )
        return mask

    def embed(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **audio) -> Tensor:
        """Text embeddings with the audio tokens at the placeholders: [batch, tokens, hidden_size], the LM's dtype.

        inputs_embeds: the text's, if they have been looked up already.
        """
        given = [name for name in AUDIO_INPUTS if audio.get(name) is not None]
        if len(given) > 1:
            raise ValueError(f"pass one of {', '.join(AUDIO_INPUTS)}, not {' and '.join(given)}")
        if input_ids is None and inputs_embeds is None:
            raise ValueError("pass input_ids or inputs_embeds")
        if inputs_embeds is not None and not given:
            return inputs_embeds
        tokens = self.get_audio_features(**audio, return_dict=True).pooler_output if given else None
        placeholders = self.get_placeholder_mask(input_ids, tokens, inputs_embeds)
        if tokens is None:
            assert input_ids is not None
            return self.embed_text(input_ids)
        positions = placeholders.flatten().nonzero()[:, 0]
        if inputs_embeds is None:
            # The placeholder's id may lie outside the vocabulary; the embedding looked up instead is replaced.
            return self.embed_with_audio(input_ids.masked_fill(placeholders, 0), tokens, positions)
        tokens = tokens.to(device=inputs_embeds.device, dtype=inputs_embeds.dtype)
        flat = inputs_embeds.flatten(0, 1).index_copy(0, positions.to(inputs_embeds.device), tokens)
        return flat.view_as(inputs_embeds)

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Embeddings [batch, tokens, hidden_size] of ids; a placeholder gets the embedding of id 0."""
        return self.get_input_embeddings()(input_ids.masked_fill(input_ids == self.config.audio_token_id, 0))

    def embed_with_audio(self, input_ids: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embeddings [batch, tokens, hidden_size] in the LM's dtype, with audio tokens [audio tokens, hidden_size] at
        `positions`, int64 [audio tokens], of the rows end to end. A token at one past the last position is dropped.

        input_ids: [batch, tokens], any id of the vocabulary at placeholders.
        """
        ids = torch.cat([input_ids.flatten(), input_ids.new_zeros(1)])
        embeddings = self.get_input_embeddings()(ids[None])[0]
        tokens = tokens.to(device=embeddings.device, dtype=embeddings.dtype)
        embeddings = embeddings.index_copy(0, positions.to(embeddings.device), tokens)
        return embeddings[:-1].view(*input_ids.shape, -1)
