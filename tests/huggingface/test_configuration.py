"""transformers' own tests of configurations, over ours."""

import unittest

import pytest

from qwhisper import Qwen3AudioConfig
from tests.huggingface.fetched import mixin
from tests.small import make_small_model

pytestmark = pytest.mark.slow

ConfigTester = mixin("test_configuration_common", "ConfigTester")


class ModelTester:
    """What ConfigTester asks of a model's tests: a configuration whose values are not the defaults."""

    def get_config(self) -> Qwen3AudioConfig:
        return make_small_model("qwen3", projector_stack=2).config


class ConfigurationTest(unittest.TestCase):
    def test_config(self) -> None:
        self.model_tester = ModelTester()
        ConfigTester(self, config_class=Qwen3AudioConfig, has_text_modality=False, projector_stack=2).run_common_tests()
