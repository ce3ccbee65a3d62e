"""That a run learns, and from the audio: a falling loss alone can be what the text gives away."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qwhisper.commands.verify import VerifyArguments
from qwhisper.commands.verify import main as verify
from qwhisper.data.dialogue import read_dialogues
from qwhisper.engine import fp8_check
from qwhisper.evaluate.evaluation import evaluate_model
from qwhisper.infer.assistant import Assistant
from qwhisper.model import fp8
from qwhisper.model.bases import LoadOptions, load_language_model
from qwhisper.model.fp8 import float8_layers
from qwhisper.model.loading import options_as_trained
from qwhisper.model.qwen3_audio import load_trained
from qwhisper.train.run import main
from tests.small import teach_to_read, write_dialogues, write_small_bases
from tests.train.helpers import checkpoint_tensors, read_lines, same_bits


def test_the_loss_falls_at_the_stable_recipes_rate(run_training):
    args = run_training(
        max_steps=36,
        save_steps=36,
        learning_rate=3e-5,
        projector_learning_rate=None,
        freeze_projector_steps=12,
        early_lr_steps=0,
        lr_scheduler_type="constant",
    )
    losses = [line["loss"] for line in read_lines(Path(args.output_dir) / "metrics.jsonl") if "loss" in line]
    # 12 steps see every dialogue four times, so both sums are over the same samples.
    assert sum(losses[-12:]) < sum(losses[:12])


@pytest.mark.slow
def test_swapped_audio_ends_up_costing_more_than_the_true_audio(arguments, tmp_path, shared):
    _, text = write_small_bases(tmp_path, hidden_size=64)
    teach_to_read(text, ["low", "high"])
    train = write_dialogues(tmp_path / "data", 48)
    held_out = write_dialogues(tmp_path / "data", 12, name="eval.jsonl", first=100)
    args = arguments(
        train_file=str(train),
        audio_model=str(shared / "models/whisper-tiny.en"),
        text_model=str(text),
        max_steps=100,
        save_steps=100,
        learning_rate=2e-3,
        per_device_train_batch_size=6,
        freeze_projector_steps=0,
        early_lr_steps=0,
    )
    assert main(args) == 0
    assistant = Assistant.from_pretrained(args.output_dir, "cpu")
    result = evaluate_model(assistant.model, assistant.encoder, read_dialogues(held_out), max_new_tokens=2)
    assert result.counts["swapped_same_question"] > 0
    assert result.loss_swapped > result.loss_unswapped + 1.0


@pytest.mark.slow
def test_a_wrong_fp8_product_is_replaced_before_the_first_step(run_training, monkeypatch):
    right = fp8.PRODUCTS[fp8.ROWWISE]
    monkeypatch.setattr(fp8, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(fp8_check, "ROWS", (9,))
    monkeypatch.setitem(fp8.PRODUCTS, fp8.ROWWISE, dataclasses.replace(right, multiply=lambda *x: -right.multiply(*x)))
    args = run_training(load_in_fp8=True, max_steps=1)
    (event,) = [
        line for line in read_lines(Path(args.output_dir) / "events.jsonl") if line["kind"] == "kernel_replaced"
    ]
    assert (event["kernel"], event["replaced_by"]) == (fp8.ROWWISE, fp8.TENSORWISE)
    assert event["case"].startswith("model.language_model.layers.0.self_attn.q_proj [32, 32], 9 rows")


@pytest.mark.slow
def test_a_base_in_fp8_learns_and_evaluates(run_training):
    args = run_training(load_in_fp8=True)
    losses = [line["loss"] for line in read_lines(Path(args.output_dir) / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    assistant = Assistant.from_pretrained(args.output_dir, "cpu")
    assert float8_layers(assistant.model)
    result = evaluate_model(
        assistant.model, assistant.encoder, read_dialogues(args.train_file)[:1], swap=False, max_new_tokens=2
    )
    assert 0 < result.loss < 20
    # The format of the run gives way to the one that is asked for.
    checkpoint = Path(args.output_dir) / "checkpoint-6"
    assert not float8_layers(load_trained(checkpoint, options_as_trained(checkpoint, {"load_in_fp8": False})))


def test_a_base_in_4_bits_trains_evaluates_and_resumes(arguments):
    pytest.importorskip("bitsandbytes")
    args = arguments(load_in_4bit=True, max_steps=1, save_steps=1)
    assert main(args) == 0
    more = arguments(load_in_4bit=True, max_steps=2, save_steps=1, resume_from_checkpoint="latest")
    assert main(more) == 0
    losses = [line["loss"] for line in read_lines(Path(args.output_dir) / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
    assistant = Assistant.from_pretrained(args.output_dir, "cpu")
    assert assistant.model.is_loaded_in_4bit
    result = evaluate_model(
        assistant.model, assistant.encoder, read_dialogues(args.train_file)[:1], swap=False, max_new_tokens=2
    )
    assert 0 < result.loss < 20


@pytest.mark.slow
def test_a_base_saved_in_4_bits_trains_resumes_to_the_last_bit_and_answers(arguments, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    _, text = write_small_bases(tmp_path / "wide", hidden_size=64)
    saved = tmp_path / "nf4"
    load_language_model(str(text), LoadOptions(load_in_4bit=True, device_map="cpu")).save_pretrained(saved)
    AutoTokenizer.from_pretrained(text).save_pretrained(saved)
    args = arguments(text_model=str(saved), gradient_checkpointing=True, max_steps=4, save_steps=2)
    assert main(args) == 0
    assert "the language model is saved in 4 bits and stays so" in capsys.readouterr().out
    last = Path(args.output_dir) / "checkpoint-4"
    uninterrupted = checkpoint_tensors(last)
    verify(VerifyArguments(checkpoint=str(last)))
    assistant = Assistant.from_pretrained(last, "cpu")
    assert assistant.model.is_loaded_in_4bit
    assert assistant.answer([{"role": "user", "content": "Hello"}], max_new_tokens=2).text is not None
    shutil.rmtree(last)
    assert main(dataclasses.replace(args, resume_from_checkpoint="latest")) == 0
    assert same_bits(checkpoint_tensors(last), uninterrupted) == []
