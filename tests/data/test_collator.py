import numpy as np
import pytest
import soundfile

from qwhisper.data.collator import ConversationCollator
from qwhisper.data.dialogue import AudioClip
from qwhisper.data.encode import NoLabelsError
from qwhisper.errors import BadClipError, DataError
from tests.data.conftest import dialogue_of, reply, user


@pytest.fixture(scope="session")
def make(frames, chatml_tokenizer):
    """A collator whose tokens are bytes."""
    return lambda **options: ConversationCollator(chatml_tokenizer, frames, audio_token_id=999, **options)


def test_sample_without_labels_is_rejected_and_counted(make):
    collator = make(max_length=12)
    short = dialogue_of(user("a"), reply("b"))
    with pytest.raises(NoLabelsError, match=r"t\.jsonl:1: no supervised token is left"):
        collator.encoder.encode(short)
    with pytest.raises(DataError, match="none of 2 samples"):
        collator([short, short])
    assert len(collator.rejected) == 2
    ready = make().encoder.encode(short)
    batch = collator([ready, short])
    assert batch["input_ids"].shape == (1, len(ready.input_ids))
    assert [identity for identity, _ in collator.rejected] == ["t", "t", "t"]
    with pytest.raises(NoLabelsError, match="no assistant message"):
        make().encoder.encode(dialogue_of(user("a")))


def test_bad_clip_is_rejected_with_dialogue_and_file_named(make, tmp_path):
    path = tmp_path / "silent.wav"
    soundfile.write(path, np.zeros(8_000), 16_000)
    bad = dialogue_of(user(AudioClip(str(path))), reply("b"))
    with pytest.raises(BadClipError, match=r"t\.jsonl:1: .*silent\.wav: silent"):
        make().encoder.encode(bad)
    collator = make()
    assert collator([dialogue_of(user("a"), reply("b")), bad])["valid_label_count"] == 2
    assert "silent.wav" in collator.rejected[0][1]


@pytest.mark.parametrize("packed", [False, True])
def test_call_takes_dialogues_records_and_samples_alike(make, recordings, monkeypatch, packed):
    monkeypatch.chdir(recordings[0].parent)
    collator = make(packed=packed)
    content = [{"type": "audio", "audio": recordings[0].name}, {"type": "text", "text": "?"}]
    record = {"id": "t", "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]}
    dialogue = dialogue_of(user(AudioClip(str(recordings[0])), "?"), reply("b"))
    batch = collator([record, dialogue, collator.encoder.encode(dialogue)])
    assert batch["valid_label_count"] == 6
    rows = batch["input_ids"].reshape(3, -1)
    assert (rows == rows[0]).all()
    assert len(batch["audio_lengths"]) == 3
    assert ("cu_seq_lens_q" in batch) == packed


def test_fault_of_a_record_is_raised_not_rejected(make):
    with pytest.raises(DataError, match="broken: no `messages` list"):
        make()([{"id": "broken"}])
