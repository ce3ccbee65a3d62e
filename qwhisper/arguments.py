"""What the verbs other than `train` are told. Cheap to import: no torch, no transformers.

A field listed as positional in `cli.VERBS` is given without a flag: `qwhisper verify CHECKPOINT`.
"""

from dataclasses import dataclass
from typing import Literal

from qwhisper.errors import UsageError
from qwhisper.flags import check_values, flag, required

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
CHECKPOINT_HELP = "Folder of a checkpoint, or of a run (its best checkpoint, or else its newest)."
AUDIO_MODEL_HELP = (
    "Where the Whisper that it was trained on lies now: hub id or folder (default: where it was, or by the name of its "
    "folder beside the checkpoint)."
)
TEXT_MODEL_HELP = "Where the language model that it was trained on lies now, in the same way."
DEVICE_HELP = "cpu, cuda, cuda:1 and so on (default: the first GPU if there is one)."
DTYPE_HELP = "Number format of the two base models (auto: bf16 on a GPU, fp32 on a CPU)."
MOST_SAMPLES = 2**20  # at once, or in one optimizer step
MOST_NEW_TOKENS = 2**20  # no language model has positions for more


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    output_dir: str = flag("demo-output", "Folder for speech, models, run and results.")
    seed: int = flag(0, "Decides voices, dialogues and weights.", at_least=0)

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True, kw_only=True)
class DataCheckArguments:
    file: str = required("JSONL of dialogues, one a line.")
    data_root: str | None = flag(
        None,
        "Folder that absolute audio paths must lie in (default: the file's own folder). Nothing outside it is read.",
    )
    text_model: str | None = flag(
        None, "Hub id or folder: its tokenizer is loaded as well, and labels and lengths are checked turn by turn."
    )
    audio_model: str | None = flag(
        None, "Hub id or folder: its configuration decides how long audio is cut into windows."
    )
    max_length: int | None = flag(
        None, "Tokens a dialogue may have: reports what would be cut. Needs --text_model.", at_least=1
    )
    hub: Literal["huggingface", "modelscope"] = flag("huggingface", "Where hub ids are fetched from.")

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True, kw_only=True)
class DataAnswerArguments:
    in_file: str = required(
        'JSONL of dialogues that end with the user speaking, or of lines {"audio": path, "transcript": text}, each of '
        "which is given an instruction. Dialogues that have their answers are kept as they are."
    )
    out_file: str = required(
        "JSONL of the same dialogues with their answers. What was answered so far lies beside it in a .cache.jsonl: "
        "after a crash the same command goes on where it stopped."
    )
    text_model: str = required(
        "Language model that answers, reading the transcripts: hub id or folder. The one that will be trained: answers "
        "of its own change it least."
    )
    data_root: str | None = flag(
        None,
        "Folder that absolute audio paths must lie in (default: the file's own folder). Nothing outside it is read.",
    )
    instructions: str | None = flag(
        None, 'File with instructions of your own, one a line, in place of the shipped ones; a line "" is an empty one.'
    )
    language: Literal["both", "en", "zh"] = flag("both", "Which of the shipped instructions are drawn from.")
    seed: int = flag(0, "Decides, with a line's content, which instruction the line is given.", at_least=0)
    batch_size: int = flag(
        8, "Prompts answered at once; out of memory halves it by itself.", at_least=1, at_most=MOST_SAMPLES
    )
    max_new_tokens: int = flag(
        256,
        "Tokens an answer may have. One that is longer is left out, since it would end in mid-sentence.",
        at_least=1,
        at_most=MOST_NEW_TOKENS,
    )
    load_in_4bit: bool = flag(False, "Load the language model's linear layers in 4 bits (NF4, bitsandbytes).")
    hub: Literal["huggingface", "modelscope"] = flag("huggingface", "Where hub ids are fetched from.")
    device: str | None = flag(None, DEVICE_HELP)
    dtype: Dtype = flag("auto", "Number format of the language model (auto: bf16 on a GPU, fp32 on a CPU).")

    def __post_init__(self) -> None:
        check_values(self)
        if self.instructions is not None and self.language != "both":
            raise UsageError("--language chooses among the shipped instructions, which --instructions replaces")


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    checkpoint: str = required(CHECKPOINT_HELP)
    audio_model: str | None = flag(None, AUDIO_MODEL_HELP)
    text_model: str | None = flag(None, TEXT_MODEL_HELP)
    device: str | None = flag(None, DEVICE_HELP)
    dtype: Dtype = flag("auto", DTYPE_HELP)


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    checkpoint: str = required(CHECKPOINT_HELP)
    eval_file: str = required("JSONL of dialogues whose assistant turns are the reference answers.")
    data_root: str | None = flag(
        None,
        "Folder that absolute audio paths must lie in (default: the file's own folder). Nothing outside it is read.",
    )
    max_samples: int | None = flag(None, "Use only the first N dialogues.", at_least=1)
    swap_audio: bool = flag(
        True,
        "Answer everything once more with another sample's audio whose right answer differs: what the model still "
        "gets right then, it guessed from the text.",
    )
    ask_text_model: bool = flag(
        True,
        "Ask the language model without its adapter the same, in words, where clips have transcripts: what it answers "
        "right and the trained model does not was forgotten, or not heard.",
    )
    text_file: str | None = flag(
        None,
        "JSONL of text dialogues on which to measure how far the language model has moved from its base (default: "
        "what the base answers to the instructions that qwhisper ships).",
    )
    batch_size: int = flag(
        8, "Dialogues answered at once; the result does not depend on it.", at_least=1, at_most=MOST_SAMPLES
    )
    max_new_tokens: int = flag(128, "Tokens an answer may have.", at_least=1, at_most=MOST_NEW_TOKENS)
    output_json: str | None = flag(None, "File for all numbers and answers as JSON (default: none is written).")
    output_md: str | None = flag(None, "File for the result as a Markdown table (default: none; it is printed anyway).")
    audio_model: str | None = flag(None, AUDIO_MODEL_HELP)
    text_model: str | None = flag(None, TEXT_MODEL_HELP)
    device: str | None = flag(None, DEVICE_HELP)
    dtype: Dtype = flag("auto", DTYPE_HELP)

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True, kw_only=True)
class ChatArguments:
    checkpoint: str = required(CHECKPOINT_HELP)
    audio: list[str] = flag([], "Audio files of the first turn.")
    text: str | None = flag(
        None, "Text of the first turn. With --audio or --text one answer is given and the command ends."
    )
    system: str | None = flag(None, "System prompt.")
    max_new_tokens: int = flag(256, "Tokens an answer may have.", at_least=1, at_most=MOST_NEW_TOKENS)
    audio_model: str | None = flag(None, AUDIO_MODEL_HELP)
    text_model: str | None = flag(None, TEXT_MODEL_HELP)
    device: str | None = flag(None, DEVICE_HELP)
    dtype: Dtype = flag("auto", DTYPE_HELP)

    def __post_init__(self) -> None:
        check_values(self)
