"""The table of verbs. A command's module is imported only when its verb runs.

A command is `main(arguments) -> int | None`; the fields of its arguments dataclass are the verb's flags. It reads,
prints and writes; the libraries do the work and don't know any command.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One line of the table.

    command, arguments: "module:name". positionals: the fields without a flag. waits_for_reader: whether the command
    waits for a slow reader of its output. loads_models: whether it needs the packages that load weights.
    """

    summary: str
    command: str
    arguments: str
    positionals: tuple[str, ...] = ()
    example: str
    waits_for_reader: bool = True
    loads_models: bool = True


VERBS = {
    "demo": Verb(
        summary="the whole path offline on this computer, with synthesised speech and small models",
        command="qwhisper.commands.demo:main",
        arguments="qwhisper.commands.demo:DemoArguments",
        example="qwhisper demo --output_dir demo-output",
    ),
    "data check": Verb(
        summary="validate dialogues and audio before a run",
        command="qwhisper.commands.data:check",
        arguments="qwhisper.commands.data:DataCheckArguments",
        positionals=("file",),
        example="qwhisper data check data.jsonl --text_model Qwen/Qwen3-8B",
    ),
    "data answer": Verb(
        summary="have the text model answer transcripts: training data from audio and its words",
        command="qwhisper.commands.data:answer",
        arguments="qwhisper.commands.data:DataAnswerArguments",
        positionals=("in_file", "out_file"),
        example="qwhisper data answer in.jsonl out.jsonl --text_model Qwen/Qwen3-8B",
    ),
    "plan": Verb(
        summary="memory and time of a training before anything is loaded: what fits a card, and how fast it is",
        command="qwhisper.commands.plan:main",
        arguments="qwhisper.commands.plan:PlanArguments",
        example="qwhisper plan --text_model Qwen/Qwen3-8B --gpu_memory 32",
        loads_models=False,
    ),
    "train": Verb(
        summary="fine-tune projector and LoRA; the stable recipe is the default",
        command="qwhisper.commands.train:main",
        arguments="qwhisper.train.arguments:TrainArguments",
        example="qwhisper train --train_file data.jsonl --output_dir run",
        waits_for_reader=False,  # neither does a training
    ),
    "verify": Verb(
        summary="reload a checkpoint, run one step and one generation, prove that no number is NaN",
        command="qwhisper.commands.verify:main",
        arguments="qwhisper.commands.verify:VerifyArguments",
        positionals=("checkpoint",),
        example="qwhisper verify run/checkpoint-200",
    ),
    "eval": Verb(
        summary="exact match, WER/CER and loss, beside the same with swapped audio",
        command="qwhisper.commands.evaluate:main",
        arguments="qwhisper.commands.evaluate:EvalArguments",
        positionals=("checkpoint",),
        example="qwhisper eval run --eval_file test.jsonl --output_json eval.json",
    ),
    "chat": Verb(
        summary="talk to a trained model: text and audio files, several turns",
        command="qwhisper.commands.chat:main",
        arguments="qwhisper.commands.chat:ChatArguments",
        positionals=("checkpoint",),
        example="qwhisper chat run --audio question.wav",
    ),
}
