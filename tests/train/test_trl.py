"""TRL's `SFTTrainer` with our model: texts by itself, dialogues with audio by our collator. Skipped without trl."""

import json
import math
from pathlib import Path

import pytest

from qwhisper import ConversationCollator, Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


@pytest.fixture
def settings(tmp_path):
    return {
        "output_dir": str(tmp_path / "sft"), "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none",
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1, "save_steps": 2,
    }  # fmt: skip


def losses(trainer) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("load", [Qwen3AudioForConditionalGeneration.from_pretrained, str])
def test_texts_need_no_more_than_the_model_or_its_path(finished_run, settings, tmp_path, load):
    model = load(finished_run)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]
    texts = datasets.Dataset.from_list([{"messages": turns}] * 6)
    trainer = trl.SFTTrainer(model=model, train_dataset=texts, args=trl.SFTConfig(**settings))
    found = losses(trainer)
    assert len(found) == 2 and all(map(math.isfinite, found)) and found[1] < found[0]
    assert type(trainer.model) is Qwen3AudioForConditionalGeneration
    Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path / "sft" / "checkpoint-2")


def test_dialogues_with_audio_take_our_collator(finished_run, settings, monkeypatch):
    data = finished_run.parent / "data"
    monkeypatch.chdir(data)
    processor = Qwen3AudioProcessor.from_pretrained(finished_run)
    encode = ConversationCollator(
        processor.tokenizer,
        processor.frames,
        audio_token_id=processor.audio_token_id,
        chat_template=processor.chat_template,
    )
    lines = Path("train.jsonl").read_text(encoding="utf-8").splitlines()
    trainer = trl.SFTTrainer(
        model=Qwen3AudioForConditionalGeneration.from_pretrained(finished_run),
        processing_class=processor,
        train_dataset=datasets.Dataset.from_list([{"line": line} for line in lines]),
        data_collator=lambda rows: encode([json.loads(row["line"]) for row in rows]),
        args=trl.SFTConfig(**settings, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}),
    )
    found = losses(trainer)
    assert len(found) == 2 and all(map(math.isfinite, found))
