"""The model card: what is known of run and bases, and nothing of a user's paths."""

import shutil

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file

from qwhisper import Qwen3AudioForConditionalGeneration
from qwhisper.model.lora import add_lora

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def test_a_loaded_run_says_what_it_was_trained_on_and_how(finished_run, tmp_path):
    model = Qwen3AudioForConditionalGeneration.from_pretrained(finished_run / "checkpoint-2")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for line in ("- train_file: train.jsonl", "- learning_rate: 0.01", "- max_steps: 2", "- audio: whisper, licence:"):
        assert line in card
    assert "## Losses at step 2" in card and "- loss: 5." in card
    assert "a run of qwhisper up to step 2. Later training is not listed." in card
    assert 'pipeline("any-to-any"' in card and str(finished_run.parent) not in card


def test_a_checkpoint_has_the_card_of_its_run(finished_run):
    card = (finished_run / "checkpoint-2" / "README.md").read_text()
    assert "- train_file: train.jsonl" in card and "- lora_r: 16" in card and str(finished_run.parent) not in card


def test_without_a_run_the_card_names_bases_and_their_licences(model, bases, tmp_path):
    for role, place in zip(("audio", "text"), bases, strict=True):
        shutil.copytree(place, tmp_path / role)
        (tmp_path / role / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# Base\n")
        getattr(model.config, f"{role}_base")["name"] = str(tmp_path / role)
    model.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "license: apache-2.0\n---" in card and "- text: text, licence: apache-2.0" in card
    assert "## Recipe" not in card and "## Losses" not in card and "up to step" not in card
    model.config.audio_base["name"] = "openai/whisper-large-v3-turbo"
    model.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "base_model:\n- openai/whisper-large-v3-turbo" in card and "licence: see the base's own page" in card


def test_a_card_of_somebody_else_is_kept(model, tmp_path):
    (tmp_path / "README.md").write_text("Mine.")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "Mine."


@pytest.mark.parametrize("there", [None, "Theirs."])
def test_push_to_hub_uploads_our_card_unless_the_repository_has_one(model, tmp_path, monkeypatch, there):
    uploaded = {}

    def create_commit(self, *, operations, **keywords):
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, tmp_path)
            uploaded[operation.path_in_repo] = keywords["repo_id"]

    def download(self, repo_id, file, *, local_dir, token):
        with open(f"{local_dir}/{file}", "w", encoding="utf-8") as opened:
            opened.write(there)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kw: type("Url", (), {"repo_id": f"me/{name}"}))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "file_exists", lambda *args, **keywords: there is not None)
    monkeypatch.setattr(HfApi, "hf_hub_download", download)
    add_lora(model)
    model.push_to_hub("heard", token="t", private=True)
    assert ("README.md" in uploaded) == (there is None) and set(uploaded.values()) == {"me/heard"}
    assert load_file(tmp_path / "projector.safetensors") and "adapter_config.json" in uploaded
