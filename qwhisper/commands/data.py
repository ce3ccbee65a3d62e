"""`qwhisper data check` and `qwhisper data answer`: prepare a file of dialogues for training."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwhisper.commands.shared_flags import DATA_ROOT_HELP, DEVICE_HELP, HUB_HELP, MOST_NEW_TOKENS, Dtype, Hub
from qwhisper.errors import DataError, UsageError
from qwhisper.flags import MOST_SAMPLES, Arguments, flag, required

if TYPE_CHECKING:
    from qwhisper.frames import FrameArithmetic


@dataclass(frozen=True, kw_only=True)
class DataCheckArguments(Arguments):
    file: str = required("JSONL of dialogues, one a line.")
    data_root: str | None = flag(None, DATA_ROOT_HELP)
    text_model: str | None = flag(
        None, "Hub id or folder: also loads its tokenizer, and checks labels and lengths turn by turn."
    )
    audio_model: str | None = flag(
        None, "Hub id or folder: its configuration decides how long audio is cut into windows."
    )
    max_length: int | None = flag(
        None, "Maximum number of tokens in a dialogue: reports cuts. Needs --text_model.", at_least=1
    )
    hub: Hub = flag("huggingface", HUB_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None and self.text_model is None:
            raise UsageError("--max_length counts tokens: give --text_model as well")
        if self.audio_model is not None and self.text_model is None:
            raise UsageError("--audio_model decides how many tokens a clip has: give --text_model as well")


def check(arguments: DataCheckArguments) -> int:
    """Print the contents and the faults of a file; return 3 if a training on it would end with exit code 3."""
    from qwhisper.data.check import check_dataset, report_lines

    tokenizer = _load_tokenizer(arguments.text_model, arguments.hub) if arguments.text_model else None
    frames = _load_frames(arguments.audio_model, arguments.hub) if tokenizer is not None else None
    report = check_dataset(
        arguments.file, arguments.data_root, tokenizer=tokenizer, frames=frames, max_length=arguments.max_length
    )
    print("\n".join(report_lines(report)))
    return 0 if report["ok"] else DataError.exit_code


def _load_tokenizer(name: str, hub: str):
    from qwhisper.model.base_kinds import refuse_empty_tokenizer
    from qwhisper.model.pretrained import load_tokenizer

    tokenizer = load_tokenizer(_find_model(name, hub, "--text_model"), "--text_model")
    refuse_empty_tokenizer(tokenizer, name)
    return tokenizer


def _load_frames(name: str | None, hub: str) -> "FrameArithmetic":
    """The lengths of a new model on this encoder; without a name, on Whisper's default configuration."""
    from transformers import WhisperConfig

    from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
    from qwhisper.model.pretrained import load_config

    if name is None:
        return Qwen3AudioConfig(audio_config=WhisperConfig()).frames
    config = load_config(_find_model(name, hub, "--audio_model"), "--audio_model")
    return Qwen3AudioConfig(audio_config=config).frames


def _find_model(name: str, hub: str, flag: str) -> str:
    from qwhisper.model.base_kinds import refuse_model
    from qwhisper.model.bases import resolve_model

    if hub != "huggingface":
        return resolve_model(name, hub, flag)
    refuse_model(name, flag)  # a folder with only a tokenizer is enough here
    return name


@dataclass(frozen=True, kw_only=True)
class DataAnswerArguments(Arguments):
    in_file: str = required(
        'JSONL of dialogues that end with the user speaking, or of lines {"audio": path, "transcript": text}, each of '
        "which gets an instruction. Dialogues with answers are kept unchanged."
    )
    out_file: str = required(
        "JSONL of the same dialogues with their answers. Answers so far are kept beside it in a .cache.jsonl: after "
        "a crash the same command continues where it stopped."
    )
    text_model: str = required(
        "Language model that answers, reading the transcripts: hub id or folder. Use the one that will be "
        "trained: its own answers change it least."
    )
    data_root: str | None = flag(None, DATA_ROOT_HELP)
    instructions: str | None = flag(
        None,
        'File with your own instructions, one a line, instead of the shipped ones; a line "" is an empty instruction.',
    )
    language: Literal["both", "en", "zh"] = flag("both", "Language of the shipped instructions that are drawn.")
    seed: int = flag(0, "Decides, with a line's content, which instruction the line gets.", at_least=0)
    batch_size: int = flag(
        8, "Prompts answered at once; out of memory halves it automatically.", at_least=1, at_most=MOST_SAMPLES
    )
    max_new_tokens: int = flag(
        256,
        "Maximum number of tokens in an answer. A longer one is left out, since it would end in mid-sentence.",
        at_least=1,
        at_most=MOST_NEW_TOKENS,
    )
    load_in_4bit: bool = flag(False, "Load the language model's linear layers in 4 bits (NF4, bitsandbytes).")
    hub: Hub = flag("huggingface", HUB_HELP)
    device: str | None = flag(None, DEVICE_HELP)
    dtype: Dtype = flag("auto", "Number format of the language model (auto: bf16 on a GPU, fp32 on a CPU).")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.instructions is not None and self.language != "both":
            raise UsageError("--language chooses among the shipped instructions, which --instructions replaces")


def answer(arguments: DataAnswerArguments) -> int:
    """Answer a file and name the lines that could not be answered; return 3 if nothing was left to write."""
    from qwhisper.data.dialogue import unused_notes
    from qwhisper.data.faults import grouped
    from qwhisper.infer.answer import answer_dialogues, folder_of_far_audio, read_unanswered, refuse_foreign_output
    from qwhisper.model.bases import LoadOptions, resolve_model
    from qwhisper.report.terminal import note, quieten_transformers

    quieten_transformers()
    out_file = Path(arguments.out_file)
    refuse_foreign_output(Path(arguments.in_file), out_file)
    dialogues, faults = read_unanswered(
        arguments.in_file,
        data_root=arguments.data_root,
        instructions=arguments.instructions,
        language=arguments.language,
        seed=arguments.seed,
    )
    for sentence in unused_notes(dialogues):
        note(sentence)
    result = answer_dialogues(
        dialogues,
        resolve_model(arguments.text_model, arguments.hub, "--text_model"),
        LoadOptions(
            dtype=arguments.dtype,
            device_map={"": arguments.device} if arguments.device else None,
            load_in_4bit=arguments.load_in_4bit,
        ),
        out_file,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
    )
    faults += result.faults
    for line in grouped(faults):
        print(line)
    print(
        f"{arguments.out_file}: {len(result.dialogues)} dialogues; {result.given} of them answered by "
        f"{arguments.text_model} ({result.asked} prompts now, the rest from the cache), "
        f"{len(result.dialogues) - result.given} had their answers; {len(faults)} faults"
    )
    if result.cut:
        print(f"left out, cut at {arguments.max_new_tokens} tokens: {result.cut}; raise --max_new_tokens to keep them")
    if root := folder_of_far_audio(result.dialogues, out_file.parent):
        print(f"its audio lies in another folder: `train` and `data check` need --data_root {shlex.quote(root)}")
    return 0 if result.dialogues else DataError.exit_code
