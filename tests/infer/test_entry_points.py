"""What an assistant loads, and that every entry point loads the same."""

import json
import shutil

import pytest
import torch

from qwhisper.errors import CheckpointError, UsageError
from qwhisper.infer.assistant import Assistant, answer_prompts, load_chosen
from qwhisper.model.fp8 import float8_layers
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration
from tests.infer.conftest import say


def test_run_folder_loads_its_newest_checkpoint_as_trained(finished_run):
    assistant = Assistant.from_pretrained(finished_run)
    again = Assistant.from_pretrained(finished_run / "checkpoint-2", device="cpu", dtype="fp32")
    older = Assistant.from_pretrained(finished_run / "checkpoint-1", dtype="bf16").model
    assert not assistant.model.training
    # On a GPU "auto" rounds the bases to bf16; what was trained is in fp32 in both.
    pairs = zip(assistant.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a.cpu(), b.to(a.dtype)) for a, b in pairs)
    assert older.model.language_model.dtype == torch.bfloat16
    projector, projector_before = (m.model.multi_modal_projector.linear_1.weight for m in (assistant.model, older))
    assert projector_before.dtype == torch.float32
    assert (projector_before - projector).abs().max() > 1e-4  # one step at 1e-2 lies between the two


def test_device_that_is_not_there_is_named_before_anything_is_loaded(finished_run, monkeypatch):
    monkeypatch.setattr("qwhisper.infer.assistant.load_trained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match="no device 'foo'"):
        Assistant.from_pretrained(finished_run, "foo")


def test_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(UsageError, match="neither a checkpoint nor a run"):
        Assistant.from_pretrained(tmp_path)


ENTRY_POINTS = {
    "Assistant": lambda folder: Assistant.from_pretrained(folder).model,
    "eval and verify": lambda folder: load_chosen(folder)[0],
    "from_pretrained": Qwen3AudioForConditionalGeneration.from_pretrained,
}


def trained_with(finished_run, folder, **values):
    """A checkpoint whose run had these arguments; without a manifest, which would no longer fit."""
    shutil.copytree(finished_run / "checkpoint-2", folder)
    (folder / "manifest.json").unlink()
    arguments = json.loads((folder / "arguments.json").read_text())
    (folder / "arguments.json").write_text(json.dumps(arguments | values))
    return folder


@pytest.mark.parametrize("values", [{}, {"load_in_4bit": True}, {"load_in_fp8": True}, {"projector_fp32": False}])
def test_every_entry_point_loads_the_same_model_as_it_was_trained(finished_run, tmp_path, values):
    if values.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    folder = trained_with(finished_run, tmp_path / "checkpoint", **values)
    models = {name: load(folder) for name, load in ENTRY_POINTS.items()}
    states = {name: model.state_dict() for name, model in models.items()}
    first = states["Assistant"]
    for name, state in states.items():
        assert bool(getattr(models[name], "is_loaded_in_4bit", False)) == values.get("load_in_4bit", False), name
        assert bool(float8_layers(models[name])) == values.get("load_in_fp8", False), name
        assert state.keys() == first.keys(), name
        assert all(tensor.dtype == first[key].dtype for key, tensor in state.items()), name
        assert all(torch.equal(tensor.float(), first[key].float()) for key, tensor in state.items()), name


@pytest.mark.parametrize("load", ENTRY_POINTS.values(), ids=ENTRY_POINTS)
def test_every_entry_point_checks_the_hashes(finished_run, tmp_path, load):
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-1")
    weights = run / "checkpoint-2/projector.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    if load is ENTRY_POINTS["eval and verify"]:
        from qwhisper.checkpoint.reading import read_checkpoint

        load, chosen = (lambda path: read_checkpoint(path, chosen)), load
    with pytest.raises(CheckpointError, match=r"projector.safetensors"):
        load(run)


def test_a_model_that_was_saved_without_its_processor_says_so(finished_run, tmp_path):
    folder = trained_with(finished_run, tmp_path / "saved")
    (folder / "processor_config.json").unlink()
    (folder / "state.json").unlink()  # as Trainer saves it
    with pytest.raises(CheckpointError, match=r"processor_config\.json is missing; write it with the processor's"):
        Assistant.from_pretrained(folder)


def test_base_trained_on_in_4_bits_answers(finished_run, tmp_path):
    pytest.importorskip("bitsandbytes")
    assistant = Assistant.from_pretrained(trained_with(finished_run, tmp_path / "checkpoint", load_in_4bit=True))
    assert assistant.model.is_loaded_in_4bit
    finite = []
    assistant.model.lm_head.register_forward_hook(lambda module, inputs, out: finite.append(out.isfinite().all()))
    prompt = assistant.encoder.encode_prompt([say("Hello")])
    answer_prompts(assistant.model, assistant.encoder, [prompt], 2)
    assert len(finite) == 2 and all(finite)
