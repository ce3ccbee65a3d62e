"""How long data workers take to start: until the first, and until all of them have read a dialogue.

    python benchmarks/worker_start.py --tokenizer ../shared/models/qwen3-tokenizer --record

A worker is a fresh interpreter that imports what reads data and builds the tokenizer. With more workers than cores they
start one after another. `trainer_s` is what the process that starts them spends on making the reader portable.
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


def start(reader: DialogueReader, num_workers: int) -> dict[str, float]:
    """Seconds: `trainer_s`, `first_s` and `all_s`."""
    dialogue, begun = parse_own(DIALOGUE, "here"), time.perf_counter()
    pickled = dumps(reader.read)
    times = {"trainer_s": time.perf_counter() - begun}
    workers = [Worker(pickled) for _ in range(num_workers)]
    try:
        for worker in workers:
            worker.give(dialogue)
        for worker in workers:
            worker.answer()
            times.setdefault("first_s", time.perf_counter() - begun)
        times["all_s"] = time.perf_counter() - begun
    finally:
        stop(workers)
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
