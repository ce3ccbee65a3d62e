"""The model that qwhisper trains and serves: the architecture, with folders of trained weights, runs and a teacher.

Everybody in the package, and transformers' Auto classes, use this class and the functions below it.
"""

import os
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from qwhisper.checkpoint.reading import is_run_folder, read_checkpoint
from qwhisper.data.template import listening_template
from qwhisper.model import loading, modeling_qwen3_audio, saving
from qwhisper.model.base_kinds import refuse_empty_tokenizer
from qwhisper.model.bases import DEFAULT_OPTIONS, LoadOptions, fingerprint, resolve_model
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.lora import adapter_off
from qwhisper.model.loss import IGNORE_INDEX, Lesson, reference_loss, supervised_loss
from qwhisper.model.pretrained import load_config, load_feature_extractor, load_tokenizer
from qwhisper.model.processing_qwen3_audio import add_audio_token
from qwhisper.model.processor import Qwen3AudioProcessor
from qwhisper.model.weights import BaseRecord, following_casts


class Qwen3AudioForConditionalGeneration(modeling_qwen3_audio.Qwen3AudioForConditionalGeneration):
    """The model that is trained and that answers.

    base_record: of the weights that came from the bases, see `weights`.
    manual_loss: when True, `forward` also computes the loss the plain way into `last_manual_loss` (fp32 scalar), and
    `last_logits` then holds every position's logits. last_logits: detached logits of the last supervised chunk.
    last_valid_label_count, last_loss: supervised tokens and loss of the last forward with labels, scalar tensors.
    last_divergence: from the teacher, in nats, summed over its taught positions; None without one.
    """

    base_record: BaseRecord | None = None
    manual_loss: bool = False
    last_logits: Tensor | None = None
    last_manual_loss: Tensor | None = None
    last_valid_label_count: Tensor | None = None
    last_loss: Tensor | None = None
    last_divergence: Tensor | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a whole model, or, from a folder of trained weights (projector, adapter), the bases it names and then
        these.

        Of a run's folder it is the best checkpoint by evaluation, else the newest. Files of a checkpoint must be what
        its manifest says. For a folder of trained weights the keywords are the fields of `bases.LoadOptions` (dtype,
        device_map, load_in_4bit …) and audio_model, text_model, where a base has moved; load_in_4bit and projector_fp32
        are those of its run unless they are given. Weights that are missing are an error, not a warning.
        """
        name = pretrained_model_name_or_path
        if is_run_folder(name) or (os.path.isdir(name) and loading.is_trained_folder(name)):
            return read_checkpoint(name, lambda folder: loading.load_for_user(cls, folder, **kwargs))
        if loading.is_trained_folder(name):  # on the hub
            return loading.load_for_user(cls, name, **kwargs)
        loading.refuse_for_whole(name, kwargs)
        if os.path.isdir(name) and not kwargs.get("subfolder"):
            return read_checkpoint(name, lambda folder: loading.load_whole(cls, folder, *args, **kwargs))
        return loading.load_whole(cls, name, *args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """Trained weights alone where all others are still their bases', the whole model otherwise; see
        `saving.save_pretrained`.
        """
        keywords = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub, **kwargs}
        saving.save_pretrained(self, self.base_record, save_directory, **keywords)

    def _apply(self, fn, recurse=True):
        with following_casts(self):
            return super()._apply(fn, recurse)

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
        valid_label_count: Tensor | None = None,
        teacher: dict[str, Any] | None = None,
        taught: Tensor | None = None,
        distill_weight: float = 0.0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As the architecture's, and with labels also what training asks for.

        teacher: a batch of the same dialogues in words, with the same tokens supervised, which the language model
        without its adapter reads as the teacher, see `Lesson`; taught: bool [supervised positions] on the CPU, those of
        dialogues that are in it.
        """
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "input_features": input_features,
            "input_features_mask": input_features_mask,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "audio_waveforms": audio_waveforms,
            "audio_features": audio_features,
            "audio_lengths": audio_lengths,
            **kwargs,
        }
        if labels is None:
            return super().forward(**inputs, logits_to_keep=logits_to_keep)
        outputs = self.model(**inputs)
        hidden_states = outputs.last_hidden_state
        lesson = None
        if teacher is not None and taught is not None:
            lesson = Lesson(self.teacher_states(**teacher), taught, distill_weight)
        loss = self.loss_of(hidden_states, labels.to(hidden_states.device), num_items_in_batch, lesson)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, **rest)

    @torch.no_grad()
    def teacher_states(self, labels: Tensor, **batch) -> Tensor:
        """[supervised positions, hidden] of the language model as it was before its adapter, in evaluation mode."""
        batch.pop("valid_label_count", None)
        language_model, was_training = self.model.language_model, self.training
        try:
            language_model.eval()
            with adapter_off(language_model):
                hidden_states = self.model(**batch).last_hidden_state
        finally:
            language_model.train(was_training)
        return hidden_states[:, :-1][labels[:, 1:] != IGNORE_INDEX]

    def loss_of(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        num_items_in_batch: int | Tensor | None,
        lesson: Lesson | None,
    ) -> Tensor:
        keywords: dict[str, Any] = {"num_items_in_batch": num_items_in_batch, "softcap": self._softcap}
        self.last_valid_label_count = (labels[:, 1:] != IGNORE_INDEX).sum()
        loss, self.last_logits = supervised_loss(hidden_states, labels, self.lm_head, lesson=lesson, **keywords)
        self.last_loss = loss.detach()
        self.last_divergence = None if lesson is None else lesson.divergence
        if self.manual_loss:
            self.last_manual_loss, self.last_logits = reference_loss(
                hidden_states, labels, self.lm_head, lesson=lesson, **keywords
            )
        return loss


class Qwen3AudioModel(modeling_qwen3_audio.Qwen3AudioModel):
    """The model without its head, as `AutoModel` gives it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads what `Qwen3AudioForConditionalGeneration.from_pretrained` does, with the same keywords."""
        loaded = Qwen3AudioForConditionalGeneration.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return (loaded[0].model, loaded[1]) if isinstance(loaded, tuple) else loaded.model


def build_from_bases(
    audio_model: str,
    text_model: str,
    options: LoadOptions = DEFAULT_OPTIONS,
    *,
    hub: str = "huggingface",
    **config_values,
) -> tuple[Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor]:
    """A model with a fresh projector and its processor, from two folders or hub ids.

    config_values: fields of `Qwen3AudioConfig`, such as audio_lead_silence.
    """
    audio_path = resolve_model(audio_model, hub, "--audio_model")
    text_path = resolve_model(text_model, hub, "--text_model")
    audio_config = load_config(audio_path)
    tokenizer = load_tokenizer(text_path, "--text_model")
    refuse_empty_tokenizer(tokenizer, text_model)
    config = Qwen3AudioConfig(
        audio_config=audio_config,
        text_config=load_config(text_path),
        audio_base={"name": audio_path, "fingerprint": fingerprint(audio_path)},
        text_base={"name": text_path, "fingerprint": fingerprint(text_path)},
        audio_token_id=add_audio_token(tokenizer),
        **config_values,
    )
    extractor = load_feature_extractor(audio_path, "--audio_model")
    model = loading.load_and_join(Qwen3AudioForConditionalGeneration, config, audio_path, text_path, options)
    template, _ = listening_template(tokenizer)
    processor = Qwen3AudioProcessor.for_model(extractor, tokenizer, model.config, template)
    return model, processor


def load_trained(
    name: str | os.PathLike,
    options: LoadOptions = DEFAULT_OPTIONS,
    *,
    audio_model: str | None = None,
    text_model: str | None = None,
) -> Qwen3AudioForConditionalGeneration:
    """The model of a folder of trained weights; see `loading.load_trained`."""
    moved = {"audio_model": audio_model, "text_model": text_model}
    return loading.load_trained(Qwen3AudioForConditionalGeneration, name, options, **moved)
