"""The script that fetches the mixins says which of them the tests run."""

import pytest

from tests.huggingface import mixins


@pytest.fixture
def source(tmp_path, monkeypatch):
    """An unpacked sdist of transformers, with one module of mixins."""
    monkeypatch.setattr(mixins, "FOLDER", tmp_path / "mixins")
    (tmp_path / "sdist" / "tests").mkdir(parents=True)
    (tmp_path / "sdist" / "tests" / "test_modeling_common.py").write_text("from tests.here import this\n")
    return tmp_path / "sdist"


def test_the_report_says_that_nothing_ran_without_the_mixins(source):
    assert "none of its own tests ran" in mixins.report()


def test_the_report_says_that_the_sdist_lacks_generation_and_a_clone_adds_it_for_good(source):
    mixins.fetch(source)
    assert "The mixin for generation did not" in mixins.report()
    (source / "tests" / "generation").mkdir()
    (source / "tests" / "generation" / "test_utils.py").write_text("class GenerationTesterMixin: ...\n")
    mixins.fetch(source)
    assert "models, generation, processors and configurations ran" in mixins.report()
    (source / "tests" / "generation" / "test_utils.py").unlink()
    mixins.fetch(source)
    assert "models, generation, processors and configurations ran" in mixins.report()
