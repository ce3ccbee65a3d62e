"""The model that qwhisper trains and serves: the architecture, with folders of trained weights and runs.

The whole package, and transformers' Auto classes, use this class and the functions below it.
"""

import os
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from transformers import GenerationMixin

from qwhisper.checkpoint.reading import read_checkpoint
from qwhisper.data.template import listening_template
from qwhisper.errors import UsageError
from qwhisper.model import card, loading, modeling_qwen3_audio, saving
from qwhisper.model.base_kinds import refuse_empty_tokenizer
from qwhisper.model.bases import DEFAULT_OPTIONS, LoadOptions, fingerprint, resolve_model
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.device_map import checked_device_map
from qwhisper.model.offloaded import full_state
from qwhisper.model.pretrained import load_config, load_feature_extractor, load_tokenizer
from qwhisper.model.processing_qwen3_audio import add_audio_token
from qwhisper.model.processor import Qwen3AudioProcessor
from qwhisper.model.weights import BaseRecord, following_casts, is_adapters, placed, plain_name


class Qwen3AudioModel(modeling_qwen3_audio.Qwen3AudioModel):
    """The model without its head, as `AutoModel` gives it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads what `Qwen3AudioForConditionalGeneration.from_pretrained` does, with the same keywords, and what this
        class has saved.
        """
        name = pretrained_model_name_or_path
        if name is None or (os.path.isdir(name) and loading.is_without_head(name)):
            wants_info = kwargs.pop("output_loading_info", False)
            if name is not None and kwargs.get("device_map") is not None:
                config = Qwen3AudioConfig.from_pretrained(name)
                kwargs["device_map"] = checked_device_map(kwargs["device_map"], cls, config)
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
            if not wants_info:
                loading.refuse_incomplete(name, info, kwargs)
            return (model, info) if wants_info else model
        loaded = Qwen3AudioForConditionalGeneration.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return (loaded[0].model, loaded[1]) if isinstance(loaded, tuple) else loaded.model

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs):
        """As in transformers, with the weights that accelerate has offloaded. Raises UsageError for a model with an
        adapter, which could not be loaded again.
        """
        if any(map(is_adapters, self.state_dict())):
            raise UsageError(
                "this model has an adapter, and no head: save the Qwen3AudioForConditionalGeneration that it is a part "
                "of, or merge the adapter first"
            )
        state_dict = full_state(self, state_dict).read()
        saving.refuse_without_values(state_dict)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)


NOT_GIVEN: Any = object()


class Qwen3AudioForConditionalGeneration(
    modeling_qwen3_audio.Qwen3AudioForConditionalGeneration,
    GenerationMixin,  # transformers looks for it among the direct bases
):
    """The model that is trained and that answers.

    base_record: of the weights that came from the bases, see `weights`. origin: the run that it was loaded from.
    """

    body_class = Qwen3AudioModel
    base_record: BaseRecord | None = None
    origin: card.Origin = card.Origin()
    # Trainer's checkpoint of a whole model has the adapter in it, from which Trainer resumes; it is loaded from beside.
    _keys_to_ignore_on_load_unexpected = (r"\.lora_",)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a whole model; or, from a folder of trained weights (projector, adapter), the bases that it names and
        then these weights.

        For a run's folder, load its best checkpoint by evaluation, else the newest. A checkpoint's files must match its
        manifest. For a folder of trained weights the keywords are transformers', see `load_keywords`, the fields of
        `bases.LoadOptions` (load_in_4bit, whisper_cpu …), and audio_model, text_model if a base has moved; load_in_4bit
        and projector_fp32 are those of its run unless they are given. Weights that are missing are an error, not a
        warning.
        """
        name = pretrained_model_name_or_path
        if name is None:  # a model of given weights, as in transformers
            return super().from_pretrained(name, *args, **kwargs)
        if os.path.isdir(name):
            name = os.path.join(name, kwargs.pop("subfolder", None) or "")
            return read_checkpoint(name, lambda folder: _load_checkpoint(cls, folder, *args, **kwargs))
        if folder := loading.downloaded(name, kwargs):
            return loading.load_for_user(cls, folder, **kwargs)
        loading.refuse_for_whole(name, kwargs)
        return loading.load_whole(cls, name, *args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process=None, state_dict=NOT_GIVEN, push_to_hub=False, **kwargs):
        """Save the trained weights alone if all others still equal their bases', the whole model otherwise; see
        `saving.save_pretrained`. What a training loop saves is resumable: one gives `is_main_process` or `state_dict`.
        """
        # Trainer gives is_main_process in newer versions of transformers, state_dict=None in older ones.
        kwargs["resumable"] = is_main_process is not None or state_dict is not NOT_GIVEN
        state_dict = None if state_dict is NOT_GIVEN else state_dict
        keywords = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub, **kwargs}
        saving.save_pretrained(self, self.base_record, save_directory, origin=self.origin, **keywords)

    def push_to_hub(self, repo_id, *, token=None, tags=None, **kwargs):
        """As in transformers, with our model card, unless the repository has one. `tags` are the card's: edit them
        there.
        """
        if tags:
            raise UsageError("tags stand in the model card: save_pretrained, edit README.md, then upload the folder")
        with TemporaryDirectory() as folder:
            if HfApi().file_exists(repo_id, card.CARD, revision=kwargs.get("revision"), token=token):
                HfApi().hf_hub_download(repo_id, card.CARD, local_dir=folder, token=token)
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, token=token, **kwargs)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As in torch; a weight's plain name also finds it in a layer that has an adapter.

        If not `strict`, weights that came from the bases are not reported as missing: trained ones go on top of them.
        """
        found = super().load_state_dict(placed(self, state_dict), strict=strict, assign=assign)
        if self.base_record is not None:
            found.missing_keys[:] = [key for key in found.missing_keys if plain_name(key) not in self.base_record]
        return found

    def _apply(self, fn, recurse=True):
        with following_casts(self):
            return super()._apply(fn, recurse)


def _load_checkpoint(cls, folder, *args, **kwargs):
    """The model of a local folder, or (model, report); it knows its run."""
    if loading.is_trained_folder(folder):
        loaded = loading.load_for_user(cls, folder, **kwargs)
    else:
        loading.refuse_for_whole(folder, kwargs)
        loaded = loading.load_whole(cls, folder, *args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.origin = card.origin_of(folder)
    return loaded


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
