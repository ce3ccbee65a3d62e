"""Loading holds one copy of the weights: the peak of the process's memory, mapped files included."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForMultimodalLM, Qwen3ForCausalLM

from qwhisper.model.bases import LoadOptions
from qwhisper.model.lora import add_lora
from qwhisper.model.qwen3_audio import build_from_bases
from tests.small import text_config, write_small_bases

PEAK = Path("/proc/self/clear_refs")  # 5 resets the peak, VmHWM
SLACK = 25 * 2**20  # bytes for everything else: tokenizer, configuration, LoRA
KEPT_BF16 = {"dtype": "bf16", "device_map": "cpu"}

pytestmark = pytest.mark.skipif(not PEAK.exists(), reason="needs Linux's /proc")


def memory(name: str) -> int:
    """Bytes: VmRSS, present memory of this process; VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def peak_of(load: Callable[[], object]) -> int:
    """Bytes that were added at the highest point."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would be used again unseen
    PEAK.write_text("5")
    before = memory("VmRSS")
    load()
    return memory("VmHWM") - before


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> SimpleNamespace:
    """Bases whose language model has 79 MB in bf16; folders of trained weights and of a whole model made of them."""
    folder = tmp_path_factory.mktemp("large")
    audio, text = write_small_bases(folder)
    config = text_config(vocab_size=600, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, head_dim=32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        Qwen3ForCausalLM(config).save_pretrained(text)
    finally:
        torch.set_default_dtype(torch.float32)
    run, whole = folder / "run", folder / "whole"
    model, processor = build_from_bases(str(audio), str(text), LoadOptions(**KEPT_BF16))
    model.base_record, record = None, model.base_record  # without a record all weights are saved
    model.save_pretrained(whole)
    model.base_record = record
    add_lora(model)
    model.save_pretrained(run)
    for each in (run, whole):
        processor.save_pretrained(each)
    size = (text / "model.safetensors").stat().st_size
    assert size > 70 * 2**20
    return SimpleNamespace(audio=str(audio), text=str(text), run=run, whole=whole, size=size)


def test_bases_are_held_once_and_the_measure_sees_a_wider_copy(saved):
    def load(dtype: str) -> int:
        options = LoadOptions(dtype=dtype, device_map="cpu")
        return peak_of(lambda: build_from_bases(saved.audio, saved.text, options))

    assert load("bf16") < 1.2 * saved.size + SLACK
    assert load("fp32") > 1.9 * saved.size + SLACK


@pytest.mark.parametrize("kind", ["run", "whole"])
def test_a_saved_model_is_held_once(saved, kind):
    folder = getattr(saved, kind)
    peak = peak_of(lambda: AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.bfloat16))
    assert peak < 1.2 * saved.size + SLACK
