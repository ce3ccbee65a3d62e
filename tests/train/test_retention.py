"""What is left of the text model in one that hears: asked while it trains, and reported where it is lost."""

import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qwhisper.data.dialogue import AudioClip, Dialogue, Message, read_dialogues
from qwhisper.data.rows import IGNORE
from qwhisper.evaluate.forgetting import (
    MAX_QUESTIONS,
    MIN_QUESTIONS,
    Question,
    Questions,
    answered_by_text_model,
    choose_questions,
    scores_by_ear,
)
from qwhisper.guards.alarms import Alarms, StepFacts
from qwhisper.infer.assistant import answer_prompts
from qwhisper.train import probe as probe_module
from qwhisper.train import session
from qwhisper.train.monitor import as_facts
from qwhisper.train.run import main
from qwhisper.train.state import TrainState
from tests.train.helpers import make_run, read_lines
from tests.train.thinkers import (
    FEW,
    KINDS,
    TAUGHT,
    thinking_arguments,
    train_and_ask,
    write_spoken,
    write_thinking_bases,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_thinking_bases(tmp_path_factory.mktemp("bases"), FEW)


@pytest.fixture(scope="module")
def bases_that_know_more(tmp_path_factory):
    return write_thinking_bases(tmp_path_factory.mktemp("more"), list(KINDS))


@pytest.fixture(scope="module")
def forgetful(on_the_cpu, bases, tmp_path_factory):
    """(run, probe) of a LoRA trained on one kind alone, at a rate that rewrites the small model."""
    folder = tmp_path_factory.mktemp("forgetful")
    return train_and_ask(thinking_arguments(bases, folder, learning_rate=1e-2))


def facts(found) -> StepFacts:
    """Those of a step in which all but what the probe found is well."""
    return StepFacts(
        step=100, loss=1.0, tokens=12, num_samples=4, has_audio=True, skipped=False, group_norms={}, learning_rates={},
        **as_facts(found),
    )  # fmt: skip


def test_a_run_that_forgets_raises_the_alarm(forgetful):
    found = forgetful[1].measure()
    assert found.retention.asked == MAX_QUESTIONS
    assert found.hearing.share > 0.95 and found.retention.share < 0.2  # 1.0 and 0, also after 50 or 80 steps
    (alarm,) = Alarms().observe(facts(found))
    assert alarm.kind == "forgetting"


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"use_lora": False, "learning_rate": 3e-3}, id="projector alone"),
        pytest.param({"learning_rate": 3e-4, "distill_weight": 1.0}, id="taught by the text model"),
    ],
)
def test_a_run_that_keeps_what_the_text_model_knows_is_silent(bases_that_know_more, tmp_path, values):
    long = {"held_out": list(KINDS), "max_steps": 100, "per_device_train_batch_size": 16}
    found = train_and_ask(thinking_arguments(bases_that_know_more, tmp_path, **long, **values))[1].measure()
    assert found.hearing.share > 0.95 and found.retention.share > 0.4  # of 4 bases: 1.0, and 0.56 to 0.91
    assert Alarms().observe(facts(found)) == []


def test_an_answer_is_right_where_greedy_decoding_gives_it_to_its_end(forgetful):
    run, probe = forgetful
    model, known = run.executor.model, probe.questions
    rows = [question.heard for question in (*known.untrained, *known.trained)]
    right = run.executor.answered_right(rows)
    assert 0 < sum(right) < len(rows)
    model.eval()
    starts = [row.answer_spans[-1][0] for row in rows]
    prompts = [
        replace(row, input_ids=row.input_ids[:start], labels=row.labels[:start], answer_spans=[])
        for row, start in zip(rows, starts, strict=True)
    ]
    tokenizer = run.encoder.tokenizer
    expected = [tokenizer.decode(row.targets, skip_special_tokens=True) for row in rows]
    answers = answer_prompts(model, run.encoder, prompts, 8, 8)
    model.train()
    assert right == [answer == reference for answer, reference in zip(answers, expected, strict=True)]


def test_one_wrong_token_makes_an_answer_wrong_and_an_unsupervised_one_does_not(forgetful):
    run, probe = forgetful
    row = next(q.heard for q in probe.questions.trained if run.executor.answered_right([q.heard])[0])
    ends = np.flatnonzero(row.labels != IGNORE)
    assert len(ends) == 2  # the letter and the end of the turn
    for position in ends:
        other = row.labels.copy()
        other[position] += 1
        assert run.executor.answered_right([replace(row, labels=other)]) == [False]
        other[position] = IGNORE
        assert run.executor.answered_right([replace(row, labels=other)]) == [True]


def test_any_packing_and_chunking_finds_the_same_right(forgetful, monkeypatch):
    run, probe = forgetful
    rows = [question.heard for question in (*probe.questions.untrained[::4], *probe.questions.trained[::4])]
    executor, alone = run.executor, [run.executor.answered_right([row])[0] for row in rows]
    for limit, packing, at_once in ((4096, True, 2**26), (100, True, 1), (4096, False, 3000), (1, False, 2**26)):
        monkeypatch.setattr(executor, "max_tokens_per_pack", limit)
        monkeypatch.setattr(executor, "packing", packing)
        monkeypatch.setattr("qwhisper.engine.forward.MAX_LOGITS_AT_ONCE", at_once)
        assert executor.answered_right(rows) == alone
        assert executor.answered_right(rows[::-1]) == alone[::-1]
    assert executor.answered_right([]) == [] and executor.model.training


def test_the_token_that_stands_for_audio_is_no_answer(forgetful):
    run, probe = forgetful
    rows, audio = [question.heard for question in probe.questions.trained], run.executor.model.config.audio_token_id

    def prefer_audio(module, given, logits):
        logits[:, audio] = 1e9

    before = run.executor.answered_right(rows)
    hook = run.executor.model.lm_head.register_forward_hook(prefer_audio)
    assert run.executor.answered_right(rows) == before and any(before)
    hook.remove()


def test_only_what_the_text_model_knows_is_asked(forgetful):
    run, probe = forgetful
    good = probe.questions.untrained[0]
    wrong = good.read.labels.copy()
    wrong[np.flatnonzero(wrong != IGNORE)[0]] += 1
    asked = Questions([good, Question(good.heard, replace(good.read, labels=wrong))], [good])
    known = answered_by_text_model(run.executor, asked)
    assert known.untrained == [good] and known.trained == [good]  # though the model that hears has lost it
    assert scores_by_ear(run.executor, known) == (None, None)
    retention, hearing = scores_by_ear(run.executor, Questions([good] * MIN_QUESTIONS, [good] * (MIN_QUESTIONS - 1)))
    assert retention.asked == MIN_QUESTIONS and retention.right in (0, MIN_QUESTIONS) and hearing is None


def test_the_text_model_is_asked_once(forgetful, monkeypatch):
    _, probe = forgetful
    probe.measure()
    known, text = probe.known, probe.text
    monkeypatch.setattr(probe_module, "answered_by_text_model", None)
    monkeypatch.setattr(probe_module, "own_answers", None)
    probe.measure()
    assert probe.known is known and probe.text is text
    assert probe.measure(ask=False).retention is None


def test_asking_draws_no_random_number_and_changes_nothing(forgetful):
    run, probe = forgetful
    generator = torch.get_rng_state()
    before = {name: p.detach().clone() for name, p in run.executor.model.named_parameters()}
    assert probe.measure().retention is not None
    assert torch.equal(torch.get_rng_state(), generator) and run.executor.model.training
    assert all(torch.equal(before[name], p) for name, p in run.executor.model.named_parameters())
    assert all(p.grad is None for p in run.executor.model.parameters())


@pytest.fixture
def spoken(tmp_path):
    """All kinds, six clips a letter."""
    return read_dialogues(write_spoken(tmp_path / "spoken", "eval", list(KINDS), each=6, seed=1))


def kind_counts(dialogues, questions) -> Counter:
    by_id = {c.id: c.messages[-1].kind for c in dialogues}
    return Counter(by_id[question.heard.id] for question in questions)


def test_questions_are_of_all_kinds_alike_and_the_same_for_the_same_seed(arguments, spoken):
    run, _ = make_run(arguments())
    chosen, again, other = (choose_questions(spoken, run.encoder, TAUGHT, seed=seed) for seed in (0, 0, 1))
    assert len(chosen.untrained) == MAX_QUESTIONS and len(chosen.trained) == 24
    assert kind_counts(spoken, chosen.trained) == {"same": 24}
    assert sorted(kind_counts(spoken, chosen.untrained).values()) == [5, 5, 5, 5, 6, 6]
    ids = [[question.heard.id for question in found.untrained] for found in (chosen, again, other)]
    assert ids[0] == ids[1] != ids[2]
    for question in chosen.untrained:
        assert question.heard.windows and not question.read.windows
        assert np.array_equal(question.heard.targets, question.read.targets)


def test_there_are_no_questions_without_kinds_that_were_not_trained_on(arguments, spoken):
    run, _ = make_run(arguments())
    few = [c for c in spoken if c.messages[-1].kind == "same"] + [c for c in spoken if c.messages[-1].kind == "next"][
        :7
    ]
    without_kind = [replace(c, messages=tuple(replace(m, kind=None) for m in c.messages)) for c in spoken]
    mute = [replace(c, messages=tuple(replace(m, content=without_transcripts(m)) for m in c.messages)) for c in spoken]
    text = [Dialogue(f"t{n}", (Message("user", ("Hi",)), Message("assistant", ("hi",), "new")), "f") for n in range(9)]
    for dialogues in (few, without_kind, mute, text, []):
        assert len(choose_questions(dialogues, run.encoder, TAUGHT, seed=0)) == 0
    assert len(choose_questions(spoken, run.encoder, list(KINDS), seed=0)) == 0
    assert len(choose_questions(spoken, run.encoder, [], seed=0)) == 0  # any may have been trained on


def without_transcripts(message: Message) -> tuple:
    return tuple(replace(part, transcript=None) if isinstance(part, AudioClip) else part for part in message.content)


@pytest.fixture
def probed_in_each_step(monkeypatch):
    monkeypatch.setattr(session, "first_probe_step", lambda **values: 1)
    monkeypatch.setattr(session, "first_questions_step", lambda **values: 2)
    monkeypatch.setattr(probe_module, "TIME_SHARE", 1e9)


def probes(args) -> list[dict]:
    return [line for line in read_lines(Path(args.output_dir) / "metrics.jsonl") if "listening_gain" in line]


def test_a_run_whose_data_names_no_kinds_asks_nothing_and_says_so(bases, tmp_path, probed_in_each_step, capsys):
    args = thinking_arguments(bases, tmp_path, max_steps=2)
    train_file = Path(args.train_file)
    train_file.write_text(re.sub(r', "kind": "[a-z]+"', "", train_file.read_text()))
    assert main(args) == 0
    assert not [line for line in probes(args) if "retention" in line]
    assert "note: no retention in this run: the training data names no `kind`" in capsys.readouterr().out


def test_the_curve_is_in_the_log_of_a_run_with_kinds_that_it_was_not_trained_on(
    bases, tmp_path, probed_in_each_step, capsys
):
    args = thinking_arguments(bases, tmp_path, max_steps=3, learning_rate=1e-3)
    assert main(args) == 0
    found = probes(args)
    assert [line["step"] for line in found if "retention" in line] == [2, 3]
    assert all(0 <= line["retention"] <= 1 and 0 <= line["hearing"] <= 1 for line in found[1:])
    assert found[1]["retention_questions"] == MAX_QUESTIONS
    assert "of kinds never trained on: " in capsys.readouterr().out
    assert TrainState.load(Path(args.output_dir) / "checkpoint-3").kinds == ["same"]
    # A second stage counts the first one's kinds among those that were trained on.
    others = write_spoken(tmp_path, "next", ["next"], each=4, seed=2)
    values = {"train_file": others, "output_dir": str(tmp_path / "2"), "init_from": args.output_dir}
    later = thinking_arguments(bases, tmp_path, **values, max_steps=1, learning_rate=1e-3)
    assert main(later) == 0
    assert TrainState.load(tmp_path / "2/checkpoint-1").kinds == ["next", "same"]


def test_a_shift_that_is_no_number_leaves_a_log_that_is_json(bases, tmp_path, probed_in_each_step, monkeypatch):
    monkeypatch.setattr(probe_module.ListeningProbe, "text_shift", lambda probe: math.nan)
    args = thinking_arguments(bases, tmp_path, max_steps=1, learning_rate=1e-3)
    assert main(args) == 0
    assert [line["text_shift"] for line in probes(args)] == ["nan"]


@pytest.mark.slow
def test_a_run_without_such_kinds_asks_nothing(bases, tmp_path, probed_in_each_step, monkeypatch):
    monkeypatch.setattr(probe_module, "answered_by_text_model", None)
    args = thinking_arguments(
        bases,
        tmp_path,
        train_file=write_spoken(tmp_path, "all", FEW, each=2, seed=2),
        max_steps=2,
        learning_rate=1e-3,
    )
    assert main(args) == 0
    own = replace(args, eval_file=None, train_file=write_spoken(tmp_path, "own", TAUGHT, each=4, seed=2))
    own = replace(own, output_dir=str(tmp_path / "own-run"))
    assert main(own) == 0
    for run in (args, own):
        found = probes(run)
        assert len(found) == 2 and not any({"retention", "hearing"} & line.keys() for line in found)
