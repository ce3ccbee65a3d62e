import pytest

from qwhisper.cli import main
from qwhisper.commands.chat import ChatArguments
from qwhisper.commands.evaluate import EvalArguments
from qwhisper.nearest_flag import ELSEWHERE, nearest_flag
from qwhisper.parsing import flag_names
from qwhisper.train.arguments import TrainArguments

FLAGS = {
    "train": flag_names(TrainArguments),
    "eval": flag_names(EvalArguments, ["checkpoint"]),
    "chat": flag_names(ChatArguments, ["checkpoint"]),
}


@pytest.mark.parametrize(
    ("verb", "typed", "meant"),
    [
        ("train", "learning_rat", "learning_rate"),
        ("train", "lr", "learning_rate"),
        ("train", "bs", "per_device_train_batch_size"),
        ("train", "train_batch_size", "per_device_train_batch_size"),
        ("train", "wd", "weight_decay"),
        ("train", "grad_accum", "gradient_accumulation_steps"),
        ("train", "gradient_accumulation", "gradient_accumulation_steps"),
        ("train", "epochs", "num_train_epochs"),
        ("train", "num_epochs", "num_train_epochs"),
        ("train", "model", "text_model"),
        ("train", "train_data", "train_file"),
        ("train", "validation_file", "eval_file"),
        ("train", "output", "output_dir"),
        ("train", "lora_rank", "lora_r"),
        ("train", "lora_alhpa", "lora_alpha"),
        ("train", "no_lora", "no_use_lora"),
        ("train", "max_seq_length", "max_length"),
        ("train", "max_norm", "max_grad_norm"),
        ("train", "plr", "projector_learning_rate"),
        ("train", "proj_scale", "projector_scale"),
        ("train", "resume", "resume_from_checkpoint"),
        ("train", "xyzzy", None),
        ("train", "q", None),
        ("eval", "lr", None),
        ("eval", "test_data", "eval_file"),
        ("eval", "bf16", "dtype"),
        ("eval", "bs", "batch_size"),
        ("chat", "prompt", "text"),
        ("chat", "max_length", "max_new_tokens"),
    ],
)
def test_nearest_flag(verb, typed, meant):
    assert nearest_flag(typed, FLAGS[verb]) == meant


def test_every_name_used_elsewhere_leads_to_a_flag_that_there_is():
    known = set().union(*FLAGS.values())
    assert {flag for flags in ELSEWHERE for flag in flags} <= known


def test_one_dash_is_said_to_be_one_too_few(capsys):
    assert main(["train", "--train_file", "x", "--output_dir", "y", "-lr", "1e-4"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("unknown flag -lr: flags begin with two dashes; did you mean --learning_rate?\n")
