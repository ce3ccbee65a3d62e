"""The tests of transformers' mixins that our classes don't run, with a reason each: at most eight of all mixins.

None is about attention equivalence, padding, generation, saving or loading. A test that a mixin itself skips does not
count.
"""

EXCLUDED: dict[str, str] = {
    "test_feature_extractor_defaults": "the name of the next one in transformers 5.16",
    "test_subprocessor_defaults_3_audio": "wants 30 s of frames, which WhisperFeatureExtractor gives to any clip",
    "test_chat_template_message_objects": "renders an image part, which ours refuses; objects are in tests/model/",
}
