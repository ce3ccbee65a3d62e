"""Qwen3Audio: a Whisper encoder, an AudioProjection and a causal LM as one Hugging Face model.

Architecture only: nothing here knows of files, dialogues or training. `qwen3_audio` adds what the package needs.
"""

import itertools

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from qwhisper.frames import encoder_frames
from qwhisper.model.attention import (
    IMPLEMENTATIONS,
    PACKED_ATTENTION,
    packed_row_mask,
    set_encoder_attention,
    set_text_attention,
)
from qwhisper.model.audio_layout import AudioLayout, EncoderLayout, encoder_layout, on_device, stack_groups
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from qwhisper.model.loss import head_logits, supervised_loss
from qwhisper.model.mel import log_mel, packed_log_mel
from qwhisper.model.projector import AudioProjection, ProjectorLinear

AUDIO_INPUTS = ("audio_waveforms", "input_features", "audio_features")


class Qwen3AudioPreTrainedModel(PreTrainedModel):
    config: Qwen3AudioConfig
    base_model_prefix = "model"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ("WhisperEncoderLayer",)
    _keep_in_fp32_modules_strict = ("multi_modal_projector",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ProjectorLinear):
            module.reset_to_small_xavier(self.config.projector_init_scale)
        else:
            super()._init_weights(module)

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """As in transformers, but the encoder keeps one of ours, and "sdpa" for the language model selects ours."""
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        set_encoder_attention(self.config.audio_config)
        set_text_attention(self.config.text_config)


class Qwen3AudioModel(Qwen3AudioPreTrainedModel):
    """Audio tower, projector and language model without its head."""

    def __init__(self, config: Qwen3AudioConfig):
        super().__init__(config)
        set_encoder_attention(config.audio_config)
        set_text_attention(config.text_config)
        self.audio_tower = TrueLengthWhisperEncoder(config.audio_config)
        self.multi_modal_projector = AudioProjection(config)
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @property
    def encoder_is_trained(self) -> bool:
        """Whether any parameter of the encoder is trained, LoRA on it included."""
        return any(parameter.requires_grad for parameter in self.audio_tower.parameters())

    def train(self, mode: bool = True) -> "Qwen3AudioModel":
        """A frozen encoder stays in evaluation mode: its dropout would blur features that nothing learns from."""
        super().train(mode)
        if not self.encoder_is_trained:
            self.audio_tower.eval()
        return self

    def encode_audio(self, waveforms: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """waveforms: [sum(lengths)] float32 at 16 kHz, windows end to end.

        Returns as `encode_mel`.
        """
        device = self.audio_tower.conv1.weight.device
        mel, mel_lengths = packed_log_mel(waveforms.to(device), lengths, self.config.audio_config.num_mel_bins)
        return self.encode_mel(mel, mel_lengths)

    def encode_mel(self, mel: Tensor, mel_lengths: list[int]) -> tuple[Tensor, list[int]]:
        """mel: [sum(mel_lengths), num_mel_bins], each window with the configuration's silence around its speech.

        Returns ([frames, d_model], frames of each window): of the speech and a short rest after it, see
        `FrameArithmetic.kept_frames`.
        """
        device = self.audio_tower.conv1.weight.device
        hidden_states = self._encode(mel.to(device), on_device(encoder_layout(mel_lengths), device))
        lengths = [encoder_frames(n) for n in mel_lengths]
        arithmetic = self.config.frames
        kept = [frames[arithmetic.kept_frames(len(frames))] for frames in hidden_states.split(lengths)]
        return torch.cat(kept), [len(frames) for frames in kept]

    def _encode(self, mel: Tensor, layout: EncoderLayout) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_is_trained):
            return self.audio_tower(mel, layout)

    def audio_embeddings(self, row: Tensor, layout: AudioLayout) -> Tensor:
        """Audio tokens [tokens, hidden_size], in the projector's dtype, of a row of samples.

        row: see `audio_layout.waveform_row`. It and the indices of mel and encoder lie on the encoder's device. Waits
        for a device only to move the encoder's frames to another one.
        """
        mel = log_mel(row, layout.mel, self.config.audio_config.num_mel_bins)
        frames = self._encode(mel, layout.encoder)
        device = self.multi_modal_projector.linear_1.weight.device
        return self.multi_modal_projector(frames.to(device), layout.groups.to(device))

    def get_audio_features(
        self,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        audio_waveforms: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_lengths: Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """Projected audio tokens of all windows, in order; exactly one of the three inputs.

        input_features: [windows, num_mel_bins, mel_frames] with input_features_mask [windows, mel_frames], the
        processor's.
        audio_waveforms: [samples] float32, windows end to end, audio_lengths [windows] their samples, the collator's.
        audio_features: [frames, d_model], cached output of `encode_audio`, audio_lengths [windows] their frames.
        Returns last_hidden_state [frames, d_model] and pooler_output [tokens, hidden_size] in the projector's dtype.
        """
        if audio_waveforms is not None:
            frames, lengths = self.encode_audio(audio_waveforms, audio_lengths.tolist())
        elif input_features is not None:
            if input_features_mask is None:
                input_features_mask = input_features.new_ones(input_features.shape[::2], dtype=torch.bool)
            mask = input_features_mask.bool()
            frames, lengths = self.encode_mel(input_features.transpose(1, 2)[mask], mask.sum(-1).tolist())
        elif audio_features is not None:
            if self.training and self.encoder_is_trained and not audio_features.requires_grad:
                raise ValueError("an encoder that is trained learns nothing from cached audio_features: pass its input")
            frames, lengths = audio_features, audio_lengths.tolist()
        else:
            raise ValueError(f"no audio: pass one of {', '.join(AUDIO_INPUTS)}")
        device = self.multi_modal_projector.linear_1.weight.device
        ends = list(itertools.accumulate(lengths, initial=0))
        groups = stack_groups(list(itertools.pairwise(ends)), self.config.projector_stack, nothing=ends[-1])
        tokens = self.multi_modal_projector(frames.to(device), groups.to(device))
        return BaseModelOutputWithPooling(last_hidden_state=frames, pooler_output=tokens)

    def get_placeholder_mask(self, input_ids: Tensor, audio_tokens: Tensor | None) -> Tensor:
        """[batch, tokens], True at placeholders; their number must equal that of the audio tokens."""
        mask = input_ids == self.config.audio_token_id
        found, wanted = int(mask.sum()), 0 if audio_tokens is None else audio_tokens.shape[0]
        if found != wanted:
            raise ValueError(
                f"{found} audio placeholders in input_ids, but the audio gives {wanted} tokens: "
                "both must come from the same processor, whose configuration holds silence, stack and audio_token_id"
            )
        return mask

    def embed(self, input_ids: Tensor, **audio) -> Tensor:
        """Text embeddings with the audio tokens at the placeholders: [batch, tokens, hidden_size], the LM's dtype."""
        given = [name for name in AUDIO_INPUTS if audio.get(name) is not None]
        if len(given) > 1:
            raise ValueError(f"pass one of {', '.join(AUDIO_INPUTS)}, not {' and '.join(given)}")
        tokens = self.get_audio_features(**audio).pooler_output if given else None
        placeholders = self.get_placeholder_mask(input_ids, tokens)
        # The placeholder's id may lie outside the vocabulary; the embedding looked up instead is replaced.
        input_ids = input_ids.masked_fill(placeholders, 0)
        if tokens is None:
            return self.get_input_embeddings()(input_ids)
        return self.embed_with_audio(input_ids, tokens, placeholders.flatten().nonzero()[:, 0])

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

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        audio_waveforms: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The LM's output for `input_ids` with audio, see `get_audio_features`, or for ready `inputs_embeds`.

        A packed row is one with `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k` and restarting
        `position_ids`.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("pass input_ids or inputs_embeds")
            inputs_embeds = self.embed(
                input_ids,
                input_features=input_features,
                input_features_mask=input_features_mask,
                audio_waveforms=audio_waveforms,
                audio_features=audio_features,
                audio_lengths=audio_lengths,
            )
        set_text_attention(self.language_model.config)  # it may have been set on the language model itself
        if kwargs.get("cu_seq_lens_q") is not None:
            implementation = self.language_model.config._attn_implementation
            if implementation not in IMPLEMENTATIONS:
                raise ValueError(
                    f"packed rows need attn_implementation={PACKED_ATTENTION!r}, not {implementation!r}: "
                    "give this model padded batches (ConversationCollator's packed=False)"
                )
            attention_mask = packed_row_mask(inputs_embeds)
            kwargs["use_cache"] = False
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )


class Qwen3AudioForConditionalGeneration(Qwen3AudioPreTrainedModel, GenerationMixin):
    """`Qwen3AudioModel` with the language model's head: computes a loss from labels, and answers.

    last_logits: while `keep_last_logits`, the detached logits [positions, vocabulary] of the last supervised positions,
    as many as are computed at once.
    """

    keep_last_logits: bool = False
    last_logits: Tensor | None = None

    def __init__(self, config: Qwen3AudioConfig):
        super().__init__(config)
        self.model = Qwen3AudioModel(config)
        with torch.device("meta"):
            head = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False).get_output_embeddings()
        self.lm_head = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def enable_input_require_grads(self) -> None:
        """For the text embeddings alone; the library's own would hook the frozen encoder's convolution as well."""
        self._require_grads_hooks = [
            self.get_input_embeddings().register_forward_hook(
                lambda module, inputs, output: output.requires_grad_(True)
            )
        ]

    def get_audio_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        return self.model.get_audio_features(*args, **kwargs)

    def get_placeholder_mask(self, *args, **kwargs) -> Tensor:
        return self.model.get_placeholder_mask(*args, **kwargs)

    @property
    def softcap(self) -> float | None:
        """The bound of the language model's logits (Gemma 2's final_logit_softcapping), or None."""
        return getattr(self.config.get_text_config(), "final_logit_softcapping", None)

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        audio_waveforms: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """input_ids: [batch, tokens] int64; audio: see `Qwen3AudioModel.get_audio_features`.

        labels: [batch, tokens] int64, unshifted, -100 where not supervised. With labels the result is a loss (sum over
        supervised tokens / num_items_in_batch, or their mean). It has no logits in training mode or where gradients are
        recorded, so that no full logits exist; otherwise, and without labels, logits [batch, tokens or logits_to_keep,
        vocabulary]. valid_label_count, which our batches have, is not used.
        """
        kwargs.pop("valid_label_count", None)  # no parameter: Trainer takes each with "label" in its name for labels
        outputs = self.model(
            input_ids=input_ids,
            input_features=input_features,
            input_features_mask=input_features_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            audio_waveforms=audio_waveforms,
            audio_features=audio_features,
            audio_lengths=audio_lengths,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            loss, last_logits = supervised_loss(
                hidden_states,
                labels.to(hidden_states.device),
                self.lm_head,
                num_items_in_batch=num_items_in_batch,
                softcap=self.softcap,
            )
            if self.keep_last_logits:
                self.last_logits = last_logits
        if labels is None or not (self.training or torch.is_grad_enabled()):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = head_logits(hidden_states[:, kept], self.lm_head, self.softcap)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config=None, **kwargs):
        """transformers' `generate` for prompts with audio: left-padded `input_ids` and `attention_mask`, and one audio
        input.

        The audio is put into the prompt's embeddings once; ids, cache, beams and streamers then work as for any LM. The
        placeholder itself is never generated.
        """
        device = self.get_input_embeddings().weight.device
        input_ids = kwargs.pop("input_ids", inputs).to(device)
        if kwargs.get("attention_mask") is not None:  # transformers counts positions on the mask's device
            kwargs["attention_mask"] = kwargs["attention_mask"].to(device)
        audio = {k: kwargs.pop(k, None) for k in (*AUDIO_INPUTS, "input_features_mask", "audio_lengths")}
        for unused in ("labels", "valid_label_count"):
            kwargs.pop(unused, None)
        if any(audio[name] is not None for name in AUDIO_INPUTS):
            kwargs["inputs_embeds"] = self.model.embed(input_ids, **audio)
        if self.config.audio_token_id < self.config.get_text_config().vocab_size:
            given = generation_config or self.generation_config
            suppressed = kwargs.pop("suppress_tokens", None) or given.suppress_tokens or []
            kwargs["suppress_tokens"] = [*suppressed, self.config.audio_token_id]
        return super().generate(input_ids, generation_config=generation_config, **kwargs)
