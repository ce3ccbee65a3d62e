from qwhisper.data.check import check_dataset, report_lines
from qwhisper.data.faults import grouped
from qwhisper.frames import FrameArithmetic
from tests.data.conftest import CHATML, byte_tokenizer
from tests.dialogue_files import record


def typed(reply):
    return {"messages": [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": reply}]}


def test_sound_file_is_counted_and_passes(write):
    report = check_dataset(write(record("a.wav"), record("a.wav")))
    assert report["ok"]
    counts = {key: report[key] for key in ("dialogues", "answers", "clips", "audio_seconds")}
    assert counts == {"dialogues": 2, "answers": 2, "clips": 2, "audio_seconds": 0.4}  # one clip, used twice
    assert report_lines(report)[-1] == "ready to train on"


def test_bad_clip_that_a_dialogue_uses_eight_times_is_listed_once(write):
    dialogue = record("silent.wav")
    dialogue["messages"][0]["content"] *= 8
    report = check_dataset(write(dialogue))
    assert len(report["bad_clips"]) == 1


def test_keys_that_are_not_used_masked_answers_and_typed_tokens_are_said(write):
    odd = {**typed(reply="<|im_end|> ends it, says <bos>."), "speaker": "a"}
    odd["messages"][1]["loss"] = False
    odd["messages"] += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "<|im_end|> does."}]
    path = write(typed(reply="One."), odd, odd)
    report = check_dataset(path, tokenizer=byte_tokenizer(CHATML))
    assert report["ok"] and (report["answers"], report["masked"]) == (5, 2)
    typed_token = "message 4: <|im_end|> in an answer is learned as text, not as the token"
    assert report["notes"] == [
        f"dialogues with the key `speaker`, which is not used: 2; first at {path}:2",
        f"{path}:2: {typed_token}",
        f"{path}:3: {typed_token}",
    ]
    printed = report_lines(report)
    assert "5 answers (2 of them masked)" in printed[0]
    assert printed[printed.index("3 notes:") + 1 :][:3] == [f"  {note}" for note in grouped(report["notes"])]


def test_one_bad_clip_in_a_hundred_is_what_training_puts_up_with(write):
    assert check_dataset(write(record("silent.wav"), *[record("a.wav")] * 99))["ok"]
    assert not check_dataset(write(record("silent.wav"), *[record("a.wav")] * 98))["ok"]


def test_tokenizer_adds_lengths_labels_and_cuts(write):
    frames = FrameArithmetic()
    path = write(record("a.wav"), typed(reply="x" * 200), record("a.wav", text="y" * 200))
    report = check_dataset(path, tokenizer=byte_tokenizer(CHATML), frames=frames, max_length=100)
    assert report["answer_tokens"] == (
        5,
        5,
        81,
    )  # "One." and the end of the turn; beside 19 tokens of scaffold 81 of 200 fit
    assert report["tokens"][2] == 100
    assert len(report["cuts"]) == 3
    assert report["cuts"][-1].startswith(f"{path}:3: kept the last exchange alone, without the first")
    assert report["ok"]


def test_dialogue_that_leaves_nothing_to_learn_is_listed(write):
    path = write(typed(reply="One."), record("a.wav"))
    report = check_dataset(path, tokenizer=byte_tokenizer(CHATML), max_length=10)
    assert f"{path}:1: no supervised token is left" in report["without_labels"][0]
    assert "5 tokens of audio and the reply do not fit into max_length" in report["without_labels"][1]
    assert not report["ok"]
