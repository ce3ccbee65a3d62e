import json
import shutil

import numpy as np
import pytest
import soundfile

from qwhisper.arguments import DataCheckArguments
from qwhisper.data.check import check_dataset, main, report_lines
from qwhisper.data.faults import grouped
from qwhisper.errors import DataError, UsageError
from qwhisper.frames import FrameArithmetic
from tests.data.conftest import CHATML, byte_tokenizer


def record(clip, reply="One.", text="Which digit?"):
    content = [{"type": "audio", "audio": clip}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]}


def typed(reply):
    return {"messages": [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": reply}]}


@pytest.fixture
def write(tmp_path, recordings):
    shutil.copy(recordings[1], tmp_path / "a.wav")
    soundfile.write(tmp_path / "silent.wav", np.zeros(8_000), 16_000)

    def write_records(*records):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        return path

    return write_records


def test_sound_file_is_counted_and_passes(write):
    report = check_dataset(write(record("a.wav"), record("a.wav")))
    assert report["ok"]
    counts = {key: report[key] for key in ("dialogues", "answers", "clips", "audio_seconds")}
    assert counts == {"dialogues": 2, "answers": 2, "clips": 2, "audio_seconds": 0.4}  # one clip, used twice
    assert report_lines(report)[-1] == "ready to train on"


def test_every_fault_and_bad_clip_is_listed(write, capsys):
    path = write(record("a.wav"), record("none.wav"), record("silent.wav"), record("a.wav", reply=""))
    assert main(DataCheckArguments(file=str(path))) == 3
    printed = capsys.readouterr().out
    for line, fault in ((2, "does not exist"), (3, "silent"), (4, "reply is empty")):
        assert any(f"{path}:{line}: " in text and fault in text for text in printed.splitlines())
    assert "not ready to train on" in printed


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


def test_command_reads_the_real_tokenizer_and_encoder(write, shared, capsys):
    arguments = DataCheckArguments(
        file=str(write(record("a.wav"))),
        text_model=str(shared / "models" / "qwen3-tokenizer"),
        audio_model=str(shared / "models" / "whisper-tiny.en"),
    )
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "with its think block in every assistant turn" in printed
    assert "supervised tokens an answer: 3 to 3, median 3" in printed


def test_what_is_not_there_is_named(write, tmp_path):
    path = str(write(record("a.wav")))
    with pytest.raises(DataError, match="does not exist"):
        main(DataCheckArguments(file=str(tmp_path / "none.jsonl")))
    with pytest.raises(UsageError, match="no tokenizer can be read there"):
        main(DataCheckArguments(file=path, text_model=str(tmp_path)))
    with pytest.raises(UsageError, match="--max_length counts tokens"):
        main(DataCheckArguments(file=path, max_length=10))
    with pytest.raises(UsageError, match="--audio_model decides how many tokens"):
        main(DataCheckArguments(file=path, audio_model="openai/whisper-tiny"))
