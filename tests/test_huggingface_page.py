"""docs/huggingface.md: every example runs on a small trained run, one after another; the one with TRL by itself."""

import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from transformers import TrainingArguments

from qwhisper.infer.assistant import Assistant

PAGE = Path(__file__).parents[1] / "docs" / "huggingface.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
(WITH_TRL,) = (example for example in EXAMPLES if "from trl" in example)


@pytest.fixture
def beside_a_run(finished_run, tmp_path, monkeypatch):
    """A working folder with the names of the page: the run, dialogues and a question."""
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.copytree(finished_run.parent / "data", tmp_path, dirs_exist_ok=True)
    (tmp_path / "train.jsonl").rename(tmp_path / "data.jsonl")
    shutil.copy(tmp_path / "clip0.wav", tmp_path / "question.wav")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def uploads(monkeypatch) -> list[str]:
    """The repositories that are uploaded to, which the tests can't reach."""
    found: list[str] = []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **given: type("Repository", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr(HfApi, "file_exists", lambda self, *given, **named: False)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *given, **named: ModelCard("Ours."))
    for name in ("upload_folder", "create_commit"):
        monkeypatch.setattr(HfApi, name, lambda self, *given, **named: found.append(named["repo_id"]))
    return found


@pytest.mark.usefixtures("beside_a_run", "on_the_cpu", "without_librosa")
def test_every_example_runs(uploads, monkeypatch):
    monkeypatch.setattr(
        "transformers.TrainingArguments", lambda *a, **given: TrainingArguments(*a, **given, use_cpu=True)
    )
    names: dict = {}
    for example in EXAMPLES:
        if example != WITH_TRL:
            exec(example, names)
    assert names["trainer"].state.global_step == 2 and "eval_loss" in names["trainer"].state.log_history[-1]
    for folder in ("hf-run/final", "hf-run/checkpoint-2", "merged"):
        answer = Assistant.from_pretrained(folder).answer(names["messages"], max_new_tokens=2)
        assert answer.completion_tokens > 0
    assert len(names["outputs"]) == 2
    assert (Path("merged") / "README.md").is_file()
    assert set(uploads) == {"you/my-listener"}


@pytest.mark.usefixtures("beside_a_run", "on_the_cpu")
def test_the_example_with_trl_runs(monkeypatch):
    """The oldest versions lack trl, see pyproject.toml."""
    trl = pytest.importorskip("trl")
    settings = trl.SFTConfig  # asks for bf16, which it takes from a GPU alone
    monkeypatch.setattr(trl, "SFTConfig", lambda *a, **given: settings(*a, **given, use_cpu=True, bf16=False))
    exec(WITH_TRL, {})
    Assistant.from_pretrained("sft-run/checkpoint-1")
