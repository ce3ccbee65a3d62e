"""`qwhisper eval`: what it reads, prints and writes."""

import json
from collections import Counter
from pathlib import Path

import pytest
import soundfile

from qwhisper.cli import main as cli
from qwhisper.data import clips
from qwhisper.data.dialogue import read_dialogues
from qwhisper.errors import DataError
from qwhisper.frames import SAMPLE_RATE
from tests.small import tone, write_dialogues


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
    dialogues = read_dialogues(eval_file)
    turns = [(c.id, m.text) for c in dialogues for m in c.messages if m.role == "assistant"]
    assert [(record["id"], record["reference"]) for record in result["answers"]] == turns
    assert {"id", "turn", "kind", "reference", "answer", "right"} <= result["answers"][0].keys()
    table = (tmp_path / "out/eval.md").read_text(encoding="utf-8")
    assert "| all answers |" in table
    assert table.strip() in capsys.readouterr().out
    leaked = "5 of 5 held-out dialogues are in the training data as they are, the first: "  # the same tones and words
    assert any(note.startswith(leaked) for note in result["notes"]) and leaked in table


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
    assert "Masked answers (`loss` false), used only as history: 1." in result["notes"]
    first = next(message for message in lines[0]["messages"] if message["role"] == "user")
    assert first == lines[0]["messages"][0] and result["answers"][0]["turn"] == 2


@pytest.mark.parametrize("flags", [["--eval_file", "nowhere.jsonl"], ["--text_file", "nowhere.jsonl"]])
def test_command_names_a_missing_file_before_it_loads(finished_run, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr("qwhisper.infer.assistant.load_chosen", lambda *_, **__: pytest.fail("a model was loaded"))
    eval_file = write_dialogues(tmp_path / "data", 1, name="eval.jsonl")
    assert cli(["eval", str(finished_run), "--eval_file", str(eval_file), *flags]) == 3
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err


def test_clips_of_the_text_file_may_lie_in_the_data_root_as_well(finished_run, tmp_path, monkeypatch):
    given = {}

    def evaluate(*_, **values):
        given.update(values)
        raise DataError("that is all")

    monkeypatch.setattr("qwhisper.infer.assistant.load_chosen", lambda *_, **__: (None, None))
    monkeypatch.setattr("qwhisper.model.processor.encoder_of", lambda _: None)
    monkeypatch.setattr("qwhisper.evaluate.evaluation.evaluate_model", evaluate)
    eval_file = write_dialogues(tmp_path / "data", 1, name="eval.jsonl")
    text_file = tmp_path / "other" / "text.jsonl"
    text_file.parent.mkdir()
    text_file.write_text(eval_file.read_text().replace('"clip0.wav"', json.dumps(str(tmp_path / "data/clip0.wav"))))
    flags = ["--eval_file", str(eval_file), "--text_file", str(text_file), "--data_root", str(tmp_path)]
    assert cli(["eval", str(finished_run), *flags]) == 3
    assert [clip.transcript for clip in given["text"][0].clips] == ["low"]


@pytest.mark.slow
def test_each_pass_over_200_dialogues_decodes_each_of_1000_clips_once(finished_run, tmp_path, monkeypatch):
    decoded = Counter()

    def count(source, *args, **how):
        decoded[source] += 1
        return load_audio(source, *args, **how)

    load_audio = clips.load_audio
    monkeypatch.setattr(clips, "load_audio", count)
    eval_file = write_five_turns(tmp_path, 200)
    flags = ["--eval_file", str(eval_file), "--max_new_tokens", "1", "--output_json", str(tmp_path / "eval.json")]
    for swap, times in (("--no_swap_audio", 1), ("--swap_audio", 2)):
        decoded.clear()
        assert cli(["eval", str(finished_run), *flags, swap]) == 0
        assert len(decoded) == 1000 and set(decoded.values()) == {times}
    counts = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["counts"]
    assert (counts["dialogues"], counts["turns"], counts["swapped"], counts["not_swapped"]) == (200, 1000, 1000, 0)


def write_five_turns(folder: Path, count: int) -> Path:
    """Dialogues of five questions, each with a clip; every two ask the same, so that they are each other's partners."""
    lines = []
    for n in range(count):
        messages = []
        for turn in range(5):
            clip = folder / f"{n}-{turn}.wav"
            soundfile.write(clip, tone(200 + 5 * n + turn, 0.02), SAMPLE_RATE)
            question = [{"type": "audio", "audio": clip.name}, {"type": "text", "text": f"{n // 2}?"}]
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": f"{n % 2}{turn}"}]
        lines.append(json.dumps({"id": f"d{n}", "messages": messages}) + "\n")
    path = folder / "eval.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path
