"""The command line: what a user types and what comes back. No model is loaded here."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwhisper import __version__, cli
from qwhisper.cli import main
from qwhisper.commands import VERBS
from qwhisper.commands.chat import ChatArguments
from qwhisper.commands.evaluate import EvalArguments
from qwhisper.errors import CheckpointError, DataError, UsageError
from qwhisper.flags import Arguments, flag
from qwhisper.parsing import parse

ROOT = Path(__file__).parents[1]
TRAIN = ["train", "--train_file", "data.jsonl", "--output_dir", "run"]


def run(monkeypatch, argv, outcome=None):
    """Exit code of `argv` and the arguments its command got; the command returns or raises `outcome`."""
    received = []

    def command(arguments):
        received.append(arguments)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    load = cli.load
    monkeypatch.setattr(cli, "load", lambda reference: load(reference) if reference.endswith("Arguments") else command)
    return main(argv), received


def parsed(*argv):
    verb = VERBS[argv[0]]
    return parse(argv[0], verb, cli.load(verb.arguments), list(argv[1:]))


def test_overview_names_every_verb():
    code = "from qwhisper.cli import main; main([]); main(['--help']); main(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert done.stdout.count(f"\n  {verb} ") == 2
    assert done.stdout.endswith(f"qwhisper {__version__}\n")


@pytest.mark.parametrize("command", [["-m", "qwhisper", "train"], ["finetune_audio.py"]])
def test_both_entry_points_lead_to_train_and_load_no_library(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    assert "--early_lr_factor" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "qwhisper.train.flag_sections" in loaded
    assert loaded & {"torch", "transformers", "numpy", "yaml"} == set()


@pytest.mark.parametrize("name", VERBS)
def test_help_of_every_verb_shows_its_flags(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert VERBS[name].example in text
    assert "--config" in text
    for word in VERBS[name].positionals:
        assert f"\n  {word.upper()} " in text


@pytest.mark.parametrize("name", [name for name in VERBS if name != "train"])
def test_examples_parse(name, monkeypatch):
    code, received = run(monkeypatch, VERBS[name].example.split()[1:])
    assert code == 0
    assert len(received) == 1


def test_handler_gets_the_arguments_and_its_exit_code_comes_back(monkeypatch):
    code, (arguments,) = run(
        monkeypatch, [*TRAIN, "--lora-r", "8", "--no_use_lora", "--report_to", "a", "b"], outcome=3
    )
    assert code == 3
    assert (arguments.lora_r, arguments.use_lora, arguments.report_to) == (8, False, ["a", "b"])


def test_positionals_stand_before_or_after_flags():
    assert parsed("chat", "run", "--audio", "a.wav", "b.wav") == ChatArguments(
        checkpoint="run", audio=["a.wav", "b.wav"]
    )
    assert parsed("eval", "--eval_file=t.jsonl", "run", "--no_swap_audio") == EvalArguments(
        checkpoint="run", eval_file="t.jsonl", swap_audio=False
    )


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (UsageError("u"), 2),
        (DataError("d.jsonl:3: no audio"), 3),
        (CheckpointError("c"), 6),
        (KeyboardInterrupt(), 130),
    ],
)
def test_faults_of_the_user_are_one_line_and_their_own_exit_code(monkeypatch, capsys, outcome, code):
    assert run(monkeypatch, TRAIN, outcome)[0] == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(outcome) in lines[0]


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, TRAIN, ZeroDivisionError())


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["trian"], "did you mean `qwhisper train`?"),
        (["data", "chekc"], "did you mean `qwhisper data check`?"),
        (["data", "check"], "required: FILE"),
        (["xyzzy"], "verbs: demo, data check, data answer, plan, train, verify, eval, chat"),
        ([*TRAIN, "--learning_rat", "1"], "did you mean --learning_rate?"),
        ([*TRAIN, "--batch_size=3"], "did you mean --per_device_train_batch_size?"),
        ([*TRAIN, "--xyzzy"], "unknown flag --xyzzy; --help lists all"),
        ([*TRAIN, "stray"], "'stray' belongs to no flag"),
        ([*TRAIN, "--lora_r", "many"], "--lora_r: invalid int value: 'many'"),
        ([*TRAIN, "--train_on", "user"], "--train_on: invalid choice: 'user'"),
        ([*TRAIN, "--lora_r", "0"], "--lora_r 0: must be 1 or more"),
        (["train"], "required: --train_file, --output_dir"),
        ([*TRAIN, "--config"], "--config: expected one argument"),
        ([*TRAIN, "--config", "qwen3-8b"], "no recipe of that name is shipped; did you mean qwen3-8b-"),
        (["eval", "run", "--eval_file", "x", "--warmup_ratio", "1"], "unknown flag --warmup_ratio"),
    ],
)
def test_wrong_commands_are_named_with_what_to_do(capsys, argv, wanted):
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert wanted in lines[0]


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("warmup_ratio", "--warmup_steps below 1"),
        ("save_safetensors", "always safetensors"),
        ("overwrite_output_dir", "no run is overwritten"),
        ("logging_dir", "--output_dir"),
        ("no_cuda", "--device_map cpu"),
        ("evaluation_strategy", "--eval_steps"),
        ("per_gpu_train_batch_size", "--per_device_train_batch_size"),
        ("bf16", "--dtype bf16"),
        ("deepspeed", "one card"),
        ("activation-checkpointing", "--gradient_checkpointing"),
    ],
)
def test_names_of_hf_that_are_not_taken_say_what_to_use(capsys, name, replacement):
    assert main([*TRAIN, f"--{name}", "x"]) == 2
    error = capsys.readouterr().err
    assert f"--{name.replace('-', '_')} " in error
    assert replacement in error


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_recipe_gives_values_and_flags_win_over_it(tmp_path):
    recipe = write(
        tmp_path / "r.yaml",
        "# comment\nlearning_rate: 2e-5\nuse_lora: false\nreport_to: [tensorboard, wandb]\n"
        "max_length: null\ntrain_file: a\n",
    )
    arguments = parsed("train", "--config", recipe, "--output_dir", "o", "--use_lora", "--learning_rate", "1e-4")
    assert (arguments.train_file, arguments.learning_rate, arguments.use_lora) == ("a", 1e-4, True)
    assert (arguments.report_to, arguments.max_length) == (["tensorboard", "wandb"], None)
    assert parsed("train", "--config", recipe, "--output_dir", "o").learning_rate == 2e-5


def test_list_in_a_recipe_leaves_the_positional_alone(tmp_path):
    recipe = write(tmp_path / "r.yaml", "audio: [a.wav, b.wav]\n")
    assert parsed("chat", "run", "--config", recipe) == ChatArguments(checkpoint="run", audio=["a.wav", "b.wav"])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("lora_r: 8\n\nlora_rank: 8\n", "r.yaml:3: unknown flag lora_rank; did you mean lora_r?"),
        ("lora_r: 8\nlora_r: 9\n", "r.yaml:2: lora_r is set in line 1 already"),
        ("warmup_ratio: 0.1\n", "r.yaml:1: warmup_ratio is no longer a flag"),
        ("bf16: true\n", "r.yaml:1: bf16 of HF's TrainingArguments is not taken"),
        ("no_use_lora: true\n", "r.yaml:1: write `use_lora: false`"),
        ("\nlora_r: many\n", "r.yaml:2: --lora_r: invalid int value"),
        ("\nlora_r: -1\n", "r.yaml:2: --lora_r -1: must be 1 or more"),
        ("lora_r: {a: 1}\n", "r.yaml:1: lora_r must be a plain value"),
        ("- lora_r\n", "r.yaml: a recipe is a list of `flag: value` lines"),
        ("lora_r: [\n", "r.yaml: not readable as YAML"),
    ],
)
def test_faults_in_a_recipe_are_named_with_file_and_line(tmp_path, capsys, text, wanted):
    assert main([*TRAIN, "--config", write(tmp_path / "r.yaml", text)]) == 2
    error = capsys.readouterr().err
    assert wanted in error
    assert len(error.splitlines()) == 1


def test_a_faulty_flag_is_not_blamed_on_the_recipe(tmp_path, capsys):
    assert main([*TRAIN, "--config", write(tmp_path / "r.yaml", "lora_r: 4\n"), "--lora_r", "0"]) == 2
    assert "r.yaml" not in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class PercentArguments(Arguments):
    share: float = flag(0.5, "A share, 50 % by default.")


def test_percent_signs_in_help_texts_are_printed(capsys):
    assert parse("demo", VERBS["demo"], PercentArguments, ["--help"]) is None
    assert "50 % by default" in capsys.readouterr().out


def test_what_the_outputs_encoding_lacks_is_told_all_the_same():
    """A Chinese name on a terminal that knows ASCII alone."""
    code = "import sys; from qwhisper import cli; cli.main([]); print('中 ×'); sys.exit(cli.main(['中']))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 2 and b"\\u4e2d" in done.stderr
    assert done.stdout.endswith(b"\\u4e2d \\xd7\n")


def test_an_error_that_nobody_can_be_told_of_keeps_its_exit_code():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "qwhisper", "xyzzy"]
        assert subprocess.run(command, stdout=full, stderr=full, cwd=ROOT).returncode == 2


@pytest.mark.slow
def test_no_entry_point_says_that_an_optional_kernel_of_bitsandbytes_is_missing():
    """On a CPU with AVX512-BF16 it warns on import; processes that the demo spawns never meet the command line."""
    pytest.importorskip("bitsandbytes")
    code = "import qwhisper, bitsandbytes.backends.cpu.ops as ops; print(ops.logger.isEnabledFor(30))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n" and "gemm_4bit" not in done.stderr
