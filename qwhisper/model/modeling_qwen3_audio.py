"""Qwen3Audio: a Whisper encoder, an AudioProjection and a causal LM as one Hugging Face model.

Architecture only: nothing here knows of files, dialogues or training. `qwen3_audio` adds what the package needs.
"""

from typing import Unpack

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import TransformersKwargs, can_return_tuple

from qwhisper.model.attention import (
    IMPLEMENTATIONS,
    PACKED_ATTENTION,
    choose_attention,
    packed_row_mask,
    text_attention,
)
from qwhisper.model.audio_embedding import AudioEmbedding
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from qwhisper.model.generation import AudioGeneration
from qwhisper.model.loss import head_logits, supervised_loss
from qwhisper.model.projector import AudioProjection, ProjectorLinear


class Qwen3AudioPreTrainedModel(PreTrainedModel):
    config: Qwen3AudioConfig
    base_model_prefix = "model"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _no_split_modules = ("WhisperEncoderLayer",)
    _keep_in_fp32_modules_strict = ("multi_modal_projector",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ProjectorLinear):
            module.reset_to_small_xavier(self.config.projector_init_scale)
        else:
            super()._init_weights(module)


class Qwen3AudioModel(Qwen3AudioPreTrainedModel, AudioEmbedding):
    """Audio tower, projector and language model without its head."""

    def __init__(self, config: Qwen3AudioConfig):
        super().__init__(config)
        self.audio_tower = TrueLengthWhisperEncoder(config.audio_config)
        self.multi_modal_projector = AudioProjection(config)
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def __setattr__(self, name: str, value) -> None:
        """Setting the language model makes its layers use `text_attention`."""
        if name == "language_model":
            value._supports_flex_attn = False  # as of the whole model, also if it is set on this part
            self._settle_attention(value)
            choose_attention(value, text_attention)
        super().__setattr__(name, value)

    @staticmethod
    def _settle_attention(language_model: PreTrainedModel) -> None:
        """Set "eager" in the configuration, whose name decides the mask, if the layers use eager attention. Raises
        ValueError for flex attention: training and generation fail with it on some machines.
        """
        implementation = text_attention(language_model.config)
        if implementation == "eager":
            language_model.config._attn_implementation = "eager"
        elif implementation == "flex_attention":
            language_model._flex_attn_can_dispatch()

    def _apply(self, fn, recurse=True):
        projector = self.multi_modal_projector
        projector.is_cast_with_model = True
        try:
            return super()._apply(fn, recurse)
        finally:
            projector.is_cast_with_model = False

    @can_return_tuple
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
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> BaseModelOutputWithPast:
        """The LM's output for `input_ids` with audio, see `get_audio_features`, or for ready `inputs_embeds`.

        A packed row is one with `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k` and restarting
        `position_ids`.
        """
        inputs_embeds = self.embed(
            input_ids,
            inputs_embeds,
            input_features=input_features,
            input_features_mask=input_features_mask,
            audio_waveforms=audio_waveforms,
            audio_features=audio_features,
            audio_lengths=audio_lengths,
        )
        self._settle_attention(self.language_model)  # it may have been set on the language model itself
        if kwargs.get("cu_seq_lens_q") is not None:
            implementation = text_attention(self.language_model.config)
            if implementation not in IMPLEMENTATIONS:
                raise ValueError(
                    f"packed rows need attn_implementation={PACKED_ATTENTION!r}, not {implementation!r}: "
                    "give this model padded batches (ConversationCollator's packed=False)"
                )
            attention_mask = packed_row_mask(inputs_embeds)
            kwargs["use_cache"] = False
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,
            **kwargs,
        )


class Qwen3AudioForConditionalGeneration(
    Qwen3AudioPreTrainedModel,
    AudioGeneration,
    GenerationMixin,  # transformers looks for it among the direct bases
):
    """`Qwen3AudioModel` with the language model's head: computes a loss from labels, and answers.

    last_logits: while `keep_last_logits`, the detached logits [positions, vocabulary] of the last supervised positions,
    as many as are computed at once; in training without labels, of all positions.
    """

    body_class: type[Qwen3AudioModel] = Qwen3AudioModel
    keep_last_logits: bool = False
    last_logits: Tensor | None = None

    def __init__(self, config: Qwen3AudioConfig):
        super().__init__(config)
        self.model = self.body_class(config)
        with torch.device("meta"):
            language_model = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        head = language_model.get_output_embeddings()
        self.lm_head = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._can_compile_fullgraph = self.model.language_model._can_compile_fullgraph
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()
        if plan := (language_model._tp_plan or {}).get("lm_head"):
            self._tp_plan["lm_head"] = plan

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

    def get_audio_features(self, *args, **kwargs) -> tuple | BaseModelOutputWithPooling:
        return self.model.get_audio_features(*args, **kwargs)

    def get_placeholder_mask(self, *args, **kwargs) -> Tensor:
        return self.model.get_placeholder_mask(*args, **kwargs)

    @property
    def softcap(self) -> float | None:
        """The bound of the language model's logits (Gemma 2's final_logit_softcapping), or None."""
        return getattr(self.config.get_text_config(), "final_logit_softcapping", None)

    @can_return_tuple
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
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> CausalLMOutputWithPast:
        """input_ids: [batch, tokens] int64; audio: see `Qwen3AudioModel.get_audio_features`.

        labels: [batch, tokens] int64, unshifted, -100 where not supervised. With labels the result is a loss (sum over
        supervised tokens / num_items_in_batch, or their mean). It has no logits in training mode or where gradients are
        recorded, so that no full logits exist; otherwise, and without labels, logits [batch, tokens or logits_to_keep,
        vocabulary]. shift_labels: as in transformers, labels shifted already, in their place. valid_label_count, which
        our batches have, is not used.
        """
        # No parameters: Trainer takes each with "label" in its name for labels.
        kwargs.pop("valid_label_count", None)
        shift_labels = kwargs.pop("shift_labels", None)
        if self.training and self.keep_last_logits:
            self.last_logits = None  # not in memory beside the next ones
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
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            loss, last_logits = supervised_loss(
                hidden_states,
                labels.to(hidden_states.device),
                self.lm_head,
                shift_labels=None if shift_labels is None else shift_labels.to(hidden_states.device),
                num_items_in_batch=num_items_in_batch,
                softcap=self.softcap,
            )
            if self.keep_last_logits:
                self.last_logits = last_logits
        if labels is None or not (self.training or torch.is_grad_enabled()):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = head_logits(hidden_states[:, kept], self.lm_head, self.softcap)
            if labels is None and self.training and self.keep_last_logits:
                self.last_logits = logits.detach().flatten(0, 1)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)
