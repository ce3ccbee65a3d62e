"""Whichever attention a user sets on a model, as it is loaded or later: samples together give what each gives alone.

Of the encoder alone, of the ways to set an attention and of each kernel see model/test_modeling.py and
model/test_attention.py.
"""

import tempfile
from functools import partial

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qwhisper import Assistant, Qwen3AudioForConditionalGeneration
from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.packing import pack_samples, pad_samples
from qwhisper.evaluate import evaluation
from qwhisper.model.attention import IMPLEMENTATIONS, encoder_attention, text_attention, without_cudnn
from qwhisper.model.lora import add_lora
from tests.model.parts import gradients
from tests.sdpa_switches import switches_of_calls
from tests.small import large_weights, write_dialogues

NOT_OURS = "not_ours"  # stands for flash attention and others that transformers or a user may register
SET = {
    "ours": "qwhisper_packed",
    "math": "qwhisper_packed_math_padded_math",
    "sdpa": "sdpa",
    "eager": "eager",
    "by part": {"audio_config": "sdpa", "text_config": "eager"},
    "not ours": NOT_OURS,
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    AttentionInterface.register(NOT_OURS, without_cudnn(sdpa_attention_forward))
    AttentionMaskInterface.register(NOT_OURS, sdpa_mask)


@pytest.fixture(scope="module")
def data(small_model, tmp_path_factory):
    """(encoder, folder of a whole model, dialogues)"""
    model, encoder = small_model
    folder = tmp_path_factory.mktemp("attention")
    model.save_pretrained(folder / "whole")
    return encoder, folder / "whole", read_dialogues(write_dialogues(folder / "data", 5))


def load(folder, **keywords):
    """With LoRA away from zero. All of it is trained, the encoder included."""
    model = Qwen3AudioForConditionalGeneration.from_pretrained(folder, **keywords)
    torch.manual_seed(0)
    large_weights(model.model.audio_tower)
    add_lora(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def asked(dialogues):
    """Conversations up to their last answer; the last one continues the first, and has two clips."""
    found = [dialogue.messages[:-1] for dialogue in dialogues]
    return [*found, (*dialogues[0].messages, *found[1])]


def assistant(model, encoder, dialogues, *, together):
    """As every entry point: (what was written, what was computed)."""
    helper = Assistant(model, encoder)
    if together:
        return [answer.text for answer in helper.answer_all(asked(dialogues), batch_size=6, max_new_tokens=4)], {}
    return [helper.answer(messages, max_new_tokens=4).text for messages in asked(dialogues)], {}


def evaluated(model, encoder, dialogues, *, together):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "DIALOGUES_AT_ONCE", 256 if together else 1)
        settings = {"text": dialogues, "batch_size": 6 if together else 1, "max_new_tokens": 3}
        found = evaluation.evaluate_model(model, encoder, dialogues, **settings)
    names = ("loss", "loss_swapped", "loss_unswapped", "text_shift")
    return found.answers, {name: torch.tensor(getattr(found, name)) for name in names}


def generated(model, encoder, dialogues, *, together):
    prompts = [encoder.encode_prompt(messages) for messages in asked(dialogues)]
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = []
    for batch in [prompts] if together else [[prompt] for prompt in prompts]:
        found += model.generate(**pad_samples(batch, 0, "left"), **settings)[:, -4:].tolist()
    return found, {}


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = gradients(model)


def trained(model, encoder, dialogues, *, together, packed=False):
    """Loss and gradients of one step of a plain Trainer: one batch, or as many as there are samples."""
    samples = [row for dialogue in dialogues for row in encoder.encode_rows(dialogue)]
    size = len(samples) if together else 1
    collator = pack_samples if packed else partial(pad_samples, pad_token_id=0)
    seen = Gradients()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=len(samples) // size,
            max_grad_norm=0.0, report_to="none", remove_unused_columns=False, save_strategy="no", use_cpu=True,
            disable_tqdm=True, learning_rate=0.0,
        )  # fmt: skip
        trainer = Trainer(model, settings, train_dataset=samples, data_collator=collator, callbacks=[seen])
        loss = trainer.train().training_loss
    model.eval()
    return None, seen.found | {"loss": torch.tensor(loss)}


ENTRIES = {"assistant": assistant, "evaluate": evaluated, "generate": generated, "trainer": trained}


def compare(entry, found, expected):
    assert found[0] == expected[0], entry
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
    assert found[1].keys() == expected[1].keys()
    for name, value in found[1].items():
        close(value, expected[1][name], msg=lambda m, n=name: f"{entry}, {n}: {m}")


@pytest.fixture(scope="module")
def alone(data):
    """What each entry point gives for one sample at a time, with the attention that a model is loaded with."""
    encoder, folder, dialogues = data
    model = load(folder)
    return {entry: run(model, encoder, dialogues, together=False) for entry, run in ENTRIES.items()}


CASES = [(when, name) for when in ("before loading", "after loading") for name in SET]
SLOW = [("before loading", name) for name in SET if name not in ("sdpa", "eager")]


@pytest.mark.parametrize(
    ("when", "name"), [pytest.param(*case, marks=pytest.mark.slow if case in SLOW else []) for case in CASES]
)
def test_samples_together_give_what_each_gives_alone(data, alone, when, name):
    encoder, folder, dialogues = data
    if when == "before loading":
        model = load(folder, attn_implementation=SET[name])
    else:
        model = load(folder)
        model.set_attn_implementation(SET[name])
    language_model = model.model.language_model.config
    for entry, run in ENTRIES.items():
        with switches_of_calls() as seen:
            found = run(model, encoder, dialogues, together=True)
        compare(entry, found, alone[entry])
        assert bool(seen) == (name != "eager") and not any(one["cudnn"] for one in seen), entry
    later_turns = assistant(model, encoder, dialogues, together=False)  # read on from what the earlier ones have left
    compare("assistant, one by one", later_turns, alone["assistant"])
    assert (encoder_attention(model.model.audio_tower.config) in IMPLEMENTATIONS) == (name != "eager")
    if text_attention(language_model) in IMPLEMENTATIONS:
        packed = trained(model, encoder, dialogues, together=True, packed=True)
        compare("trainer, packed", packed, alone["trainer"])
