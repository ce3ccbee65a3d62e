"""The loop that `throughput.py` compares with: what a competent user writes with `Trainer` and PEFT.

Whisper's encoder padded to 30 s, a two-layer projector, padded batches, logits of every position; LoRA r 16 on all
linears, bf16 autocast, eight data workers that compute the log-mel features.

    python benchmarks/plain_loop.py --audio_model DIR --text_model DIR --train_file FILE --batch 16 --accumulate 8
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import soundfile
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

STACK = 4  # encoder frames in one token
PLACEHOLDER = -1
FRAME_SAMPLES = 320  # of one encoder frame
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Listener(nn.Module):
    """Encoder, projector and language model; `forward` as `Trainer` calls it."""

    def __init__(self, audio_model: str, text_model: str, device: str):
        super().__init__()
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.encoder = WhisperEncoder.from_pretrained(audio_model, dtype=dtype).to(device).eval().requires_grad_(False)
        text = AutoModelForCausalLM.from_pretrained(text_model, dtype=dtype).to(device)
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM")
        self.text = get_peft_model(text, lora)
        width, hidden = self.encoder.config.d_model, text.config.hidden_size
        layers = [nn.Linear(STACK * width, hidden), nn.GELU(), nn.Linear(hidden, hidden)]
        self.projector = nn.Sequential(*layers).to(device)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.text.enable_input_require_grads()
        self.text.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward(self, mel: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        with torch.no_grad():
            frames = self.encoder(mel.to(self.encoder.conv1.weight.dtype)).last_hidden_state
        stacked = frames.float().reshape(len(frames), frames.shape[1] // STACK, -1)
        audio = input_ids == PLACEHOLDER
        embeddings = self.text.get_input_embeddings()(input_ids.masked_fill(audio, 0))
        tokens = self.projector(stacked).to(embeddings.dtype)
        places = (audio.cumsum(1) - 1).clamp(min=0)[..., None].expand(-1, -1, tokens.shape[-1])
        embeddings = torch.where(audio[..., None], tokens.gather(1, places), embeddings)
        return self.text(inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels)


class Dialogues(torch.utils.data.Dataset):
    """One clip, a question in words and an answer each, of a file that `real_shapes.make_data` has made."""

    def __init__(self, file: Path, tokenizer: Any, extractor: WhisperFeatureExtractor):
        self.folder, self.tokenizer, self.extractor = file.parent, tokenizer, extractor
        self.records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        question, answer = self.records[index]["messages"]
        clip, text = question["content"]
        samples, rate = soundfile.read(self.folder / clip["audio"], dtype="float32")
        mel = self.extractor(samples, sampling_rate=rate, return_tensors="pt").input_features[0]
        audio = torch.full((-(-len(samples) // (FRAME_SAMPLES * STACK)),), PLACEHOLDER)
        prompt, reply = (
            self.tokenizer(words, return_tensors="pt")["input_ids"][0] for words in (text["text"], answer["content"])
        )
        labels = torch.cat([torch.full((len(audio) + len(prompt),), -100), reply])
        return {"mel": mel, "input_ids": torch.cat([audio, prompt, reply]), "labels": labels}


def padded(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids, labels = ([item[name] for item in items] for name in ("input_ids", "labels"))
    return {
        "mel": torch.stack([item["mel"] for item in items]),
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


class Clock(TrainerCallback):
    """The seconds from the end of step `skip` to the end of the last step."""

    def __init__(self, skip: int):
        self.skip, self.begun, self.seconds = skip, 0.0, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if state.global_step == self.skip:
            self.begun = now
        self.seconds = now - self.begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--audio_model", "--text_model", "--train_file"):
        parser.add_argument(name, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--skip", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    extractor = WhisperFeatureExtractor.from_pretrained(args.audio_model)
    data = Dialogues(Path(args.train_file), AutoTokenizer.from_pretrained(args.text_model), extractor)
    clock = Clock(args.skip)
    settings = TrainingArguments(
        os.path.join(os.path.dirname(args.train_file), "plain-run"),
        per_device_train_batch_size=args.batch, gradient_accumulation_steps=args.accumulate, max_steps=args.steps,
        bf16=on_gpu, use_cpu=not on_gpu, gradient_checkpointing=args.gradient_checkpointing, learning_rate=3e-5,
        max_grad_norm=1.0,
        save_strategy="no", logging_strategy="no", report_to=[], remove_unused_columns=False, disable_tqdm=True,
        dataloader_num_workers=args.workers,
    )  # fmt: skip
    model = Listener(args.audio_model, args.text_model, "cuda" if on_gpu else "cpu")
    Trainer(model=model, args=settings, train_dataset=data, data_collator=padded, callbacks=[clock]).train()
    samples = (args.steps - args.skip) * args.batch * args.accumulate
    reserved = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else 0.0
    print(json.dumps({"samples_s": round(samples / clock.seconds, 2), "max_reserved_gib": round(reserved, 2)}))


if __name__ == "__main__":
    main()
