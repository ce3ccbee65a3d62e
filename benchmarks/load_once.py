"""The process that `loading.py` measures: loads one model as `qwhisper train` does, and prints a line of JSON.

    python benchmarks/load_once.py --audio_model DIR --text_model DIR --output_dir DIR --train_file none

The flags are those of `train`; with --train_file FILE it also trains. `seconds` is the time from the first file to a
model whose LoRA is added and whose frozen weights are recorded; imports and the start of CUDA are counted apart.
`parts` is where the seconds went; a part that runs within another is counted in both. `until_first_step` and
`until_first_step_ended` count from the start of the process.
"""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BEGUN = time.perf_counter()
SAMPLE_SECONDS = 0.01


def rss_anon() -> int:
    """Bytes of anonymous memory of this process that are resident; files that are mapped don't count."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon: this benchmark needs Linux")


@contextmanager
def peak_of_rss_anon():
    """Yields a list whose only element is the highest value so far."""
    peak, done = [rss_anon()], threading.Event()

    def look() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], rss_anon())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], rss_anon())


def time_parts(parts: dict[str, float], places: dict[str, tuple[Any, str]], wait: Callable[[], None]) -> None:
    """Replaces each function, (module, name), by one that adds its seconds to `parts`."""

    def timed(name: str, function: Callable) -> Callable:
        def run(*arguments, **keywords):
            wait()
            begun = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                wait()
                parts[name] = parts.get(name, 0.0) + time.perf_counter() - begun

        return run

    for name, (module, attribute) in places.items():
        setattr(module, attribute, timed(name, getattr(module, attribute)))


def main() -> None:
    import json

    with peak_of_rss_anon() as peak:
        import torch
        from transformers import TrainerCallback

        from qwhisper.commands import VERBS
        from qwhisper.model import bases, loading, qwen3_audio
        from qwhisper.parsing import parse
        from qwhisper.report.terminal import quieten_transformers
        from qwhisper.train import models, run, session
        from qwhisper.train.arguments import TrainArguments
        from qwhisper.train.plan import resolve

        class Meter(TrainerCallback):
            """When the first step was begun and ended."""

            def on_step_begin(self, args, state, control, **kwargs):
                parts.setdefault("until_first_step", time.perf_counter() - BEGUN)

            def on_step_end(self, args, state, control, **kwargs):
                wait()
                parts.setdefault("until_first_step_ended", time.perf_counter() - BEGUN)

        args = parse("train", VERBS["train"], TrainArguments, sys.argv[1:])
        imports = time.perf_counter() - BEGUN
        on_gpu = torch.cuda.is_available()
        wait = torch.cuda.synchronize if on_gpu else lambda: None
        if on_gpu:
            torch.zeros(1, device="cuda")
        cuda = time.perf_counter() - BEGUN - imports
        before = rss_anon()
        quieten_transformers()
        parts: dict[str, float] = {}
        places = {
            "fingerprints": (qwen3_audio, "fingerprint"),
            "tokenizer": (qwen3_audio, "load_tokenizer"),
            "encoder": (loading, "load_encoder"),
            "language_model": (bases, "load_causal_lm"),
            "head_check": (bases, "_refuse_other_head"),
            "join": (loading, "join"),
            "whole_model": (loading, "load_whole"),
            "base_record": (loading, "record_of"),
            "trained_weights": (loading, "load_trained_weights"),
            "lora": (models, "add_lora"),
            "frozen_checksums": (session, "checksums"),
            "read_data": (run, "read_data"),
            "build_model": (run, "build_model"),
            "build_session": (run, "build_session"),
            "kernel_check": (run, "try_kernels"),
        }
        time_parts(parts, places, wait)
        if Path(args.train_file).exists():
            assert run.main(args, [Meter()]) == 0
        else:
            model, _ = run.build_model(args, resolve(args, num_dialogues=1), None)
            session.checksums(session.frozen_parameters(model))
    print(
        json.dumps(
            {
                "seconds": round(parts["build_model"] + parts["frozen_checksums"], 2),
                "imports_s": round(imports, 2),
                "cuda_start_s": round(cuda, 2),
                "parts": {name: round(spent, 3) for name, spent in parts.items()},
                "before_gib": round(before / 2**30, 3),
                "peak_rss_anon_gib": round(peak[0] / 2**30, 3),
                "max_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if on_gpu else 0.0,
            }
        )
    )


if __name__ == "__main__":
    main()
