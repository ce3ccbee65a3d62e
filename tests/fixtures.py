"""What tests of every package may ask for, and what holds for each of them."""

import dataclasses
import gc
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from qwhisper.engine import preflight
from qwhisper.model import fp8, loading
from qwhisper.train import models
from tests.declared import faults_in_runs
from tests.small import made_once
from tests.trained import (  # noqa: F401
    arguments,
    bases,
    finished_run,
    qwen3_tokenizer,
    run_training,
    small_model,
    train_file,
)

# On some CPUs bitsandbytes warns on import that a faster kernel could be installed. The warning of a test process would
# appear at its end, after the summary that continuous integration looks for in the last line.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

SMALL_BYTES = 10_000_000  # of bases that tests write themselves

# cuDNN's fp32 convolutions keep 10 bits of the mantissa on a GPU by default (matrix products keep all 23);
# our tolerances are those of fp32.
torch.backends.cudnn.allow_tf32 = False

# The first backward pass of a process starts threads for the kinds of device that are known by then. torch.compile
# makes more of them known, even without a device, and torch 2.11 refuses a backward pass in a fork of such a process.
torch.ones((), requires_grad=True).backward()


def pytest_collection_finish() -> None:
    """What has been imported by now stays: the garbage collector need not look at it after each run of a test."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """On a machine with a GPU, a test that trains in forks runs in a process that sees none.

    PyTorch refuses a backward pass in a fork whose parent has taken one, also on the CPU, wherever it sees a GPU.
    """
    if pyfuncitem.get_closest_marker("trains_in_forks") is None or torch.cuda.device_count() == 0:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    blind = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    for name in [name for name in blind if name.startswith("PYTEST_")]:
        del blind[name]
    done = subprocess.run(command, cwd=pyfuncitem.config.rootpath, env=blind, capture_output=True, text=True)
    if done.returncode == 0 and f"XFAIL {pyfuncitem.nodeid}" in done.stdout:
        pytest.xfail("as expected, in a process that sees no GPU")
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    return True


@pytest.fixture(autouse=True, scope="session")
def references_of_the_preflight_are_computed_once() -> Iterator[None]:
    """Every run of a test tries its kernels; what they are compared with depends on the attention and layout alone."""
    honest, known = preflight.reference, {}

    def reference(query, key, value, grad, attention, layout):  # type: ignore[no-untyped-def]
        trial = (attention, layout, grad is None)
        if trial not in known:
            known[trial] = honest(query, key, value, grad, attention, layout)
        return known[trial]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "reference", reference)
        yield


@pytest.fixture(autouse=True, scope="session")
def a_run_begins_with_a_copy_of_what_another_built_of_the_same_bases() -> Iterator[None]:
    """Of the same small bases, options and random numbers, every run of a test builds the same model and processor.

    Loading is tested with `build_from_bases` itself, and by each first run.
    """
    honest = models.build_from_bases

    def build_from_bases(audio_model, text_model, options, **values):  # type: ignore[no-untyped-def]
        files = [file for folder in (audio_model, text_model) for file in sorted(Path(folder).glob("*"))]
        versions = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        if torch.accelerator.is_available() or not 0 < sum(size for _, size, _ in versions) < SMALL_BYTES:
            return honest(audio_model, text_model, options, **values)
        loaders = loading.load_encoder, loading.load_language_model  # which a test may have patched
        key = (*loaders, audio_model, text_model, repr(options), repr(values), repr(versions))
        return made_once(key, lambda: honest(audio_model, text_model, options, **values))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build_from_bases", build_from_bases)
        yield


@pytest.fixture(scope="module")
def on_the_cpu() -> Iterator[None]:
    """No test of the module sees a GPU: bits are compared, processes forked, or outcomes known on a CPU alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(autouse=True)
def events_and_metrics_are_declared(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every run below a test's folder wrote only what qwhisper/report/kinds.py declares."""
    yield
    folder = request.node.funcargs.get("tmp_path") if isinstance(request.node, pytest.Function) else None
    assert folder is None or faults_in_runs(folder) == []


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real weights, tokenizer and recordings beside the repository; without it a test is skipped."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs real weights and recordings in {folder}")
    return folder


@pytest.fixture
def without_librosa(monkeypatch):
    """Older pipelines ask for librosa as soon as a model takes audio; our processor reads audio without it."""
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)


@pytest.fixture
def rowwise_product(monkeypatch) -> None:
    """fp8 with row-wise scales on a CPU, where torch before 2.12 has none: the tensor-wise product gives the same."""
    rowwise, tensorwise = fp8.PRODUCTS[fp8.ROWWISE], fp8.PRODUCTS[fp8.TENSORWISE]
    quantised = fp8.quantise_rows(torch.ones(16, 16))
    try:
        rowwise.multiply(*quantised, *quantised)
    except RuntimeError:
        monkeypatch.setitem(fp8.PRODUCTS, fp8.ROWWISE, dataclasses.replace(rowwise, multiply=tensorwise.multiply))
