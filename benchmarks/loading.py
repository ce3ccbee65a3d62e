"""Seconds and host memory until a model is loaded, for each kind of folder; one case a call.

    python benchmarks/loading.py --tokenizer DIR --output_dir DIR --size 8b
    python benchmarks/loading.py --tokenizer DIR --output_dir DIR --size 0.6b --load_in_4bit --kind run

Real shapes, random weights (real_shapes.py). The files are read once before, so that they are in the disk's cache; then
a fresh process loads them as `qwhisper train` does (load_once.py). --kind: `bases`; `run`, a folder of trained weights
and the bases; `whole`, a folder with all weights. --stored: the dtype of the language model in the file. --start: also
takes two steps of 4 samples; `parts` then shows what comes before the first one.

`ratio` is the peak of the process's anonymous memory, libraries included, divided by the bytes of all weight files.
"""

import argparse
import json
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

from common import append_result
from real_shapes import SIZES, make_bases, make_data
from safetensors.torch import load_file, save_file

from qwhisper.model.bases import LoadOptions
from qwhisper.model.lora import add_lora
from qwhisper.model.qwen3_audio import build_from_bases

CHUNK = 1 << 24


def stored_as(text: Path, dtype: str) -> Path:
    """A copy of a base in one file whose weights are stored in this dtype."""
    if dtype == "bf16":
        return text
    copy = text.with_name(f"{text.name}-{dtype}")
    if not copy.exists():
        narrow = chain.from_iterable(load_file(file).items() for file in weight_files(text))
        wide = {name: tensor.float() for name, tensor in narrow}
        copy.mkdir()
        for file in text.glob("*.json*"):
            if not file.name.startswith("model.safetensors"):
                (copy / file.name).write_bytes(file.read_bytes())
        save_file(wide, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def trained(audio: Path, text: Path, kind: str) -> Path:
    """A folder of trained weights, or of a whole model, made of the bases."""
    folder = text.with_name(f"{kind}-{text.name}")
    if not folder.exists():
        model, processor = build_from_bases(str(audio), str(text), LoadOptions(dtype="bf16"))
        if kind == "whole":
            model.base_record = None  # as if nobody knew the bases: all weights are saved
        else:
            add_lora(model)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def read_once(files: list[Path]) -> int:
    """Bytes of the files, which are in the disk's cache afterwards."""
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.read(CHUNK):
                pass
    return sum(file.stat().st_size for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="0.6b")
    parser.add_argument("--kind", choices=("bases", "run", "whole"), default="bases")
    parser.add_argument("--stored", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--start", action="store_true", help="also train two steps")
    args = parser.parse_args()
    audio, text = make_bases(args.output_dir / "bases", args.size, args.tokenizer)
    text = stored_as(text, args.stored)
    flags = ["--output_dir", args.output_dir / f"run-{time.strftime('%H%M%S')}", "--dtype", args.dtype]
    folders = [audio, text]
    if args.kind == "bases":
        flags += ["--audio_model", audio, "--text_model", text]
    else:
        folder = trained(audio, text, args.kind)
        folders = [folder] if args.kind == "whole" else [*folders, folder]
        flags += ["--init_from", folder]
    flags += ["--load_in_4bit"] if args.load_in_4bit else []
    data = make_data(args.output_dir / "data", 64) if args.start else "none"
    flags += ["--train_file", data, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1]
    flags += ["--max_steps", 2]
    checkpoint = read_once([file for folder in folders for file in weight_files(folder)]) / 2**30
    command = [sys.executable, Path(__file__).with_name("load_once.py"), *flags]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    case = {name: getattr(args, name) for name in ("size", "kind", "stored", "dtype", "load_in_4bit", "start")}
    ratio = round(found["peak_rss_anon_gib"] / checkpoint, 3)
    append_result("loading", {**case, "checkpoint_gib": round(checkpoint, 3), "ratio": ratio, **found})


if __name__ == "__main__":
    main()
