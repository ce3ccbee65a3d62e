"""A training script as a user of Hugging Face's Trainer writes it, on small models: nothing of ours guards it.

Clips are read with soundfile, turned to mono and given to `WhisperFeatureExtractor` with the rate that the file states;
dialogues are tokenized by the chat template and cut by the tokenizer's own truncation; the loss is transformers' own.
Model and tokenizer alone are qwhisper's. Trainer has the flags that everybody sets and its defaults otherwise.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from kill9 import Plain
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from qwhisper.data.template import AUDIO_TOKEN
from qwhisper.model.lora import add_lora
from qwhisper.model.qwen3_audio import build_from_bases

STEPS, SAVE_STEPS, LEARNING_RATE = 6, 2, 1e-3
MAX_LENGTH = 512
STACK = 4  # encoder frames that the projector joins into one token
LAST_STEP = "end.pt"


class PlainModel(Plain):
    """The model as any other module: Trainer saves all of its weights, and the loss is transformers'."""

    def forward(self, labels=None, num_items_in_batch=None, dialogue=None, **inputs):
        logits = self.model(**inputs).logits
        loss = ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch)
        return {"loss": loss, "logits": logits}


class Dialogues(torch.utils.data.Dataset):
    """One dialogue a line; of its answers the last one is learned."""

    def __init__(self, path: Path, tokenizer, extractor, max_length: int):
        with open(path, encoding="utf-8") as file:
            self.records = [json.loads(line) for line in file]
        self.folder = Path(path).parent
        self.tokenizer = tokenizer
        self.extractor = extractor
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        clips: list[torch.Tensor] = []
        messages = [self._rendered(message, clips) for message in self.records[index]["messages"]]
        prompt = self._ids(messages[:-1], add_generation_prompt=True)
        input_ids = self._ids(messages)
        labels = input_ids.clone()
        labels[: len(prompt)] = -100
        return {"input_ids": input_ids, "labels": labels, "clips": clips, "dialogue": index}

    def _rendered(self, message: dict, clips: list[torch.Tensor]) -> dict:
        """A message whose clips are placeholders in its text; their features are added to `clips`."""
        if isinstance(message["content"], str):
            return message
        text = ""
        for part in message["content"]:
            if part["type"] == "text":
                text += part["text"]
                continue
            clips.append(self._features(part))
            frames = -(-clips[-1].shape[0] // 2)
            text += AUDIO_TOKEN * -(-frames // STACK)
        return {"role": message["role"], "content": text}

    def _features(self, part: dict) -> torch.Tensor:
        """[frames, mel bins] of a clip."""
        waveform, rate = soundfile.read(self.folder / part["audio"], dtype="float32")
        if waveform.ndim > 1:
            waveform = waveform.mean(axis=1)
        if "start" in part or "end" in part:
            waveform = waveform[int(part.get("start", 0) * rate) : int(part.get("end", 1e6) * rate)]
        features = self.extractor(waveform, sampling_rate=rate, padding="longest", return_tensors="np")
        return torch.from_numpy(np.ascontiguousarray(features["input_features"][0].T))

    def _ids(self, messages: list[dict], **how) -> torch.Tensor:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **how)
        return self.tokenizer(text, truncation=True, max_length=self.max_length, return_tensors="pt")["input_ids"][0]


def collate(samples: list[dict], pad: int, multiple_of: int = 1) -> dict[str, torch.Tensor]:
    """Padded on the right; all clips of the batch in a row. dialogue: the samples' numbers, which faults aim at."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    spare = -longest % multiple_of
    ids, labels, mask = (
        torch.nn.functional.pad(pad_sequence(rows, batch_first=True, padding_value=value), (0, spare), value=value)
        for rows, value in (
            ([s["input_ids"] for s in samples], pad),
            ([s["labels"] for s in samples], -100),
            ([torch.ones_like(s["input_ids"]) for s in samples], 0),
        )
    )
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    if clips := [clip for sample in samples for clip in sample["clips"]]:
        batch["input_features"] = pad_sequence(clips, batch_first=True).transpose(1, 2)
        batch["input_features_mask"] = pad_sequence([torch.ones(len(clip)) for clip in clips], batch_first=True)
    return batch | {"dialogue": torch.tensor([sample["dialogue"] for sample in samples])}


@dataclass
class Script:
    """The script's model, and what it makes a trainer of."""

    model: PlainModel
    tokenizer: object
    extractor: object

    @classmethod
    def on(cls, bases: tuple[Path, Path], *, lora_r: int = 16) -> "Script":
        """bases: (audio, text) folders."""
        torch.manual_seed(0)
        model, processor = build_from_bases(*map(str, bases), audio_lead_silence=0.0, audio_tail_silence=0.0)
        add_lora(model, r=lora_r, dropout=0.05)
        processor.tokenizer.chat_template = processor.chat_template
        return cls(PlainModel(model), processor.tokenizer, processor.feature_extractor)

    def dialogues(self, path: Path, max_length: int = MAX_LENGTH) -> Dialogues:
        return Dialogues(path, self.tokenizer, self.extractor, max_length)

    def trainer(
        self,
        folder: Path,
        train_file: Path,
        *,
        eval_file: Path | None = None,
        max_length: int = MAX_LENGTH,
        collator: Callable | None = None,
        multiple_of: int = 1,
        **flags,
    ) -> Trainer:
        usual = {
            "max_steps": STEPS, "save_steps": SAVE_STEPS, "logging_steps": 1, "learning_rate": LEARNING_RATE,
            "max_grad_norm": 1.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True,
            "remove_unused_columns": False, "report_to": "none", "disable_tqdm": True, "prediction_loss_only": True,
        }  # fmt: skip
        if eval_file:
            usual |= {"eval_strategy": "steps", "eval_steps": SAVE_STEPS}
        pad = self.tokenizer.pad_token_id
        return Trainer(
            model=self.model,
            args=TrainingArguments(output_dir=str(folder), **usual | flags),
            train_dataset=self.dialogues(train_file, max_length),
            eval_dataset=self.dialogues(eval_file) if eval_file else None,
            data_collator=collator or (lambda samples: collate(samples, pad, multiple_of)),
        )
