"""benchmarks/throughput.py and the loop beside it, on the small bases: what they report follows from the data."""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from torch.utils.flop_counter import FlopCounterMode

from qwhisper.commands import VERBS
from qwhisper.data.rows import Sample
from qwhisper.frames import FrameArithmetic
from qwhisper.parsing import parse
from qwhisper.report.events import read_jsonl
from qwhisper.train.arguments import TrainArguments

pytestmark = pytest.mark.usefixtures("on_the_cpu")

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = ("throughput", "throughput_meter", "throughput_cases", "plain_loop", "real_shapes", "common")
TICK = 1e-4  # seconds between two looks at the clock
BATCH, STEPS = 2, 3


@pytest.fixture
def scripts(monkeypatch) -> Iterator[SimpleNamespace]:
    """The scripts, which find each other in their own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name in NAMES:
        del sys.modules[name]


@pytest.fixture
def call(scripts, bases, tmp_path, monkeypatch) -> Callable[..., SimpleNamespace]:
    """Calls throughput.py for a case; returns its line, its last meter, data and run. Every step has every dialogue."""
    throughput, meters, ticks = scripts.throughput, [], count()
    clock = SimpleNamespace(perf_counter=lambda: TICK * next(ticks), monotonic=lambda: 0.0, strftime=lambda form: "now")
    honest = throughput.make_data

    class Kept(scripts.throughput_meter.Meter):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            meters.append(self)
            self.operations = FlopCounterMode(display=False)  # of the first step that is counted

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == self.start + STEPS:
                self.operations.__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.start + STEPS + 1:
                self.operations.__exit__(None, None, None)
            super().on_step_end(args, state, control, **kwargs)

    def in_this_process(command, **options) -> SimpleNamespace:
        """A script; a process would load torch for seconds."""
        script = Path(command[1]).stem
        assert command[:2] == [sys.executable, str(FOLDER / f"{script}.py")]
        with monkeypatch.context() as patch, redirect_stdout(StringIO()) as said:
            patch.setattr(sys, "argv", command[1:])
            vars(scripts)[script].main()
        return SimpleNamespace(returncode=0, stdout=said.getvalue(), stderr="")

    monkeypatch.setattr(scripts.real_shapes, "WORDS", ("a", "b"))  # a byte is a token here
    monkeypatch.setattr(scripts.plain_loop, "time", clock)
    monkeypatch.setattr(scripts.throughput_meter, "time", clock)
    monkeypatch.setattr(scripts.common, "RESULTS", tmp_path / "results")
    values = {"time": clock, "Meter": Kept, "RESULTS": tmp_path / "results"}
    values |= {"make_bases": lambda *_, **kind: bases, "make_data": lambda folder, _, **kind: honest(folder, BATCH)}
    for name, value in (values | {"subprocess": SimpleNamespace(run=in_this_process)}).items():
        monkeypatch.setattr(throughput, name, value)

    def call(*flags: str, **fields) -> SimpleNamespace:
        case = scripts.throughput_cases.Case(size="tiny", recipe="qwen3-0.6b-32gb", batch=BATCH, steps=STEPS, **fields)
        monkeypatch.setattr(throughput, "CASES", {"small": case})
        own = ["--tokenizer", "none", "--output_dir", str(tmp_path), "--case", "small"]
        monkeypatch.setattr(sys, "argv", ["throughput.py", *own, *flags])
        throughput.main()
        line = read_jsonl(tmp_path / "results/throughput.jsonl")[-1]
        return SimpleNamespace(line=line, meters=meters, data=tmp_path / "data", run=tmp_path / "run-small-now")

    return call


def test_the_figures_follow_from_the_data(scripts, call):
    measured = call(plain=(1, BATCH, False))
    line, (meter,), useful_flops = measured.line, measured.meters, scripts.throughput_meter.useful_flops
    packs, steps = meter.packs, STEPS - meter.skip + scripts.throughput_meter.PROFILED_STEPS
    step_s = TICK  # it looks at the clock once a step
    assert meter.skip < STEPS and line["samples_s"] == pytest.approx(BATCH / step_s)
    assert line["slowest_step"] == pytest.approx(1) and line["compile_s"] == 0 and line["execution"] == "plain"
    assert sum(len(pack.segments) for pack in packs) == sum(len(pack.windows) for pack in packs) == steps * BATCH
    logged = [record["valid_label_count"] for record in read_jsonl(measured.run / "metrics.jsonl") if "loss" in record]
    assert sum(pack.supervised for pack in packs) == sum(logged[meter.skip :])
    for pack in packs:
        assert pack.supervised < sum(pack.segments) <= pack.tokens
        assert 0 < sum(pack.windows) == pack.real_frames <= pack.frames
    heard_s = sum(soundfile.info(clip).duration for clip in (measured.data / "clips").iterdir())
    frame_s = 320 / 16_000
    assert line["audio_hours_per_gpu_hour"] * step_s == pytest.approx(heard_s, abs=BATCH * frame_s)
    assert 0 < line["fill_tokens"] <= 1 and 0 < line["fill_frames"] <= 1
    assert [line[name] for name in ("gpu_busy", "launches_per_pack", "max_reserved_gib")] == [0, 0, 0]
    # The loop beside it takes BATCH samples between two looks at the clock.
    assert line["plain_samples_s"] == pytest.approx(BATCH / TICK)
    assert line["ratio"] == pytest.approx(line["samples_s"] / line["plain_samples_s"])

    useful = useful_flops(meter.model, packs)
    assert line["useful_tflops"] == pytest.approx(useful / steps / step_s / 1e12, abs=0.005)
    # PyTorch counts no attention on a CPU, but the mel filters, which need no model.
    tokens, frames = sum(packs[0].segments), sum(packs[0].windows)
    without_attention = dataclasses.replace(packs[0], segments=[1] * tokens, windows=[1] * frames)
    filters = 2 * meter.model.config.audio_config.num_mel_bins * (400 // 2 + 1) * 2 * frames
    expected = meter.operations.get_total_flops() - filters
    assert useful_flops(meter.model, [without_attention]) == pytest.approx(expected, rel=0.02)
    in_the_cache = useful_flops(meter.model, packs, encoded=False)
    assert 0 < in_the_cache < useful


def test_a_resume_a_teacher_and_a_second_start(scripts, call):
    """Each is a run of the product; the line is of the last one, and of the steps after the resume."""
    flags = ("--no_use_lora", "--distill_weight", "0.5")
    measured = call("--no_plain", "--starts", "2", resumed=True, flags=flags)
    start, before, meter = measured.meters
    assert (start.start, before.start, meter.start) == (0, 0, STEPS)
    assert measured.line["samples_s_before"] == measured.line["samples_s"] == pytest.approx(BATCH / TICK)
    assert measured.line["starts"] == 2 and "cold_first_step_s" in measured.line and "ratio" not in measured.line
    (pack, *_), useful_flops = meter.packs, scripts.throughput_meter.useful_flops
    # The teacher reads the words; forward alone, beside the student's forward and backward pass.
    assert len(pack.taught) == len(pack.segments) and pack.num_taught == pack.supervised
    tokens, frames, read = sum(pack.segments), sum(pack.windows), sum(pack.taught)
    without = dataclasses.replace(pack, segments=[1] * tokens, windows=[1] * frames, taught=[1] * read)
    filters = 2 * meter.model.config.audio_config.num_mel_bins * (400 // 2 + 1) * 2 * frames
    expected = meter.operations.get_total_flops() - filters
    assert useful_flops(meter.model, [without]) == pytest.approx(expected, rel=0.03)


def test_packs_of_an_evaluation_are_not_counted(scripts):
    """Whether a pack counts is asked when it is made, and afterwards the package is as before."""
    from qwhisper.engine import batch, executor

    made, packs = executor.packed_batch, []
    wanted = [False, True]
    sample = Sample("a", "a", np.array([1, 2, 3]), np.array([-100, 2, 3]))
    with scripts.throughput_meter.counting(packs, lambda: wanted.pop(0)):
        assert executor.packed_batch is batch.packed_batch is not made
        for _ in range(2):
            executor.packed_batch([sample], FrameArithmetic(), 9)
    assert executor.packed_batch is batch.packed_batch is made
    assert packs == [scripts.throughput_meter.Pack([3], [], supervised=2, tokens=3, frames=0, real_frames=0)]


@pytest.mark.parametrize("distribution", [{}, {"longest_s": 60.0, "most_turns": 4}])
def test_the_data_does_not_depend_on_the_clips_that_exist(scripts, tmp_path, distribution):
    whole = scripts.real_shapes.make_data(tmp_path / "whole", 6, **distribution)
    scripts.real_shapes.make_data(tmp_path / "twice", 3, **distribution)
    twice = scripts.real_shapes.make_data(tmp_path / "twice", 6, **distribution)
    assert whole.read_text() == twice.read_text()
    clips = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.flac"))
    assert clips == sorted(path.relative_to(tmp_path / "twice") for path in (tmp_path / "twice").rglob("*.flac"))
    assert all((tmp_path / "whole" / clip).read_bytes() == (tmp_path / "twice" / clip).read_bytes() for clip in clips)
    turns = [len(record["messages"]) // 2 for record in read_jsonl(whole)]
    assert len(clips) == sum(turns) and (max(turns) > 1) == bool(distribution)


def test_the_product_takes_every_case_and_its_flags(scripts, tmp_path):
    cases = scripts.throughput_cases.CASES
    for name, case in cases.items():
        assert case.size in scripts.real_shapes.SIZES
        flags = scripts.throughput.flags_of(case, tmp_path, (tmp_path, tmp_path), tmp_path, ["--max_steps", "1"])
        parsed = parse("train", VERBS["train"], TrainArguments, [*flags, "--output_dir", "run"])
        assert parsed.samples_per_step == (4 if "1x4" in name or name == "tiny" else 128)


def test_kernels_that_overlap_are_counted_once(scripts):
    assert scripts.throughput_meter.covered([(10, 12), (0, 5), (3, 8), (4, 6)]) == 10
