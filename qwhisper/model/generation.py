"""Answers from prompts with audio, through transformers' own `generate` and all of its strategies.

The audio is encoded once, into the embeddings of the prompt. `prepare_inputs_for_generation` gives these to the model
wherever it reads the prompt: in the first iteration, and in each one without a cache.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationMixin,
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from qwhisper.model.audio_embedding import AUDIO_INPUTS

AUDIO_KEYWORDS = (*AUDIO_INPUTS, "input_features_mask", "audio_lengths")
BOOKKEEPING = ("labels", "shift_labels", "valid_label_count", "num_items_in_batch")  # of a training batch
# What reads or changes the ids of a prompt again, with what to do instead.
NOT_WITH_AUDIO = {
    "prefill_chunk_size": "leave it out: the prompt is read at once",
    "token_healing": "leave it out, or end the prompt before the part of a word",
}
# They take the prompt's ids as columns of the scores.
OF_THE_PROMPT = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
ASSISTED = ("prompt_lookup_num_tokens", "use_mtp")


def with_prompt_embeds(signature: inspect.Signature) -> inspect.Signature:
    *named, others = signature.parameters.values()
    own = inspect.Parameter("prompt_embeds", inspect.Parameter.KEYWORD_ONLY, default=None)
    return signature.replace(parameters=[*named, own, others])


class WithColumns(LogitsProcessor):
    """A processor that sees scores of `width` columns: the vocabulary's and those of an id outside it, never chosen."""

    def __init__(self, processor: LogitsProcessor, width: int):
        self.processor = processor
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = scores.shape[-1]
        wide = torch.nn.functional.pad(scores, (0, self.width - width), value=-torch.inf)
        return self.processor(input_ids, wide)[..., :width]


class AudioGeneration(GenerationMixin):
    """`GenerationMixin` for a model whose `model` has `embed`, and whose `config` an audio_token_id."""

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config=None, **kwargs):
        """transformers' `generate` for left-padded `input_ids` with `attention_mask` and one audio input, or for
        `inputs_embeds`.

        The placeholder is never generated. Raises ValueError for options that would lose the audio.
        """
        kwargs = {name: value for name, value in kwargs.items() if value is not None and name not in BOOKKEEPING}
        self._refuse(generation_config, kwargs)
        device = self.model.text_device
        for name in ("input_ids", "attention_mask", "inputs_embeds"):
            if name in kwargs:  # transformers counts positions on the mask's device
                kwargs[name] = kwargs[name].to(device)
        if inputs is not None:
            inputs = inputs.to(device)
        audio = {name: kwargs.pop(name) for name in AUDIO_KEYWORDS if name in kwargs}
        if any(name in audio for name in AUDIO_INPUTS):
            kwargs |= self._prompt(kwargs.get("input_ids", inputs), audio, kwargs)
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    def _prompt(self, input_ids: Tensor | None, audio: dict[str, Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords that stand for a prompt's audio."""
        inputs_embeds = kwargs.get("inputs_embeds")
        if input_ids is None or inputs_embeds is not None:
            return {"inputs_embeds": self.model.embed(input_ids, inputs_embeds, **audio)}
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        read = 0 if cache is None else cache.get_seq_length()
        if 0 < read < input_ids.shape[1] and not (input_ids[:, read:] == self.config.audio_token_id).any():
            return {}  # an earlier call has read all of the audio
        prompt: dict[str, Any] = {"prompt_embeds": self.model.embed(input_ids, **audio)}
        assistant = kwargs.get("assistant_model")
        if assistant is not None:  # one that listens as well encodes the audio itself
            heard = inspect.signature(assistant.forward).parameters
            prompt |= {name: value for name, value in audio.items() if name in heard}
        return prompt

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args, prompt_embeds: Tensor | None = None, **kwargs):
        """As in transformers.

        prompt_embeds: [batch, tokens, hidden_size], embeddings of the first columns of `input_ids`, which are read
        instead of these.
        """
        first, cached = kwargs.get("is_first_iteration", False), kwargs.get("use_cache", True)
        if prompt_embeds is not None or (cached and not first):
            kwargs = {name: value for name, value in kwargs.items() if name not in AUDIO_KEYWORDS}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        ids = inputs.get("input_ids")
        if ids is None or any(name in inputs for name in AUDIO_INPUTS):
            return inputs
        parts = []
        read = input_ids.shape[1] - ids.shape[1]
        if prompt_embeds is not None and read < prompt_embeds.shape[1]:
            parts.append(prompt_embeds[:, read:])
            ids = input_ids[:, prompt_embeds.shape[1] :]
        elif first or ids.shape[1] == 1:
            return inputs
        # Drafts that are checked may hold placeholders copied from the prompt, which stand for no audio.
        parts.append(self.model.embed_text(ids))
        return inputs | {"input_ids": None, "inputs_embeds": torch.cat(parts, dim=1)}

    # transformers takes the keywords that `generate` may pass on from this signature.
    prepare_inputs_for_generation.__signature__ = with_prompt_embeds(  # type: ignore[attr-defined]
        inspect.signature(GenerationMixin.prepare_inputs_for_generation)
    )

    def _get_logits_processor(self, *args, device=None, **kwargs):
        """The placeholder is suppressed before anything else, or gets a column if it lies outside the vocabulary."""
        processors = super()._get_logits_processor(*args, device=device, **kwargs)
        placeholder = self.config.audio_token_id
        if placeholder < self.config.get_text_config().vocab_size:
            device = device or self.model.text_device
            processors.insert(0, SuppressTokensLogitsProcessor([placeholder], device=device))
            return processors
        return type(processors)(
            WithColumns(processor, placeholder + 1) if isinstance(processor, OF_THE_PROMPT) else processor
            for processor in processors
        )

    def _get_candidate_generator(self, *args, model_kwargs: dict[str, Any], **kwargs):
        """Drafts come from an assistant, for which this model's embeddings mean nothing."""
        theirs = {name: value for name, value in model_kwargs.items() if name != "prompt_embeds"}
        return super()._get_candidate_generator(*args, model_kwargs=theirs, **kwargs)

    def _refuse(self, generation_config, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for options that transformers would carry out on the ids alone."""

        def asked(name: str) -> Any:
            return kwargs.get(name) or getattr(generation_config or self.generation_config, name, None)

        if asked("cache_implementation") == "paged":
            self._refuse_continuous_batching()
        if asked("assistant_early_exit"):
            raise ValueError("assistant_early_exit: this model has no layers to exit from early; pass assistant_model")
        if any(kwargs.get(name) is not None for name in AUDIO_INPUTS):
            for name, advice in NOT_WITH_AUDIO.items():
                if asked(name):
                    raise ValueError(f"{name} with audio would lose it: {advice}")
        if kwargs.get("inputs_embeds") is not None and ("assistant_model" in kwargs or any(map(asked, ASSISTED))):
            raise ValueError(
                "assisted decoding with inputs_embeds would not read them: pass input_ids and the audio, or leave "
                "assistant_model and prompt_lookup_num_tokens out"
            )

    def _refuse_continuous_batching(self) -> None:
        raise NotImplementedError(
            "continuous batching takes ids alone and would lose the audio: pass a left-padded batch to `generate`, or "
            "use `qwhisper.Assistant.answer_all`"
        )

    def generate_batch(self, *args, **kwargs):
        self._refuse_continuous_batching()

    def init_continuous_batching(self, *args, **kwargs):
        self._refuse_continuous_batching()

    def continuous_batching_context_manager(self, *args, **kwargs):
        self._refuse_continuous_batching()
