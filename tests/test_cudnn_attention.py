"""cuDNN's attention, whose masked backward pass gives NaN, stays out of every entry point, and no setting of torch is
changed for it.

The plain Trainer's test is in train/test_hf.py, that of what a user sets on a model in model/test_modeling.py.
"""

import json
import multiprocessing
import operator
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import soundfile
import torch

from qwhisper.cli import main as cli
from qwhisper.train.run import main as train
from tests.sdpa_switches import SWITCHES, switches, switches_of_calls
from tests.small import tone, write_dialogues

PACKAGE = Path(__file__).parents[1] / "qwhisper"
FLAGS = {"cuda.matmul": ("allow_tf32",), "cudnn": ("allow_tf32", "benchmark", "deterministic", "enabled")}


def set_all(on: bool) -> None:
    """Every switch to `on`, and other settings away from their defaults."""
    for name in SWITCHES:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(on)
    for backend, flags in FLAGS.items():
        for flag in flags:
            setattr(operator.attrgetter(backend)(torch.backends), flag, on)
    torch.use_deterministic_algorithms(on)
    torch.set_grad_enabled(on)
    torch.set_float32_matmul_precision("high" if on else "medium")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    torch.manual_seed(17)


def settings() -> list[str]:
    getters = (
        "get_default_dtype get_num_threads is_grad_enabled get_float32_matmul_precision "
        "are_deterministic_algorithms_enabled is_anomaly_enabled"
    )
    found = [f"{name}: {getattr(torch, name)()}" for name in getters.split()]
    for backend, flags in FLAGS.items():
        found += [f"{flag}: {getattr(operator.attrgetter(backend)(torch.backends), flag)}" for flag in flags]
    return [*found, str(switches()), str(torch.get_rng_state().tolist())]


def run_all_modules() -> None:
    """Executes the code of every module of the package again, but of those that register with transformers (packages,
    the loading in fp8), and of kernels without their library.
    """
    left_out = {"fp8_loading"} | (set() if find_spec("triton") else {"segment_kernels"})
    for file in sorted(PACKAGE.rglob("*.py")):
        if not file.name.startswith("__") and file.stem not in left_out:
            runpy.run_path(str(file), run_name=f"again_{file.stem}")


def test_importing_the_package_changes_no_setting_of_torch():
    def look() -> None:
        for on in (True, False):
            set_all(on)
            before = settings()
            run_all_modules()
            assert settings() == before

    assert all(switches().values())
    process = multiprocessing.get_context("fork").Process(target=look)  # what is set and registered stays there
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.fixture
def calls():
    """torch's switches during each SDPA call of the test, which must have made some, all without cuDNN."""
    with switches_of_calls() as seen:
        yield seen
    assert seen and not any(one["cudnn"] for one in seen)
    assert all(switches().values())


def test_training_with_evaluation(arguments, train_file, calls):
    assert train(arguments(max_steps=2, eval_file=str(train_file), eval_steps=1)) == 0


def test_training_on_padded_batches(arguments, calls, monkeypatch):
    monkeypatch.setattr("qwhisper.engine.executor.supports_packing", lambda config: False)
    assert train(arguments(max_steps=1)) == 0


def test_verify(finished_run, calls):
    assert cli(["verify", str(finished_run)]) == 0


def test_eval(finished_run, tmp_path, calls):
    eval_file = write_dialogues(tmp_path / "data", 3)
    assert cli(["eval", str(finished_run), "--eval_file", str(eval_file), "--max_new_tokens", "2"]) == 0


def test_chat(finished_run, tmp_path, calls):
    soundfile.write(tmp_path / "a.wav", tone(300, 0.3), 16_000)
    assert cli(["chat", str(finished_run), "--audio", str(tmp_path / "a.wav"), "--max_new_tokens", "2"]) == 0


def test_data_answer(bases, tmp_path, calls):
    question = {"messages": [{"role": "user", "content": "Pitch?"}]}
    (tmp_path / "in.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    cli(["data", "answer", *files, "--text_model", str(bases[1]), "--max_new_tokens", "2"])
