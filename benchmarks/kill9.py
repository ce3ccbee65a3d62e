"""SIGKILL at random moments and inside saves, until the training ends; and the same to a plain HF Trainer.

    python benchmarks/kill9.py --kills 300 --hf_kills 60 --scratch DIR

Small models of the real architectures on the CPU, with dropout and two processes that read data. After each kill the
run is resumed, as a user would: by the command that qwhisper prints itself, or by `resume_from_checkpoint=True`. If a
resume ends in an error, the newest checkpoint is deleted, as by hand, and the next one is tried. Ends with exit code 1
unless every resume of qwhisper worked, none lost more than one save interval, and every run ended in the same bits as
the uninterrupted one: parameters, optimizer, generators and the loss of every step.

Half of the kills come inside a save: at a random one of its writes, fsyncs, renames and deletions. All children are
forked from one process, so that a kill costs no imports.
"""

import argparse
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from common import ROOT, append_result
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(ROOT))
from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.loader import encode_all
from qwhisper.data.packing import pad_samples
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.models import build_model
from qwhisper.train.plan import resolve
from qwhisper.train.session import encoder_for
from tests.small import write_dialogues, write_small_bases
from tests.test_faults.lives import Kill, Life, Lives, Qwhisper, Save, random_kills

STEPS, SAVE_STEPS, SAMPLES, KEPT = 12, 2, 4, 2
IN_SAVE = 0.5


def small_run(scratch: Path, **values) -> TrainArguments:
    audio, text = write_small_bases(scratch / "bases")
    return TrainArguments(
        train_file=str(write_dialogues(scratch / "data")), output_dir=str(scratch / "run"),
        audio_model=str(audio), text_model=str(text), max_steps=STEPS, save_steps=SAVE_STEPS, save_total_limit=KEPT,
        per_device_train_batch_size=SAMPLES, gradient_accumulation_steps=1, freeze_projector_steps=1,
        lora_dropout=0.2, learning_rate=1e-3, **values,
    )  # fmt: skip


class Plain(torch.nn.Module):
    """The same model as any other module: Trainer then saves all of its weights in its own way."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        # Untied: safetensors does not take two names of one tensor. Frozen, so that nothing else changes.
        head = model.lm_head.weight.detach().clone()
        model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)

    def forward(self, **batch):
        return self.model(**batch)


class PlainTrainer:
    """HF Trainer with its defaults on the same model and samples."""

    def __init__(self, args: TrainArguments):
        model, processor = build_model(args, resolve(args, num_dialogues=1), None)
        self.model = Plain(model)
        self.pad = processor.tokenizer.pad_token_id
        self.samples, _ = encode_all(read_dialogues(args.train_file), encoder_for(args, processor, model))

    def train(self, folder: Path, around_save: Callable[[Save], object]) -> None:
        class Saving(Trainer):
            def _save_checkpoint(self, *args, **kwargs):
                return around_save(lambda: super(Saving, self)._save_checkpoint(*args, **kwargs))

        trainer = Saving(
            model=self.model,
            args=TrainingArguments(
                output_dir=str(folder), max_steps=STEPS, save_steps=SAVE_STEPS, save_total_limit=KEPT,
                per_device_train_batch_size=SAMPLES, learning_rate=1e-3, logging_steps=1, use_cpu=True,
                remove_unused_columns=False, report_to="none", disable_tqdm=True,
            ),
            train_dataset=self.samples,
            data_collator=lambda samples: pad_samples(samples, self.pad),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=True if checkpoint_folders(folder) else None)
        if not (folder / f"checkpoint-{STEPS}").exists():
            trainer._save_checkpoint(trainer.model, None)

    def reached(self, folder: Path) -> int:
        return self.saved(folder)  # it keeps no record of a step that it did not save

    def saved(self, folder: Path) -> int:
        return max(checkpoint_folders(folder), default=0)

    def end_state(self, folder: Path) -> dict[str, torch.Tensor]:
        end = folder / f"checkpoint-{STEPS}"
        tensors = {f"model|{name}": tensor for name, tensor in load_file(end / "model.safetensors").items()}
        moments = torch.load(end / "optimizer.pt", weights_only=True)["state"]
        tensors |= {f"optimizer|{i}|{key}": value for i, state in moments.items() for key, value in state.items()}
        history = json.loads((end / "trainer_state.json").read_text())["log_history"]
        losses = [line["loss"] for line in history if "loss" in line]
        return tensors | {"losses": torch.tensor(losses, dtype=torch.float64)}

    def give_up(self, folder: Path) -> None:
        shutil.rmtree(folder / f"checkpoint-{max(checkpoint_folders(folder))}")


def checkpoint_folders(folder: Path) -> list[int]:
    names = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")]
    return [int(match[1]) for match in names if match]


def kill_until(lives: Lives, generator: random.Random, kills: int, per_life: int | None) -> list[Life]:
    """Run lives until there were `kills`; per_life: at most that many in one life (None: until it ends by itself)."""
    plan = random_kills(generator, seconds=lives.seconds, saves=len(lives.operations), in_save=IN_SAVE)
    lived: list[Life] = []
    while (done := sum(life.kills for life in lived)) < kills:
        of_this_life: Iterator[Kill] = islice(plan, min(kills - done, per_life or kills))
        lived.append(lives.live(of_this_life))
    return lived


def summary(lived: list[Life], seconds: float) -> dict:
    return {
        "kills": sum(life.kills for life in lived),
        "kills_in_saves": sum(life.in_save for life in lived),
        "runs": len(lived),
        "resumes_that_ended_in_an_error": sum(len(life.errors) for life in lived),
        "runs_that_ended_in_other_bits": sum(bool(life.different) for life in lived),
        "most_steps_lost": max(step for life in lived for step in life.lost),
        "errors": sorted({anonymous(error) for life in lived for error in life.errors}),
        "seconds": round(seconds),
    }


def anonymous(error: str) -> str:
    """Without this machine's folders and the number of the checkpoint, so that equal ones are equal."""
    return re.sub(r"checkpoint-\d+", "checkpoint-N", re.sub(r"/\S*/", "", error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--hf_kills", type=int, default=60)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = random.Random(args.seed)
    run = small_run(args.scratch, dataloader_num_workers=2)
    settings = {"steps": STEPS, "save_steps": SAVE_STEPS, "seed": args.seed}

    began = time.monotonic()
    ours = summary(
        kill_until(Lives(Qwhisper(run), args.scratch / "qwhisper"), generator, args.kills, None),
        time.monotonic() - began,
    )
    append_result("kill9", {"name": "kill9", "trainer": "qwhisper"} | ours | settings)
    if args.hf_kills:
        began = time.monotonic()
        plain = Lives(PlainTrainer(run), args.scratch / "hf")
        # One kill a run, so that its effect on the run is known.
        theirs = summary(kill_until(plain, generator, args.hf_kills, 1), time.monotonic() - began)
        append_result("kill9", {"name": "kill9", "trainer": "plain HF Trainer"} | theirs | settings)
    failed = ours["resumes_that_ended_in_an_error"] or ours["runs_that_ended_in_other_bits"]
    sys.exit(int(bool(failed) or ours["most_steps_lost"] > SAVE_STEPS))


if __name__ == "__main__":
    main()
