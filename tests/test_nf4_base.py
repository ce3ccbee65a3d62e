"""benchmarks/nf4_base.py writes what transformers would save after quantising the model as a whole."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import Qwen3ForCausalLM

from qwhisper.model.bases import LoadOptions, load_language_model
from tests.small import text_config

pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import dequantize_4bit


@pytest.fixture
def nf4_base(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    yield importlib.import_module("nf4_base")
    del sys.modules["nf4_base"]


def entries(folder: Path) -> set[str]:
    return {key for file in folder.glob("*.safetensors") for key in safe_open(file, "pt").keys()}  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("tied", [True, False])
def test_a_base_that_is_written_one_matrix_at_a_time_loads_with_the_weights_that_were_drawn(
    nf4_base, tmp_path, monkeypatch, tied
):
    monkeypatch.setattr(nf4_base, "SHARD_BYTES", 4096)
    config = text_config(hidden_size=64, intermediate_size=128, tie_word_embeddings=tied)
    nf4_base.write_nf4_base(config, tmp_path / "base")
    files = sorted((tmp_path / "base").glob("model-*.safetensors"))
    assert len(files) > 2
    model = load_language_model(str(tmp_path / "base"), LoadOptions(dtype="bf16", device_map="cpu"))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, parameter in model.named_parameters():
        weight = parameter
        if state := getattr(parameter, "quant_state", None):
            weight = dequantize_4bit(parameter.data, state)
            assert state.nested and ".layers." in name
        assert weight.dtype == torch.bfloat16
        if weight.ndim > 1:
            assert weight.float().std() == pytest.approx(0.02, rel=0.1)
        else:
            assert (weight == 1).all()
    # The same entries as transformers writes for a model that it has quantised.
    full = Qwen3ForCausalLM(text_config(hidden_size=64, intermediate_size=128, tie_word_embeddings=tied))
    full.save_pretrained(tmp_path / "full")
    options = LoadOptions(load_in_4bit=True, dtype="bf16", device_map="cpu")
    load_language_model(str(tmp_path / "full"), options).save_pretrained(tmp_path / "quantised")
    assert entries(tmp_path / "base") == entries(tmp_path / "quantised")
