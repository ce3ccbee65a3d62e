"""benchmarks/throughput.py and the loop beside it, on the small bases: what they report follows from the data."""

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
from torch.utils.flop_counter import FlopCounterMode

from qwhisper.report.events import read_jsonl

pytestmark = pytest.mark.usefixtures("on_the_cpu")

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = ("throughput", "plain_loop", "real_shapes", "common")  # scripts, which find each other in their own folder
TICK = 1e-4  # seconds between two looks at the clock
BATCH, STEPS = 2, 3


@pytest.fixture
def scripts(monkeypatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name in NAMES:
        del sys.modules[name]


@pytest.fixture
def measured(scripts, bases, tmp_path, monkeypatch) -> SimpleNamespace:
    """The line of a call of throughput.py, its meter, data and run. Every step has every dialogue."""
    throughput, meters, ticks = scripts.throughput, [], count()
    clock = SimpleNamespace(perf_counter=lambda: TICK * next(ticks), strftime=lambda form: "now")
    honest = throughput.make_data
    case = throughput.Case("tiny", "qwen3-0.6b-32gb", BATCH, (1, BATCH, False), STEPS)

    class Kept(throughput.Meter):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            meters.append(self)
            self.operations = FlopCounterMode(display=False)  # of the first step that is counted

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == STEPS:
                self.operations.__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == STEPS + 1:
                self.operations.__exit__(None, None, None)
            super().on_step_end(args, state, control, **kwargs)

    def in_this_process(command, **options) -> SimpleNamespace:
        """The plain loop; a process would load torch for seconds."""
        assert command[:2] == [sys.executable, str(FOLDER / "plain_loop.py")]
        with monkeypatch.context() as patch, redirect_stdout(StringIO()) as said:
            patch.setattr(sys, "argv", command[1:])
            scripts.plain_loop.main()
        return SimpleNamespace(returncode=0, stdout=said.getvalue(), stderr="")

    monkeypatch.setattr(scripts.real_shapes, "WORDS", ("a", "b"))  # a byte is a token here
    monkeypatch.setattr(scripts.plain_loop, "time", clock)
    monkeypatch.setattr(scripts.common, "RESULTS", tmp_path / "results")
    values = {"time": clock, "CASES": {"small": case}, "Meter": Kept, "RESULTS": tmp_path / "results"}
    values |= {"make_bases": lambda *_: bases, "make_data": lambda folder, _: honest(folder, BATCH)}
    for name, value in (values | {"subprocess": SimpleNamespace(run=in_this_process)}).items():
        monkeypatch.setattr(throughput, name, value)
    flags = ["--tokenizer", "none", "--output_dir", str(tmp_path), "--case", "small"]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *flags])
    throughput.main()
    (line,) = read_jsonl(tmp_path / "results/throughput.jsonl")
    (meter,) = meters
    return SimpleNamespace(line=line, meter=meter, data=tmp_path / "data", run=tmp_path / "run-small-now")


def test_the_figures_follow_from_the_data(scripts, measured):
    line, meter, throughput = measured.line, measured.meter, scripts.throughput
    packs, steps = meter.counted.packs, throughput.COUNTED_STEPS
    step_s = TICK / (STEPS - meter.skip)  # it looks at the clock after step `skip` and after step STEPS alone
    assert meter.skip < STEPS and line["samples_s"] == pytest.approx(BATCH / step_s)
    assert sum(len(pack.segments) for pack in packs) == sum(len(pack.windows) for pack in packs) == steps * BATCH
    logged = [record["valid_label_count"] for record in read_jsonl(measured.run / "metrics.jsonl") if "loss" in record]
    assert len(logged) == STEPS + steps and sum(pack.supervised for pack in packs) == sum(logged[STEPS:])
    for pack in packs:
        assert pack.supervised < sum(pack.segments) <= pack.tokens and sum(pack.windows) <= pack.frames
    heard_s = sum(soundfile.info(clip).duration for clip in (measured.data / "clips").iterdir())
    frame_s = 320 / 16_000
    assert line["audio_hours_per_gpu_hour"] * step_s == pytest.approx(heard_s, abs=BATCH * frame_s)
    assert 0 < line["fill_tokens"] <= 1 and 0 < line["fill_frames"] <= 1
    assert [line[name] for name in ("gpu_busy", "launches_per_pack", "max_reserved_gib")] == [0, 0, 0]
    # The loop beside it takes BATCH samples between two looks at the clock.
    assert line["plain_samples_s"] == pytest.approx(BATCH / TICK)
    assert line["ratio"] == pytest.approx(line["samples_s"] / line["plain_samples_s"])

    useful = throughput.useful_flops(meter.model, packs)
    assert line["useful_tflops"] == pytest.approx(useful / steps / step_s / 1e12, abs=0.005)
    # PyTorch counts no attention on a CPU, but the mel filters, which need no model.
    tokens, frames = sum(packs[0].segments), sum(packs[0].windows)
    without_attention = dataclasses.replace(packs[0], segments=[1] * tokens, windows=[1] * frames)
    filters = 2 * meter.model.config.audio_config.num_mel_bins * (400 // 2 + 1) * 2 * frames
    expected = meter.operations.get_total_flops() - filters
    assert throughput.useful_flops(meter.model, [without_attention]) == pytest.approx(expected, rel=0.02)


def test_kernels_that_overlap_are_counted_once(scripts):
    assert scripts.throughput.covered([(10, 12), (0, 5), (3, 8), (4, 6)]) == 10
