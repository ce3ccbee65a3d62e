"""Answers to many prompts, a left-padded batch at a time."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.packing import pad_samples
from qwhisper.data.rows import Sample
from qwhisper.errors import UsageError
from qwhisper.infer.context import context_length, within_context
from qwhisper.infer.decoding import Answer, AnswerText, Chooser, Reader, Request, fetch_tokens, never_written
from qwhisper.memory import is_out_of_memory, naming_memory_limit


def answer_batches(
    model: PreTrainedModel,
    encoder: DialogueEncoder,
    prompts: Sequence[Sample],
    request: Request,
    batch_size: int = 8,
) -> Iterator[dict[int, Answer]]:
    """The model's answers, one batch at a time, by the position of their prompts.

    model: ours, or any causal LM if no prompt has audio. prompts: see `DialogueEncoder.encode_prompt`. The batches
    change the result only by rounding. Long prompts go first, and the batch is halved if memory runs out. Raises
    MemoryLimitError if one prompt alone does not fit, UsageError for a batch_size below 1, TooLongPromptError, before
    the first answer, if a prompt fills the model's context.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; a batch needs at least 1 prompt")
    context = context_length(model.config)
    requests = [within_context(prompt, request, context) for prompt in prompts]
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].input_ids))
    done = 0
    while done < len(prompts):
        chosen = longest_first[done : done + batch_size]
        try:
            answers = _answer_batch(model, encoder, [prompts[i] for i in chosen], [requests[i] for i in chosen])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(chosen) == 1:
                with naming_the_prompt(prompts[chosen[0]]):
                    raise
            batch_size = len(chosen) // 2
            answers = None
        if answers is None:  # outside the handler: its traceback keeps the failed batch's tensors alive
            torch.cuda.empty_cache()
            continue
        yield dict(zip(chosen, answers, strict=True))
        done += len(chosen)


def naming_the_prompt(prompt: Sample) -> AbstractContextManager[None]:
    """A context in which running out of memory raises MemoryLimitError with the size of the prompt."""
    doing = f"with one prompt of {len(prompt.input_ids)} tokens"
    return naming_memory_limit(doing, "a lower --max_new_tokens or --dtype bf16")


def _answer_batch(model, encoder: DialogueEncoder, prompts: list[Sample], requests: list[Request]) -> list[Answer]:
    """requests: they differ in max_new_tokens alone."""
    batch: dict[str, Any] = dict(pad_samples(prompts, encoder.pad_token_id, padding_side="left"))
    embeddings, attention_mask = _embed(model, batch)
    reader = Reader(model, attention_mask, context=context_length(model.config))
    chooser = Chooser(requests[0], len(prompts), never_written(model))
    written = [AnswerText(encoder, prompt, request) for prompt, request in zip(prompts, requests, strict=True)]
    logits = reader.read(embeddings)
    while True:
        tokens = chooser.choose(logits)
        for text, token in zip(written, fetch_tokens(tokens, logits), strict=True):
            if text.finish_reason is None:
                text.add(token)
        if all(text.finish_reason for text in written):
            break
        logits = reader.read_tokens(tokens)
    return [text.answer() for text in written]


@torch.no_grad()
def _embed(model, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(embeddings [prompts, longest, hidden], attention mask [prompts, longest]) of a padded batch."""
    embeddings = model.get_input_embeddings()
    input_ids, attention_mask = (batch[name].to(embeddings.weight.device) for name in ("input_ids", "attention_mask"))
    audio = {name: batch[name] for name in ("audio_waveforms", "audio_lengths") if name in batch}
    return (model.model.embed(input_ids, **audio) if audio else embeddings(input_ids)), attention_mask
