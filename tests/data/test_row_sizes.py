"""Sizes of rows by headers and lengths of texts, against rows that are laid out."""

import json
import math

import numpy as np
import pytest
import soundfile

from qwhisper.data import row_sizes
from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.row_sizes import Rows, rows_of
from qwhisper.frames import FrameArithmetic
from tests.small import tone

FRAMES = FrameArithmetic(lead_silence_s=0.26, tail_silence_s=1.0)


@pytest.fixture
def dialogues(tmp_path):
    """Clips of 1, 2 and 40 s, the last one as Ogg, whose header gives an estimate; and one dialogue of text."""
    records = []
    for number, (seconds, ending) in enumerate([(1.0, "wav"), (2.0, "flac"), (40.0, "ogg")]):
        soundfile.write(tmp_path / f"{number}.{ending}", tone(300, seconds), 16_000)
        content = [{"type": "audio", "audio": f"{number}.{ending}"}, {"type": "text", "text": "What is said?"}]
        records.append([{"role": "user", "content": content}, {"role": "assistant", "content": "a word " * 20}])
    records.append([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}])
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in records))
    return read_dialogues(file)


def test_audio_is_counted_exactly_and_text_by_its_bytes(dialogues):
    one = [rows_of([dialogue], FRAMES) for dialogue in dialogues]
    samples = [16_000, 32_000, 640_000, 0]
    assert [row.audio_tokens for row in one] == [FRAMES.num_tokens(n) if n else 0 for n in samples]
    assert [row.seconds for row in one] == [1.0, 2.0, 40.0, 0.0]
    # 40 s are two windows, and each has its silence: 63 encoder frames.
    assert [row.frames for row in one] == pytest.approx([50 + 63, 100 + 63, 2000 + 2 * 63, 0], abs=1)
    assert one[0].supervised == 6 + 139 / 4 and one[0].tokens == one[0].audio_tokens + 6 + 13 / 4 + one[0].supervised
    whole = rows_of(dialogues, FRAMES)
    assert whole.tokens == pytest.approx(np.mean([row.tokens for row in one]))
    assert whole.spread == pytest.approx(np.std([row.tokens for row in one]))
    assert whole.longest == math.ceil(one[2].tokens)
    assert rows_of(dialogues, FRAMES, max_length=50).longest == 50


def test_nothing_is_decoded(dialogues, monkeypatch):
    monkeypatch.setattr("qwhisper.data.audio.load_audio", None)
    monkeypatch.setattr("qwhisper.data.clips.load_audio", None)
    assert rows_of(dialogues, FRAMES).seconds == 43 / 4


def test_of_a_large_file_some_dialogues_are_measured(dialogues, monkeypatch):
    monkeypatch.setattr(row_sizes, "MOST_MEASURED", 2)
    measured, honest = [], row_sizes._row

    def one_row(dialogue, frames):
        measured.append(dialogue)
        return honest(dialogue, frames)

    monkeypatch.setattr(row_sizes, "_row", one_row)
    rows_of(dialogues, FRAMES)
    assert measured == [dialogues[0], dialogues[2]]


@pytest.mark.parametrize(("count", "steps"), [(4, 60), (8, 16), (128, 14)])
def test_the_largest_step_is_about_what_random_steps_have(count, steps):
    rows = Rows()
    generator = np.random.default_rng(0)
    drawn = generator.normal(rows.tokens, rows.spread, (2000, steps, count)).sum(2).max(1)
    assert rows.most(count, steps) == pytest.approx(drawn.mean(), rel=0.005)
    assert Rows(longest=10_000).most(count, steps) >= 10_000
    assert rows.most(count, 1) == math.ceil(count * rows.tokens)


@pytest.mark.parametrize(("count", "tokens"), [(4, 700), (4, 832), (8, 1200), (128, 8192), (128, 600), (128, 150)])
def test_packs_of_a_step_are_counted_on_average(count, tokens):
    rows = Rows()
    drawn = np.random.default_rng(0).normal(rows.tokens, rows.spread, (20_000, count)).sum(1)
    assert rows.packs(count, tokens) == pytest.approx(np.ceil(drawn / tokens).mean(), rel=0.01)
