"""A model's folder is data: no code in it runs and nobody is asked."""

import ast
import io
import json
import pickle
import sys
import time
from pathlib import Path

import pytest
import torch

import qwhisper
from qwhisper.cli import main as cli
from qwhisper.errors import CheckpointError, UsageError
from qwhisper.model.adapter_config import read_adapter_config
from qwhisper.model.bases import fingerprint, resolve_model
from qwhisper.model.lora import target_regex
from qwhisper.model.pretrained import load_config
from qwhisper.model.processor import load_processor
from qwhisper.model.qwen3_audio import build_from_bases, load_trained
from tests.data.test_try_template import LONG
from tests.small import write_small_bases
from tests.trust.conftest import edit, sign

SECONDS = 60  # no attack may take longer, on a busy machine; most take none
PACKAGE = Path(qwhisper.__file__).parent


def plant_code(folder: Path, canary: Path) -> None:
    code = f"""
import pathlib
pathlib.Path({str(canary)!r}).touch()
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, WhisperFeatureExtractor
class T(PreTrainedTokenizerFast): pass
class C(Qwen3Config): pass
class M(Qwen3ForCausalLM): pass
class F(WhisperFeatureExtractor): pass
def generate(model, *args, **kwargs): pass
"""
    (folder / "custom_generate").mkdir()
    for file in ("evil.py", "custom_generate/generate.py"):
        (folder / file).write_text(code)


MAPS = {
    "AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M", "AutoProcessor": "evil.T",
    "AutoTokenizer": ["evil.T", "evil.T"], "AutoFeatureExtractor": "evil.F",
}  # fmt: skip
ANY_FILE = (
    "config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json", "adapter_config.json"
)  # fmt: skip


def with_maps(values: dict) -> None:
    values["auto_map"] = MAPS
    values["auto_mapping"] = {"base_model_class": "M", "parent_library": "evil"}
    values["custom_generate"] = "evil"
    values["trust_remote_code"] = True
    values["text_config"] = values.get("text_config", {}) | {"auto_map": MAPS}


def test_code_beside_a_checkpoint_is_ignored_where_our_classes_serve(checkpoint, canary):
    plant_code(checkpoint, canary)
    for file in ANY_FILE:
        edit(checkpoint / file, with_maps)
    sign(checkpoint)
    assert cli(["verify", str(checkpoint)]) == 0
    assert not canary.exists()
    assert sys.stdin.read().startswith("y\n" * 50), "somebody has asked"


def without_tokenizer_class(checkpoint: Path) -> None:
    edit(checkpoint / "tokenizer_config.json", lambda v: v.pop("tokenizer_class") and v.update(auto_map=MAPS))


def without_extractor_class(checkpoint: Path) -> None:
    edit(checkpoint / "processor_config.json", lambda v: v.pop("feature_extractor"))
    (checkpoint / "preprocessor_config.json").write_text(json.dumps({"auto_map": MAPS}))


@pytest.mark.parametrize(("verb", "change"), [
    ("verify", without_tokenizer_class), ("eval", without_tokenizer_class), ("chat", without_extractor_class),
    ("train", without_extractor_class),
])  # fmt: skip
def test_code_that_a_checkpoint_needs_is_refused(checkpoint, canary, change, verb, capsys):
    plant_code(checkpoint, canary)
    change(checkpoint)
    sign(checkpoint)
    run, told = checkpoint.parent, json.loads((checkpoint / "arguments.json").read_text())
    command = {
        "verify": ["verify", str(checkpoint)],
        "eval": ["eval", str(checkpoint), "--eval_file", told["train_file"]],
        "chat": ["chat", str(checkpoint)],
        "train": ["train", "--config", str(run / "config.yaml"), "--output_dir", str(run), "--resume_from_checkpoint"],
    }[verb]  # fmt: skip
    assert cli(command) == CheckpointError.exit_code
    assert "never run" in capsys.readouterr().err
    assert not canary.exists()
    assert sys.stdin.read().startswith("y\n" * 50), "somebody has asked"


def unknown_architecture(bases: Path) -> None:
    for base in bases.iterdir():
        edit(base / "config.json", lambda v: v.update(model_type="unheard_of", auto_map=MAPS))


@pytest.mark.parametrize("load", [
    lambda bases: load_config(bases / "qwen3"),
    lambda bases: resolve_model(str(bases / "qwen3"), "huggingface", "--text_model"),
    lambda bases: build_from_bases(str(bases / "whisper"), str(bases / "qwen3")),
])  # fmt: skip
def test_code_of_a_base_is_refused(tmp_path, canary, load):
    write_small_bases(tmp_path / "bases")
    unknown_architecture(tmp_path / "bases")
    plant_code(tmp_path / "bases/qwen3", canary)
    with pytest.raises(UsageError, match="never run") as caught:
        load(tmp_path / "bases")
    assert caught.value.exit_code == 2
    assert not canary.exists()


def test_code_of_a_base_is_ignored_where_a_known_class_serves(tmp_path, canary):
    audio, text = write_small_bases(tmp_path / "bases")
    for base in (audio, text):
        plant_code(base, canary)
        for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
            if (base / file).exists():
                edit(base / file, lambda v: v.update(auto_map=MAPS))
    build_from_bases(str(audio), str(text))
    assert not canary.exists()


def test_base_that_a_checkpoint_names_ends_verify_with_2(checkpoint, canary, capsys):
    base = checkpoint.parents[1] / "bases/qwen3"
    plant_code(base, canary)
    edit(base / "config.json", lambda v: v.update(model_type="unheard_of", auto_map=MAPS))
    edit(checkpoint / "config.json", lambda v: v["text_base"].update(fingerprint=fingerprint(str(base))))
    sign(checkpoint)
    assert cli(["verify", str(checkpoint)]) == UsageError.exit_code
    assert "never run" in capsys.readouterr().err and not canary.exists()


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("pack", [pickle.dumps, lambda value: _saved(value)])
def test_pickled_weights_of_a_base_run_nothing(tmp_path, canary, pack):
    audio, text = write_small_bases(tmp_path / "bases")
    (text / "model.safetensors").unlink()
    (text / "pytorch_model.bin").write_bytes(pack(Payload(canary)))
    with pytest.raises(UsageError, match="the language model's weights are a pickle"):
        build_from_bases(str(audio), str(text))
    assert not canary.exists()


def _saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": value}, buffer)
    return buffer.getvalue()


def test_base_with_an_adapter_is_refused(tmp_path, canary):
    audio, text = write_small_bases(tmp_path / "bases")
    (text / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "megatron_core": "evil"}))
    with pytest.raises(UsageError, match="merge it into the model first"):
        build_from_bases(str(audio), str(text))


def test_all_loaders_of_transformers_are_called_in_one_place():
    """A call of `Auto….from_pretrained` elsewhere would ask on stdin again."""
    allowed = {
        "commands/chat.py": {"Assistant.from_pretrained"},  # ours
        "model/pretrained.py": None,
        "model/loading.py": {
            "GenerationConfig.from_pretrained",
            "Qwen3AudioConfig.from_pretrained",
            "super.from_pretrained",
        },
        "model/trained_folder.py": {"Qwen3AudioConfig.from_pretrained"},
        "model/modeling_qwen3_audio.py": {"AutoModel.from_config", "AutoModelForCausalLM.from_config"},
        "model/qwen3_audio.py": {
            "Qwen3AudioConfig.from_pretrained",
            "Qwen3AudioForConditionalGeneration.from_pretrained",
            "super.from_pretrained",
        },
        "model/processor.py": {"super.from_pretrained", "Qwen3AudioProcessor.from_pretrained"},
    }  # fmt: skip
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "from_pretrained" not in text and "from_config" not in text:
            continue
        known = allowed.get(file.relative_to(PACKAGE).as_posix(), set())
        for node in ast.walk(ast.parse(text)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr not in ("from_pretrained", "from_config"):
                continue
            owner = node.func.value
            name = f"{owner.func.id if isinstance(owner, ast.Call) else owner.id}.{node.func.attr}"
            assert known is None or name in known, f"{file}:{node.lineno}: {name}"
            if name.startswith("Auto"):
                assert any(keyword.arg == "trust_remote_code" for keyword in node.keywords) or any(
                    isinstance(keyword.value, ast.Name) and keyword.value.id == "NO_CODE" for keyword in node.keywords
                ), f"{file}:{node.lineno}"


# Adapters


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", "((([a-z_.0-9]+)+)+)+X"),
        ("target_modules", "all-linear"),
        ("target_modules", target_regex(["q_proj"])[:-1] + "|(x+)+y)"),
        ("target_modules", []),
        ("exclude_modules", "((x+)+)+"),
        ("modules_to_save", ["((x+)+)+"]),
        ("layers_pattern", "((x+)+)+"),
        ("rank_pattern", {"((x+)+)+": 4}),
        ("megatron_config", {"a": 1}),
        ("megatron_core", "evil"),
        ("init_lora_weights", "pissa"),
        ("r", 16.5),
        ("r", True),
        ("lora_alpha", float("nan")),
        ("peft_type", "IA3"),
        ("layer_replication", [[0, 4], [2, 5]]),
    ],
)
def test_adapter_that_qwhisper_does_not_write_is_refused(checkpoint, field, value):
    edit(checkpoint / "adapter_config.json", lambda v: v.update({field: value}))
    started = time.perf_counter()
    with pytest.raises(CheckpointError):
        read_adapter_config(checkpoint)
    assert time.perf_counter() - started < SECONDS


@pytest.mark.parametrize(("field", "value"), [("megatron_core", "evil"), ("r", 60_000)])
def test_model_with_such_an_adapter_or_one_of_another_size_is_not_loaded(checkpoint, field, value):
    edit(checkpoint / "adapter_config.json", lambda v: v.update({field: value}))
    started = time.perf_counter()
    with pytest.raises(CheckpointError):
        load_trained(checkpoint)
    assert time.perf_counter() - started < SECONDS


@pytest.mark.parametrize("value", [["q_proj", "v_proj"], target_regex(["q_proj", "down_proj"])])
def test_adapter_with_plain_targets_is_read(checkpoint, value):
    edit(checkpoint / "adapter_config.json", lambda v: v.update(target_modules=value, use_rslora=True, a_later_field=1))
    read = read_adapter_config(checkpoint)
    assert read.use_rslora and (read.target_modules == value or read.target_modules == set(value))


# Chat templates


def test_costly_template_of_a_checkpoint_or_base_is_refused(checkpoint, capsys):
    (checkpoint / "chat_template.jinja").write_text(LONG)
    sign(checkpoint)
    assert cli(["verify", str(checkpoint)]) == CheckpointError.exit_code
    assert "chat template can't be used: it makes 5000000" in capsys.readouterr().err
    bases = checkpoint.parents[1] / "bases"
    (bases / "qwen3/chat_template.jinja").write_text(LONG)
    with pytest.raises(UsageError, match="chat template can't be used: it makes 5000000"):
        build_from_bases(str(bases / "whisper"), str(bases / "qwen3"))


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% broken", "only text", "{{ range(10**9) | list }}"])
def test_template_that_fails_is_refused(checkpoint, template):
    (checkpoint / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match="template"):
        load_processor(checkpoint)
