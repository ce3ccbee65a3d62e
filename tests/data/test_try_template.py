"""A chat template that costs too much is found out before it is used."""

import time

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from qwhisper.data import try_template
from tests.small import TEMPLATE

SECONDS = 60  # on a busy machine; each is given one of CPU time
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
LONG = "{{ 'a' * 5000000 }}"  # found out in no time
DOUBLING = "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x * 2 %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (ENDLESS, "more than"),
        ("{{ 'a' * 10**10 }}", "MemoryError|ended the process"),
        pytest.param(DOUBLING, "Memory|more than", marks=pytest.mark.slow),
        (LONG, "makes 5000000 characters"),
        ("{% if messages | length > 15 %}" + LONG + "{% endif %}", "makes 5000000"),
        ("{% if messages | length == 4 %}" + LONG + "{% endif %}", "makes 5000000"),
        ("{% if messages[0].content | length > 4000 %}" + LONG + "{% endif %}", "makes 5000000"),
        ("x" * (1 << 20) + "y", "characters"),
        ("{% generation %}" + LONG + "{% endgeneration %}", "makes 5000000"),
    ],
)  # fmt: skip
def test_costly_template_is_found_out_in_another_process(template, said, monkeypatch):
    monkeypatch.setattr(try_template, "CPU_SECONDS", 1)
    started = time.perf_counter()
    fault = try_template.cost_fault.__wrapped__(template)
    assert fault is not None and any(part in fault for part in said.split("|")), fault
    assert time.perf_counter() - started < SECONDS


@pytest.mark.parametrize(
    "template", [TEMPLATE.read_text(encoding="utf-8"), "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{% broken"]
)
def test_cheap_template_passes(template):
    assert try_template.cost_fault(template) is None


def test_template_is_tried_with_what_transformers_gives_it():
    theirs, ours = _compile_jinja_template("x").environment, try_template.environment()
    assert ours.globals.keys() >= theirs.globals.keys()
    assert ours.filters.keys() == theirs.filters.keys()
    assert len(ours.extensions) == len(theirs.extensions)
    assert (ours.trim_blocks, ours.lstrip_blocks) == (theirs.trim_blocks, theirs.lstrip_blocks)
