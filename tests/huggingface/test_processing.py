"""transformers' own mixin for processors, over ours: with a small tokenizer, and with Qwen3's own if it is at hand."""

import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import soundfile
from transformers import AutoTokenizer, WhisperFeatureExtractor, testing_utils

from qwhisper import Qwen3AudioProcessor
from tests.huggingface.excluded import excluded
from tests.huggingface.fetched import mixin
from tests.small import small_tokenizer, tone

pytestmark = pytest.mark.slow

QWEN3 = Path(__file__).parents[3] / "shared" / "models" / "qwen3-tokenizer"

# Tests of audio files are for machines with librosa, which our processor does not need.
with patch.object(testing_utils, "require_librosa", lambda test: test):
    ProcessorTesterMixin = mixin("test_processing_common", "ProcessorTesterMixin")


class SmallProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = Qwen3AudioProcessor

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.clips = tempfile.TemporaryDirectory()
        for n in range(2):
            soundfile.write(Path(cls.clips.name) / f"{n}.wav", tone(300 + 200 * n, 0.3 + 0.2 * n, 8000), 8000)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.clips.cleanup()
        super().tearDownClass()

    def setUp(self) -> None:
        if (reason := excluded(self._testMethodName)) is not None:
            self.skipTest(reason)
        files = [str(file) for file in sorted(Path(self.clips.name).glob("*.wav"))]
        data = patch.dict(mixin("test_processing_common", "MODALITY_INPUT_DATA"), audio=files)
        data.start()  # clips that the mixin would download
        self.addCleanup(data.stop)

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return small_tokenizer()

    @classmethod
    def _setup_feature_extractor(cls) -> WhisperFeatureExtractor:
        return WhisperFeatureExtractor(feature_size=80)


@pytest.mark.skipif(not QWEN3.exists(), reason=f"Qwen3's tokenizer is not at {QWEN3}")
class Qwen3ProcessorTest(SmallProcessorTest):
    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return AutoTokenizer.from_pretrained(QWEN3)

    @classmethod
    def _setup_feature_extractor(cls) -> WhisperFeatureExtractor:
        return WhisperFeatureExtractor(feature_size=128)
