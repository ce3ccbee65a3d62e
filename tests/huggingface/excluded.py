"""The tests of transformers' mixins that our classes leave out or adapt, with a reason each: at most eight in all.

None is about attention equivalence, padding, generation, saving or loading. A test that a mixin itself skips, because
of the machine or of what a model has, does not count.
"""

# Tests that don't run.
EXCLUDED: dict[str, str] = {
    "test_subprocessor_defaults_3_audio": "wants 30 s of frames, which WhisperFeatureExtractor gives to any clip",
    "test_chat_template_message_objects": "renders an image part, which ours refuses; objects are in tests/model/",
}
# Tests of EXCLUDED under the names that older versions of transformers have for them.
OLDER_NAMES = {"test_feature_extractor_defaults": "test_subprocessor_defaults_3_audio"}

# What is set for tests that run, by its name in test_model.py or test_processing.py.
ADAPTED: dict[str, str] = {
    "skip_test_audio_features_output_shape": "the mixin's own switch, for models that return the frames of all "
    "clips in one row, as this one and Qwen2.5-Omni do",
    "IDS_ALONE": "tests that give random ids, or the ids of a prompt without its audio: the placeholder lies outside "
    "their vocabulary, since one without its audio is refused",
    "MODEL_MAPPING_NAMES": "transformers' table of base models, by which a mixin knows that these have no "
    "loss; `import qwhisper` adds no entry to it",
    "MODALITY_INPUT_DATA": "clips that the mixin would download are made here",
    "require_librosa": "tests of audio files need librosa for other processors; they run without it",
}


def excluded(test: str) -> str | None:
    """Why a test does not run; None for one that does."""
    return EXCLUDED.get(OLDER_NAMES.get(test, test))
