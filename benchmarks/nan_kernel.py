"""Attention kernels whose backward pass gives NaN, and what becomes of a training run that meets one.

    python benchmarks/nan_kernel.py
    python benchmarks/nan_kernel.py --text_model DIR --audio_model DIR --data DIR --output_dir DIR

The first line tries the kernels alone: kernel × length × log-sum-exp, with a mask and without, on inputs whose scores
are all near the log-sum-exp. With a real LM the same dialogues then go through a plain Hugging Face Trainer, which
reads them, and through qwhisper, which hears the digit: padded, packed, and padded with cuDNN's attention put back on.
Meant for a CUDA card; a CPU has no kernel that fails, and shows that the script runs.
"""

import argparse
import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from common import DIGITS, append_result, audio_part, pick, recordings
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from qwhisper.data.dialogue import Dialogue, parse_dialogue
from qwhisper.data.loader import StepSamples
from qwhisper.data.packing import pad_samples
from qwhisper.data.rows import Sample
from qwhisper.demo.dialogues import write_jsonl
from qwhisper.engine.kernels import check_kernels
from qwhisper.engine.preflight import Attention, Layout, make_inputs, reference
from qwhisper.errors import NumericalError
from qwhisper.guards.diagnose import diagnose
from qwhisper.infer.answer import encoder_for_text
from qwhisper.model.attention import PACKED_KERNELS, restore_kernels
from qwhisper.model.loss import IGNORE_INDEX
from qwhisper.report.events import read_jsonl
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.loop import train
from qwhisper.train.models import build_model
from qwhisper.train.plan import resolve
from qwhisper.train.session import build_session, encoder_for
from qwhisper.train.signals import StopSignals
from qwhisper.train.state import TrainState

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
KERNELS = (*BACKENDS, "varlen")
TENSORS = ("out", "dq", "dk", "dv")
ROWS = 4


# Kernels alone


def attend(kernel: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention: Attention) -> Tensor:
    """[rows, tokens, heads, head_dim] each."""
    rows, tokens = query.shape[:2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if kernel == "varlen":
        borders = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=query.device)
        joined = (x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (query, key, value))
        settings = {"scale": attention.scale, "causal": True, "window": None, "dropout": 0.0}
        return PACKED_KERNELS["varlen"](*joined, borders, tokens, **settings).unflatten(0, (rows, tokens))
    with sdpa_kernel(BACKENDS[kernel]):
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=attention.scale,
            enable_gqa=attention.groups > 1,
        )  # fmt: skip
    return out.transpose(1, 2)


def try_kernel(kernel: str, length: int, lse: float, *, masked: bool, dtype: torch.dtype, groups: int) -> dict | None:
    """NaN share of each tensor and its largest error in units of what rounding explains; None if it does not run."""
    attention = Attention(
        owner="benchmark", groups=groups, head_dim=128, scale=128**-0.5, causal=True, window=None, dtype=dtype,
        device=DEVICE, trained=True,
    )  # fmt: skip
    layout = Layout((length,) * ROWS, packed=False)
    *inputs, grad = make_inputs(attention, layout, score=lse)
    mask = attention.allowed(length).expand(ROWS, 1, length, length) if masked else None
    leaves = [x.requires_grad_() for x in inputs]
    try:
        out = attend(kernel, *leaves, mask, attention)
        got = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    except (RuntimeError, AssertionError):
        return None
    right = reference(*(x.detach().float() for x in (*inputs, grad)), attention, layout)
    result = {}
    for name, tensor, (expected, rounding) in zip(TENSORS, got, right, strict=True):
        # The heads of the second key head are those near the log-sum-exp.
        tensor, expected, rounding = (x.chunk(2, dim=2)[1].float() for x in (tensor, expected, rounding))
        finite = tensor.isfinite()
        errors = ((tensor - expected).abs() / (rounding + torch.finfo(dtype).tiny))[finite]
        result[name] = {"nan": float((~finite).float().mean()), "error": float(errors.max()) if errors.numel() else 0.0}
    return result


def worst_of(found: list[dict]) -> dict:
    """The largest NaN share and error of each tensor over dtypes and groupings."""
    shares = {f"nan_{name}": round(max(one[name]["nan"] for one in found), 4) for name in TENSORS}
    return shares | {"error_in_roundings": round(max(one[name]["error"] for one in found for name in TENSORS), 2)}


def try_kernels(lengths: list[int], log_sum_exps: list[float]) -> None:
    for kernel in KERNELS:
        for length in lengths:
            for lse in log_sum_exps:
                line: dict = {"kernel": kernel, "length": length, "log_sum_exp": lse}
                for name, masked in (("masked", True), ("unmasked", False)):
                    settings = [(dtype, groups) for dtype in (torch.bfloat16, torch.float16) for groups in (1, 4)]
                    tried = [
                        try_kernel(kernel, length, lse, masked=masked, dtype=dtype, groups=groups)
                        for dtype, groups in settings
                        if not (masked and kernel == "varlen")
                    ]
                    if found := [one for one in tried if one is not None]:
                        line[name] = worst_of(found) | {"ran": f"{len(found)} of {len(settings)}"}
                if "masked" in line or "unmasked" in line:
                    append_result("nan_kernel", line)


# A training run


def dialogues(files: dict, count: int, generator: random.Random) -> list[tuple[dict, dict]]:
    """(read, heard): the same dialogue with the digit's name and with its recording."""
    found = []
    for index in range(count):
        digit, path = pick(generator, files[generator.choice(sorted(files))])
        system = {"role": "system", "content": " ".join(generator.choices(DIGITS, k=256))}
        answer = {"role": "assistant", "content": DIGITS[digit]}
        question = {"type": "text", "text": " Which digit?"}
        read, heard = (
            {"id": f"d{index}", "messages": [system, {"role": "user", "content": [part, question]}, answer]}
            for part in ({"type": "text", "text": DIGITS[digit]}, audio_part(digit, path))
        )
        found.append((read, heard))
    return found


def cut(sample: Sample, length: int) -> Sample:
    """The sample with exactly `length` tokens; what is taken out stands in the system message, which is long."""
    excess = len(sample.input_ids) - length
    end_of_message = sample.labels[sample.labels != IGNORE_INDEX][-1]
    if not 0 <= excess < (sample.input_ids == end_of_message).argmax() - 4:
        raise SystemExit(f"a row of {len(sample.input_ids)} tokens can't be cut to {length}: choose other --padded_to")
    kept = np.r_[0:4, 4 + excess : len(sample.input_ids)]
    return dataclasses.replace(sample, input_ids=sample.input_ids[kept], labels=sample.labels[kept])


def batches(samples: list[Sample], batch: int, padded_to: list[int]) -> list[list[Sample]]:
    """Batches whose longest row has the wanted lengths in turn, and whose others are padded to it."""
    groups = [samples[i : i + batch] for i in range(0, len(samples), batch)]
    return [
        [cut(sample, padded_to[step % len(padded_to)] - 3 * row) for row, sample in enumerate(group)]
        for step, group in enumerate(groups)
    ]


class NonFiniteGradients:
    """The first parameter, in the order of the backward pass, whose gradient is not finite, for every step with one."""

    def __init__(self, model: nn.Module, step: Callable[[], int]):
        self.first: dict[int, str] = {}
        self.step = step
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._look(name, p.grad))

    def _look(self, name: str, grad: Tensor) -> None:
        if not grad.isfinite().all():
            self.first.setdefault(self.step(), name)

    def summary(self) -> dict:
        step = min(self.first, default=None)
        return {"steps_not_finite": len(self.first), "first_step": step, "first_parameter": self.first.get(step)}


def weights_are_finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)


@contextmanager
def cudnn_attention(on: bool) -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def plain_trainer(args: argparse.Namespace, rows: list[list[Sample]], pad_token_id: int) -> dict:
    """Hugging Face's Trainer with PEFT's LoRA in bf16, as most would write it; rows are read, not heard."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.text_model, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

    def collate(features: list[list[Sample]]) -> dict:
        batch = pad_samples(features[0], pad_token_id)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    settings = TrainingArguments(
        str(args.output_dir / "trainer"), per_device_train_batch_size=1, max_steps=len(rows), learning_rate=3e-5,
        max_grad_norm=1.0, bf16=True, logging_steps=1, save_strategy="no", report_to=[], remove_unused_columns=False,
        disable_tqdm=True, use_cpu=DEVICE.type == "cpu",
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=collate)
    gradients = NonFiniteGradients(model, lambda: trainer.state.global_step)
    outcome = trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return gradients.summary() | {
        "weights_finite": weights_are_finite(model),
        "last_logged_loss": round(losses[-1], 4),
        "reported_train_loss": round(outcome.training_loss, 4),
    }


@dataclasses.dataclass
class Heard:
    """What the runs of qwhisper share."""

    args: argparse.Namespace
    dialogues: list[Dialogue]
    train_file: Path

    def run(self, name: str, *, packing: bool) -> dict:
        """Training without the preflight, so that a kernel is met as it is; what the guards did, and what the diagnosis
        of a batch and the preflight say afterwards.
        """
        batch, folder = self.args.batch, self.args.output_dir / name
        train_args = TrainArguments(
            train_file=str(self.train_file), output_dir=str(folder), audio_model=str(self.args.audio_model),
            text_model=str(self.args.text_model), dtype="bf16", per_device_train_batch_size=batch,
            gradient_accumulation_steps=1, max_steps=len(self.dialogues) // batch,
        )  # fmt: skip
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        plan = resolve(train_args, num_dialogues=len(self.dialogues))
        model, processor = build_model(train_args, plan, None)
        state = TrainState()
        run = build_session(train_args, plan, model, processor, self.dialogues, [], state, [])
        run.executor.packing = packing
        encoder = encoder_for(train_args, processor, model)
        rows = batches([encoder.encode(c) for c in self.dialogues], batch, self.args.padded_to)
        gradients = NonFiniteGradients(model, lambda: state.step)
        try:
            train(run, iter([StepSamples(samples, []) for samples in rows]), StopSignals())
            ended = "done"
        except NumericalError as error:
            ended = str(error)
        events = read_jsonl(folder / "events.jsonl")
        result = gradients.summary() | {
            "weights_finite": weights_are_finite(model),
            "ended": ended,
            "steps_skipped": state.skipped_steps,
            "events": dict(Counter(event["kind"] for event in events)),
        }
        found = diagnose(model, run.executor.batch(rows[0]))
        findings = check_kernels(model, max(self.args.padded_to))
        restore_kernels()
        return result | {
            "diagnosis_of_a_batch": found and f"{found.where}: {found.message}",
            "preflight": [str(finding) for finding in findings],
        }


def real_runs(args: argparse.Namespace) -> None:
    generator = random.Random(0)
    pairs = dialogues(recordings(args.data), args.steps * args.batch, generator)
    reader = encoder_for_text(str(args.text_model))
    rows = batches([reader.encode(read) for read, _ in pairs], args.batch, args.padded_to)
    heard = [parse_dialogue(record, record["id"], args.data.resolve()) for _, record in pairs]
    train_file = write_jsonl(args.output_dir / "heard.jsonl", [record for _, record in pairs])
    shared = Heard(args, heard, train_file)
    settings = {"text_model": args.text_model.name, "steps": args.steps, "padded_to": args.padded_to}
    settings |= {"batch": args.batch}

    def record(name: str, cudnn: bool, result: Callable[[], dict]) -> None:
        with cudnn_attention(cudnn):
            append_result("nan_kernel", {"run": name, "cudnn_attention": cudnn} | settings | result())

    for cudnn in (True, False):
        record("HF Trainer", cudnn, lambda: plain_trainer(args, rows, reader.pad_token_id))
    record("qwhisper, padded", False, lambda: shared.run("padded", packing=False))
    record("qwhisper, packed", False, lambda: shared.run("packed", packing=True))
    record("qwhisper, padded, cuDNN put back on", True, lambda: shared.run("padded-cudnn", packing=False))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[64, 65, 128, 192, 256, 320])
    parser.add_argument("--log_sum_exps", type=float, nargs="*", default=[0.0, -50.0, -88.0, -95.0, -110.0])
    parser.add_argument("--text_model", type=Path, default=None)
    parser.add_argument("--audio_model", type=Path, default=None)
    parser.add_argument("--data", type=Path, default=None, help="folder of DIGIT_SPEAKER_TAKE.wav")
    parser.add_argument("--output_dir", type=Path, default=None, help="a folder that does not exist yet")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--padded_to", type=int, nargs="+", default=[64, 192], help="tokens of the batches, in turn")
    args = parser.parse_args()
    given = [getattr(args, name) for name in ("text_model", "audio_model", "data", "output_dir")]
    if any(given) and not all(given):
        parser.error("a training run needs all of --text_model, --audio_model, --data and --output_dir")
    return args


def main() -> None:
    args = parse()
    try_kernels(args.lengths, args.log_sum_exps)
    if args.text_model:
        real_runs(args)


if __name__ == "__main__":
    main()
