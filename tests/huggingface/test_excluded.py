"""The list of excluded tests is short."""

from tests.huggingface.excluded import EXCLUDED


def test_the_excluded_tests_are_few_and_each_has_a_reason():
    assert len(EXCLUDED) <= 8 and all(EXCLUDED.values())
