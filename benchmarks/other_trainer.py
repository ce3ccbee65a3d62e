"""Samples a second of another trainer, ms-swift (`swift sft`), on a model of the shapes of the case `0.6b`.

    pip install ms-swift
    python benchmarks/other_trainer.py --tokenizer DIR --output_dir DIR

The model is Qwen2-Audio's architecture in transformers, which ms-swift knows: Whisper's encoder with the sizes of
large-v3 turbo, one linear layer, and Qwen3 0.6B as the language model, with random weights. Its encoder halves its
output, so a second of audio is 25 tokens, in qwhisper 12.5. Clips and dialogues are those of throughput.py. LoRA of
rank 16 on all linears of the language model, bf16, frozen encoder and projector, no recompute, 128 samples a step. The
speed is read from the trainer's own log: whole steps, the first third left out.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from common import append_result
from real_shapes import SIZES, make_data, save_random
from transformers import (
    AutoTokenizer,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

# Its own `all-linear` looks for the modules' names of transformers before 5.
LINEARS = r"^model\.language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"
AUDIO_TOKENS = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
ENTRY = "swift.cli.sft"


def make_model(folder: Path, size: str, tokenizer: Path) -> Path:
    """The model folder, made once."""
    if (folder / "config.json").exists():
        return folder
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.add_special_tokens({"additional_special_tokens": list(AUDIO_TOKENS)})
    hidden, layers, intermediate, heads, key_heads, tied = SIZES[size]
    width, audio_layers, audio_heads = (32, 2, 2) if size == "tiny" else (1280, 32, 20)
    text = {
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": key_heads,
        "head_dim": 128, "tie_word_embeddings": tied, "max_position_embeddings": 40_960,
    }  # fmt: skip
    audio = {
        "d_model": width, "encoder_layers": audio_layers, "encoder_attention_heads": audio_heads,
        "encoder_ffn_dim": 4 * width, "num_mel_bins": 128,
    }  # fmt: skip
    config = Qwen2AudioConfig(
        audio_config=audio,
        text_config=text,
        audio_token_index=words.convert_tokens_to_ids(AUDIO_TOKENS[0]),
        ignore_index=-100,  # the class reads it from here, and has no default for it in transformers 5
    )
    save_random(Qwen2AudioForConditionalGeneration, config, folder)
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=128), words).save_pretrained(folder)
    return folder


def as_swift_reads(data: Path) -> Path:
    """The same dialogues with `<audio>` in the text and the clips beside it."""
    records = []
    for line in data.read_text(encoding="utf-8").splitlines():
        messages, audios = [], []
        for message in json.loads(line)["messages"]:
            parts = message["content"] if isinstance(message["content"], list) else [message["content"]]
            text = ""
            for part in parts:
                if isinstance(part, dict) and part["type"] == "audio":
                    audios.append(str(data.parent / part["audio"]))
                    text += "<audio>"
                else:
                    text += part["text"] if isinstance(part, dict) else part
            messages.append({"role": message["role"], "content": text})
        records.append({"messages": messages, "audios": audios})
    file = data.with_name(f"swift-{data.name}")
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def command(args: argparse.Namespace, model: Path, data: Path, run: Path) -> list[str]:
    on_gpu = torch.cuda.is_available()
    flags = [
        "--model", model, "--model_type", "qwen2_audio", "--dataset", data, "--output_dir", run,
        "--add_version", "false", "--tuner_type", "lora", "--lora_rank", 16, "--lora_alpha", 32, "--lora_dropout", 0,
        "--target_regex", LINEARS, "--torch_dtype", "bfloat16" if on_gpu else "float32",
        "--bf16", str(on_gpu).lower(), "--attn_impl", "sdpa", "--gradient_checkpointing", "false",
        "--per_device_train_batch_size", args.batch, "--gradient_accumulation_steps", args.accumulate,
        "--max_steps", args.steps, "--learning_rate", 3e-5, "--logging_steps", 1, "--save_strategy", "no",
        "--split_dataset_ratio", 0, "--lazy_tokenize", "true", "--report_to", "none",
        "--dataloader_num_workers", 8 if on_gpu else 0,
    ]  # fmt: skip
    return [sys.executable, "-m", ENTRY, *map(str, flags)]


def figures(log: Path, samples: int, skip: int) -> dict[str, float]:
    """Speed and memory of the trainer's log. samples: of a step; the first `skip` steps are left out.

    The log has the seconds a step since the start, in the mean.
    """
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    spent = {}  # step: seconds since the start
    for line in lines:
        if "train_speed(s/it)" in line and "loss" in line:
            step = int(str(line["global_step/max_steps"]).split("/")[0])
            spent[step] = line["train_speed(s/it)"] * step
    last = max(spent)
    memory = [line["memory(GiB)"] for line in lines if "memory(GiB)" in line]
    speed = samples * (last - skip) / (spent[last] - spent[skip])
    return {"samples_s": round(speed, 2), "max_reserved_gib": max(memory, default=0.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="0.6b")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=8)
    parser.add_argument("--steps", type=int, default=9)
    args = parser.parse_args()
    folder, samples = args.output_dir.resolve(), args.batch * args.accumulate
    model = make_model(folder / f"qwen2-audio-{args.size}", args.size, args.tokenizer)
    data = as_swift_reads(make_data(folder / "data", min(1024, args.steps * samples)))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    run = folder / f"swift-{args.size}-{time.strftime('%H%M%S')}"
    offline = {"SWIFT_AUDIO_LOAD_BACKEND": "soundfile_pyav", "HF_HUB_OFFLINE": "1", "MODELSCOPE_OFFLINE": "1"}
    subprocess.run(command(args, model, data, run), env=os.environ | offline, check=True)
    found = figures(run / "logging.jsonl", samples, max(1, args.steps // 3))
    facts = {"case": f"ms-swift-{args.size}", "version": version("ms-swift"), "batch": args.batch}
    append_result("other_trainer", facts | found | {"accumulate": args.accumulate, "steps": args.steps})


if __name__ == "__main__":
    main()
