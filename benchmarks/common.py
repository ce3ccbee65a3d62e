"""What the benchmarks share: running the product's own commands, the spoken digits, results and their circumstances."""

import json
import platform
import random
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# More than the default: the recorded digits are very short, and it costs the language model nothing (docs/silence.md).
SILENCE = {"--audio_lead_silence": 1.0, "--audio_tail_silence": 3.0}
RECORDING = re.compile(r"(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<take>\d+)\.wav")


def qwhisper(*arguments: object) -> float:
    """Runs `qwhisper …` as a user would, its output passed through; returns the seconds it took. Raises if it fails."""
    command = [sys.executable, "-m", "qwhisper", *map(str, arguments)]
    print("$ qwhisper " + shlex.join(command[3:]), flush=True)
    started = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT)
    return time.perf_counter() - started


def as_arguments(flags: dict[str, object]) -> list[object]:
    """False is the flag's --no_…; a list gives the flag several values."""
    parts: list[object] = []
    for flag, value in flags.items():
        if value is False:
            parts.append(flag.replace("--", "--no_", 1))
        else:
            parts += [flag, *(value if isinstance(value, list) else [value])]
    return parts


def as_settings(flags: dict[str, object]) -> dict[str, object]:
    """The flags as a result records them."""
    return {flag.removeprefix("--"): value for flag, value in flags.items()}


def recordings(folder: Path) -> dict[str, dict[int, list[Path]]]:
    """speaker -> digit -> files, of a folder of DIGIT_SPEAKER_TAKE.wav."""
    found: dict[str, dict[int, list[Path]]] = {}
    for path in sorted(folder.glob("*.wav")):
        if match := RECORDING.fullmatch(path.name):
            digits = found.setdefault(match["speaker"], {digit: [] for digit in range(10)})
            digits[int(match["digit"])].append(path.resolve())
    if not found:
        raise SystemExit(f"{folder}: no files named DIGIT_SPEAKER_TAKE.wav")
    return found


def pick(generator: random.Random, digits: dict[int, list[Path]], digit: int | None = None) -> tuple[int, Path]:
    """A digit (a random one, unless given) and one of its recordings."""
    digit = generator.choice([d for d, files in digits.items() if files]) if digit is None else digit
    return digit, generator.choice(digits[digit])


def audio_part(digit: int, path: Path) -> dict:
    return {"type": "audio", "audio": str(path), "transcript": DIGITS[digit]}


def circumstances() -> dict:
    """Device, versions and commit, without which a figure is worth nothing."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {
        "device": device,
        "machine": platform.machine(),
        "python": platform.python_version(),
        **packages,
        "commit": commit,
    }


def append_result(name: str, result: dict) -> None:
    """One JSON line under benchmarks/results, and the same on the screen."""
    RESULTS.mkdir(exist_ok=True)
    line = json.dumps(result | circumstances() | {"date": time.strftime("%Y-%m-%d")})
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)
