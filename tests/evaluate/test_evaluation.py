import numpy as np
import pytest
import soundfile
import torch

from qwhisper.data import dialogue_audio
from qwhisper.data.dialogue import AudioClip, Dialogue, Message, in_words
from qwhisper.engine.executor import Executor
from qwhisper.errors import DataError
from qwhisper.evaluate import evaluation as run_module
from qwhisper.evaluate import forgetting
from qwhisper.evaluate.evaluation import NO_KIND, evaluate_model
from qwhisper.evaluate.forgetting import text_answers
from qwhisper.evaluate.tables import markdown
from qwhisper.evaluate.turns import turns_of
from qwhisper.frames import SAMPLE_RATE
from tests.small import tone

PITCHES = {"low": 200.0, "high": 800.0}


@pytest.fixture(autouse=True)
def short_answers_to_the_shipped_instructions(monkeypatch):
    monkeypatch.setattr(forgetting, "OWN_TOKENS", 4)


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory) -> list[Dialogue]:
    """16 dialogues: is the tone low or high, in half of them asked about again, and two without audio."""
    folder = tmp_path_factory.mktemp("tones")
    dialogues = []
    for n in range(14):
        word = ("low", "high", "high")[n % 3]
        soundfile.write(folder / f"{n}.wav", tone(PITCHES[word], 0.2 + 0.02 * n), SAMPLE_RATE)
        clip = AudioClip(str(folder / f"{n}.wav"), transcript=word)
        messages = [Message("user", (clip, "Pitch?")), Message("assistant", (f"{word.title()}.",), kind="pitch")]
        if n % 2:
            sure = Message("assistant", ("yes" if word == "low" else "no",), kind="again")
            messages += [Message("user", ("Was it low?",)), sure]
        dialogues.append(Dialogue(f"d{n}", tuple(messages), f"file:{n}"))
    hello = (Message("user", ("Hello",)), Message("assistant", ("Hi.",)))
    return [*dialogues, *(Dialogue(f"t{n}", hello, f"file:{n + 14}") for n in range(2))]


def heard(prompt) -> str:
    """What the prompt's only clip is, by its zero crossings."""
    wave = prompt.windows[0]
    sounding = wave[: int(np.flatnonzero(wave)[-1])]
    crossings = np.count_nonzero(np.diff(np.signbit(sounding))) * SAMPLE_RATE / len(sounding) / 2
    return "low" if crossings < 500 else "high"


def listener(model, encoder, prompts, max_new_tokens, batch_size):
    """Answers as somebody who hears well."""
    answers = []
    for prompt in prompts:
        text = encoder.tokenizer.decode(prompt.input_ids)
        again = "Was it low?" in text
        answers.append(
            "Hi" if not prompt.windows else heard(prompt) if not again else "yes" if heard(prompt) == "low" else "no"
        )
    return answers


def deaf(model, encoder, prompts, max_new_tokens, batch_size):
    """Answers from the text alone: the majority's answer."""
    texts = [encoder.tokenizer.decode(prompt.input_ids) for prompt in prompts]
    return ["no" if "Was it low?" in text else "high" if "Pitch?" in text else "Hi" for text in texts]


def test_who_listens_is_right_and_follows_swapped_audio(small_model, dialogues, monkeypatch):
    monkeypatch.setattr(run_module, "answer_prompts", listener)
    result = evaluate_model(*small_model, dialogues, max_new_tokens=2)
    assert (result.turns, result.dialogues, result.turns_swapped) == (1.0, 1.0, 0.0)
    assert (result.wer, result.cer) == (0.0, 0.0)
    assert result.counts == {
        "dialogues": 16, "turns": 23, "swapped": 21, "swapped_same_question": 21, "without_audio": 2, "not_swapped": 0,
    }  # fmt: skip
    assert [record["answer"] for record in result.answers] == [
        record["reference"].lower().strip(".") if record["kind"] != NO_KIND else "Hi" for record in result.answers
    ]


def test_who_guesses_scores_the_majority_with_any_audio(small_model, dialogues, monkeypatch):
    monkeypatch.setattr(run_module, "answer_prompts", deaf)
    result = evaluate_model(*small_model, dialogues, max_new_tokens=2)
    pitch, again, hello = (result.kinds[kind] for kind in ("pitch", "again", NO_KIND))
    assert pitch == {
        "n": 14, "turns": 9 / 14, "swapped": 9 / 14, "majority": 9 / 14, "text_model": 0.0, "heard": 9 / 14,
    }  # fmt: skip
    assert again["n"] == 7
    assert again["turns"] == again["swapped"] == again["majority"]
    assert hello == {"n": 2, "turns": 1.0, "swapped": None, "majority": 1.0, "text_model": None, "heard": None}
    right = 9 + round(7 * again["turns"])
    assert result.turns == result.majority == pytest.approx((right + 2) / 23)
    assert result.turns_swapped == pytest.approx(right / 21)
    assert result.dialogues < result.turns


def test_loss_is_that_of_training_and_gain_that_of_the_swap(small_model, dialogues):
    model, encoder = small_model
    result = evaluate_model(model, encoder, dialogues, max_new_tokens=2)
    executor = Executor(model, max_tokens_per_pack=64, pad_token_id=encoder.pad_token_id)
    rows = [row for dialogue in dialogues for row in encoder.encode_rows(dialogue)]
    assert result.loss == pytest.approx(executor.evaluate(rows), rel=1e-5)
    spoken = executor.evaluate([row for row in rows if row.windows])  # every turn after audio has a partner here
    assert result.loss_unswapped == pytest.approx(spoken, rel=1e-5)
    assert result.listening_gain == pytest.approx(result.loss_swapped - result.loss_unswapped)
    assert abs(result.listening_gain) > 1e-3  # random weights hear, though they understand nothing


def test_model_that_hears_nothing_gains_nothing(small_model, dialogues):
    model, encoder = small_model
    projector = model.model.multi_modal_projector.linear_2
    loud = projector.weight.detach().clone()
    with torch.no_grad():
        projector.weight.zero_()
    # The same number of windows and tokens, or the rows themselves would differ.
    one_length = [c for c in dialogues if c.clips]
    same = [_of_one_length(dialogue) for dialogue in one_length]
    try:
        result = evaluate_model(model, encoder, same, max_new_tokens=4)
    finally:
        with torch.no_grad():
            projector.weight.copy_(loud)
    assert result.listening_gain == pytest.approx(0.0, abs=1e-5)
    assert all(record["answer"] == record["swapped_answer"] for record in result.answers)


def _of_one_length(dialogue: Dialogue) -> Dialogue:
    """The dialogue with only the first 0.2 s of its clip."""
    first, *rest = dialogue.messages
    clip, text = first.content
    cut = Message("user", (AudioClip(clip.path, 0.0, 0.2, clip.transcript), text))
    return Dialogue(dialogue.id, (cut, *rest), dialogue.source)


def test_batches_change_nothing(small_model, dialogues, monkeypatch):
    results = []
    some = dialogues[:10]
    for batch_size, at_once in ((1, 256), (3, 4)):
        monkeypatch.setattr(run_module, "DIALOGUES_AT_ONCE", at_once)
        results.append(evaluate_model(*small_model, some, batch_size=batch_size, max_new_tokens=4))
    one_by_one, other = results
    assert other.answers == one_by_one.answers
    for name in ("loss", "loss_swapped", "loss_unswapped"):
        assert getattr(other, name) == pytest.approx(getattr(one_by_one, name), rel=1e-5)
    assert len({record["answer"] for record in one_by_one.answers}) > 3


def test_prompts_are_what_is_served(small_model, dialogues, monkeypatch):
    model, encoder = small_model
    seen = []
    monkeypatch.setattr(
        run_module, "answer_prompts", lambda m, c, prompts, n, size: seen.extend(prompts) or [""] * len(prompts)
    )
    thought = Message("assistant", ("Low.",), reasoning="It sounds low.")
    with_reasoning = Dialogue("r", (*dialogues[0].messages[:1], thought, *dialogues[1].messages), "file:r")
    evaluate_model(model, encoder, [*dialogues, with_reasoning], swap=False, max_new_tokens=2)
    served = [
        encoder.encode_prompt(dialogue.messages[:index])
        for dialogue in [*dialogues, with_reasoning]
        for index, message in enumerate(dialogue.messages)
        if message.role == "assistant"
    ]
    assert len(seen) == len(served)
    for prompt, expected in zip(seen, served, strict=True):
        np.testing.assert_array_equal(prompt.input_ids, expected.input_ids)
        assert len(prompt.windows) == len(expected.windows)


def test_no_swap_no_swapped_numbers(small_model, dialogues):
    result = evaluate_model(*small_model, dialogues, swap=False, max_new_tokens=2)
    assert {
        getattr(result, name) for name in ("turns_swapped", "loss_swapped", "loss_unswapped", "listening_gain")
    } == {None}
    assert not any("swapped_answer" in record for record in result.answers)


def test_kinds_are_untrained_only_beside_known_trained_ones_and_that_is_said(small_model, dialogues, monkeypatch):
    monkeypatch.setattr(run_module, "answer_prompts", listener)
    monkeypatch.setattr(
        run_module, "text_answers", lambda m, c, turns, *_: [t.reference if t.clips else None for t in turns]
    )
    text = [Dialogue("t", (Message("user", (AudioClip("/no.wav"),)), Message("assistant", ("Hi.",))), "t.jsonl:1")]
    for known, retention in (((), None), (("pitch",), 1.0)):
        result = evaluate_model(*small_model, dialogues, swap=False, trained_kinds=known, text=text)
        table = markdown(result, checkpoint="c", eval_file="e")
        assert result.retention == retention
        assert ("Retention 1.00" in table) == ("never trained)" in table) == bool(known)
        assert ("training data names no `kind`, so the kinds that were never trained on are unknown;" in table) != bool(
            known
        )
        assert "No text shift: no dialogue of the text file can be read in words; the first: t.jsonl:1: a clip" in table
    without_kind = [dialogue for dialogue in dialogues if not dialogue.clips]
    for few, asked in ((without_kind, True), (dialogues, False)):
        assert evaluate_model(*small_model, few, swap=False, text_model=asked).notes == []


def talks(folder, count: int) -> list[Dialogue]:
    """Dialogues of three one-clip turns; each two ask the same, so that one is the other's partner."""
    found = []
    for n in range(count):
        messages = []
        for turn in range(3):
            path = folder / f"{n}-{turn}.wav"
            soundfile.write(path, tone(200 + 50 * n + 10 * turn, 0.05), SAMPLE_RATE)
            messages += [
                Message("user", (AudioClip(str(path)), f"{n // 2}?")),
                Message("assistant", (f"{'abcdef'[n]}{turn}",)),
            ]
        found.append(Dialogue(f"d{n}", tuple(messages), f"file:{n}"))
    return found


def test_each_pass_decodes_each_clip_once(small_model, tmp_path, monkeypatch):
    decoded, load = [], dialogue_audio.load_clip
    monkeypatch.setattr(dialogue_audio, "load_clip", lambda clip, **how: decoded.append(clip.path) or load(clip, **how))
    for at_once in (256, 2):
        monkeypatch.setattr(run_module, "DIALOGUES_AT_ONCE", at_once)
        decoded.clear()
        dialogues = talks(tmp_path, 4)
        result = evaluate_model(*small_model, dialogues, text_model=False, max_new_tokens=1)
        assert result.counts["turns"] == result.counts["swapped"] == 12
        assert result.loss and result.loss_unswapped and result.loss_swapped
        every = sorted(clip.path for dialogue in dialogues for clip in dialogue.clips)
        assert len(decoded) == 3 * 4 + 3 * 4
        assert sorted(decoded[:12]) == sorted(decoded[12:]) == every
        decoded.clear()
        evaluate_model(*small_model, dialogues, swap=False, text_model=False, max_new_tokens=1)
        assert sorted(decoded) == every


def test_model_keeps_its_mode(small_model, dialogues):
    model, encoder = small_model
    model.train()
    try:
        evaluate_model(model, encoder, dialogues[:1], max_new_tokens=1)
        assert model.training
        with pytest.raises(DataError, match="no dialogue can be evaluated"):
            evaluate_model(model, encoder, [], max_new_tokens=1)
        assert model.training
    finally:
        model.eval()


def test_bad_clip_costs_its_dialogue_and_is_named(small_model, dialogues, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    question = Message("user", (AudioClip(str(tmp_path / "silent.wav")), "Pitch?"))
    bad = Dialogue("bad", (question, Message("assistant", ("low",))), "file:99")
    result = evaluate_model(*small_model, [bad, *dialogues], max_new_tokens=1)
    assert [record["id"] for record in result.rejected] == ["bad"]
    assert "file:99" in result.rejected[0]["reason"]
    assert "bad" not in {record["id"] for record in result.answers}
    with pytest.raises(DataError, match=r"no dialogue can be evaluated.*silent"):
        evaluate_model(*small_model, [bad])


@pytest.fixture
def set_context(small_model, monkeypatch):
    """A function that sets the tokens of the small model's context."""
    config = small_model[0].config.get_text_config()
    return lambda tokens: monkeypatch.setattr(config, "max_position_embeddings", tokens)


def test_a_dialogue_longer_than_the_context_is_rejected_by_name_and_the_rest_is_measured(small_model, set_context):
    model, encoder = small_model
    short, long = (
        Dialogue(name, (Message("user", (question,)), Message("assistant", ("Hi.",))), f"file:{name}")
        for name, question in (("short", "Hello"), ("long", "Hello " * 50))
    )
    expected = evaluate_model(model, encoder, [short], text_model=False, max_new_tokens=2)
    length = len(encoder.encode(long).input_ids)
    set_context(length - 1)
    result = evaluate_model(model, encoder, [long, short], text_model=False, max_new_tokens=2)
    reason = f"file:long: the dialogue takes {length} tokens and the model's context has {length - 1}: divide it"
    assert [found["id"] for found in result.rejected] == ["long"] and result.rejected[0]["reason"].startswith(reason)
    assert f"1 dialogues left out, the first: long: {reason}" in markdown(result, checkpoint="run", eval_file="e.jsonl")
    assert (result.answers, result.loss) == (expected.answers, expected.loss)
    with pytest.raises(DataError, match=r"no dialogue can be evaluated.*file:long"):
        evaluate_model(model, encoder, [long], text_model=False)
    set_context(length)
    assert not evaluate_model(model, encoder, [long], text_model=False, max_new_tokens=2).rejected


def test_a_swap_longer_than_the_context_is_left_out(small_model, set_context, tmp_path):
    """Of a long text with a short clip and a short text with a long clip, only the two long ones are too long."""
    model, encoder = small_model
    dialogues = []
    for n, (seconds, text, word) in enumerate(((0.3, "Pitch?" * 8, "low"), (1.1, "Pitch?", "high"))):
        soundfile.write(tmp_path / f"{n}.wav", tone(PITCHES[word], seconds), SAMPLE_RATE)
        asked = Message("user", (AudioClip(str(tmp_path / f"{n}.wav")), text))
        dialogues.append(Dialogue(f"d{n}", (asked, Message("assistant", (word,))), f"file:{n}"))
    both = evaluate_model(model, encoder, dialogues, text_model=False, max_new_tokens=2)
    longest = max(len(encoder.encode(dialogue).input_ids) for dialogue in dialogues)
    set_context(longest)
    result = evaluate_model(model, encoder, dialogues, text_model=False, max_new_tokens=2)
    assert (both.counts["swapped"], result.counts["swapped"], result.rejected) == (2, 1, [])
    assert "swapped_same" not in result.answers[0]
    assert result.answers[1] == both.answers[1] and "swapped_same" in both.answers[1]
    unswapped = evaluate_model(model, encoder, dialogues[1:], text_model=False, max_new_tokens=2).loss
    assert result.loss_unswapped == pytest.approx(unswapped, rel=1e-5)  # over the same turns as the swapped loss


def test_a_transcript_that_fills_the_context_is_not_asked_of_the_text_model(small_model, dialogues, set_context):
    model, encoder = small_model
    short, long = dialogues[0], dialogues[2]
    clip, text = long.messages[0].content
    question = Message("user", (AudioClip(clip.path, transcript="high " * 20), text))
    turns = turns_of([short, Dialogue("long", (question, long.messages[1]), "file:long")])
    everything = text_answers(model, encoder, turns, 2, 8)
    length = len(encoder.encode_prompt(in_words(turns[1].history)).input_ids)
    set_context(length)
    assert text_answers(model, encoder, turns, 2, 8) == [everything[0], None]
    set_context(length + 1)
    assert text_answers(model, encoder, turns, 2, 8)[1] is not None
