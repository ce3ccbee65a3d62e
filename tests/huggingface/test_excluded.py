"""The list of what is left out of the mixins, or changed for them, is short and whole."""

from pathlib import Path

from tests.huggingface.excluded import ADAPTED, EXCLUDED


def test_the_excluded_and_adapted_tests_are_few_and_each_has_a_reason():
    listed = EXCLUDED | ADAPTED
    assert len(listed) == len(EXCLUDED) + len(ADAPTED) <= 8 and all(listed.values())


def test_each_adaptation_is_in_use():
    code = "".join((Path(__file__).parent / name).read_text() for name in ("test_model.py", "test_processing.py"))
    assert [name for name in ADAPTED if name not in code] == []
