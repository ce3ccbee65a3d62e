"""Rounded shapes hold their packs, are few, and add little."""

from dataclasses import replace

import numpy as np
import pytest

from qwhisper.engine.batch import pack_shape, packed_batch
from qwhisper.engine.shapes import rounded, rounded_shape
from tests.model.parts import make_sample, with_teacher
from tests.small import small_model

MOST = 8192
LONGEST_WINDOW = 1500


def shape_of(generator: np.random.Generator, samples: int):
    model = small_model()
    clips = generator.integers(1600, 30 * 1600, size=samples)
    drawn = [make_sample(model, [int(n) % 40 + 2, int(n) % 70 + 3], [int(n)], seed=int(n)) for n in clips]
    return model, drawn


@pytest.mark.parametrize("samples", [1, 2, 7, 30])
def test_a_rounded_shape_holds_the_pack(samples):
    generator = np.random.default_rng(samples)
    model, drawn = shape_of(generator, samples)
    drawn[0] = with_teacher(drawn[0], 3)
    exact = pack_shape(drawn, model.config.frames, teach=True)
    longest = model.config.audio_config.max_source_positions
    larger = rounded_shape(exact, MOST, longest)
    batch = packed_batch(drawn, model.config.frames, model.config.audio_token_id, teach=True, shape=larger)
    assert batch.shape == larger and batch.text.input_ids.shape == (1, larger.tokens)
    assert int(batch.text.real.sum()) == exact.tokens
    assert len(batch.text.cu_seq_lens) == larger.segments + 1
    assert rounded_shape(larger, MOST, longest).tokens == larger.tokens


def test_sizes_are_few_and_add_at_most_an_eighth_of_large_packs():
    found = {rounded(count, 8) for count in range(64, 8193)}
    assert len(found) == 7 * 8 + 1 and max(found) == 8192
    for count in range(64, 8193):
        assert count <= rounded(count, 8) <= count * 9 / 8
        assert count <= rounded(count, 4) <= count * 5 / 4
    assert rounded(1, 4) == 64


def test_the_largest_pack_of_a_run_is_a_size_itself():
    model, drawn = shape_of(np.random.default_rng(0), 2)
    exact = replace(pack_shape(drawn, model.config.frames), tokens=5000)
    assert rounded_shape(exact, 5000, LONGEST_WINDOW).tokens == 5000
    assert rounded_shape(exact, 8192, LONGEST_WINDOW).tokens == 5120
    assert rounded_shape(replace(exact, tokens=9000), 8192, LONGEST_WINDOW).tokens == 9216


def test_packs_of_the_same_tokens_have_few_shapes():
    """Their numbers of samples, of supervised tokens and of tokens of audio differ."""
    model, drawn = shape_of(np.random.default_rng(0), 3)
    exact, generator, found = pack_shape(drawn, model.config.frames), np.random.default_rng(1), set()
    for _ in range(200):
        pack = replace(
            exact,
            tokens=int(generator.integers(7700, 8192)),
            segments=int(generator.integers(35, 60)),
            max_length=int(generator.integers(300, 500)),
            supervised=int(generator.integers(2200, 2900)),
            audio_tokens=int(generator.integers(4300, 5000)),
        )
        found.add(replace(rounded_shape(pack, MOST, LONGEST_WINDOW), encoder_frames=0, mel_frames=0, windows=0))
    assert len(found) <= 4
