"""`qwhisper eval`: evaluates a checkpoint on a file of dialogues, prints the result and writes it to files."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from qwhisper.commands.shared_flags import (
    AUDIO_MODEL_HELP,
    CHECKPOINT_HELP,
    DATA_ROOT_HELP,
    DEVICE_HELP,
    DTYPE_HELP,
    MOST_NEW_TOKENS,
    TEXT_MODEL_HELP,
    Dtype,
)
from qwhisper.flags import MOST_SAMPLES, Arguments, flag, required


@dataclass(frozen=True, kw_only=True)
class EvalArguments(Arguments):
    checkpoint: str = required(CHECKPOINT_HELP)
    eval_file: str = required("JSONL of dialogues whose assistant turns are the reference answers.")
    data_root: str | None = flag(None, DATA_ROOT_HELP)
    max_samples: int | None = flag(None, "Use only the first N dialogues.", at_least=1)
    swap_audio: bool = flag(
        True,
        "Answer everything again with another sample's audio whose right answer differs: an answer that stays right "
        "was guessed from the text.",
    )
    ask_text_model: bool = flag(
        True,
        "Ask the language model without its adapter the same questions in words, if clips have transcripts: an answer "
        "that it gets right and the trained model gets wrong was forgotten, or not heard.",
    )
    text_file: str | None = flag(
        None,
        "JSONL of text dialogues on which to measure how far the language model has moved from its base (default: "
        "what the base answers to the instructions that qwhisper ships).",
    )
    batch_size: int = flag(
        8, "Dialogues answered at once; it does not change the result.", at_least=1, at_most=MOST_SAMPLES
    )
    max_new_tokens: int = flag(128, "Maximum number of tokens in an answer.", at_least=1, at_most=MOST_NEW_TOKENS)
    output_json: str | None = flag(None, "File for all numbers and answers as JSON (default: none is written).")
    output_md: str | None = flag(None, "File for the result as a Markdown table (default: none; it is printed anyway).")
    audio_model: str | None = flag(None, AUDIO_MODEL_HELP)
    text_model: str | None = flag(None, TEXT_MODEL_HELP)
    device: str | None = flag(None, DEVICE_HELP)
    dtype: Dtype = flag("auto", DTYPE_HELP)


def main(arguments: EvalArguments) -> None:
    """Evaluate a checkpoint, print the table, write the files asked for."""
    from qwhisper.checkpoint.facts import trained_kinds
    from qwhisper.checkpoint.reading import read_checkpoint
    from qwhisper.data.dialogue import read_dialogues, unused_notes
    from qwhisper.evaluate.evaluation import evaluate_model
    from qwhisper.evaluate.tables import markdown
    from qwhisper.evaluate.trained_on import shared_with_training
    from qwhisper.infer.assistant import load_chosen
    from qwhisper.model.processor import encoder_of
    from qwhisper.report.terminal import note, quieten_transformers

    quieten_transformers()
    dialogues = read_dialogues(arguments.eval_file, data_root=arguments.data_root, max_samples=arguments.max_samples)
    text = read_dialogues(arguments.text_file, data_root=arguments.data_root) if arguments.text_file else None
    for sentence in unused_notes([*dialogues, *(text or [])]):
        note(sentence)

    def read(folder: Path):
        bases = {"audio_model": arguments.audio_model, "text_model": arguments.text_model}
        loaded = load_chosen(folder, arguments.device, arguments.dtype, **bases)
        return loaded, trained_kinds(folder), shared_with_training(folder, arguments.eval_file, dialogues)

    (model, processor), kinds, shared = read_checkpoint(arguments.checkpoint, read)
    evaluation = evaluate_model(
        model,
        encoder_of(processor),
        dialogues,
        swap=arguments.swap_audio,
        text_model=arguments.ask_text_model,
        text=text,
        trained_kinds=kinds,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
    )
    evaluation = replace(evaluation, notes=[*evaluation.notes, *shared])
    table = markdown(evaluation, checkpoint=arguments.checkpoint, eval_file=arguments.eval_file)
    print(table)
    if arguments.output_json:
        result = {"checkpoint": arguments.checkpoint, "eval_file": arguments.eval_file, **evaluation.to_json()}
        _write(arguments.output_json, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if arguments.output_md:
        _write(arguments.output_md, table + "\n")


def _write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
