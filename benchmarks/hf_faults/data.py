"""Broken clips and dialogues. What is planted is what tests/test_faults/test_data*.py plant: the tests themselves run,
with a plain training in the place of ours, up to the point where they would look at its outcome."""

import inspect
import json
import os
import wave
from functools import partial
from pathlib import Path

import pytest

from hf_faults.observe import HARMLESS, SILENT, Bench, Seen, Verdict, judge
from hf_faults.plain import MAX_LENGTH, STEPS
from tests.test_faults import test_data, test_data_files, test_data_text
from tests.test_faults.broken_data import unchanged, write_dialogues, write_tone
from tests.test_faults.test_data_text import CONTROL

HOUR = 3600
EPOCHS = 2  # of two steps each


class Trained(Exception):
    """Ends a test once the training that it asked for is over."""

    def __init__(self, seen: Seen, train_file: Path, max_length: int):
        super().__init__(seen.ended)
        self.seen, self.train_file, self.max_length = seen, train_file, max_length


class PlainRun:
    """In the place of `BrokenRun`: the same dialogues, the plain trainer."""

    def __init__(self, bench: Bench, folder: Path):
        self.bench, self.data = bench, folder / "data"
        self.train_file = self.data / "train.jsonl"

    def train(self, write=write_tone, *, clip="d3.wav", change=unchanged, line=None, callbacks=(), **values):
        write_dialogues(self.data, clip=clip, write=write, change=change, line=line)
        kept = {"max_length": values["max_length"]} if "max_length" in values else {}
        steps = values.get("max_steps", 2 * EPOCHS)
        seen = self.bench.train(train_file=self.train_file, callbacks=callbacks, max_steps=steps, **kept)
        raise Trained(seen, self.train_file, values.get("max_length", MAX_LENGTH))

    def named(self, *given, **how) -> None:
        """Not reached, as `refused` and `right`."""

    refused = right = named


def trained_by(bench: Bench, test, **parameters) -> Trained:
    """What the training that this test asks for came to."""
    folder = bench.fresh()
    with pytest.MonkeyPatch.context() as monkeypatch:
        fixtures = {"run": PlainRun(bench, folder), "tmp_path": folder, "monkeypatch": monkeypatch} | parameters
        wanted = inspect.signature(test).parameters
        try:
            test(**{name: value for name, value in fixtures.items() if name in wanted})
        except Trained as trained:
            return trained
    raise AssertionError(f"{test.__name__} has trained nothing")


def clean_of(bench: Bench, seen: Seen) -> Seen:
    """With the eight sound dialogues for as many steps."""
    return bench.clean(max_steps=seen.steps or STEPS)


def values_of(test) -> list[dict]:
    """What it is parametrized with, but for its guard."""
    marks = [mark for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] != "guard"]
    return [{marks[0].args[0]: value} for value in marks[0].args[1]] if marks else [{}]


def as_tested(bench: Bench, test) -> Verdict:
    verdicts = {}
    for values in values_of(test):
        trained = trained_by(bench, test, **values)
        verdicts[", ".join(map(str, values.values()))] = judged(bench, trained)
    outcomes: dict[str, list[str]] = {}
    for value, verdict in verdicts.items():
        outcomes.setdefault(verdict.outcome, []).append(value)
    worst = next((v for v in verdicts.values() if v.kind == SILENT), next(iter(verdicts.values())))
    if len(outcomes) == 1:
        return worst
    text = "; ".join(f"{', '.join(values)}: {outcome}" for outcome, values in outcomes.items())
    return Verdict(worst.kind, text, worst.seen)


def judged(bench: Bench, trained: Trained) -> Verdict:
    seen = trained.seen
    if not seen.finished:
        return judge(clean_of(bench, seen), seen, clip=True)
    seconds = len(bench.script.dialogues(trained.train_file, trained.max_length)[3]["clips"][0]) / 100
    text = f"the clip is trained on {seen.visits['d3']} times as if it were sound ({seconds:.2f} s of it)"
    verdict = judge(clean_of(bench, seen), seen, text, clip=True)
    outside = [path for path in trained.train_file.parent.iterdir() if path.resolve().parent != path.parent.resolve()]
    if verdict.kind == HARMLESS and outside:
        return Verdict(SILENT, "finishes, says nothing; the file outside is read and trained on", seen.facts)
    return verdict


def tokens_typed(bench: Bench, test) -> Verdict:
    """Whether what a user typed has become control tokens."""
    trained = trained_by(bench, test)
    verdict = judge(clean_of(bench, trained.seen), trained.seen, clip=True)
    if not trained.seen.finished:
        return Verdict(verdict.kind, verdict.outcome, verdict.seen)
    dialogues = bench.script.dialogues(trained.train_file)
    ids = {token: bench.script.tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    broken, sound = ([int((dialogues[row]["input_ids"] == i).sum()) for i in ids.values()] for row in (3, 2))
    extra = [f"{a - b} × `{token}`" for token, a, b in zip(ids, broken, sound, strict=True) if a > b]
    if not extra:
        return Verdict(HARMLESS, "finishes; no control token comes of the text", trained.seen.facts)
    return Verdict(
        SILENT,
        f"finishes, says nothing; the typed text has become control tokens: {', '.join(extra)}",
        trained.seen.facts,
    )


def characters_kept(bench: Bench) -> Verdict:
    trained = trained_by(bench, test_data_text.test_control_characters)
    if not trained.seen.finished:
        return judge(clean_of(bench, trained.seen), trained.seen)
    sample = bench.script.dialogues(trained.train_file)[3]
    wanted = json.loads(trained.train_file.read_text().splitlines()[3])["messages"][-1]["content"]
    learned = bench.script.tokenizer.decode(sample["labels"][sample["labels"] >= 0])
    kept = wanted in learned
    return Verdict(
        HARMLESS if kept else SILENT,
        f"finishes; the text is {'' if kept else 'not '}learned as it was written",
        trained.seen.facts,
    )


def supervised_left(bench: Bench) -> Verdict:
    """How much of the broken dialogue's answers is left to learn."""
    trained = trained_by(bench, test_data_text.test_huge_text)
    if not trained.seen.finished:
        return judge(clean_of(bench, trained.seen), trained.seen)
    sample = bench.script.dialogues(trained.train_file, trained.max_length)[3]
    count = int((sample["labels"] >= 0).sum())
    text = f"cut in mid-turn by the tokenizer, {count or 'none'} of its tokens are learned"
    return judge(clean_of(bench, trained.seen), trained.seen, text, clip=True)


def hour_long(bench: Bench) -> Verdict:
    folder = bench.fresh()

    def write(path: Path) -> None:
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 1, 16_000, 0, "NONE", ""))
            file.writeframes(os.urandom(16_000) * HOUR)

    train_file = write_dialogues(folder / "data", write=write)
    # As often as the rest of the dialogue allows: the features are what counts.
    seen = bench.train(train_file=train_file, max_steps=2, max_length=4096, limit=60)
    if not seen.finished:
        return judge(clean_of(bench, seen), seen, clip=True)
    frames = len(bench.script.dialogues(train_file, 4096)[3]["clips"][0])
    (folder / "data/d3.wav").unlink()
    return judge(
        clean_of(bench, seen),
        seen,
        f"{frames / 100:.0f} s of {HOUR} are heard, and the answer is learned all the same",
        clip=True,
    )


def long_line(bench: Bench) -> Verdict:
    path = bench.fresh() / "train.jsonl"
    path.touch()
    os.truncate(path, 2**27)
    return judge(bench.clean(), bench.train(train_file=path))


def fifo_later(bench: Bench) -> Verdict:
    """It takes the clip's place after the first epoch."""
    train_file = write_dialogues(bench.fresh() / "data")
    clip = train_file.parent / "d3.wav"

    def take_its_place() -> None:
        clip.unlink()
        os.mkfifo(clip)

    at = test_data_files.At(take_its_place, after_step=2)
    return judge(bench.clean(), bench.train(train_file=train_file, callbacks=[at], max_steps=2 * EPOCHS), clip=True)


SPECIAL = {
    "a clip of an hour": hour_long,
    "a FIFO that takes a clip's place during the run": fifo_later,
    "a line of 128 MB": long_line,
    "a text of a million characters": supervised_left,
    "`<|im_end|>` and a turn of the assistant, typed by a user": partial(
        tokens_typed, test=test_data_text.test_typed_turn
    ),
    "`<think>` and `<tool_call>` in a text": partial(tokens_typed, test=test_data_text.test_typed_think),
    "`<|audio_pad|>` typed where no audio is": partial(tokens_typed, test=test_data_text.test_typed_placeholder),
    "`<|audio_pad|>` in an answer": partial(tokens_typed, test=test_data_text.test_placeholder_in_an_answer),
    "control characters, NUL and private-use characters in a text": characters_kept,
}


def cases() -> dict:
    """All of the data tests as they are, but for those that train nothing or whose harm shows in the tokens."""
    found = {}
    for module in (test_data, test_data_files, test_data_text):
        for test in vars(module).values():
            for mark in getattr(test, "pytestmark", ()):
                if mark.name == "fault" and test.__module__ == module.__name__:
                    found[mark.kwargs["name"]] = partial(as_tested, test=test)
    return found | SPECIAL


CASES = cases()
