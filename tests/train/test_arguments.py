"""TrainArguments: the stable recipe as default, values and combinations that are refused, and notices."""

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from qwhisper.cli import load
from qwhisper.commands import VERBS
from qwhisper.errors import UsageError
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.parsing import flag_names, sections_of
from qwhisper.train import plan as module
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.hf_names import NOT_TAKEN, REMOVED
from qwhisper.train.plan import CAREFUL_STEPS, resolve

FIELDS = {f.name: f for f in dataclasses.fields(TrainArguments)}
HF_FIELDS = {f.name for f in dataclasses.fields(TrainingArguments)}


def make(**values):
    return TrainArguments(**{"train_file": "data.jsonl", "output_dir": "runs/first"} | values)


def planned(**values):
    """What a run of 1000 steps does: the arguments, and the plan's values where nothing was given."""
    arguments = make(max_steps=1000, **values)
    return SimpleNamespace(**vars(arguments) | vars(resolve(arguments, num_dialogues=1)))


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
        "projector_learning_rate": 3e-5,
        "early_lr_factor": 0.2,
        "learning_rate": 3e-5,
        "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 1,
        "manual_loss": False,
        "load_in_4bit": False,
        "load_in_fp8": False,
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
    arguments, long_run = make(), planned()
    assert {name: getattr(long_run, name) for name in recipe} == recipe
    assert (long_run.early_lr_steps, long_run.freeze_projector_steps) == (100, 20)
    assert arguments.samples_per_step == 4
    assert long_run.run_name == "first"
    assert arguments.notices() == []


def test_defaults_that_hang_on_other_flags():
    alone = planned(use_lora=False, learning_rate=1e-3)
    assert (alone.freeze_projector_steps, alone.projector_learning_rate) == (0, 1e-3)
    second = planned(init_from="runs/zero")
    inherited = ("audio_model", "text_model", "projector_scale", "audio_lead_silence", "audio_tail_silence")
    assert [getattr(second, name) for name in inherited] == [None] * 5
    assert planned(init_from="runs/zero", text_model="x").text_model == "x"
    assert planned(save_steps=50).eval_steps == 50
    assert planned(hub="modelscope").audio_model == "openai-mirror/whisper-large-v3-turbo"


def test_arguments_can_be_built_again():
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


@pytest.mark.parametrize(("given", "layers"), [("auto", None), ("0", 0), (12, 12)])
def test_recompute_layers(given, layers):
    assert make(recompute_layers=given).recomputed == layers


@pytest.mark.parametrize("given", ["-1", "all", "1001", "", "9" * 5000])
def test_recompute_layers_refuses(given):
    with pytest.raises(UsageError, match="--recompute_layers"):
        make(recompute_layers=given)


def test_all_layers_and_a_number_of_them_contradict_each_other():
    with pytest.raises(UsageError, match="--gradient_checkpointing with --recompute_layers 3"):
        make(gradient_checkpointing=True, recompute_layers="3")


BOUNDS = {name: f.metadata["bounds"] for name, f in FIELDS.items() if "bounds" in f.metadata}


def outside(bounds):
    """Values just beyond each limit of a flag, and what is no number of a run whatever the limits."""
    yield from (math.nan, math.inf, -math.inf, -1e9, 2**63, 10**400)
    yield from (bounds.above, bounds.below)
    if math.isfinite(bounds.at_least):
        yield bounds.at_least - (1 if isinstance(bounds.at_least, int) else bounds.at_least / 1e6)
    yield bounds.at_most + 1 if isinstance(bounds.at_most, int) else bounds.at_most * (1 + 1e-6)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_outside_its_bounds_is_refused_by_name_and_one_at_them_is_taken(name):
    bounds = BOUNDS[name]
    for bad in outside(bounds):
        with pytest.raises(UsageError, match=f"^--{name} {re.escape(str(bad))}: must be "):
            make(**{name: bad})
    for good in (bounds.at_least, bounds.at_most, bounds.besides):
        assert good is None or not math.isfinite(good) or bounds.fault(good) is None


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"learning_rate": 1e10}, "learning_rate"),
        ({"learning_rate": 1e-30}, "learning_rate"),
        ({"projector_learning_rate": 50.0}, "projector_learning_rate"),
        ({"adam_epsilon": 1e-50}, "adam_epsilon"),
        ({"adam_epsilon": 1.0}, "adam_epsilon"),
        ({"adam_beta1": 0.9999999999}, "adam_beta1"),
        ({"adam_beta2": 0.9999999999}, "adam_beta2"),
        ({"adam_beta2": 0.5}, "adam_beta1"),
        ({"max_grad_norm": 1e-30}, "max_grad_norm"),
        ({"lora_grad_clip": 1e-30}, "lora_grad_clip"),
        ({"early_lr_factor": 1e-30}, "early_lr_factor"),
        ({"lora_init_scale": 1e-30}, "lora_init_scale"),
        ({"projector_scale": 1e-30}, "projector_scale"),
        ({"projector_scale": 1e30}, "projector_scale"),
        ({"lora_alpha": 10**9}, "lora_alpha"),
        ({"lora_r": 10**9}, "lora_r"),
        ({"lora_dropout": 0.999}, "lora_dropout"),
        ({"weight_decay": 1e4}, "weight_decay"),
        ({"weight_decay": 5.0, "learning_rate": 0.1}, "weight_decay"),
        ({"num_train_epochs": 1e9}, "num_train_epochs"),
        ({"warmup_steps": 1e12}, "warmup_steps"),
        ({"activation_clamp": "1e-30"}, "activation_clamp"),
        ({"dataloader_num_workers": 10**6}, "dataloader_num_workers"),
        ({"distill_weight": 1.5}, "distill_weight"),
    ],
)
def test_values_with_which_nothing_could_learn_are_refused(values, name):
    with pytest.raises(UsageError, match=f"^--{name} "):
        make(**values)


def test_what_turns_a_bound_off_is_taken():
    arguments = make(max_grad_norm=0.0, lora_grad_clip=0, max_steps=-1, adam_beta1=0.0)
    assert (arguments.max_grad_norm, arguments.lora_grad_clip, arguments.max_steps) == (0, 0, -1)


@pytest.mark.parametrize(("lead", "tail"), [(40.0, None), (None, 30.0), (29.5, None), (20.0, 12.0)])
def test_silence_that_leaves_no_room_for_speech_is_refused(lead, tail):
    with pytest.raises(UsageError, match="leave no room for speech in a window of 30 s"):
        make(audio_lead_silence=lead, audio_tail_silence=tail)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", "1e-3", "'1e-3' (str) where float is expected"),  # as YAML reads it
        ("learning_rate", True, "True (bool) where float is expected"),
        ("learning_rate", None, "None (NoneType) where float is expected"),
        ("max_steps", 2.5, "2.5 (float) where int is expected"),
        ("lora_r", 16.0, "16.0 (float) where int is expected"),
        ("lora_target_modules", "q_proj", "'q_proj' (str) where list is expected"),
        ("use_lora", "no", "'no' (str) where bool is expected"),
        ("dtype", "float32", "'float32' (str) where one of auto, bf16, fp16, fp32 is expected"),
        ("lr_scheduler_type", "step", "'step' (str) where one of cosine, linear, constant is expected"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value, expected):
    with pytest.raises(UsageError, match=re.escape(f"--{name} is {expected}")):
        make(**{name: value})


def test_no_list_of_layers_is_not_an_empty_one():
    with pytest.raises(UsageError, match="names no layer"):
        make(lora_target_modules=[])


def test_paths_and_a_single_tracker_are_taken_as_transformers_takes_them():
    args = make(train_file=Path("a/data.jsonl"), output_dir=Path("run"), report_to="tensorboard")
    assert (args.train_file, args.output_dir, args.report_to) == ("a/data.jsonl", "run", ["tensorboard"])
    assert make(report_to="none").report_to == make(report_to=None).report_to == []


def test_every_number_of_every_verb_has_bounds():
    for verb in VERBS.values():
        fields = dataclasses.fields(load(verb.arguments))
        numbers = {f.name for f in fields if f.type in (int, float, int | None, float | None)}
        assert numbers == {f.name for f in fields if "bounds" in f.metadata}, verb


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"early_lr_factor": 2.0}, "--early_lr_factor 2.0: must be 1 or less: .* above 1 they would be the fastest"),
        ({"whisper_cpu": True, "freeze_whisper": False}, "--whisper_cpu with --no_freeze_whisper"),
        ({"dtype": "fp16", "lora_fp32": False}, "--dtype fp16 with --no_lora_fp32"),
        ({"load_in_4bit": True, "load_in_fp8": True}, "--load_in_4bit with --load_in_fp8: these are two formats"),
        ({"use_lora": False, "freeze_projector_steps": 5}, "nothing would learn"),
        ({"init_from": "runs/first/"}, "a new stage needs another folder"),
    ],
)
def test_contradictions_are_refused_with_a_sentence(values, sentence):
    with pytest.raises(UsageError, match=sentence):
        make(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"load_in_4bit": True, "use_lora": False},
        {"load_in_fp8": True, "use_lora": False},
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
        ({"max_steps": 50, "num_train_epochs": 1}, "--num_train_epochs has no effect: --max_steps 50 replaces it"),
        ({"early_lr_steps": 0, "early_lr_factor": 0.5}, "--early_lr_factor has no effect: --early_lr_steps is 0"),
        ({"early_lr_factor": 1.0, "early_lr_steps": 9}, "--early_lr_steps has no effect: --early_lr_factor is 1"),
        (
            {"init_from": "a", "resume_from_checkpoint": "latest"},
            "--init_from has no effect: the resumed checkpoint already holds these weights",
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
    for name, (default, percent) in CAREFUL_STEPS.items():
        assert f"(default: {default}, at most {percent} % of the run" in FIELDS[name].metadata["help"]


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
