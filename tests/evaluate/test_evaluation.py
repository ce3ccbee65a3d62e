import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

from qwhisper.cli import main as cli
from qwhisper.data.dialogue import AudioClip, Dialogue, Message, read_dialogues
from qwhisper.engine.executor import Executor
from qwhisper.errors import DataError
from qwhisper.evaluate import evaluation as run_module
from qwhisper.evaluate.evaluation import NO_KIND, evaluate_model
from qwhisper.evaluate.tables import markdown
from qwhisper.frames import SAMPLE_RATE
from tests.small import tone, write_dialogues

PITCHES = {"low": 200.0, "high": 800.0}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> list[Dialogue]:
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


def listener(model, collator, prompts, max_new_tokens, batch_size):
    """Answers as somebody who hears well."""
    answers = []
    for prompt in prompts:
        text = collator.tokenizer.decode(prompt.input_ids)
        again = "Was it low?" in text
        answers.append(
            "Hi" if not prompt.windows else heard(prompt) if not again else "yes" if heard(prompt) == "low" else "no"
        )
    return answers


def deaf(model, collator, prompts, max_new_tokens, batch_size):
    """Answers from the text alone: the majority's answer."""
    texts = [collator.tokenizer.decode(prompt.input_ids) for prompt in prompts]
    return ["no" if "Was it low?" in text else "high" if "Pitch?" in text else "Hi" for text in texts]


def test_who_listens_is_right_and_follows_swapped_audio(small_model, conversations, monkeypatch):
    monkeypatch.setattr(run_module, "answer_prompts", listener)
    result = evaluate_model(*small_model, conversations)
    assert (result["turns"], result["dialogues"], result["turns_swapped"]) == (1.0, 1.0, 0.0)
    assert (result["wer"], result["cer"]) == (0.0, 0.0)
    assert result["counts"] == {
        "dialogues": 16, "turns": 23, "swapped": 21, "swapped_same_question": 21, "without_audio": 2, "not_swapped": 0,
    }  # fmt: skip
    assert [record["answer"] for record in result["answers"]] == [
        record["reference"].lower().strip(".") if record["kind"] != NO_KIND else "Hi" for record in result["answers"]
    ]


def test_who_guesses_scores_the_majority_with_any_audio(small_model, conversations, monkeypatch):
    monkeypatch.setattr(run_module, "answer_prompts", deaf)
    result = evaluate_model(*small_model, conversations)
    pitch, again, hello = (result["kinds"][kind] for kind in ("pitch", "again", NO_KIND))
    assert pitch == {
        "n": 14, "turns": 9 / 14, "swapped": 9 / 14, "majority": 9 / 14, "text_model": 0.0, "heard": 9 / 14,
    }  # fmt: skip
    assert again["n"] == 7
    assert again["turns"] == again["swapped"] == again["majority"]
    assert hello == {"n": 2, "turns": 1.0, "swapped": None, "majority": 1.0, "text_model": None, "heard": None}
    right = 9 + round(7 * again["turns"])
    assert result["turns"] == result["majority"] == pytest.approx((right + 2) / 23)
    assert result["turns_swapped"] == pytest.approx(right / 21)
    assert result["dialogues"] < result["turns"]


def test_loss_is_that_of_training_and_gain_that_of_the_swap(small_model, conversations):
    model, collator = small_model
    result = evaluate_model(model, collator, conversations, max_new_tokens=2)
    executor = Executor(model, max_tokens_per_pack=64, pad_token_id=collator.pad_token_id)
    rows = [row for conversation in conversations for row in collator.encode_rows(conversation)]
    assert result["loss"] == pytest.approx(executor.evaluate(rows), rel=1e-5)
    spoken = executor.evaluate([row for row in rows if row.windows])  # every turn after audio has a partner here
    assert result["loss_unswapped"] == pytest.approx(spoken, rel=1e-5)
    assert result["listening_gain"] == pytest.approx(result["loss_swapped"] - result["loss_unswapped"])
    assert abs(result["listening_gain"]) > 1e-3  # random weights hear, though they understand nothing


def test_model_that_hears_nothing_gains_nothing(small_model, conversations):
    model, collator = small_model
    projector = model.model.multi_modal_projector.linear_2
    loud = projector.weight.detach().clone()
    with torch.no_grad():
        projector.weight.zero_()
    # The same number of windows and tokens, or the rows themselves would differ.
    one_length = [c for c in conversations if c.clips]
    same = [_of_one_length(conversation) for conversation in one_length]
    try:
        result = evaluate_model(model, collator, same, max_new_tokens=4)
    finally:
        with torch.no_grad():
            projector.weight.copy_(loud)
    assert result["listening_gain"] == pytest.approx(0.0, abs=1e-5)
    assert all(record["answer"] == record["swapped_answer"] for record in result["answers"])


def _of_one_length(conversation: Dialogue) -> Dialogue:
    """The dialogue with only the first 0.2 s of its clip."""
    first, *rest = conversation.messages
    clip, text = first.content
    cut = Message("user", (AudioClip(clip.path, 0.0, 0.2, clip.transcript), text))
    return Dialogue(conversation.id, (cut, *rest), conversation.source)


def test_batches_change_nothing(small_model, conversations, monkeypatch):
    results = []
    for batch_size, at_once in ((1, 256), (5, 256), (3, 7)):
        monkeypatch.setattr(run_module, "DIALOGUES_AT_ONCE", at_once)
        results.append(evaluate_model(*small_model, conversations, batch_size=batch_size, max_new_tokens=4))
    for other in results[1:]:
        assert other["answers"] == results[0]["answers"]
        for name in ("loss", "loss_swapped", "loss_unswapped"):
            assert other[name] == pytest.approx(results[0][name], rel=1e-5)
    assert len({record["answer"] for record in results[0]["answers"]}) > 3


def test_prompts_are_what_is_served(small_model, conversations, monkeypatch):
    model, collator = small_model
    seen = []
    monkeypatch.setattr(
        run_module, "answer_prompts", lambda m, c, prompts, n, size: seen.extend(prompts) or [""] * len(prompts)
    )
    thought = Message("assistant", ("Low.",), reasoning="It sounds low.")
    with_reasoning = Dialogue("r", (*conversations[0].messages[:1], thought, *conversations[1].messages), "file:r")
    evaluate_model(model, collator, [*conversations, with_reasoning], swap=False)
    served = [
        collator.encode_prompt(conversation.messages[:index])
        for conversation in [*conversations, with_reasoning]
        for index, message in enumerate(conversation.messages)
        if message.role == "assistant"
    ]
    assert len(seen) == len(served)
    for prompt, expected in zip(seen, served, strict=True):
        np.testing.assert_array_equal(prompt.input_ids, expected.input_ids)
        assert len(prompt.windows) == len(expected.windows)


def test_no_swap_no_swapped_numbers(small_model, conversations):
    result = evaluate_model(*small_model, conversations, swap=False, max_new_tokens=2)
    assert {result[name] for name in ("turns_swapped", "loss_swapped", "loss_unswapped", "listening_gain")} == {None}
    assert not any("swapped_answer" in record for record in result["answers"])


def test_kinds_are_untrained_only_beside_known_trained_ones_and_that_is_said(small_model, conversations, monkeypatch):
    monkeypatch.setattr(run_module, "answer_prompts", listener)
    monkeypatch.setattr(
        run_module, "text_answers", lambda m, c, turns, *_: [t.reference if t.clips else None for t in turns]
    )
    text = [Dialogue("t", (Message("user", (AudioClip("/no.wav"),)), Message("assistant", ("Hi.",))), "t.jsonl:1")]
    for known, retention in (((), None), (("pitch",), 1.0)):
        result = evaluate_model(*small_model, conversations, swap=False, trained_kinds=known, text=text)
        table = markdown({"checkpoint": "c", "eval_file": "e", **result})
        assert result["retention"] == retention
        assert ("Retention 1.00" in table) == ("never trained)" in table) == bool(known)
        assert ("training data names no `kind`, so what was never trained on is unknown; give" in table) != bool(known)
        assert "No text shift: no dialogue of the text file can be read in words; the first: t.jsonl:1: a clip" in table
    without_kind = [conversation for conversation in conversations if not conversation.clips]
    for few, asked in ((without_kind, True), (conversations, False)):
        assert evaluate_model(*small_model, few, swap=False, text_model=asked)["notes"] == []


def test_model_keeps_its_mode(small_model, conversations):
    model, collator = small_model
    model.train()
    try:
        evaluate_model(model, collator, conversations[:1], max_new_tokens=1)
        assert model.training
    finally:
        model.eval()


def test_bad_clip_costs_its_dialogue_and_is_named(small_model, conversations, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    question = Message("user", (AudioClip(str(tmp_path / "silent.wav")), "Pitch?"))
    bad = Dialogue("bad", (question, Message("assistant", ("low",))), "file:99")
    result = evaluate_model(*small_model, [bad, *conversations], max_new_tokens=1)
    assert [record["id"] for record in result["rejected"]] == ["bad"]
    assert "file:99" in result["rejected"][0]["reason"]
    assert "bad" not in {record["id"] for record in result["answers"]}
    with pytest.raises(DataError, match=r"no dialogue can be evaluated.*silent"):
        evaluate_model(*small_model, [bad])


def test_command_writes_json_and_markdown(finished_run, tmp_path, capsys):
    eval_file = write_dialogues(tmp_path / "data", 5, name="eval.jsonl")
    outputs = ["--output_json", str(tmp_path / "out/eval.json"), "--output_md", str(tmp_path / "out/eval.md")]
    arguments = ["--eval_file", str(eval_file), "--max_new_tokens", "3", *outputs]
    assert cli(["eval", str(finished_run), *arguments]) == 0
    result = json.loads((tmp_path / "out/eval.json").read_text(encoding="utf-8"))
    shares = {"turns", "dialogues", "turns_swapped", "majority", "wer", "cer", "kinds"}
    needed = {*shares, "loss", "loss_swapped", "listening_gain", "answers", "checkpoint", "seconds"}
    assert needed <= result.keys()
    assert result["checkpoint"] == str(finished_run)
    conversations = read_dialogues(eval_file)
    turns = [(c.id, m.text) for c in conversations for m in c.messages if m.role == "assistant"]
    assert [(record["id"], record["reference"]) for record in result["answers"]] == turns
    assert {"id", "turn", "kind", "reference", "answer", "right"} <= result["answers"][0].keys()
    table = (tmp_path / "out/eval.md").read_text(encoding="utf-8")
    assert "| all answers |" in table
    assert table.strip() in capsys.readouterr().out
    leaked = "5 of 5 held-out dialogues are in the training data as they are, the first: "  # the same tones and words
    assert any(note.startswith(leaked) for note in result["notes"]) and leaked in table


def test_evaluation_data_that_was_trained_on_is_noted(finished_run, tmp_path):
    folder, train_file = finished_run / "checkpoint-2", finished_run.parent / "data/train.jsonl"
    copy = shutil.copy(train_file, tmp_path / "copy.jsonl")
    (note,) = run_module._leakage(folder, copy, read_dialogues(train_file))
    assert note == f"{copy} is what checkpoint-2 was trained on: its scores say what was learned by heart."
    other = tmp_path / "other.jsonl"
    other.write_text('{"messages": [{"role": "user", "content": "Ho"}, {"role": "assistant", "content": "Hey"}]}\n')
    assert run_module._leakage(folder, other, read_dialogues(other)) == []


def test_training_data_that_moved_with_its_run_is_compared(finished_run, tmp_path):
    run = tmp_path / finished_run.name
    shutil.copytree(finished_run / "checkpoint-2", run / "checkpoint-2")
    shutil.copytree(finished_run.parent / "data", tmp_path / "data")
    told = json.loads((finished_run / "checkpoint-2/arguments.json").read_text())
    was = {"output_dir": "/nowhere/run", "train_file": "/nowhere/data/train.jsonl"}
    assert told["train_file"].endswith("data/train.jsonl")
    (run / "checkpoint-2/arguments.json").write_text(json.dumps(told | was))
    other = tmp_path / "other.jsonl"
    first, *_ = (tmp_path / "data/train.jsonl").read_text().splitlines(keepends=True)
    other.write_text(first.replace('"clip', '"data/clip'))
    (note,) = run_module._leakage(run / "checkpoint-2", other, read_dialogues(other))
    assert note.startswith("1 of 1 held-out dialogues are in the training data as they are")


def test_training_data_that_is_gone_is_said_not_to_be_compared(finished_run, tmp_path):
    folder = shutil.copytree(finished_run / "checkpoint-2", tmp_path / "checkpoint-2")
    told = json.loads((folder / "arguments.json").read_text()) | {"train_file": str(tmp_path / "gone.jsonl")}
    (folder / "arguments.json").write_text(json.dumps(told))
    eval_file = write_dialogues(tmp_path / "data", 1)
    (note,) = run_module._leakage(folder, eval_file, read_dialogues(eval_file))
    assert note.startswith(f"Whether {eval_file} shares dialogues with the training data was not checked: ")
    assert "gone.jsonl does not exist" in note


def test_command_says_what_it_does_not_use_and_does_not_ask_for(finished_run, tmp_path, capsys):
    eval_file = write_dialogues(tmp_path / "data", 3, name="eval.jsonl")
    lines = [json.loads(line) for line in eval_file.read_text().splitlines()]
    lines[0]["speaker"] = "a"
    lines[0]["messages"] += lines[0]["messages"]
    lines[0]["messages"][1] = {**lines[0]["messages"][1], "loss": False}
    eval_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "eval.json"
    flags = ["--no_swap_audio", "--no_ask_text_model", "--max_new_tokens", "1", "--output_json", str(output)]
    assert cli(["eval", str(finished_run), "--eval_file", str(eval_file), *flags]) == 0
    said = capsys.readouterr().out
    assert f"note: dialogues with the key `speaker`, which is not used: 1; first at {eval_file}:1\n" in said
    result = json.loads(output.read_text())
    answers = sum(message["role"] == "assistant" for line in lines for message in line["messages"])
    assert len(result["answers"]) == answers - 1
    assert "Masked answers (`loss` false), which are history alone: 1." in result["notes"]
    first = next(message for message in lines[0]["messages"] if message["role"] == "user")
    assert first == lines[0]["messages"][0] and result["answers"][0]["turn"] == 2


@pytest.mark.parametrize("flags", [["--eval_file", "nowhere.jsonl"], ["--text_file", "nowhere.jsonl"]])
def test_command_names_a_missing_file_before_it_loads(finished_run, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr(run_module, "load_chosen", lambda *_, **__: pytest.fail("a model was loaded"))
    eval_file = write_dialogues(tmp_path / "data", 1, name="eval.jsonl")
    assert cli(["eval", str(finished_run), "--eval_file", str(eval_file), *flags]) == 3
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err


def test_clips_of_the_text_file_may_lie_in_the_data_root_as_well(finished_run, tmp_path, monkeypatch):
    given = {}

    def evaluate(*_, **values):
        given.update(values)
        raise DataError("that is all")

    monkeypatch.setattr(run_module, "load_chosen", lambda *_, **__: (None, None, None))
    monkeypatch.setattr(run_module, "evaluate_model", evaluate)
    eval_file = write_dialogues(tmp_path / "data", 1, name="eval.jsonl")
    text_file = tmp_path / "other" / "text.jsonl"
    text_file.parent.mkdir()
    text_file.write_text(eval_file.read_text().replace('"clip0.wav"', json.dumps(str(tmp_path / "data/clip0.wav"))))
    flags = ["--eval_file", str(eval_file), "--text_file", str(text_file), "--data_root", str(tmp_path)]
    assert cli(["eval", str(finished_run), *flags]) == 3
    assert [clip.transcript for clip in given["text"][0].clips] == ["low"]
