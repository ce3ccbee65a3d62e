"""Eight spoken dialogues one of which is broken, a run on them, and the guards that keep such data from harm."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from qwhisper.data import audio, dialogue_audio
from qwhisper.data.check import check_dataset
from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.loader import DialogueReader, encode_all
from qwhisper.errors import BadClipError, QwhisperError
from qwhisper.frames import FrameArithmetic
from qwhisper.model.processing_qwen3_audio import add_audio_token
from tests.small import small_tokenizer, tone
from tests.test_faults.inject import Outcome, outcome_of, raise_if_a_patch_is_stale
from tests.train.helpers import read_lines

COUNT = 8
BROKEN = 3  # its dialogue is "d3", on line 4
ANSWER_TOKENS = 4  # "low" and the end of the turn
NAMED = "the clip is quarantined, with file and reason; its step is that much smaller, and the run goes on"
REFUSED = "exit code 3 before a model is loaded, with file and line"
RIGHT = "it is read as it was meant"


def write_tone(path: Path, seconds: float = 0.3, rate: int = 16_000, **how) -> None:
    soundfile.write(path, tone(440, seconds, rate), rate, **how)


def write_float(path: Path, samples: np.ndarray, rate: int = 16_000) -> None:
    soundfile.write(path, samples, rate, subtype="FLOAT")


def unchanged(record: dict) -> None:
    pass


def write_dialogues(
    folder: Path,
    *,
    clip: str = "d3.wav",
    write: Callable[[Path], None] = write_tone,
    change: Callable[[dict], None] = unchanged,
    line: bytes | None = None,
) -> Path:
    """d3 is the broken one: `write` makes its clip, `change` alters its record, or `line` stands in its place."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number in range(COUNT):
        name = clip if number == BROKEN else f"d{number}.wav"
        (write if number == BROKEN else write_tone)(folder / name)
        content = [{"type": "audio", "audio": name}, {"type": "text", "text": "Pitch?"}]
        record = {"id": f"d{number}", "messages": [{"role": "user", "content": content}, answer("low")]}
        if number == BROKEN:
            change(record)
        lines.append(json.dumps(record).encode())
    if line is not None:
        lines[BROKEN] = line
    path = folder / "train.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


@dataclass
class Reading(Outcome):
    """What a training reads of its file, in the place of what a run wrote."""

    quarantined: dict[str, str] = field(default_factory=dict)
    tokens: int = 0

    @property
    def finite(self) -> bool:
        return True  # nothing was trained


class BrokenRun:
    """Dialogues of which one is broken, read as a training reads them or trained on, and what became of it.

    Reading takes milliseconds and shows each fault; a few of every verdict go through a whole training.
    """

    def __init__(self, arguments, folder: Path):
        """arguments: the fixture. folder: an empty one."""
        self.arguments, self.data, self.output = arguments, folder / "data", folder / "run"
        self.train_file = self.data / "train.jsonl"
        self.reading: Reading | None = None

    def read(self, write=write_tone, *, clip="d3.wav", change=unchanged, line=None, max_length=None) -> Reading:
        """As `train`, up to the tokens that are learned from."""
        write_dialogues(self.data, clip=clip, write=write, change=change, line=line)
        tokenizer = small_tokenizer()
        encoder = DialogueEncoder(
            tokenizer,
            FrameArithmetic(lead_silence_s=0.0, tail_silence_s=0.1),
            audio_token_id=add_audio_token(tokenizer),
            max_length=max_length,
        )
        try:
            samples, rejections = encode_all(read_dialogues(self.train_file), encoder)
        except QwhisperError as error:
            self.reading = Reading(error.exit_code, str(error))
        except Exception as error:  # a crash is an outcome, and no guarantee allows it
            raise_if_a_patch_is_stale(error)
            self.reading = Reading(None, repr(error))
        else:
            reasons = {rejection.id: rejection.reason for rejection in rejections}
            self.reading = Reading(0, "", quarantined=reasons, tokens=sum(sample.num_supervised for sample in samples))
        return self.reading

    def train(self, write=write_tone, *, clip="d3.wav", change=unchanged, line=None, callbacks=(), **values) -> Outcome:
        """An epoch of two steps; half of the dialogues may be bad. The first four are `write_dialogues`'s."""
        write_dialogues(self.data, clip=clip, write=write, change=change, line=line)
        small = {"max_steps": 2, "save_steps": 100, "freeze_projector_steps": 0, "max_bad_fraction": 0.5}
        return outcome_of(self.arguments(train_file=str(self.train_file), **small | values), callbacks)

    @property
    def quarantined(self) -> dict[str, str]:
        """The reason by id."""
        if self.reading:
            return self.reading.quarantined
        path = self.output / "quarantine.jsonl"
        return {line["id"]: line["reason"] for line in read_lines(path)} if path.exists() else {}

    @property
    def trained_tokens(self) -> int:
        if self.reading:
            return self.reading.tokens
        path = self.output / "metrics.jsonl"
        return sum(line.get("valid_label_count", 0) for line in read_lines(path)) if path.exists() else 0

    def named(self, outcome: Outcome, *words: str, checked: bool = True) -> None:
        """Asserts NAMED, and that `data check` says the same beforehand (checked: unless it is not broken then)."""
        assert outcome.code == 0, outcome.message
        assert outcome.finite
        reasons = self.quarantined
        assert list(reasons) == ["d3"], reasons
        expected = (f"{self.train_file}:{BROKEN + 1}: ", *words)
        assert all(word in reasons["d3"] for word in expected), reasons
        assert self.trained_tokens == ANSWER_TOKENS * (COUNT - 1)
        assert not checked or check_dataset(self.train_file)["bad_clips"] == [reasons["d3"]]

    def refused(self, outcome: Outcome, *words: str) -> None:
        """Asserts REFUSED, and that `data check` says the same."""
        assert outcome.code == 3, outcome.message
        expected = (f"{self.train_file}:{BROKEN + 1}: ", *words)
        assert all(word in outcome.message for word in expected), outcome.message
        assert not (self.output / "config.yaml").exists()  # which is written once a model is there
        assert outcome.message.splitlines() == check_dataset(self.train_file)["faults"]

    def right(self, outcome: Outcome) -> None:
        """Asserts that every dialogue was learned from."""
        assert outcome.code == 0, outcome.message
        assert outcome.finite
        assert self.quarantined == {}


# Guards patched out.


def unchecked(module, name: str) -> Callable:
    """A check that finds nothing."""
    return lambda monkeypatch: monkeypatch.setattr(module, name, lambda *args, **kwargs: None)


def few_errors_named(monkeypatch) -> None:
    """The errors that somebody has met so far are named, and others are let through."""

    @contextmanager
    def named(path):
        try:
            yield
        except ValueError as error:
            raise BadClipError(f"{path}: unreadable audio ({error})") from error

    monkeypatch.setattr(audio, "faults_named", named)


def decoder_errors_let_through(monkeypatch) -> None:
    """What libsndfile says of a file is nobody's fault in particular."""
    monkeypatch.setattr(audio, "find_ffmpeg", lambda: None)
    monkeypatch.setattr(audio, "libsndfile_fault", lambda error, *_: error)


def no_rejections(monkeypatch) -> None:
    """A dialogue that can't be encoded raises in the loader."""
    monkeypatch.setattr(DialogueReader, "read", lambda self, dialogue: self.encoder.encode_rows(dialogue))


def silence_stands_in(monkeypatch) -> None:
    """What many a data loader does with a clip that it can't read."""
    load_clip = dialogue_audio.load_clip

    def load(clip, **options):
        try:
            return load_clip(clip, **options)
        except BadClipError:
            return np.zeros(4_800, dtype=np.float32)

    monkeypatch.setattr(dialogue_audio, "load_clip", load)
