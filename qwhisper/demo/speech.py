"""Speech from espeak-ng: text, voice, pitch and speed in, a waveform at 16 kHz out; and clips of many voices as files.

espeak-ng is a shared library in the package espeakng-loader, called through ctypes. It keeps state between utterances:
the same text twice in one process gives different samples, the same sequence of calls in a fresh process does not. So
`write_clips`, whose clips must be reproducible, speaks in fresh processes.
"""

import ctypes
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
import soxr

from qwhisper.errors import UsageError
from qwhisper.frames import SAMPLE_RATE

# espeak-ng's speak_lib.h
AUDIO_OUTPUT_SYNCHRONOUS = 2
CHARS_UTF8 = 1
POSITION_CHARACTER = 1
PARAMETER_RATE, PARAMETER_PITCH = 1, 3
RATES = range(80, 451)  # words a minute
PITCHES = range(100)

ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc")
# Related voices (steph, steph2) are on the same side. Left out: robots, whispers, formant synthesis (klatt), and every
# variant with breath (f2, f3, f5, Alicia, sandro, victor), whose samples differ between fresh processes.
TRAIN_VARIANTS = (
    "Alex", "Andrea", "Andy", "Denis", "Diogo", "Gene", "Henrique", "Hugo", "Lee", "Marco", "Mario", "Michael",
    "Nguyen", "anika", "antonio", "aunty", "boris", "ed", "f1", "f4", "grandma", "gustave", "ian", "iven", "iven2",
    "john", "m1", "m2", "m4", "m5", "m7", "m8", "marcelo", "max", "michel", "miguel", "norbert", "pablo", "pedro",
    "quincy", "steph", "steph2",
)  # fmt: skip
HELD_OUT_VARIANTS = (
    "Annie", "Jacky", "Mike", "belinda", "grandpa", "linda", "m3", "m6", "paul", "robert", "shelby", "travis",
)  # fmt: skip
# Pitches and speeds of the two sides alternate, so that no voice setting is in both.
TRAIN_PITCHES, HELD_OUT_PITCHES = range(30, 71, 4), range(32, 71, 4)
TRAIN_SPEEDS, HELD_OUT_SPEEDS = range(110, 171, 10), range(115, 170, 10)

TRIM_LEVEL = 0.02  # of the peak: quieter ends are cut
TRIM_MARGIN_S = 0.03  # and this much silence is kept


@dataclass(frozen=True)
class Utterance:
    """What is said and how. voice: espeak-ng's name of a language or accent; variant: a file in its folder `voices/!v`;
    pitch: 0 to 99; speed: words a minute."""

    text: str
    voice: str
    variant: str
    pitch: int
    speed: int


class _Engine:
    """The library, started once per process: its state is global, so there can be no second one."""

    def __init__(self):
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._pieces: list[np.ndarray] = []
        data = espeakng_loader.get_data_path()
        self.variants = frozenset(path.name for path in Path(data, "voices", "!v").iterdir())
        self.sample_rate = self._library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data.encode(), 0)
        if self.sample_rate <= 0:
            raise RuntimeError(f"espeak-ng does not start with its data in {data} (code {self.sample_rate})")
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = signature(self._receive)  # kept: the library holds no reference to it
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int,
            ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip

    def _receive(self, samples, num_samples, events) -> int:
        if num_samples > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0

    def say(self, utterance: Utterance) -> np.ndarray:
        """int16 [samples] at the engine's own rate."""
        name = f"{utterance.voice}+{utterance.variant}"
        self._must(self._library.espeak_SetVoiceByName(name.encode()), f"the voice {name}")
        self._must(self._library.espeak_SetParameter(PARAMETER_RATE, utterance.speed, 0), f"speed {utterance.speed}")
        self._must(self._library.espeak_SetParameter(PARAMETER_PITCH, utterance.pitch, 0), f"pitch {utterance.pitch}")
        self._pieces.clear()
        text = utterance.text.encode()
        code = self._library.espeak_Synth(text, len(text) + 1, 0, POSITION_CHARACTER, 0, CHARS_UTF8, None, None)
        self._must(code, f"the text {utterance.text!r}")
        return np.concatenate(self._pieces) if self._pieces else np.zeros(0, np.int16)

    @staticmethod
    def _must(code: int, what: str) -> None:
        if code != 0:
            raise UsageError(f"espeak-ng refuses {what} (code {code}); voices that it takes are {', '.join(ACCENTS)}")


@lru_cache(maxsize=1)
def _engine() -> _Engine:
    return _Engine()


def speak(text: str, voice: str, variant: str, pitch: int, speed: int) -> np.ndarray:
    """Speech as float32 [samples] at 16 kHz with peak 0.5, silence at both ends cut to 30 ms.

    Raises UsageError for a voice, variant, pitch or speed that espeak-ng lacks (it would ignore an unknown variant),
    and for a text without speech.
    """
    engine = _engine()
    if variant not in engine.variants:
        raise UsageError(f"espeak-ng has no voice variant {variant!r}; it has {', '.join(sorted(engine.variants))}")
    if pitch not in PITCHES or speed not in RATES:
        limits = f"pitch from 0 to {PITCHES[-1]}, speed from {RATES[0]} to {RATES[-1]} words a minute"
        raise UsageError(f"pitch {pitch}, speed {speed}: give a {limits}")
    spoken = engine.say(Utterance(text, voice, variant, pitch, speed)).astype(np.float32) / 32768
    peak = float(np.max(np.abs(spoken), initial=0.0))
    if peak == 0.0:
        raise UsageError(f"espeak-ng says nothing for the text {text!r}: give words")
    resampled = soxr.resample(spoken * (0.5 / peak), engine.sample_rate, SAMPLE_RATE)
    return _trim(resampled)


def _trim(waveform: np.ndarray) -> np.ndarray:
    loud = np.flatnonzero(np.abs(waveform) > TRIM_LEVEL * np.abs(waveform).max())
    margin = round(TRIM_MARGIN_S * SAMPLE_RATE)
    return waveform[max(0, loud[0] - margin) : loud[-1] + 1 + margin]


def draw_utterances(words: Sequence[str], num_clips: int, *, held_out: bool, seed: int) -> list[Utterance]:
    """`num_clips` utterances, each word and each variant equally often, accent, pitch and speed drawn at random.

    held_out: use the voices that no training clip has.
    """
    generator = np.random.default_rng([seed, held_out])
    variants = HELD_OUT_VARIANTS if held_out else TRAIN_VARIANTS
    pitches = HELD_OUT_PITCHES if held_out else TRAIN_PITCHES
    speeds = HELD_OUT_SPEEDS if held_out else TRAIN_SPEEDS
    return [
        Utterance(
            words[n % len(words)],
            str(generator.choice(ACCENTS)),
            variants[n // len(words) % len(variants)],
            int(generator.choice(pitches)),
            int(generator.choice(speeds)),
        )
        for n in range(num_clips)
    ]


def write_clips(utterances: Sequence[Utterance], paths: Sequence[Path], num_processes: int = 2) -> None:
    """Speak each utterance into its WAV file (16 bits), in fresh processes: the same bytes for the same call."""
    share = -(-len(utterances) // num_processes)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        starts = range(0, len(utterances), share)
        list(pool.map(_write, [utterances[n : n + share] for n in starts], [paths[n : n + share] for n in starts]))


def _write(utterances: Sequence[Utterance], paths: Sequence[Path]) -> None:
    for utterance, path in zip(utterances, paths, strict=True):
        said = speak(utterance.text, utterance.voice, utterance.variant, utterance.pitch, utterance.speed)
        soundfile.write(path, said, SAMPLE_RATE, subtype="PCM_16")
