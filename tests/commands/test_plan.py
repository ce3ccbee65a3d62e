"""`qwhisper plan`: from configurations alone, without loading a model."""

import json
import re
from pathlib import Path

import pytest
import torch

from qwhisper.cli import main
from qwhisper.engine.plan_memory import GIB
from tests.small import write_dialogues, write_small_bases

OLD_CHECKPOINT = Path(__file__).parents[1] / "old_run" / "run" / "checkpoint-60"


def plan(capsys, *argv: str) -> str:
    assert main(["plan", *argv]) == 0
    return capsys.readouterr().out


def amounts(text: str) -> dict[str, float]:
    return {name.strip(): float(size) for name, size in re.findall(r"^  (\S.+?)  +([\d.]+) GiB$", text, re.MULTILINE)}


def test_a_hub_id_of_the_family_needs_no_files_and_no_network(capsys, monkeypatch):
    monkeypatch.setattr("qwhisper.model.pretrained.AutoConfig.from_pretrained", None)
    text = plan(capsys, "--text_model", "Qwen/Qwen3-8B", "--gpu_memory", "32")
    found = amounts(text)
    reserved = found.pop("reserved by PyTorch at the peak")
    found.pop("CUDA context, beside it")
    assert sum(found.values()) == pytest.approx(reserved, abs=0.05)
    assert found["language model"] == pytest.approx(8_190_735_360 * 2 / GIB, abs=0.01)
    assert "RTX 5090 " in text and "\n  nf4 " in text and "\n  fp8 " in text
    assert re.search(r"\n  T4 +does not fit\n", text)


def test_less_memory_gives_a_smaller_plan_and_no_plan_is_a_sentence(capsys):
    flags = "--per_device_train_batch_size", "64", "--load_in_4bit"
    big, small = (plan(capsys, "--gpu_memory", gib, *flags) for gib in ("32", "16"))
    peak = "reserved by PyTorch at the peak"
    assert amounts(small)[peak] < amounts(big)[peak]
    assert main(["plan", "--gpu_memory", "12"]) == 4
    assert "--load_in_4bit" in capsys.readouterr().err


def test_local_folders_and_data_are_planned(capsys, tmp_path):
    audio, text_folder = write_small_bases(tmp_path)
    data = write_dialogues(tmp_path / "data", 12)
    text = plan(
        capsys, "--audio_model", str(audio), "--text_model", str(text_folder), "--train_file", str(data),
        "--gpu_memory", "1", "--num_train_epochs", "2",
    )  # fmt: skip
    assert "hours for 24 samples" in text
    assert "packs of at most 8192 tokens, 0 of 2 layers computed again" in text
    assert amounts(text)["language model"] < 0.01


def test_a_base_saved_in_4_bits_is_planned_in_4_bits(capsys, tmp_path):
    audio, text_folder = write_small_bases(tmp_path)
    flags = "--audio_model", str(audio), "--text_model", str(text_folder), "--gpu_memory", "1"
    assert plan(capsys, *flags).startswith("language model in bf16,")
    file = text_folder / "config.json"
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))
    assert plan(capsys, *flags).startswith("language model in nf4,")


def test_a_second_stage_has_the_sizes_of_the_checkpoint_that_it_begins_with(capsys):
    text = plan(capsys, "--init_from", str(OLD_CHECKPOINT), "--gpu_memory", "2")
    hidden = json.loads((OLD_CHECKPOINT / "config.json").read_text())["text_config"]["hidden_size"]
    assert hidden < 100 and amounts(text)["language model"] < 0.01


def test_flags_of_train_and_recipes_are_taken_and_nothing_needs_bitsandbytes(capsys, monkeypatch):
    monkeypatch.setattr("qwhisper.versions._installed", lambda name: None if name == "bitsandbytes" else "99")
    text = plan(capsys, "--config", "qwen3-8b-4bit-32gb", "--gpu_memory", "24", "--recompute_layers", "5")
    assert text.startswith("language model in nf4, packs of at most ") and "5 of 36 layers computed again" in text
    all_again = plan(capsys, "--gpu_memory", "32", "--gradient_checkpointing", "--max_tokens_per_pack", "2048")
    assert "packs of at most 2048 tokens, 36 of 36 layers" in all_again


def test_hours_and_cards_give_the_time_of_a_run(capsys):
    def hours(*argv: str) -> float:
        text = plan(capsys, "--gpu_memory", "32", "--num_train_epochs", "1", *argv)
        return float(re.search(r"\n  H200 .* ([\d.]+)\n", text)[1])

    assert hours("--hours", "10000") == pytest.approx(10 * hours("--hours", "1000"), rel=0.05)
    assert hours("--hours", "10000", "--num_gpus", "4") == pytest.approx(hours("--hours", "10000") / 4, rel=0.05)


def test_a_number_of_steps_says_how_long_a_run_is_and_hours_and_a_file_contradict_each_other(capsys):
    assert "hours for 4000 samples" in plan(capsys, "--gpu_memory", "32", "--max_steps", "1000")
    assert "hours for 8000 samples" in plan(capsys, "--gpu_memory", "32", "--max_steps", "1000", "--num_gpus", "2")
    assert main(["plan", "--gpu_memory", "32", "--hours", "3", "--train_file", "x.jsonl"]) == 2
    assert "drop one" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_without_a_card_its_memory_must_be_given(capsys):
    assert main(["plan"]) == 2
    assert "--gpu_memory 32" in capsys.readouterr().err


def test_the_memory_of_this_machines_card_is_its_free_memory(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (21 * GIB, 80 * GIB))
    assert "of a card of 80.0 GiB, PyTorch may reserve 20.6 GiB" in plan(capsys)
