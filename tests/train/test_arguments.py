"""TrainArguments: the stable recipe as default, values and combinations that are refused, and notices."""

import dataclasses
import math
import re

import pytest
from transformers import TrainingArguments

from qwhisper.errors import UsageError
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.parsing import flag_names, sections_of
from qwhisper.train import arguments as module
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.hf_names import NOT_TAKEN, REMOVED

FIELDS = {f.name: f for f in dataclasses.fields(TrainArguments)}
HF_FIELDS = {f.name for f in dataclasses.fields(TrainingArguments)}


def make(**values):
    return TrainArguments(**{"train_file": "data.jsonl", "output_dir": "runs/first"} | values)


def test_the_stable_recipe_is_the_default():
    recipe = {
        "freeze_whisper": True,
        "use_lora": True,
        "lora_fp32": True,
        "lora_init_scale": 0.1,
        "lora_grad_clip": 5.0,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0,
        "lora_target_modules": None,
        "projector_fp32": True,
        "projector_scale": 1.0,
        "freeze_projector_steps": 20,
        "projector_learning_rate": 3e-5,
        "early_lr_factor": 0.2,
        "early_lr_steps": 100,
        "learning_rate": 3e-5,
        "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 1,
        "manual_loss": False,
        "load_in_4bit": False,
        "whisper_cpu": False,
        "device_map": None,
        "dtype": "auto",
        "train_on": "assistant",
        "save_steps": 200,
        "eval_steps": 200,
        "audio_model": "openai/whisper-large-v3-turbo",
        "text_model": "Qwen/Qwen3-8B",
        "max_bad_fraction": 0.01,
    }
    arguments = make()
    assert {name: getattr(arguments, name) for name in recipe} == recipe
    assert arguments.samples_per_step == 4
    assert arguments.run_name == "first"
    assert arguments.notices() == []


def test_defaults_that_hang_on_other_flags():
    alone = make(use_lora=False, learning_rate=1e-3)
    assert (alone.freeze_projector_steps, alone.projector_learning_rate) == (0, 1e-3)
    second = make(init_from="runs/zero")
    inherited = ("audio_model", "text_model", "projector_scale", "audio_lead_silence", "audio_tail_silence")
    assert [getattr(second, name) for name in inherited] == [None] * 5
    assert make(init_from="runs/zero", text_model="x").text_model == "x"
    assert make(save_steps=50).eval_steps == 50
    assert make(hub="modelscope").audio_model == "openai-mirror/whisper-large-v3-turbo"


def test_filled_in_arguments_can_be_built_again():
    first = make(use_lora=False, projector_learning_rate=1e-3, report_to=["none", "tensorboard"])
    assert TrainArguments(**dataclasses.asdict(first)) == first
    assert first.report_to == ["tensorboard"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("true", "latest"),
        ("latest", "latest"),
        (True, "latest"),
        ("false", None),
        (None, None),
        ("r/checkpoint-9",) * 2,
    ],
)
def test_resume_takes_a_folder_or_latest(given, meant):
    assert make(resume_from_checkpoint=given).resume_from_checkpoint == meant


@pytest.mark.parametrize(("given", "limit"), [("auto", None), ("4096", 4096), (4096, 4096)])
def test_pack_limit(given, limit):
    assert make(max_tokens_per_pack=given).pack_limit == limit


@pytest.mark.parametrize("given", ["0", "-5", "many", "1.5", "", "²", str(2**63), "9" * 5000])
def test_pack_limit_refuses(given):
    with pytest.raises(UsageError, match="--max_tokens_per_pack"):
        make(max_tokens_per_pack=given)


def wrong_numbers():
    yield from ((name, bad) for name in module.AT_LEAST_ONE for bad in (0, -1))
    yield from ((name, bad) for name in module.ABOVE_ZERO for bad in (0.0, -1.0, math.nan, math.inf))
    yield from ((name, bad) for name in module.NOT_NEGATIVE for bad in (-1, math.nan))
    yield from ((name, bad) for name in module.BELOW_ONE for bad in (-0.1, 1.0, math.nan))
    yield from ((share, bad) for share in ("max_bad_fraction", "distill_weight") for bad in (-0.1, 1.1, math.nan))
    yield from (("max_steps", bad) for bad in (0, -2))
    yield from ((name, bad) for name in module.AT_LEAST_ONE for bad in (2**63, 10**400))
    yield from (("seed", 2**64), ("learning_rate", 1e300), ("projector_learning_rate", 1e300), ("max_steps", 2**63))


@pytest.mark.parametrize(("name", "bad"), [*wrong_numbers()])
def test_impossible_numbers_are_refused_by_name(name, bad):
    with pytest.raises(UsageError, match=f"^--{name} {re.escape(str(bad))}: "):
        make(**{name: bad})


@pytest.mark.parametrize(("lead", "tail"), [(40.0, None), (None, 30.0), (29.5, None), (20.0, 12.0)])
def test_silence_that_leaves_no_room_for_speech_is_refused(lead, tail):
    with pytest.raises(UsageError, match="leave no room for speech in a window of 30 s"):
        make(audio_lead_silence=lead, audio_tail_silence=tail)


def test_every_number_is_checked():
    checked = {*module.AT_LEAST_ONE, *module.ABOVE_ZERO, *module.NOT_NEGATIVE, *module.BELOW_ONE}
    numbers = {name for name, f in FIELDS.items() if f.type in (int, float, int | None, float | None)}
    assert numbers - checked == {"max_steps", "max_bad_fraction", "distill_weight"}
    assert checked <= numbers


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"early_lr_factor": 2.0}, "--early_lr_factor 2.0: above 1"),
        ({"whisper_cpu": True, "freeze_whisper": False}, "--whisper_cpu with --no_freeze_whisper"),
        ({"dtype": "fp16", "lora_fp32": False}, "--dtype fp16 with --no_lora_fp32"),
        ({"use_lora": False, "freeze_projector_steps": 5}, "nothing would learn"),
        ({"init_from": "runs/first/"}, "a new stage needs a folder of its own"),
    ],
)
def test_contradictions_are_refused_with_a_sentence(values, sentence):
    with pytest.raises(UsageError, match=sentence):
        make(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"load_in_4bit": True, "use_lora": False},
        {"use_lora": False, "freeze_whisper": False, "freeze_projector_steps": 5},
        {"load_in_4bit": True, "device_map": "auto", "whisper_cpu": True, "learning_rate": 2e-5},
        {"warmup_steps": 0.1},
        {"max_grad_norm": 0.0, "lora_grad_clip": 0.0, "early_lr_steps": 0},
    ],
)
def test_sound_combinations_pass_without_a_notice(values):
    assert make(**values).notices() == []


@pytest.mark.parametrize(
    ("values", "notice"),
    [
        ({"use_lora": False, "lora_r": 8}, "--lora_r has no effect: there is no LoRA with --no_use_lora"),
        ({"use_lora": False, "lora_fp32": False}, "--lora_fp32 has no effect: there is no LoRA with --no_use_lora"),
        ({"eval_steps": 7}, "--eval_steps has no effect: there is no --eval_file"),
        ({"per_device_eval_batch_size": 2}, "--per_device_eval_batch_size has no effect: there is no --eval_file"),
        ({"max_steps": 50, "num_train_epochs": 1}, "--num_train_epochs has no effect: --max_steps 50 decides"),
        ({"early_lr_steps": 0, "early_lr_factor": 0.5}, "--early_lr_factor has no effect: --early_lr_steps is 0"),
        ({"early_lr_factor": 1.0, "early_lr_steps": 9}, "--early_lr_steps has no effect: --early_lr_factor is 1"),
        (
            {"init_from": "a", "resume_from_checkpoint": "latest"},
            "--init_from has no effect: the checkpoint that is resumed holds these weights already",
        ),
        (
            {"max_steps": 10},
            "--freeze_projector_steps 20 is not below --max_steps 10: the projector does not learn in this run",
        ),
    ],
)
def test_flags_without_effect_say_so(values, notice):
    assert make(**values).notices() == [notice]


def test_modelscope_without_a_hub_id_says_so(tmp_path):
    folder = str(tmp_path)
    assert make(hub="modelscope").notices() == []
    notices = make(hub="modelscope", audio_model=folder, text_model=folder).notices()
    assert notices == ["--hub has no effect: both models are folders on this machine"]


def test_every_flag_has_a_reason_and_a_section():
    listed = [f.name for _, fields in sections_of(TrainArguments) for f in fields]
    assert sorted(listed) == sorted(FIELDS)
    assert all(len(f.metadata["help"].split()) >= 4 for f in FIELDS.values())


def test_help_names_the_defaults_that_other_modules_hold():
    assert f"(default: {Qwen3AudioConfig.audio_lead_silence};" in FIELDS["audio_lead_silence"].metadata["help"]
    assert f"(default: {Qwen3AudioConfig.audio_tail_silence};" in FIELDS["audio_tail_silence"].metadata["help"]
    assert module.DEFAULT_AUDIO_MODELS["huggingface"] in FIELDS["audio_model"].metadata["help"]
    assert module.DEFAULT_TEXT_MODEL in FIELDS["text_model"].metadata["help"]
    assert f"default: {module.DEFAULT_FREEZE_PROJECTOR_STEPS};" in FIELDS["freeze_projector_steps"].metadata["help"]


def test_every_name_of_hf_is_taken_or_refused_by_name():
    unknown = HF_FIELDS - set(FIELDS) - set(NOT_TAKEN)
    assert not unknown, f"new in transformers, to be taken or explained in hf_names.py: {unknown}"
    assert not set(NOT_TAKEN) & set(FIELDS)


def test_names_said_to_be_removed_are_removed():
    assert not set(REMOVED) & (HF_FIELDS | set(FIELDS) | set(NOT_TAKEN))


def test_replacements_name_flags_that_exist():
    names = set(flag_names(TrainArguments))
    for reason in [*REMOVED.values(), *NOT_TAKEN.values()]:
        for word in reason.replace("(", " ").replace(")", " ").replace(",", " ").replace(":", " ").split():
            if word.startswith("--") and not word.endswith("_"):
                assert word[2:].rstrip(".;") in names, reason
