"""Runs that older code has written: today's code verifies, evaluates, asks, resumes and builds on them.

tests/old_run/README.md says what lies there and how it was made. Only commands are used here, as a user has them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwhisper.cli import main as cli
from tests.train.helpers import read_lines

OLD_RUN = Path(__file__).with_name("old_run")
# Bits depend on the CPU. With other instruction sets (ATEN_CPU_CAPABILITY=default, ONEDNN_MAX_CPU_ISA=SSE41) and two
# threads, the resumed steps' losses differed by at most 1.2e-7, norms by 1.4e-5 of themselves and weights by 1.5e-8. A
# resume at 0.9 of the learning rate moves losses by 3e-4, norms by 3e-2 and weights by 3e-5; one that forgets Adam's
# first moments moves all of them further.
LOSS, NORM, WEIGHT = 1e-5, 2e-4, 1e-6
FP32_ON_CPU = ["--device", "cpu", "--dtype", "fp32"]


@pytest.fixture
def moved(tmp_path, monkeypatch) -> Path:
    """A copy of the stored folder at another place, seen from a third one: every stored path is wrong."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(OLD_RUN, tmp_path / "else where" / "moved")


def metrics(run: Path, name: str) -> dict[int, float]:
    """A metric's value by step."""
    return {line["step"]: line[name] for line in read_lines(run / "metrics.jsonl") if name in line}


def slow(value: str):
    return pytest.param(value, marks=pytest.mark.slow)


def text_base(checkpoint: Path) -> str:
    return json.loads((checkpoint / "config.json").read_text())["text_base"]["name"]


@pytest.mark.parametrize("place", ["run", *map(slow, ("run/checkpoint-60", "stopped")), "stopped/checkpoint-30"])
def test_it_is_verified(moved, place, capsys):
    assert cli(["verify", str(moved / place), *FP32_ON_CPU]) == 0
    assert "sound" in capsys.readouterr().out


def test_a_stopped_run_is_resumed_to_the_end_of_the_one_that_was_not_stopped(moved):
    run, whole = moved / "stopped", OLD_RUN / "run"
    before = (run / "metrics.jsonl").read_text()
    assert cli(["train", "--config", str(run / "config.yaml"), "--resume_from_checkpoint"]) == 0
    assert (run / "metrics.jsonl").read_text().startswith(before)
    for name in ("loss", "eval_loss", "learning_rate_lora"):
        assert metrics(run, name) == pytest.approx(metrics(whole, name), rel=0, abs=LOSS), name
    for name in ("grad_norm", "grad_norm_lora", "grad_norm_projector"):
        assert metrics(run, name) == pytest.approx(metrics(whole, name), rel=NORM), name
    for file in ("adapter_model.safetensors", "projector.safetensors"):
        weights, stored = (load_file(folder / "checkpoint-60" / file) for folder in (run, whole))
        assert weights.keys() == stored.keys()
        for name, tensor in stored.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=WEIGHT, msg=name)
    assert [event["kind"] for event in read_lines(run / "events.jsonl")] == ["begin", "end", "resumed", "end"]
    assert text_base(run / "checkpoint-60") == str(moved / "bases/qwen3")


def test_it_is_evaluated_with_the_same_answers(moved):
    command = ["eval", str(moved / "run"), "--eval_file", str(moved / "data/eval.jsonl"), *FP32_ON_CPU]
    command += ["--text_file", str(moved / "data/text.jsonl"), "--max_new_tokens", "8", "--output_json", "eval.json"]
    assert cli(command) == 0
    found, stored = (json.loads(path.read_text()) for path in (Path("eval.json"), OLD_RUN / "eval.json"))
    assert found["answers"] == stored["answers"]
    assert found["turns"] == stored["turns"] > found["turns_swapped"], "it hears"
    for name in ("loss", "loss_swapped", "listening_gain", "text_shift"):
        assert found[name] == pytest.approx(stored[name], rel=0, abs=LOSS), name


@pytest.mark.parametrize(("clip", "answer"), [("clip0.wav", "low"), ("clip5.wav", "high")])
def test_it_is_asked(moved, clip, answer, capsys):
    command = ["chat", str(moved / "run"), "--audio", str(moved / "data" / clip), "--text", "Pitch?"]
    assert cli([*command, "--max_new_tokens", "8", *FP32_ON_CPU]) == 0
    assert capsys.readouterr().out.strip().endswith(answer)


def test_a_second_stage_starts_from_what_it_had_learned(moved):
    data = ["--train_file", str(moved / "data/train.jsonl"), "--eval_file", str(moved / "data/eval.jsonl")]
    command = ["train", "--init_from", str(moved / "run"), *data, "--output_dir", "second", "--max_steps", "1"]
    assert cli([*command, "--dtype", "fp32", "--device_map", "cpu"]) == 0
    learned = metrics(OLD_RUN / "run", "eval_loss")[60]
    assert metrics(Path("second"), "eval_loss")[0] == pytest.approx(learned, rel=0, abs=LOSS)
    assert text_base(Path("second/checkpoint-1")) == str(moved / "bases/qwen3")
