"""transformers' own mixins for models and for generation, over our classes."""

import math
import unittest
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import Qwen3Config, WhisperConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from qwhisper import Qwen3AudioConfig, Qwen3AudioForConditionalGeneration, Qwen3AudioModel
from tests.huggingface.excluded import excluded
from tests.huggingface.fetched import mixin

pytestmark = pytest.mark.slow

ModelTesterMixin = mixin("test_modeling_common", "ModelTesterMixin")
GenerationTesterMixin = mixin("generation.test_utils", "GenerationTesterMixin")

TOKENS, MEL_BINS, MEL_FRAMES, STACK = 24, 16, 49, 2
# Mel frames of each clip's windows: some clips have two. A mixin adds random rows to a batch of fewer than seven.
WINDOWS = [[33], [20, 28], [7], [49], [12, 5], [30], [41]]
BATCH = len(WINDOWS)
# Parts of the names of tests on random ids, and of tests that leave out the audio of a prompt; see ADAPTED.
IDS_ALONE = ("test_model_rope", "_padding_matches_padding_free")


class Qwen3AudioModelTester:
    """Configuration and inputs of a tiny model: a row of text and one clip for each of the batch.

    The attributes are those that the mixins read.
    """

    is_training = True
    batch_size, seq_length = BATCH, TOKENS
    vocab_size = 99
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2
    num_key_value_heads, head_dim = 2, 16
    audio_token_id = 7
    ids_alone = False

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> Qwen3AudioConfig:
        audio = WhisperConfig(
            d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=16, num_mel_bins=MEL_BINS,
            decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, vocab_size=99, max_source_positions=30,
            pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
        )  # fmt: skip
        text = Qwen3Config(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, intermediate_size=37, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, layer_types=["full_attention", "full_attention"],
        )  # fmt: skip
        return Qwen3AudioConfig(
            audio_config=audio, text_config=text, projector_stack=STACK, projector_init_scale=1.0,
            audio_token_id=self.vocab_size if self.ids_alone else self.audio_token_id,
            audio_lead_silence=0.0, audio_tail_silence=0.0,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[Qwen3AudioConfig, dict[str, Any]]:
        input_ids = torch.randint(8, self.vocab_size, (BATCH, TOKENS))
        if self.ids_alone:
            left_padded = torch.arange(TOKENS) >= torch.arange(BATCH)[:, None]
            return self.get_config(), {"input_ids": input_ids, "attention_mask": left_padded.long()}
        mask = torch.zeros(BATCH, MEL_FRAMES, dtype=torch.int64)
        for row, windows in enumerate(WINDOWS):
            start = tokens = 0
            for frames in windows:
                mask[row, start : start + frames] = 1
                start += frames + 1
                tokens += math.ceil(math.ceil(frames / 2) / STACK)
            input_ids[row, 1 : 1 + tokens] = self.audio_token_id
        features = torch.randn(BATCH, MEL_BINS, MEL_FRAMES) * mask[:, None]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "input_features": features,
            "input_features_mask": mask,
        }
        return self.get_config(), inputs


@pytest.mark.skipif(
    hasattr(GenerationTesterMixin, "test_greedy_generate"), reason="the mixin for generation runs below"
)
def test_generation():
    pytest.skip(
        "the sdist of transformers lacks the mixin for generation: run "
        "`python -m tests.huggingface.mixins --clone DIR` with a clone of the same version"
    )


class Qwen3AudioModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (Qwen3AudioModel, Qwen3AudioForConditionalGeneration)
    _is_composite = True
    additional_model_inputs = ("input_features", "input_features_mask")
    skip_test_audio_features_output_shape = True  # see ADAPTED

    def setUp(self) -> None:
        if (reason := excluded(self._testMethodName)) is not None:
            self.skipTest(reason)
        self.model_tester = Qwen3AudioModelTester(self)
        self.model_tester.ids_alone = any(part in self._testMethodName for part in IDS_ALONE)
        self.enterContext(patch.dict(MODEL_MAPPING_NAMES, {"qwen3_audio": Qwen3AudioModel.__name__}))  # see ADAPTED
