"""`qwhisper demo`: the whole path on this computer, real but small.

Makes speech and the two base models first, then runs the other commands of qwhisper.
"""

import json
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwhisper.commands import VERBS, chat, data, evaluate, train, verify
from qwhisper.commands.exit_code import exit_code_of
from qwhisper.errors import QwhisperError, UsageError
from qwhisper.flags import Arguments, flag
from qwhisper.train.arguments import TrainArguments

if TYPE_CHECKING:
    from qwhisper.demo.prepare import DemoPaths
    from qwhisper.evaluate.evaluation import Evaluation

STEPS, BATCH, LEARNING_RATE = 680, 12, 2e-3
ANSWER_TOKENS = 8

WHY_NOT_THE_DEFAULTS = f"""\
The demo differs from the stable recipe (learning rate 3e-5, 4 × 1 samples a step). It trains
- at learning rate {LEARNING_RATE}, because a language model this small does not listen for thousands of steps at 3e-5;
- {STEPS} steps of {BATCH} samples, because that is what fits into a few minutes on two cores;
- with {{lead}} and {{tail}} s of silence around clips, because its small encoder, unlike Whisper,
  learned with no more.
Guards, early steps, frozen first steps and LoRA are at their defaults."""


@dataclass(frozen=True, kw_only=True)
class DemoArguments(Arguments):
    output_dir: str = flag("demo-output", "Folder for speech, models, run and results.")
    seed: int = flag(0, "Decides voices, dialogues and weights.", at_least=0)


def main(arguments: DemoArguments) -> None:
    """Run every stage in `output_dir`, print the results, and leave demo.json, loss.png and the trained model there."""
    from qwhisper.data.dialogue import read_dialogues
    from qwhisper.demo.prepare import prepare
    from qwhisper.demo.summary import headline, plot_loss, report, summary
    from qwhisper.report.terminal import quieten_transformers

    folder = Path(arguments.output_dir)
    if (folder / "run").exists() or (folder / "demo.json").exists():
        raise UsageError(f"--output_dir {folder} holds an earlier demo: remove it, or give another folder")
    started = time.perf_counter()
    quieten_transformers()
    commands: list[str] = []
    headline("Speech, dialogues and two small base models, from nothing")
    paths = prepare(folder, arguments.seed)
    headline("The data, checked")
    run_command(commands, "data check", data.check, data.DataCheckArguments, file=paths.train_file)
    headline("Before training")
    before = untrained(paths)
    print(f"{before.turns:.1%} of the held-out answers are right; guessing gets {before.majority:.1%} right")
    headline("Training")
    train_model(commands, paths, folder / "run", arguments.seed)
    headline("The checkpoint, verified")
    run_command(commands, "verify", verify.main, verify.VerifyArguments, checkpoint=folder / "run")
    headline("Held-out voices, and the same questions with other clips put in")
    after = evaluated(commands, folder, paths.eval_file)
    swapped = evaluated(commands, folder, paths.swapped_file)
    headline("One unheard file")
    clip = read_dialogues(paths.eval_file)[0].clips[0]
    print(f"({Path(clip.path).name} says {clip.transcript!r})")
    run_command(
        commands,
        "chat",
        chat.main,
        chat.ChatArguments,
        checkpoint=folder / "run",
        audio=[clip.path],
        text="Which number is it?",
    )

    plot_loss(folder)
    result = summary(arguments.seed, before.to_json(), after, swapped, paths, commands)
    result["seconds"] = round(time.perf_counter() - started, 1)
    (folder / "demo.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report(result, folder)


def run_command(
    commands: list[str], verb: str, command: Callable, arguments_class: type[Arguments], **values: Any
) -> None:
    """A command in this process, with the line that a user would type; ends the demo if it fails."""
    commands.append(command_line(verb, values))
    print(f"$ {commands[-1]}", flush=True)
    code = exit_code_of(lambda: command(arguments_class(**values)))
    if code:
        raise QwhisperError(f"the demo stopped, because this command ended with exit code {code}: {commands[-1]}")


def command_line(verb: str, values: Mapping[str, Any]) -> str:
    """The command line as typed in a shell. values: by flag or positional, in the order in which they are typed."""
    words = ["qwhisper", *verb.split()]
    for name, value in values.items():
        if name in VERBS[verb].positionals:
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def untrained(paths: "DemoPaths") -> "Evaluation":
    """The evaluation of the two bases joined by a fresh projector."""
    from qwhisper.data.dialogue import read_dialogues
    from qwhisper.demo.bases import LEAD_SILENCE_S, TAIL_SILENCE_S
    from qwhisper.evaluate.evaluation import evaluate_model
    from qwhisper.model.processor import encoder_of
    from qwhisper.model.qwen3_audio import build_from_bases

    model, processor = build_from_bases(
        str(paths.audio_model),
        str(paths.text_model),
        audio_lead_silence=LEAD_SILENCE_S,
        audio_tail_silence=TAIL_SILENCE_S,
    )
    dialogues = read_dialogues(paths.eval_file)
    return evaluate_model(
        model, encoder_of(processor), dialogues, swap=False, batch_size=64, max_new_tokens=ANSWER_TOKENS
    )


def train_model(commands: list[str], paths: "DemoPaths", run: Path, seed: int) -> None:
    from qwhisper.demo.bases import LEAD_SILENCE_S, TAIL_SILENCE_S

    print(WHY_NOT_THE_DEFAULTS.format(lead=LEAD_SILENCE_S, tail=TAIL_SILENCE_S))
    run_command(
        commands,
        "train",
        train.main,
        TrainArguments,
        train_file=paths.train_file,
        output_dir=run,
        audio_model=paths.audio_model,
        text_model=paths.text_model,
        learning_rate=LEARNING_RATE,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        audio_lead_silence=LEAD_SILENCE_S,
        audio_tail_silence=TAIL_SILENCE_S,
        logging_steps=40,
        save_steps=STEPS,
        seed=seed,
    )


def evaluated(commands: list[str], folder: Path, eval_file: Path) -> dict[str, Any]:
    """What `qwhisper eval` writes for the trained model."""
    output = folder / f"{eval_file.stem}.json"
    run_command(
        commands,
        "eval",
        evaluate.main,
        evaluate.EvalArguments,
        checkpoint=folder / "run",
        eval_file=eval_file,
        swap_audio=False,
        batch_size=64,
        max_new_tokens=ANSWER_TOKENS,
        output_json=output,
    )
    return json.loads(output.read_text(encoding="utf-8"))
