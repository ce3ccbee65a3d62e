"""The shipped recipes: each parses, is found by name, and says how it is run."""

import dataclasses
import re
import shlex

import pytest

from qwhisper.commands import VERBS
from qwhisper.parsing import RECIPES, parse, shipped_recipes
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.plan import resolve


def parse_train(*argv):
    return parse("train", VERBS["train"], TrainArguments, list(argv))


def with_recipe(name):
    return parse_train("--config", name, "--train_file", "data.jsonl", "--output_dir", "run")


def test_the_promised_recipes_are_shipped():
    sizes = {f"qwen3-{size}-32gb" for size in ("0.6b", "1.7b", "4b", "8b", "8b-4bit")}
    assert set(shipped_recipes()) == sizes | {"align-projector", "lora-after-alignment", "keep-thinking"}


@pytest.mark.parametrize("name", shipped_recipes())
def test_recipe_parses_and_has_no_flag_without_effect(name):
    assert with_recipe(name).notices() == []
    assert with_recipe(name) == with_recipe(f"{name}.yaml") == with_recipe(str(RECIPES / f"{name}.yaml"))


@pytest.mark.parametrize("name", shipped_recipes())
def test_recipe_opens_with_its_purpose_and_a_command_that_parses(name):
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert re.match(r"# \S.{30,}", header[0])
    commands = [line.removeprefix("#").strip() for line in header if "qwhisper train" in line]
    assert len(commands) == 1
    words = shlex.split(commands[0])
    assert words[:4] == ["qwhisper", "train", "--config", name]
    assert parse_train(*words[2:]).output_dir.startswith("runs/")


def test_the_8b_recipe_is_the_stable_default():
    recipe, default = with_recipe("qwen3-8b-32gb"), TrainArguments(train_file="data.jsonl", output_dir="run")
    assert dataclasses.replace(recipe, text_model=None) == default
    assert resolve(recipe, num_dialogues=1) == resolve(default, num_dialogues=1)


def test_the_4bit_recipe_is_the_field_reports():
    arguments = with_recipe("qwen3-8b-4bit-32gb")
    assert (arguments.load_in_4bit, arguments.device_map, arguments.learning_rate) == (True, "auto", 2e-5)
    assert (arguments.lora_fp32, arguments.projector_fp32, arguments.lora_grad_clip) == (True, True, 5.0)


def test_the_two_stages_fit_together():
    align = (RECIPES / "align-projector.yaml").read_text(encoding="utf-8")
    first, second = with_recipe("align-projector"), with_recipe("lora-after-alignment")
    plan = resolve(first, num_dialogues=10_000)
    assert (first.use_lora, plan.projector_learning_rate, plan.freeze_projector_steps) == (False, 1e-3, 0)
    assert second.use_lora
    assert f"--output_dir {second.init_from}" in align
    assert second.text_model is None
