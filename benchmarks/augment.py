"""More voices out of few: each recording at other speeds (and pitches with it), tilted, noisier, louder or softer; and
clips of a synthesiser.

Three or four speakers are too few to tell the voice from the word. The clips are written as WAV files before training,
so that a person can listen to them.
"""

from pathlib import Path

import numpy as np
import soundfile
import soxr

from qwhisper.data.audio import load_audio
from qwhisper.demo.dialogues import NUMBERS
from qwhisper.demo.speech import draw_utterances, write_clips
from qwhisper.frames import SAMPLE_RATE

SPEEDS = (0.8, 1.25)  # slow and deep to fast and high; uniform in the logarithm
TILTS = (-0.3, 0.5)  # of a first-order filter: dull to sharp
NOISE_DB = (15.0, 45.0)  # below the speech
GAINS_DB = (-8.0, 8.0)
CUT = 0.12  # of the recording at most, at either end: some cut theirs so close that a first "s" or a last "x" is lost


def altered(waveform: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """float32 [samples] to float32 [other samples], both at 16 kHz."""
    first, last = (int(generator.uniform(0, CUT) * len(waveform)) for _ in range(2))
    waveform = waveform[first : len(waveform) - last]
    speed = np.exp(generator.uniform(*np.log(SPEEDS)))
    x = soxr.resample(waveform, SAMPLE_RATE * speed, SAMPLE_RATE).astype(np.float64)
    x[1:] = x[1:] - generator.uniform(*TILTS) * x[:-1]
    level = np.sqrt(np.mean(x**2))
    x += generator.standard_normal(len(x)) * level * 10 ** (-generator.uniform(*NOISE_DB) / 20)
    x *= 10 ** (generator.uniform(*GAINS_DB) / 20) * np.sqrt(np.mean(waveform**2)) / max(1e-9, level)
    return (x / max(1.0, np.abs(x).max() / 0.99)).astype(np.float32)


def write_altered(paths: list[Path], folder: Path, copies: int, seed: int) -> list[list[Path]]:
    """For each recording, itself and `copies` altered ones in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = []
    for index, path in enumerate(paths):
        waveform, group = load_audio(path), [path]
        for copy in range(copies):
            generator = np.random.default_rng([seed, index, copy])
            target = folder / f"{path.stem}-{copy}.wav"
            soundfile.write(target, altered(waveform, generator), SAMPLE_RATE)
            group.append(target.resolve())
        groups.append(group)
    return groups


def write_synthesised(folder: Path, count: int, seed: int) -> list[tuple[str, Path]]:
    """(number in words, file) of `count` clips in many voices: speakers to learn from that nobody had to record."""
    folder.mkdir(parents=True, exist_ok=True)
    utterances = draw_utterances(NUMBERS, count, held_out=False, seed=seed)
    paths = [(folder / f"{index}.wav").resolve() for index in range(count)]
    write_clips(utterances, paths)
    return [(spoken.text, path) for spoken, path in zip(utterances, paths, strict=True)]
