"""Whether each entry point of a model calls cuDNN's attention, and whether its gradients stay finite.

    python benchmarks/cudnn_entries.py
    python benchmarks/cudnn_entries.py --padded_to 64 --head_dim 8      # a quick try on a CPU

A small model with a massive activation, as Qwen's, has every row's log-sum-exp under -100. Batches padded to 64, 192
and 128 tokens go through training and evaluation (the engine's executor, padded and packed), generation and a plain
Hugging Face Trainer, each as loaded and after "sdpa" was set on the model or on its language model. For each the script
counts cuDNN's calls and the steps whose gradients are not finite; "guard": false is the same without our guard, and
shows on an H100 that the shapes do meet the fault. The last line and the exit code say whether any guarded call went to
cuDNN. Meant for a CUDA card, on which it takes under a minute; a CPU has no such kernel.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable

import torch
from common import ROOT, append_result
from nan_kernel import DEVICE, NonFiniteGradients, our_guard, weights_are_finite
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, WhisperConfig

from qwhisper.data.packing import pad_samples
from qwhisper.data.rows import Sample
from qwhisper.engine.executor import Executor
from qwhisper.model.attention import PACKED_ATTENTION
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from qwhisper.model.loading import join
from qwhisper.model.lora import add_lora
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration

sys.path.insert(0, str(ROOT))
from tests.model.parts import make_sample
from tests.small import VOCABULARY, text_config, whisper_config

DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SCORE = -120.0  # of every pair of tokens
WINDOWS = [800, 7_000, 16_001, 23_456]  # samples of the encoder's windows


def massive_model(head_dim: int) -> Qwen3AudioForConditionalGeneration:
    """LoRA on a language model of two layers, whose attention scores are all near SCORE."""
    torch.manual_seed(0)
    encoder = TrueLengthWhisperEncoder._from_config(
        WhisperConfig(**whisper_config().to_dict() | {"d_model": 128}), attn_implementation=PACKED_ATTENTION
    )
    config = text_config(head_dim=head_dim, hidden_size=256, intermediate_size=256)
    language_model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION)
    norm = math.sqrt(-SCORE / math.sqrt(head_dim))
    # The slowest of the rotary frequencies, so that the score does not depend on the distance.
    slowest = torch.zeros(head_dim)
    slowest[[head_dim // 2 - 1, head_dim - 1]] = 5.0
    with torch.no_grad():
        language_model.get_input_embeddings().weight[:, 0] = 50.0
        for layer in language_model.base_model.layers:
            attend = layer.self_attn
            attend.q_proj.weight[:, 0] = slowest.repeat(config.num_attention_heads)
            attend.k_proj.weight[:, 0] = -slowest.repeat(config.num_key_value_heads)
            attend.q_norm.weight.fill_(norm)
            attend.k_norm.weight.fill_(norm)
    whole = Qwen3AudioConfig(
        audio_config=encoder.config, text_config=config, audio_token_id=VOCABULARY - 1, audio_lead_silence=0.0,
        audio_tail_silence=0.0,
    )  # fmt: skip
    parts = encoder.to(DEVICE, DTYPE).eval(), language_model.to(DEVICE, DTYPE)
    model = join(Qwen3AudioForConditionalGeneration, whole, *(part.requires_grad_(False) for part in parts))
    add_lora(model)
    return model


def rows(model, length: int) -> list[Sample]:
    """Text, a row of each batch as long as the batch and the others shorter, so that there is a mask."""
    return [make_sample(model, [length - 3 * row - 8, 8], seed=row) for row in range(4)]


def executor(model, *, packing: bool) -> Executor:
    made = Executor(model, max_tokens_per_pack=None, pad_token_id=0)
    made.packing = packing
    return made


def train(model, length: int, *, packing: bool = False) -> dict:
    samples = rows(model, length)
    count = sum(s.num_supervised for s in samples)
    loss = executor(model.train(), packing=packing).forward_backward(samples, count).loss
    return {"loss": float(loss)}


def evaluate(model, length: int) -> dict:
    return {"loss": executor(model, packing=False).evaluate(rows(model, length))}


def generate(model, length: int) -> dict:
    batch = pad_samples(rows(model, length), 0, padding_side="left")
    batch = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    out = model.eval().generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    return {"tokens": out.shape[1] - length}


def plain_trainer(model, length: int) -> dict:
    """Two steps of Hugging Face's own loop."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=1, max_steps=2, learning_rate=1e-3, report_to=[], save_strategy="no",
            remove_unused_columns=False, disable_tqdm=True, use_cpu=DEVICE.type == "cpu", logging_steps=1,
        )  # fmt: skip
        data = [rows(model, length)] * 2
        outcome = Trainer(model, settings, train_dataset=data, data_collator=lambda x: pad_samples(x[0], 0)).train()
    return {"loss": outcome.training_loss, "weights_finite": weights_are_finite(model)}


ENTRIES: dict[str, Callable[..., dict]] = {
    "train, padded": train,
    "train, packed": lambda model, length: train(model, length, packing=True),
    "evaluate, padded": evaluate,
    "generate": generate,
    "HF Trainer": plain_trainer,
}
WAYS: dict[str, Callable] = {
    "as loaded": lambda model: None,
    "sdpa set on the model": lambda model: model.set_attn_implementation("sdpa"),
    "sdpa set on the language model": lambda model: model.model.language_model.set_attn_implementation("sdpa"),
}


def cudnn_calls(work: Callable[[], dict]) -> tuple[int, dict]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = work()
    return sum(event.count for event in profiler.key_averages() if "cudnn_attention" in event.key), result


def try_entry(entry: str, way: str, length: int, head_dim: int, *, guard: bool) -> dict:
    model = massive_model(head_dim)
    WAYS[way](model)
    steps = iter(range(10**6))
    gradients = NonFiniteGradients(model, lambda: next(steps))
    with our_guard(guard):
        calls, result = cudnn_calls(lambda: ENTRIES[entry](model, length))
    line = {"entry": entry, "attention": way, "padded_to": length, "guard": guard, "cudnn_calls": calls}
    line |= {"gradients_not_finite": len(gradients.first), "first": next(iter(gradients.first.values()), None)} | result
    return line | {"cudnn_switch_afterwards": torch.backends.cuda.cudnn_sdp_enabled()}


@torch.no_grad()
def try_encoder(head_dim: int) -> dict:
    """Largest difference of the encoder's features from each window's alone, for whichever attention is set."""
    model = massive_model(head_dim)
    generator = torch.Generator().manual_seed(0)
    windows = [0.1 * torch.randn(n, generator=generator) for n in WINDOWS]
    alone = torch.cat([model.model.encode_audio(window, [len(window)])[0] for window in windows])
    line: dict = {"entry": "encoder", "windows": WINDOWS, "scale": float(alone.abs().mean()), "cudnn_calls": 0}
    for name in ("qwhisper_packed", "sdpa", "eager"):
        model.set_attn_implementation(name)
        calls, found = cudnn_calls(lambda: {"features": model.model.encode_audio(torch.cat(windows), WINDOWS)[0]})
        line[f"difference, {name}"] = float((found["features"] - alone).abs().max())
        line["cudnn_calls"] += calls
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--padded_to", type=int, nargs="+", default=[64, 192, 128])
    parser.add_argument("--head_dim", type=int, default=128)
    args = parser.parse_args()
    lines = [try_encoder(args.head_dim)]
    append_result("cudnn_entries", lines[0])
    trials = [(entry, way, length, True) for entry in ENTRIES for way in WAYS for length in args.padded_to]
    trials += [(entry, "as loaded", args.padded_to[0], False) for entry in ENTRIES]
    for entry, way, length, guard in trials:
        lines.append(try_entry(entry, way, length, args.head_dim, guard=guard))
        append_result("cudnn_entries", lines[-1])
    guarded = [line for line in lines if line.get("guard", True)]
    calls = sum(line["cudnn_calls"] for line in guarded)
    bad = sum(line.get("gradients_not_finite", 0) for line in guarded)
    without = sum(line["cudnn_calls"] for line in lines) - calls
    verdict = {"guarded_trials": len(guarded), "cudnn_calls": calls, "gradients_not_finite": bad}
    append_result("cudnn_entries", {"summary": verdict | {"cudnn_calls_without_guard": without}})
    sys.exit(1 if calls or bad else 0)


if __name__ == "__main__":
    main()
