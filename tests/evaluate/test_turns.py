"""Rows are made of the first turns that can be used; their clips are decoded a few turns at a time."""

import pytest
import soundfile

from qwhisper.data.dialogue import AudioClip, Dialogue, Message
from qwhisper.evaluate import turns as module
from qwhisper.evaluate.turns import first_whole, turns_of
from qwhisper.frames import SAMPLE_RATE
from tests.small import tone


@pytest.fixture
def groups(tmp_path):
    """20 groups of one turn each; only the clips of the last two exist."""
    for n in (18, 19):
        soundfile.write(tmp_path / f"{n}.wav", tone(200 + n, 0.2), SAMPLE_RATE)
    asked = [Message("user", (AudioClip(str(tmp_path / f"{n}.wav")), "Pitch?")) for n in range(20)]
    dialogues = [Dialogue(f"d{n}", (asked[n], Message("assistant", ("low",))), f"file:{n}") for n in range(20)]
    return [(turn,) for turn in turns_of(dialogues)]


@pytest.mark.parametrize(("num_workers", "starts"), [(0, 19), (1, 3)])
def test_workers_are_started_for_several_groups(small_model, groups, monkeypatch, num_workers, starts):
    sizes, read = [], module.read_in_order

    def counted(portions, encoder, num_workers, **how):
        sizes.append(len(portions))
        return read(portions, encoder, 0, **how)

    monkeypatch.setattr(module, "read_in_order", counted)
    heard = {}
    (rows,) = first_whole(groups, 1, small_model[1], heard, num_workers)
    assert [row.id for row in rows] == ["d18"] and rows[0].windows
    assert len(sizes) == starts
    bad = [clip for (turn,) in groups[:18] for clip in turn.clips]
    assert [clip for clip, found in heard.items() if found is None] == bad
