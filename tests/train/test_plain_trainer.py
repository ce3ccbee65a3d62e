"""A stock `Trainer` with our model: evaluation, metrics, resume and the best model, with and without our LoRA."""

import copy
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from qwhisper import ConversationCollator, Qwen3AudioForConditionalGeneration
from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.rows import IGNORE
from qwhisper.errors import UsageError
from qwhisper.model.bases import LoadOptions
from qwhisper.model.lora import add_lora
from qwhisper.model.qwen3_audio import build_from_bases
from tests.small import large_weights, write_small_bases
from tests.train.helpers import read_lines, same_bits

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def built(bases):
    torch.manual_seed(0)
    return build_from_bases(str(bases[0]), str(bases[1]), LoadOptions(dtype="fp32", device_map="cpu"))


@pytest.fixture
def collator(built):
    tokenizer, frames = built[1].tokenizer, built[1].frames
    return ConversationCollator(
        tokenizer, frames, audio_token_id=built[1].audio_token_id, chat_template=built[1].chat_template
    )


@pytest.fixture
def trainer_of(built, collator, train_file, tmp_path):
    """A function that makes a stock Trainer: `trainer_of(with_lora=True, data_collator=…, max_steps=…, …)`."""

    def make(*, with_lora: bool = True, unfrozen: str | None = None, own: dict | None = None, **values) -> Trainer:
        model = copy.deepcopy(built[0])
        torch.manual_seed(0)
        if with_lora:
            add_lora(model, r=4, alpha=8)
        if unfrozen:
            model.get_submodule(unfrozen).requires_grad_(True)
        dialogues = list(read_dialogues(train_file))
        settings = {
            "output_dir": str(tmp_path / "hf"), "max_steps": 4, "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2, "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no",
            "logging_steps": 1, "use_cpu": True, "disable_tqdm": True,
        }  # fmt: skip
        arguments = TrainingArguments(**settings | values)
        data = {"train_dataset": dialogues, "eval_dataset": dialogues[:3], "data_collator": collator}
        return Trainer(**{"model": model, "args": arguments} | data | (own or {}))

    return make


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


ALL, LM_NORM = {"with_lora": True}, "model.language_model.norm"


@pytest.mark.parametrize(
    "values",
    [
        ALL,
        pytest.param({"with_lora": False}, marks=pytest.mark.slow),
        ALL | {"unfrozen": LM_NORM},  # saved whole
        pytest.param(ALL | {"unfrozen": "model.audio_tower.layers.1"}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_trainer_ends_with_the_bits_of_one_that_was_not_stopped(trainer_of, tmp_path, values, caplog):
    values = values | {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(**values)
    whole.train()
    for choice in (True, str(tmp_path / "hf" / "checkpoint-2")):
        shutil.rmtree(tmp_path / "hf" / "checkpoint-4")
        again = trainer_of(**values)
        start = trained(again.model)
        again.train(resume_from_checkpoint=choice)
        assert same_bits(trained(whole.model), trained(again.model)) == []
        assert set(same_bits(start, trained(again.model))) == set(start)
    assert "audio_tower" not in caplog.text  # Trainer lists keys that are missing


@pytest.mark.parametrize("values", [ALL, pytest.param({"with_lora": False}, marks=pytest.mark.slow)])
def test_the_best_model_is_loaded_at_the_end(trainer_of, tmp_path, values):
    # The first checkpoint is the best, as the largest loss counts as such.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer = trainer_of(**values | best | steps)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "hf" / "checkpoint-1")
    first = trained(Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path / "hf" / "checkpoint-1"))
    last = trained(Qwen3AudioForConditionalGeneration.from_pretrained(tmp_path / "hf" / "checkpoint-3"))
    assert same_bits(first, trained(trainer.model)) == [] and same_bits(last, trained(trainer.model)) != []


def test_only_a_training_loop_writes_the_file_that_it_resumes_from(built, tmp_path):
    model = copy.deepcopy(built[0])
    add_lora(model, r=4, alpha=8)
    for given in ({"is_main_process": True}, {"state_dict": None}):  # as newer and older Trainers do
        model.save_pretrained(tmp_path, **given)
        assert (tmp_path / "model.safetensors").exists()
        model.save_pretrained(tmp_path)
        assert not (tmp_path / "model.safetensors").exists()
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_a_loss_of_evaluation_needs_no_count_of_labels(trainer_of, collator):
    """Any collator's: Trainer takes each of forward's parameters with "label" in its name for a label."""

    def without_count(features):
        batch = collator(features)
        return {name: value for name, value in batch.items() if name != "valid_label_count"}

    ours, own = trainer_of(), trainer_of(own={"data_collator": without_count})
    assert own.label_names == ["labels"]
    assert ours.evaluate()["eval_loss"] == own.evaluate()["eval_loss"] > 0


def test_dialogues_whose_fields_trainer_removed_are_refused(trainer_of, train_file, monkeypatch):
    monkeypatch.chdir(Path(train_file).parent)  # paths of plain dictionaries start in the current folder
    fields = {"train_dataset": read_lines(Path(train_file))}
    with pytest.raises(UsageError, match=r"no fields left: .*remove_unused_columns=False"):
        trainer_of(own=fields).train()
    trainer_of(own=fields, remove_unused_columns=False, max_steps=1).train()


def test_metrics_see_the_logits_of_every_position_and_their_labels(trainer_of):
    seen = []

    def accuracy(evaluated):
        logits, labels = evaluated
        targets = labels[:, 1:]
        seen.append((logits.shape[:2] == labels.shape, logits.shape[-1]))
        return {"accuracy": float((logits[:, :-1].argmax(-1) == targets)[targets != IGNORE].mean())}

    trainer = trainer_of(own={"compute_metrics": accuracy}, learning_rate=3e-2, max_steps=60)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] > before["eval_accuracy"] and after["eval_loss"] < before["eval_loss"]
    vocabulary = trainer.model.lm_head.weight.shape[0]
    assert seen == [(True, vocabulary)] * 2


def test_logits_of_every_position_exist_in_evaluation_alone(built, collator, train_file):
    model, batch = copy.deepcopy(built[0]), collator(list(read_dialogues(train_file))[:2])
    for training, with_grad in ((True, True), (True, False), (False, True)):
        with torch.set_grad_enabled(with_grad):
            assert model.train(training)(**batch).logits is None
    with torch.no_grad():
        evaluated = model.eval()(**batch)
        plain = model(**{name: value for name, value in batch.items() if name != "labels"})
    assert torch.equal(evaluated.logits, plain.logits) and evaluated.loss > 0


def test_padding_in_a_batch_of_evaluation_changes_no_loss(trainer_of):
    """With one dialogue a batch there is none."""
    together, alone = trainer_of(per_device_eval_batch_size=3), trainer_of(per_device_eval_batch_size=1)
    data = alone.eval_dataset
    rows = [alone.data_collator([dialogue]) for dialogue in data]
    counts = [int((row["labels"][:, 1:] != IGNORE).sum()) for row in rows]
    losses = [alone.evaluate([dialogue])["eval_loss"] for dialogue in data]
    expected = sum(n * x for n, x in zip(counts, losses, strict=True)) / sum(counts)
    assert together.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def smoothed(model, batches, epsilon: float) -> float:
    """Cross-entropy with `epsilon` of the weight on the whole vocabulary, over all supervised tokens."""
    losses, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        settings = {"ignore_index": IGNORE, "label_smoothing": epsilon, "reduction": "sum"}
        losses += torch.nn.functional.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:], **settings)
        count += (batch["labels"][:, 1:] != IGNORE).sum()
    return float(losses / count)


@pytest.mark.parametrize("by_peft", [False, True])
def test_label_smoothing_is_of_the_next_token(trainer_of, by_peft):
    model = trainer_of(with_lora=not by_peft).model
    large_weights(model.model.language_model)
    if by_peft:
        lora = LoraConfig(r=4, target_modules=r"model\.language_model\..*_proj", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    trainer = trainer_of(
        max_steps=1, gradient_accumulation_steps=2, learning_rate=0.0, label_smoothing_factor=0.2, own={"model": model}
    )
    seen, collate = [], trainer.data_collator
    trainer.data_collator = lambda dialogues: seen.append(collate(dialogues)) or copy.copy(seen[-1])
    loss, batches = trainer.train().training_loss, seen[:2]  # more are read ahead
    assert loss == pytest.approx(smoothed(model.eval(), batches, 0.2), rel=1e-5)
    assert abs(loss - smoothed(model, batches, 0.0)) > 0.01
    seen.clear()
    evaluated = trainer.evaluate(trainer.eval_dataset[:2])["eval_loss"]
    assert len(seen) == 1 and evaluated == pytest.approx(smoothed(model, seen, 0.2), rel=1e-5)


@pytest.mark.parametrize(
    "values",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"prediction_loss_only": True},
        {"label_names": ["labels"]},
        {"auto_find_batch_size": True},
    ],
    ids=lambda values: next(iter(values)),
)
@pytest.mark.slow
def test_other_arguments_of_trainer_change_no_loss_beyond_rounding(trainer_of, values):
    plain, other = trainer_of(max_steps=2), trainer_of(max_steps=2, **values)
    losses = [trainer.train().training_loss for trainer in (plain, other)]
    evaluated = [trainer.evaluate()["eval_loss"] for trainer in (plain, other)]
    assert math.isfinite(losses[0]) and losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("quantised", ["load_in_4bit", "load_in_fp8"])
def test_a_quantised_language_model_is_trained_and_resumed(trainer_of, collator, train_file, tmp_path, quantised):
    if quantised == "load_in_4bit":
        pytest.importorskip("bitsandbytes")
    audio, text = write_small_bases(tmp_path / "wide", hidden_size=64)
    options = LoadOptions(**{quantised: True}, dtype="fp32", device_map="cpu")

    def trainer(**values) -> Trainer:
        torch.manual_seed(0)
        model, _ = build_from_bases(str(audio), str(text), options)
        add_lora(model, r=4, alpha=8)
        plain = trainer_of(save_strategy="steps", save_steps=2, **values)
        dialogues = plain.train_dataset
        return Trainer(model=model, args=plain.args, train_dataset=dialogues, data_collator=collator)

    whole = trainer()
    whole.train()
    shutil.rmtree(tmp_path / "hf" / "checkpoint-4")
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert same_bits(trained(whole.model), trained(again.model)) == []
