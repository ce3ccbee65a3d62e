import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwhisper.data.packing import pack_samples, pad_samples, plan_packs
from qwhisper.data.rows import IGNORE, Sample


def make_sample(length: int, *, labels: int, window_lengths: tuple[int, ...] = ()) -> Sample:
    """Tokens 1, 2, 3 …, the last `labels` of them supervised."""
    ids = np.arange(1, length + 1)
    targets = np.where(np.arange(length) >= length - labels, ids, IGNORE)
    windows = [np.full(n, n / 1000, dtype=np.float32) for n in window_lengths]
    return Sample(f"s{length}", "here", ids, targets, windows)


SAMPLES = [
    make_sample(5, labels=2, window_lengths=(700, 500)),
    make_sample(3, labels=1),
    make_sample(7, labels=4, window_lengths=(400,)),
]


def test_packed_row_restarts_positions_and_marks_the_edges():
    batch = pack_samples(SAMPLES)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 5, 8, 15]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (7, 7)
    assert batch["valid_label_count"].item() == 7
    assert batch["audio_lengths"].tolist() == [700, 500, 400]
    assert batch["audio_waveforms"].dtype == torch.float32
    assert [w.unique().tolist() for w in batch["audio_waveforms"].split([700, 500, 400])] == [
        [pytest.approx(0.7)],
        [pytest.approx(0.5)],
        [pytest.approx(0.4)],
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_to_the_side_that_was_asked_for(side):
    batch = pad_samples(SAMPLES, 0, side)
    kept = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert kept == [s.input_ids.tolist() for s in SAMPLES]
    column = batch["attention_mask"][:, -1 if side == "left" else 0]
    assert column.tolist() == [1, 1, 1]
    assert batch["input_ids"][batch["attention_mask"] == 0].unique().tolist() == [0]
    assert ("labels" in batch, "valid_label_count" in batch) == (side == "right", side == "right")


def test_packed_and_padded_batches_hold_the_same():
    packed, padded = pack_samples(SAMPLES), pad_samples(SAMPLES, 0)
    real = padded["attention_mask"].bool()
    for key in ("input_ids", "labels"):
        assert packed[key][0].tolist() == padded[key][real].tolist()
    assert padded["labels"][~real].unique().tolist() == [IGNORE]
    for key in ("valid_label_count", "audio_waveforms", "audio_lengths"):
        assert torch.equal(packed[key], padded[key])
    for batch in (packed, padded):
        assert (batch["labels"][..., 1:] != IGNORE).sum() == batch["valid_label_count"]


def test_text_only_batch_has_no_audio():
    assert not {"audio_waveforms", "audio_lengths"} & set(pack_samples(SAMPLES[1:2]))


def test_unknown_side_is_refused():
    with pytest.raises(ValueError, match="padding_side"):
        pad_samples(SAMPLES, 0, "middle")


@given(st.lists(st.integers(1, 120), max_size=60), st.integers(1, 100))
def test_packs_hold_every_sample_once_and_no_more_than_fits(lengths, max_tokens):
    packs = plan_packs(lengths, max_tokens)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[i] for i in pack) <= max_tokens or len(pack) == 1
    fitting = [n for n in lengths if n <= max_tokens]
    used = sum(1 for pack in packs if lengths[pack[0]] <= max_tokens)
    assert used <= 2 * sum(fitting) / max_tokens + 1  # first fit leaves at most one pack less than half full
    assert plan_packs(lengths, max_tokens) == packs


def test_packs_are_filled_longest_first():
    assert plan_packs([30, 60, 40, 70, 200], 100) == [[0, 3], [1, 2], [4]]
