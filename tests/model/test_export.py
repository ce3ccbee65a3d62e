"""The modules that an export ships, alone in another package folder: the same tokens, features, loss and answer."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.small import tone

ROOT = Path(__file__).parents[2]
CONTRACT = "What an export ships alone imports nothing else"
OUTPUTS = """
import numpy as np
import torch
from safetensors.torch import save_file


def save_outputs(model, processor, clip_file, file):
    content = [{"type": "audio", "audio": np.load(clip_file)}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    with torch.no_grad():
        found = {**inputs, "logits": model(**inputs).logits, "loss": model(**inputs, labels=inputs["input_ids"]).loss}
    found["answer"] = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)
"""
ALONE = f"""
from qwhisper.model.modeling_qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.model.processing_qwen3_audio import Qwen3AudioProcessor
{OUTPUTS}
model = Qwen3AudioForConditionalGeneration.from_pretrained("saved").eval()
save_outputs(model, Qwen3AudioProcessor.from_pretrained("saved"), "clip.npy", "alone.safetensors")
"""


@pytest.mark.slow
def test_what_an_export_ships_answers_alone_as_qwhisper_does(joined, tmp_path):
    model, processor = joined
    model.base_record = None  # so that the whole model is saved
    model.float().cpu().save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    np.save(tmp_path / "clip.npy", tone(300, 0.4))
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    for module in next(contract["source_modules"] for contract in contracts if contract["name"] == CONTRACT):
        file = Path(*module.split(".")).with_suffix(".py")
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", ALONE], check=True, cwd=tmp_path, env=environment)
    scope: dict = {}
    exec(OUTPUTS, scope)
    scope["save_outputs"](model, processor, tmp_path / "clip.npy", tmp_path / "expected.safetensors")
    alone, expected = load_file(tmp_path / "alone.safetensors"), load_file(tmp_path / "expected.safetensors")
    assert alone.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(alone[name], expected[name])] == []
