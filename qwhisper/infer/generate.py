"""Checkpoints ready to answer, and greedy answers to batches of prompts."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from qwhisper.checkpoint.facts import run_arguments
from qwhisper.checkpoint.reading import read_checkpoint
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.packing import pad_samples
from qwhisper.data.rows import Sample
from qwhisper.data.template import end_of_turn_ids
from qwhisper.errors import MemoryLimitError
from qwhisper.memory import is_out_of_memory
from qwhisper.model.bases import LoadOptions
from qwhisper.model.processor import Qwen3AudioProcessor, load_processor
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration, load_trained
from qwhisper.versions import check_versions

# Spelled out: what is left open comes from the base's generation_config.json, and Qwen's samples and penalises.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}


def load_for_inference(
    checkpoint: str | os.PathLike,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    audio_model: str | None = None,
    text_model: str | None = None,
) -> tuple[Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor, DialogueEncoder]:
    """Model in evaluation mode, its processor, and an encoder that makes prompts as they were trained on.

    checkpoint: a checkpoint's or a run's folder. device: "cpu", "cuda", "cuda:1" (None: the first GPU if there is one).
    dtype: "auto" is bf16 on a GPU and fp32 on a CPU. A base that was trained on in 4 bits is loaded in 4 bits.
    audio_model, text_model: where the bases lie now, if they are neither where they were nor beside the checkpoint.
    Raises UsageError for a folder that is none and for a device that is not there, CheckpointError for a folder that is
    damaged or whose bases have changed.
    """
    return read_checkpoint(
        checkpoint,
        lambda folder: load_chosen(folder, device, dtype, audio_model=audio_model, text_model=text_model),
    )


def load_chosen(
    folder: Path,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    audio_model: str | None = None,
    text_model: str | None = None,
) -> tuple[Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor, DialogueEncoder]:
    """The same of a checkpoint's own folder, whose files were found to be what its manifest says."""
    trained_as = run_arguments(folder)
    in_4bit = trained_as.get("load_in_4bit", False)
    check_versions(quantized=in_4bit)
    options = LoadOptions(
        dtype=dtype,
        device_map={"": device or str(LoadOptions().device)},
        load_in_4bit=in_4bit,
        projector_fp32=trained_as.get("projector_fp32", True),
    )
    model = load_trained(folder, options, audio_model=audio_model, text_model=text_model)
    processor = load_processor(folder)
    return model.eval(), processor, encoder_of(processor)


def encoder_of(processor: Qwen3AudioProcessor, max_length: int | None = None) -> DialogueEncoder:
    """The encoder whose prompts and labels are those of a processor; max_length: tokens a training row may have."""
    return DialogueEncoder(
        processor.tokenizer,
        processor.frames,
        audio_token_id=processor.audio_token_id,
        chat_template=processor.chat_template,
        max_length=max_length,
    )


@dataclass(frozen=True)
class Answer:
    """ended: whether the model ended its turn; else the answer was cut where no more tokens were allowed."""

    text: str
    ended: bool


def answer_prompts(
    model: PreTrainedModel,
    encoder: DialogueEncoder,
    prompts: Sequence[Sample],
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[str]:
    """The texts of `iterate_answers`, in the order of the prompts."""
    answers = [""] * len(prompts)
    with tqdm(total=len(prompts), unit="answer", disable=None, leave=False) as bar:
        for batch in iterate_answers(model, encoder, prompts, max_new_tokens, batch_size):
            for index, answer in batch.items():
                answers[index] = answer.text
            bar.update(len(batch))
    return answers


def iterate_answers(
    model: PreTrainedModel,
    encoder: DialogueEncoder,
    prompts: Sequence[Sample],
    max_new_tokens: int,
    batch_size: int = 8,
) -> Iterator[dict[int, Answer]]:
    """The model's greedy answers, a batch at a time: {position of the prompt: answer without special tokens and
    surrounding white space}.

    model: ours, or any causal LM where no prompt has audio. prompts: see `DialogueEncoder.encode_prompt`. The
    result depends on the batches by rounding alone; long prompts go first, and memory that runs out halves the batch.
    Raises MemoryLimitError where one prompt alone is too much.
    """
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].input_ids))
    done = 0
    while done < len(prompts):
        chosen = longest_first[done : done + batch_size]
        try:
            answers = _answer_batch(model, encoder, [prompts[i] for i in chosen], max_new_tokens)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(chosen) == 1:
                tokens = len(prompts[chosen[0]].input_ids)
                raise MemoryLimitError(
                    f"out of memory with one prompt of {tokens} tokens: use a lower --max_new_tokens or --dtype bf16"
                ) from error
            batch_size = len(chosen) // 2
            answers = None
        if answers is None:  # outside the handler, whose traceback keeps the failed batch's tensors alive
            torch.cuda.empty_cache()
            continue
        yield dict(zip(chosen, answers, strict=True))
        done += len(chosen)


def generate_tokens(
    model: PreTrainedModel,
    encoder: DialogueEncoder,
    prompts: Sequence[Sample],
    max_new_tokens: int,
    **keywords,
):
    """`model.generate` on left-padded prompts, greedy, until the turn's end; keywords: more of generate's own."""
    batch: dict[str, Any] = dict(pad_samples(prompts, encoder.pad_token_id, padding_side="left"))
    device = model.get_input_embeddings().weight.device
    batch |= {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    return model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_of_turn_ids(encoder.tokenizer, encoder.chat_template),
        pad_token_id=encoder.pad_token_id,
        **GREEDY,
        **keywords,
    )


def decode_answer(encoder: DialogueEncoder, tokens: Tensor) -> str:
    """tokens: int64 [new tokens], what was generated after a prompt. What follows the turn's end is padding."""
    ids = tokens.tolist()
    ends = end_of_turn_ids(encoder.tokenizer, encoder.chat_template)
    length = next((n for n, token in enumerate(ids) if token in ends), len(ids))
    return encoder.tokenizer.decode(ids[:length], skip_special_tokens=True).strip()


def _answer_batch(model, encoder, prompts: list[Sample], max_new_tokens: int) -> list[Answer]:
    generated = generate_tokens(model, encoder, prompts, max_new_tokens)
    new = generated[:, max(len(prompt.input_ids) for prompt in prompts) :]
    ends = torch.tensor(end_of_turn_ids(encoder.tokenizer, encoder.chat_template), device=new.device)
    ended = torch.isin(new, ends).any(dim=1).tolist()
    return [Answer(decode_answer(encoder, row), end) for row, end in zip(new, ended, strict=True)]
