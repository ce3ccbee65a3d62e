"""`qwhisper demo`: the whole path on this computer with nothing faked, only small.

First speech and the two base models, then the product's own commands.
"""

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwhisper.cli import main as command_line
from qwhisper.data.dialogue import read_dialogues
from qwhisper.demo.bases import LEAD_SILENCE_S, TAIL_SILENCE_S
from qwhisper.demo.prepare import DemoPaths, prepare
from qwhisper.errors import QwhisperError, UsageError
from qwhisper.evaluate.evaluation import evaluate_model
from qwhisper.infer.generate import encoder_of
from qwhisper.model.qwen3_audio import build_from_bases
from qwhisper.report.events import read_jsonl
from qwhisper.report.terminal import quieten_transformers

if TYPE_CHECKING:
    from qwhisper.arguments import DemoArguments

STEPS, BATCH, LEARNING_RATE = 680, 12, 2e-3
ANSWER_TOKENS = 8

WHY_NOT_THE_DEFAULTS = f"""\
Other than the stable recipe (learning rate 3e-5, 4 × 1 samples a step), the demo trains
- at learning rate {LEARNING_RATE}, because a language model this small stays deaf for thousands of steps at 3e-5;
- {STEPS} steps of {BATCH} samples, because that is what fits into a few minutes on two cores;
- with {LEAD_SILENCE_S} and {TAIL_SILENCE_S} s of silence around clips, because its small encoder, unlike Whisper,
  learned with no more.
Guards, early steps, frozen first steps and LoRA are at their defaults."""


def main(arguments: "DemoArguments") -> None:
    """Makes everything in `output_dir`, prints it all, and leaves demo.json, loss.png and the trained model there."""
    folder = Path(arguments.output_dir)
    if (folder / "run").exists() or (folder / "demo.json").exists():
        raise UsageError(f"--output_dir {folder} holds an earlier demo: remove it, or give another folder")
    started = time.perf_counter()
    quieten_transformers()
    commands: list[str] = []
    headline("Speech, dialogues and two small base models, from nothing")
    paths = prepare(folder, arguments.seed)
    headline("The data, checked")
    run_command(commands, "data", "check", paths.train_file)
    headline("Before training")
    before = untrained(paths)
    print(f"{before['turns']:.1%} of the held-out answers are right, {before['majority']:.1%} would be by guessing")
    headline("Training")
    print(WHY_NOT_THE_DEFAULTS)
    train(commands, paths, folder / "run", arguments.seed)
    headline("The checkpoint, verified")
    run_command(commands, "verify", folder / "run")
    headline("Held-out voices, and the same questions with other clips put in")
    after = evaluate(commands, folder, paths.eval_file)
    swapped = evaluate(commands, folder, paths.swapped_file)
    headline("One unheard file")
    clip = read_dialogues(paths.eval_file)[0].clips[0]
    print(f"({Path(clip.path).name} says {clip.transcript!r})")
    run_command(commands, "chat", folder / "run", "--audio", clip.path, "--text", "Which number is it?")

    plot_loss(folder)
    result = summary(arguments.seed, before, after, swapped, paths, commands)
    result["seconds"] = round(time.perf_counter() - started, 1)
    (folder / "demo.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report(result, folder)


def headline(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def run_command(commands: list[str], *arguments: object) -> None:
    """A command as a user would type it, in this process; ends the demo if it fails."""
    words = [str(argument) for argument in arguments]
    commands.append("qwhisper " + shlex.join(words))
    print(f"$ {commands[-1]}", flush=True)
    code = command_line(words)
    if code:
        raise QwhisperError(f"the demo stopped, because this command ended with exit code {code}: {commands[-1]}")


def untrained(paths: DemoPaths) -> dict[str, Any]:
    """The evaluation of the two bases joined by a fresh projector."""
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


def train(commands: list[str], paths: DemoPaths, run: Path, seed: int) -> None:
    run_command(
        commands, "train", "--train_file", paths.train_file, "--output_dir", run,
        "--audio_model", paths.audio_model, "--text_model", paths.text_model,
        "--learning_rate", LEARNING_RATE, "--max_steps", STEPS,
        "--per_device_train_batch_size", BATCH, "--gradient_accumulation_steps", 1,
        "--audio_lead_silence", LEAD_SILENCE_S, "--audio_tail_silence", TAIL_SILENCE_S,
        "--logging_steps", 40, "--save_steps", STEPS, "--seed", seed,
    )  # fmt: skip


def evaluate(commands: list[str], folder: Path, eval_file: Path) -> dict[str, Any]:
    output = folder / f"{eval_file.stem}.json"
    run_command(
        commands, "eval", folder / "run", "--eval_file", eval_file, "--no_swap_audio", "--batch_size", 64,
        "--max_new_tokens", ANSWER_TOKENS, "--output_json", output,
    )  # fmt: skip
    return json.loads(output.read_text(encoding="utf-8"))


def summary(
    seed: int, before: dict, after: dict, swapped: dict, paths: DemoPaths, commands: list[str]
) -> dict[str, Any]:
    """demo.json: shares from 0 to 1.

    turns_swapped: answers that still are the original's, with clips that make each of them wrong.
    """
    kinds = {
        kind: {
            "n": scores["n"],
            "turns_before": before["kinds"][kind]["turns"],
            "turns": scores["turns"],
            "turns_swapped": swapped["kinds"][kind]["turns"],
            "majority": scores["majority"],
        }
        for kind, scores in after["kinds"].items()
    }
    return {
        "seed": seed,
        "turns_before": before["turns"],
        "turns": after["turns"],
        "turns_swapped": swapped["turns"],
        "dialogues": after["dialogues"],
        "majority": after["majority"],
        "loss_before": before["loss"],
        "loss": after["loss"],
        "kinds": kinds,
        "bases": paths.report,
        "dialogue": example(after, paths),
        "commands": commands,
    }


def example(after: dict, paths: DemoPaths) -> list[dict[str, str]]:
    """The first held-out dialogue of two turns: what was said and asked, and what the model answered."""
    answers = {(answer["id"], answer["turn"]): answer["answer"] for answer in after["answers"]}
    dialogue = next(
        d for d in read_dialogues(paths.eval_file) if sum(message.role == "assistant" for message in d.messages) == 2
    )
    lines, turn = [], 0
    for message in dialogue.messages:
        if message.role == "assistant":
            turn += 1
            lines.append({"role": "assistant", "text": answers[dialogue.id, turn]})
        else:
            heard = "".join(f"[{clip.transcript}] " for clip in message.clips)
            lines.append({"role": message.role, "text": heard + message.text})
    return lines


def plot_loss(folder: Path) -> None:
    """loss.png: every step's loss and its mean over 20 steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    losses = np.array([record["loss"] for record in read_jsonl(folder / "run/metrics.jsonl") if "loss" in record])
    smooth = np.convolve(losses, np.ones(20) / 20, mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(np.arange(1, len(losses) + 1), losses, color="0.8", linewidth=0.8, label="step")
    axes.plot(np.arange(20, len(losses) + 1), smooth, label="mean of 20 steps")
    axes.set(xlabel="optimizer step", ylabel="nats a supervised token", title="Training loss", ylim=(0, None))
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=150)
    plt.close(figure)


def report(result: dict[str, Any], folder: Path) -> None:
    headline("What it learned")
    print(f"{'question':<16}{'answers':>8}{'before':>9}{'after':>9}{'swapped':>9}{'majority':>10}")
    rows = {**result["kinds"], "all": result | {"n": sum(scores["n"] for scores in result["kinds"].values())}}
    for kind, scores in rows.items():
        shares = [scores[name] for name in ("turns_before", "turns", "turns_swapped", "majority")]
        print(f"{kind:<16}{scores['n']:>8}{shares[0]:>9.1%}{shares[1]:>9.1%}{shares[2]:>9.1%}{shares[3]:>10.1%}")
    print("swapped: answers that stay as they were when other clips are put in, which makes every one of them wrong")
    headline("A dialogue with a voice it never heard")
    for line in result["dialogue"]:
        print(f"{line['role']:>10}: {line['text']}")
    headline("The commands, to copy")
    print("\n".join(result["commands"]))
    print(
        f"\n{result['seconds']:.0f} s in all. {folder / 'demo.json'}, {folder / 'loss.png'}; "
        f"the trained model is {folder / 'run'}"
    )
