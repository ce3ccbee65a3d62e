"""The field report's history of NaNs: training in the naive way until it breaks, then one measure more at a time.

    python benchmarks/naive_history.py --text_model DIR --audio_model DIR --data DIR
    python docs/make_stability_tables.py

The naive way is a plain loop: everything in fp16, also projector, LoRA and Adam's moments; weights drawn as PyTorch and
PEFT do; no clipping; rows padded to a multiple of 64 tokens; torch's own choice of attention kernel; labels masked by a
prompt length that was counted with 30 s of audio. MEASURES are turned on one by one in their order. Then each of those
that a plain loop can have is left out alone, in fp16 and in bf16; a run that breaks is repeated with the guards.
Recordings and encoder are real. Meant for a CUDA card: on a CPU no kernel fails. The second line writes table and plot.
"""

import argparse
import dataclasses
import gc
import math
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import DIGITS, append_result, audio_part, pick, recordings
from nan_kernel import cudnn_attention
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qwhisper.data.collator import ConversationCollator
from qwhisper.data.dialogue import Dialogue, parse_dialogue
from qwhisper.data.loader import StepSamples
from qwhisper.data.packing import pad_samples
from qwhisper.data.rows import Sample
from qwhisper.demo.dialogues import write_jsonl
from qwhisper.engine.batch import padded_batch
from qwhisper.engine.executor import Executor
from qwhisper.errors import QwhisperError
from qwhisper.guards.diagnose import diagnose
from qwhisper.guards.gradients import drop_gradients, step_statistics
from qwhisper.model.bases import LoadOptions
from qwhisper.model.lora import add_lora
from qwhisper.model.loss import IGNORE_INDEX
from qwhisper.model.projector import AudioProjection
from qwhisper.model.qwen3_audio import build_from_bases
from qwhisper.report.events import read_jsonl
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.loop import train
from qwhisper.train.optimizer import parameter_groups
from qwhisper.train.plan import resolve
from qwhisper.train.probe import Pair, choose_pairs, listening_gain
from qwhisper.train.session import build_session
from qwhisper.train.signals import StopSignals
from qwhisper.train.state import TrainState

MEASURES = (
    "labels",  # the answers' spans as the chat template lays them
    "kernel",  # cuDNN's attention is off; with guards, rows are packed as well
    "projector_fp32",
    "lora_fp32",
    "layer_norm",  # before the projector's first layer
    "small_xavier",  # × 0.1, for the projector
    "small_lora",  # A × 0.1
    "clip",  # LoRA at 5.0, then all at 1.0
    "gentle_start",  # a fifth of the learning rate for 50 steps, the projector frozen for 20
    "bf16",
    "guards",  # qwhisper's own training loop in the place of the plain one
    "careful_rates",  # 3e-5: with it, the last run is the stable recipe
)
PLAIN = MEASURES[: MEASURES.index("guards")]
NAIVE_RATES = {"lora": 2e-4, "projector": 1e-3}
CAREFUL_RATES = {"lora": 3e-5, "projector": 3e-5}
LORA_BOUND, BOUND = 5.0, 1.0
EARLY_FACTOR, EARLY_STEPS, FROZEN_STEPS = 0.2, 50, 20  # the recipe has 100 early steps: here they would be all
QUESTION = "Which digit was said? Answer with one word."


@dataclass
class Setting:
    """What all runs share. rows: the samples of each step; pairs: held out; bases: (model, processor) by dtype."""

    args: argparse.Namespace
    dialogues: list[Dialogue]
    rows: list[list[Sample]]
    pairs: list[Pair]
    collator: ConversationCollator
    bases: dict

    def batch(self, samples: Sequence[Sample]) -> dict:
        """Padded on the right to a multiple of --pad_to_multiple_of tokens, on the models' device."""
        batch = pad_samples(samples, self.collator.encoder.pad_token_id)
        missing = -batch["input_ids"].shape[1] % self.args.pad_to_multiple_of
        fill = {"input_ids": self.collator.encoder.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        batch |= {name: nn.functional.pad(batch[name], (0, missing), value=value) for name, value in fill.items()}
        device = next(iter(self.bases.values()))[0].lm_head.weight.device
        return {name: x if name == "audio_lengths" else x.to(device) for name, x in batch.items()}


def dialogues(digits: Sequence[dict], count: int, generator: random.Random, folder: Path) -> list[Dialogue]:
    """One recording, one question; digits: of each speaker."""
    made = []
    for index in range(count):
        digit, path = pick(generator, generator.choice(digits))
        content = [audio_part(digit, path), {"type": "text", "text": QUESTION}]
        answer = {"role": "assistant", "content": DIGITS[digit]}
        made.append({"id": f"d{index}", "messages": [{"role": "user", "content": content}, answer]})
    return [parse_dialogue(record, record["id"], folder.resolve()) for record in made]


def prepare(args: argparse.Namespace) -> Setting:
    bases = {
        dtype: build_from_bases(str(args.audio_model), str(args.text_model), LoadOptions(dtype=dtype))
        for dtype in ("fp16", "bf16")
    }
    _, processor = bases["fp16"]
    collator = ConversationCollator(
        processor.tokenizer, processor.frames, audio_token_id=processor.audio_token_id,
        chat_template=processor.chat_template,
    )  # fmt: skip
    generator, files = random.Random(0), recordings(args.data)
    *heard, unheard = [files[speaker] for speaker in sorted(files)]
    taught = dialogues(heard, args.steps * args.batch, generator, args.data)
    held_out = dialogues([unheard], 64 * args.probes, generator, args.data)
    samples = [collator.encoder.encode(dialogue) for dialogue in taught]
    rows = [samples[i : i + args.batch] for i in range(0, len(samples), args.batch)]
    pairs = [
        pair for i in range(args.probes) for pair in choose_pairs(held_out[i :: args.probes], collator.encoder, seed=0)
    ]
    return Setting(args, taught, rows, pairs, collator, bases)


def masked_by_padded_prompt(setting: Setting, sample: Sample) -> Sample:
    """Whisper's extractor fills every clip up to 30 s; a prompt counted with its frames ends behind the row."""
    _, processor = setting.bases["fp16"]
    surplus = processor.frames.num_tokens(30 * 16_000) - int((sample.input_ids == processor.audio_token_id).sum())
    labels = sample.labels.copy()
    labels[: sample.answer_spans[0][0] + surplus] = IGNORE_INDEX
    return dataclasses.replace(sample, labels=labels)


def fresh(setting: Setting, on: frozenset):
    """(model, processor): the loaded bases with a new projector and new LoRA as the measures have them."""
    model, processor = setting.bases["bf16" if "bf16" in on else "fp16"]
    remove_lora(model)
    torch.manual_seed(0)
    projector = AudioProjection(model.config)  # its layers are drawn as PyTorch draws a Linear: Kaiming uniform
    if "small_xavier" in on:
        for layer in (projector.linear_1, projector.linear_2):
            layer.reset_to_small_xavier(model.config.projector_init_scale)
    if "layer_norm" not in on:
        projector.norm = nn.Identity()
    projector.to(model.lm_head.weight.device, torch.float32 if "projector_fp32" in on else model.dtype)
    model.model.multi_modal_projector = projector
    add_lora(model, init_scale=0.1 if "small_lora" in on else 1.0, fp32="lora_fp32" in on)
    return model.train(), processor


def remove_lora(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    vars(model).pop("peft_config", None)
    gc.collect()
    torch.cuda.empty_cache()


class Log:
    """The record of a run, step by step."""

    def __init__(self):
        self.losses: list[float] = []
        self.norms: dict[str, list[float]] = {"all": [], "lora": [], "projector": []}
        self.broke: dict[str, int] = {}  # first step with non-finite logits, loss, gradient, weights
        self.facts: dict = {}

    def step(self, loss: float, norms: dict[str, float]) -> None:
        self.losses.append(loss)
        self.norms["all"].append(math.hypot(*norms.values()))
        for name in ("lora", "projector"):
            self.norms[name].append(norms.get(name, 0.0))

    def result(self) -> dict:
        finite = {name: [x for x in norms if math.isfinite(x)] for name, norms in self.norms.items()}
        last = [x for x in self.losses[-20:] if math.isfinite(x)]
        return self.facts | {
            "first_not_finite": self.broke,
            "steps_taken": len(self.losses),
            "largest_norm": {name: short(max(norms, default=0.0)) for name, norms in finite.items()},
            "steps_above_1000": sum(x > 1000 for x in finite["all"]),
            "last_loss": short(sum(last) / len(last)) if len(last) == len(self.losses[-20:]) > 0 else None,
            "loss": [short(x) for x in self.losses],
            "grad_norm": [short(x) for x in self.norms["all"]],
        }


def short(x: float) -> float | None:
    """Three digits; None for what is not finite, which JSON does not know."""
    return float(f"{x:.3g}") if math.isfinite(x) else None


def plain_run(setting: Setting, on: frozenset) -> dict:
    """Ends one step after the weights are no longer finite: nothing later can repair them."""
    model, _ = fresh(setting, on)
    groups, log = parameter_groups(model), Log()
    rates = CAREFUL_RATES if "careful_rates" in on else NAIVE_RATES
    with_rates = [{"params": p, "lr": rates[name]} for name, p in groups.items()]
    optimizer = torch.optim.AdamW(with_rates, weight_decay=0.0, fused="fused" in on or None)
    for step, samples in enumerate(setting.rows):
        if "labels" not in on:
            samples = [masked_by_padded_prompt(setting, sample) for sample in samples]
        batch = setting.batch(samples)
        loss, logits_are_finite = forward_backward(model, batch)
        for what, finite in (("logits", logits_are_finite), ("loss", loss.isfinite())):
            if not finite:
                log.broke.setdefault(what, step)
        if "gentle_start" in on:
            for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
                group["lr"] = rate * (EARLY_FACTOR if step < EARLY_STEPS else 1.0)
            if step < FROZEN_STEPS:
                drop_gradients({"projector": groups["projector"]})
        found = step_statistics(loss, groups)
        log.step(found.loss, found.gradients)
        if found.broken_weights:
            log.broke["weights"] = step - 1  # by the update before this step
            break
        if not math.isfinite(log.norms["all"][-1]) and log.broke.setdefault("gradient", step) == step:
            name_cause(model, batch, log)
        if "clip" in on:
            nn.utils.clip_grad_norm_(groups["lora"], LORA_BOUND)
            nn.utils.clip_grad_norm_([p for parameters in groups.values() for p in parameters], BOUND)
        optimizer.step()
        drop_gradients(groups)
    if lost := non_finite_weights(model):
        log.broke.setdefault("weights", len(setting.rows) - 1)
        log.facts["weights_lost"] = lost
    return log.result() | listening(setting, model)


def forward_backward(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the supervised tokens, as transformers computes it; whether all logits are finite."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1]
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )
    loss.backward()
    return loss.detach(), logits.isfinite().all()


def name_cause(model: nn.Module, batch: dict, log: Log) -> None:
    """The first gradient that is not finite in the order of the backward pass, and what the diagnosis says of it."""
    kept = {p: p.grad for p in model.parameters() if p.grad is not None}
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    log.facts["first_gradient"] = bad[-1]
    finding = diagnose(model, batch)
    log.facts["diagnosis"] = finding and f"{finding.when}: {finding.message}"
    for parameter, gradient in kept.items():
        parameter.grad = gradient


def non_finite_weights(model: nn.Module) -> dict[str, int]:
    """How many tensors of lora_A, lora_B and the projector."""
    names = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    return dict(Counter(next(kind for kind in ("lora_A", "lora_B", "projector") if kind in name) for name in names))


def guarded_run(setting: Setting, on: frozenset) -> dict:
    """`qwhisper train` on the same samples in the same order; if the kernel is left as it is, rows are padded."""
    model, processor = fresh(setting, on)
    with tempfile.TemporaryDirectory() as folder:
        train_args = arguments(setting, on, Path(folder))
        plan = resolve(train_args, num_dialogues=len(setting.dialogues))
        run = build_session(train_args, plan, model, processor, setting.dialogues, [], TrainState(), [])
        if "kernel" not in on:
            given = (model.config.frames, model.config.audio_token_id, run.executor.pad_token_id)
            multiple, device = setting.args.pad_to_multiple_of, run.executor.device
            run.executor.batch = lambda samples: padded_batch(samples, *given, multiple_of=multiple).to(device)
        mask, ended = (lambda _, sample: sample) if "labels" in on else masked_by_padded_prompt, "done"
        rows = [[mask(setting, sample) for sample in samples] for samples in setting.rows]
        try:
            setting.collator(rows[0])  # what a user's samples come through
            train(run, iter([StepSamples(samples, []) for samples in rows]), StopSignals())
        except QwhisperError as error:
            ended = f"exit code {error.exit_code}: {re.split(r'[.;] | [(]samples', str(error))[0]}"
        events, log = read_jsonl(Path(folder) / "events.jsonl"), Log()
        for line in filter(lambda line: "loss" in line, read_jsonl(Path(folder) / "metrics.jsonl")):
            log.step(float(line["loss"]), {n: float(line.get(f"grad_norm_{n}", 0.0)) for n in ("lora", "projector")})
    causes = [event["diagnosis"] for event in events if event.get("diagnosis")]
    log.facts = {
        "ended": ended,
        "steps_skipped": run.state.skipped_steps,
        "events": dict(Counter(event["kind"] for event in events)),
        "diagnosis": f"{causes[0]['when']}: {causes[0]['message']}" if causes else None,
        "weights_lost": non_finite_weights(model),
    }
    return log.result() | listening(setting, model)


def arguments(setting: Setting, on: frozenset, folder: Path) -> TrainArguments:
    args, rates = setting.args, CAREFUL_RATES if "careful_rates" in on else NAIVE_RATES
    clip, gentle = "clip" in on, "gentle_start" in on
    return TrainArguments(
        train_file=str(write_jsonl(folder / "train.jsonl", [])), output_dir=str(folder),
        audio_model=str(args.audio_model), text_model=str(args.text_model), dtype="bf16" if "bf16" in on else "fp16",
        per_device_train_batch_size=args.batch, gradient_accumulation_steps=1, max_steps=len(setting.rows),
        learning_rate=rates["lora"], projector_learning_rate=rates["projector"], lr_scheduler_type="constant",
        lora_grad_clip=LORA_BOUND if clip else 0.0, max_grad_norm=BOUND if clip else 0.0,
        early_lr_factor=EARLY_FACTOR if gentle else 1.0, early_lr_steps=EARLY_STEPS if gentle else 0,
        freeze_projector_steps=FROZEN_STEPS if gentle else 0, logging_steps=50, save_steps=10 * len(setting.rows),
    )  # fmt: skip


def listening(setting: Setting, model: nn.Module) -> dict:
    """Held-out loss with the true audio, and what swapped audio adds to it, of a speaker that was not trained on."""
    if non_finite_weights(model):
        return {}
    executor = Executor(model, max_tokens_per_pack=None, pad_token_id=setting.collator.encoder.pad_token_id)
    losses = executor.sample_losses([p.true for p in setting.pairs] + [p.swapped for p in setting.pairs])
    tokens = [pair.true.num_supervised for pair in setting.pairs]
    found = listening_gain(losses[: len(tokens)], losses[len(tokens) :], tokens)
    true = sum(losses[: len(tokens)]) / sum(tokens)
    return {"held_out_loss": short(true), "swapped_adds": short(found.gain), "swapped_noise": short(found.noise)}


def measured(setting: Setting, run: str, names: Sequence[str], **values) -> dict:
    """One run and its line in the results."""
    on, began = frozenset(names), time.perf_counter()
    with cudnn_attention("kernel" not in on):
        result = (guarded_run if "guards" in on else plain_run)(setting, on)
    args = setting.args
    settings = {"text_model": args.text_model.name, "steps": args.steps, "batch": args.batch}
    settings |= {"pad_to_multiple_of": args.pad_to_multiple_of, "seconds": round(time.perf_counter() - began, 1)}
    line = {"run": run, "measures": list(names), **values}
    print(f"--- {run}, {values}: {result['first_not_finite'] or result.get('ended', 'finite to the end')}", flush=True)
    append_result("naive_history", line | result | settings)
    return result


def stages(setting: Setting) -> None:
    for number in range(len(MEASURES) + 1):
        measured(setting, "stage", MEASURES[:number], added=MEASURES[number - 1] if number else None)
    # Computes in fp32 whatever the weights are.
    measured(setting, "fused AdamW", ["labels", "kernel", "fused"])


def leave_one_out(setting: Setting) -> None:
    """In fp16, where more breaks, and in bf16."""
    for dtype, everything in (("fp16", PLAIN[:-1]), ("bf16", PLAIN)):
        for left_out in setting.args.left_out:
            rest, record = [name for name in everything if name != left_out], {"left_out": left_out, "dtype": dtype}
            if measured(setting, "without", rest, **record)["first_not_finite"]:
                measured(setting, "without, guarded", [*rest, "guards"], **record)
    measured(setting, "without, guarded", [*PLAIN[:-1], "guards"], left_out=None, dtype="fp16")
    measured(setting, "guards alone", ["labels", "kernel", "guards"])


def circumstances_of(setting: Setting) -> None:
    """What the models take in memory, and how far the encoder's output reaches."""
    model, _ = setting.bases["fp16"]
    batch = setting.batch(setting.rows[0])
    frames, _ = model.model.encode_audio(batch["audio_waveforms"], batch["audio_lengths"].tolist())
    channels = frames.float().square().mean(0).sqrt()
    result = {
        "gib_in_fp32": sum(4 * p.numel() for p in model.parameters()) / 2**30,
        "gib_as_loaded": sum(p.nbytes for p in model.parameters()) / 2**30,
        "encoder_rms": float(channels.square().mean().sqrt()),
        "encoder_largest": float(frames.float().abs().max()),
        "largest_channel_over_median": float(channels.max() / channels.median()),
    }
    named = {"run": "bases"} | {name: getattr(setting.args, name).name for name in ("text_model", "audio_model")}
    append_result("naive_history", named | {name: short(x) for name, x in result.items()})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_model", type=Path, required=True)
    parser.add_argument("--audio_model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of DIGIT_SPEAKER_TAKE.wav")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pad_to_multiple_of", type=int, default=64, help="tokens")
    parser.add_argument("--probes", type=int, default=4, help="16 held-out pairs each")
    parser.add_argument("--left_out", nargs="+", choices=PLAIN[:-1], default=PLAIN[:-1], help="for leave-one-out")
    parser.add_argument("--runs", choices=("stages", "leave-one-out", "all"), default="all")
    return parser.parse_args()


def main() -> None:
    setting = prepare(parse())
    circumstances_of(setting)
    for name, run in (("stages", stages), ("leave-one-out", leave_one_out)):
        if setting.args.runs in (name, "all"):
            run(setting)


if __name__ == "__main__":
    main()
