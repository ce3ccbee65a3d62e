"""How long data workers take to start, and until the first and all of them have read a dialogue.

    python benchmarks/worker_start.py --tokenizer ../shared/models/qwen3-tokenizer --record

A worker is a fresh interpreter that imports what reads data. It builds the tokenizer for its first dialogue. With more
workers than cores they start one after another. `trainer_s` is what the process that starts them spends on making the
reader portable, before the other times begin. After `started_s` all workers, started anew, have answered a task without
a dialogue.
"""

import argparse
import json
import os
import time

from common import append_result, circumstances
from transformers import AutoTokenizer

from qwhisper.data.dialogue import parse_own
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.light_tokenizer import dumps
from qwhisper.data.loader import DialogueReader
from qwhisper.data.processes import Worker, stop
from qwhisper.frames import FrameArithmetic

DIALOGUE = {
    "id": "a",
    "messages": [{"role": "user", "content": "Is it bigger than five?"}, {"role": "assistant", "content": "yes"}],
}


def answers(pickled: bytes, num_workers: int, task: list) -> tuple[float, float]:
    """Seconds from the start of all workers to the answer of the first one and to that of the last one."""
    begun = time.perf_counter()
    workers = [Worker(pickled) for _ in range(num_workers)]
    try:
        for worker in workers:
            worker.give(task)
        workers[0].answer()
        first = time.perf_counter() - begun
        for worker in workers[1:]:
            worker.answer()
        return first, time.perf_counter() - begun
    finally:
        stop(workers)


def start(reader: DialogueReader, num_workers: int) -> dict[str, float]:
    """Seconds: `trainer_s`, `started_s`, `first_s` and `all_s`."""
    begun = time.perf_counter()
    pickled = dumps(reader.read_all)
    times = {"trainer_s": time.perf_counter() - begun}
    _, times["started_s"] = answers(pickled, num_workers, [])
    times["first_s"], times["all_s"] = answers(pickled, num_workers, [parse_own(DIALOGUE, "here")])
    return {name: round(seconds, 2) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="Qwen/Qwen3-4B", help="hub id or folder")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--record", action="store_true", help="append the lines to results/worker_start.jsonl")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    reader = DialogueReader(DialogueEncoder(tokenizer, FrameArithmetic(), audio_token_id=len(tokenizer)))
    for num_workers in args.workers:
        line = {"workers": num_workers, **start(reader, num_workers), "cores": os.cpu_count()}
        line["tokens"] = len(tokenizer)
        if args.record:
            append_result("worker_start", line)
        else:
            print(json.dumps(line | circumstances()), flush=True)


if __name__ == "__main__":
    main()
