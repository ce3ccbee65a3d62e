"""`data answer`: what the text model writes where it reads the words, and what a kill costs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from qwhisper.cli import main as cli
from qwhisper.commands.data import DataAnswerArguments
from qwhisper.commands.data import answer as main
from qwhisper.data.audio import load_audio
from qwhisper.data.check import check_dataset
from qwhisper.data.clips import load_clip
from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.instructions import instruction_pool
from qwhisper.errors import DataError, MemoryLimitError, QwhisperError, UsageError
from qwhisper.infer import answer as module
from qwhisper.infer.decoding import Answer
from tests.audio_parts import parts_of, write_chirp
from tests.small import tone, write_small_bases

NEW_TOKENS = 6
WORDS = ("low", "high", "a rather long sentence about nothing", "hm", "两个字", "yes", "no")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> str:
    """Folder of a small Qwen3, with weights so loud that different prompts have different answers."""
    _, folder = write_small_bases(tmp_path_factory.mktemp("bases"))
    model = Qwen3ForCausalLM.from_pretrained(folder)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    soundfile.write(tmp_path / "a.wav", tone(300, 0.3), 16_000)
    return tmp_path


@pytest.fixture(autouse=True)
def whole_answers(request, monkeypatch):
    """The small model never ends its turn: what it says in NEW_TOKENS is taken for whole, but in tests of cut ones.

    Its weights are random, so it also writes marks of reasoning and calls, with which no answer is taken.
    """
    iterate = module.answer_batches

    def all_whole(*arguments):
        for batch in iterate(*arguments):
            texts = {index: re.sub("</?(think|tool_call)>", "+", answer.text) for index, answer in batch.items()}
            yield {index: replace(answer, finish_reason="stop", text=texts[index]) for index, answer in batch.items()}

    if "cut" not in request.node.name:
        monkeypatch.setattr(module, "answer_batches", all_whole)


def audio(words: str | None) -> dict:
    return {"type": "audio", "audio": "a.wav", "transcript": words}


def question(words: str | None, **more) -> dict:
    return {"messages": [{"role": "user", "content": [audio(words), {"type": "text", "text": "Pitch?"}]}], **more}


def write(path: Path, lines: list) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def told(folder: Path, text_model: str, **values) -> DataAnswerArguments:
    base = {"in_file": str(folder / "in.jsonl"), "out_file": str(folder / "out.jsonl"), "text_model": text_model}
    return DataAnswerArguments(**base | {"max_new_tokens": NEW_TOKENS, "dtype": "fp32", "device": "cpu"} | values)


def answers_in(path: Path) -> list[str]:
    return [dialogue.messages[-1].text for dialogue in read_dialogues(path)]


@torch.no_grad()
def alone(text_model: str, messages: list[dict]) -> str:
    """The plain model on the tokenizer's own chat template, token by token, without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    model = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False, tokenize=False)
    prompt = ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    while ids.shape[1] < prompt.shape[1] + NEW_TOKENS:
        token = model(input_ids=ids).logits[:, -1].argmax(dim=-1, keepdim=True)
        if token.item() == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token], dim=1)
    return tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip()


def answer(text: str, finish_reason: str = "stop") -> Answer:
    return Answer(text, finish_reason, prompt_tokens=9, audio_tokens=0, completion_tokens=3)


class Asked:
    """Counts the prompts that the text model is asked, and kills the run after some batches."""

    def __init__(self, monkeypatch, dies_after: int | None = None):
        self.batches: list[list[int]] = []
        iterate = module.answer_batches

        def counted(model, encoder, prompts, *rest):
            for batch in iterate(model, encoder, prompts, *rest):
                if len(self.batches) == dies_after:
                    raise KeyboardInterrupt
                self.batches.append([len(prompts[index].input_ids) for index in batch])
                yield batch

        monkeypatch.setattr(module, "answer_batches", counted)


def test_answers_are_those_of_the_text_model_reading_the_words(folder, text_model):
    system = {"role": "system", "content": "Be brief."}
    history = [*question("low")["messages"], {"role": "assistant", "content": "low"}]
    several = {"role": "user", "content": [audio("one"), audio("two"), {"type": "text", "text": "Which?"}]}
    lines = [*(question(words) for words in WORDS), {"messages": [system, several]}, {"messages": [*history, several]}]
    write(folder / "in.jsonl", lines)
    assert main(told(folder, text_model)) == 0
    typed = [[{"role": "user", "content": f"{words} Pitch?"}] for words in WORDS]
    typed.append([system, {"role": "user", "content": "one two Which?"}])
    wanted = [alone(text_model, messages) for messages in typed]
    given = answers_in(folder / "out.jsonl")
    assert given[:-1] == wanted and len(set(given)) > len(WORDS)
    read = read_dialogues(folder / "out.jsonl")
    assert [clip.transcript for clip in read[0].clips] == ["low"]
    assert [message.text for message in read[-1].messages[:2]] == ["Pitch?", "low"]  # an earlier answer is kept


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_size_of_the_batch_changes_no_answer(folder, text_model, batch_size):
    write(folder / "in.jsonl", [question(words) for words in WORDS])
    main(told(folder, text_model))
    main(told(folder, text_model, batch_size=batch_size, out_file=str(folder / "other.jsonl")))
    assert (folder / "other.jsonl").read_bytes() == (folder / "out.jsonl").read_bytes()


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_command_goes_on_where_it_stopped(folder, text_model, monkeypatch, torn):
    monkeypatch.setattr(module, "WINDOW", 5)
    write(folder / "in.jsonl", [question(words) for words in WORDS])
    whole = told(folder, text_model, batch_size=2, out_file=str(folder / "whole.jsonl"))
    with monkeypatch.context() as patch:
        uninterrupted = Asked(patch)
        main(whole)
    arguments = told(folder, text_model, batch_size=2)
    with monkeypatch.context() as patch:
        first = Asked(patch, dies_after=2)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    assert not (folder / "out.jsonl").exists()
    if torn:
        with (folder / "out.jsonl.cache.jsonl").open("a") as file:
            file.write('{"foo": 1}\n[1]\n{"key": [1], "text": "", "ended": true}\n{"key": "0123')
    with monkeypatch.context() as patch:
        second = Asked(patch)
        main(arguments)
    # The same batches, so that the answers are the same in bf16 as well, whose rounding depends on them.
    assert first.batches + second.batches == uninterrupted.batches
    assert (folder / "out.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_language_model", lambda *_: pytest.fail("a model was loaded for nothing"))
        main(arguments)
    assert (folder / "out.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


def test_a_longer_input_asks_only_for_what_is_new_and_another_setting_for_all(folder, text_model, monkeypatch):
    write(folder / "in.jsonl", [question(words) for words in WORDS[:3]])
    main(told(folder, text_model))
    write(folder / "in.jsonl", [question(words) for words in (*WORDS, WORDS[-1])])
    asked = Asked(monkeypatch)
    main(told(folder, text_model))
    assert sum(map(len, asked.batches)) == len(WORDS) - 3  # the same question twice is asked once
    assert len(answers_in(folder / "out.jsonl")) == len(WORDS) + 1
    asked.batches.clear()
    main(told(folder, text_model, max_new_tokens=NEW_TOKENS - 1))
    assert sum(map(len, asked.batches)) == len(WORDS)


def test_bare_lines_get_an_instruction_each_that_stays_theirs(folder, text_model, capsys):
    lines = [{"audio": "a.wav", "transcript": words, "id": f"b{n}", "kind": "open"} for n, words in enumerate(WORDS)]
    write(folder / "in.jsonl", lines)
    main(told(folder, text_model, language="en"))
    given = {c.id: c.messages for c in read_dialogues(folder / "out.jsonl")}
    assert list(given) == [f"b{n}" for n in range(len(WORDS))]
    assert {question.text for question, _ in given.values()} <= set(instruction_pool("en"))
    assert all(answer.kind == "open" for _, answer in given.values())
    write(folder / "in.jsonl", lines[::-1])
    main(told(folder, text_model, language="en"))
    assert {c.id: c.messages for c in read_dialogues(folder / "out.jsonl")} == given
    mine = write(folder / "mine.txt", ["Louder?\n"])
    main(told(folder, text_model, instructions=str(mine)))
    assert {c.messages[0].text for c in read_dialogues(folder / "out.jsonl")} == {"Louder?"}


def test_what_cannot_be_answered_is_named_and_the_rest_is_written(folder, text_model, capsys):
    answered = {"id": "done", "messages": [*question(None)["messages"], {"role": "assistant", "content": "low"}]}
    twice = [*question("low")["messages"], *question("high")["messages"]]
    lines = [question("low"), question(None), "{no json\n", {"audio": "a.wav"}, {"audio": "no.wav", "transcript": "x"}]
    path = write(folder / "in.jsonl", [*lines, answered, {"messages": twice}, {"text": "x"}])
    assert main(told(folder, text_model)) == 0
    said = capsys.readouterr().out
    for line, reason in ((2, "transcript"), (3, "JSON"), (4, "transcript"), (5, "does not exist"), (8, "`messages`")):
        assert any(reason in text for text in said.splitlines() if text.startswith(f"{path}:{line}: ")), said
    assert not any(f"{path}:{line}:" in said for line in (1, 6))
    found = read_dialogues(folder / "out.jsonl")
    assert [c.id for c in found][1] == "done" and found[1].messages[1].text == "low"
    assert f"{len(found)} dialogues" in said


def test_a_cut_answer_is_left_out_and_counted(folder, text_model, monkeypatch, capsys):
    write(folder / "in.jsonl", [question("low"), question("high"), question("hm")])
    given = {0: answer("one"), 1: answer("this would teach to stop in the", "length"), 2: answer("two")}
    with monkeypatch.context() as patch:
        patch.setattr(module, "answer_batches", lambda *_: iter([given]))
        assert main(told(folder, text_model)) == 0
    assert answers_in(folder / "out.jsonl") == ["one", "two"]
    assert "2 of them answered" in (said := capsys.readouterr().out) and "left out, cut at 6 tokens: 1;" in said
    assert main(told(folder, text_model, out_file=str(folder / "none.jsonl"))) == 3  # the small model never ends
    assert not (folder / "none.jsonl").exists() and "left out, cut at 6 tokens: 3;" in capsys.readouterr().out


def test_nothing_answered_is_exit_code_3(folder, text_model, monkeypatch, capsys):
    path = write(folder / "in.jsonl", [question(None)])
    assert main(told(folder, text_model)) == 3
    assert not (folder / "out.jsonl").exists()
    write(path, [question("low"), question("high")])
    monkeypatch.setattr(module, "answer_batches", lambda *_: iter([{0: answer(""), 1: answer("Well</think>low")}]))
    assert main(told(folder, text_model)) == 3
    said = capsys.readouterr().out
    assert f"{path}:1: the text model answered nothing" in said and f"{path}:2: the text model answered reas" in said


def test_a_file_that_it_has_not_written_is_not_overwritten(folder, text_model):
    path = write(folder / "in.jsonl", [question("low")])
    before = path.read_bytes()
    other = write(folder / "out.jsonl", ["mine\n"])
    for cache in ((), ("out.jsonl.cache.jsonl",)):
        for name in cache:
            (folder / name).touch()
        with pytest.raises(UsageError, match=r"out\.jsonl exists"):
            main(told(folder, text_model))
    main(told(folder, text_model, out_file=str(folder / "out.json")))  # another file with a cache of its own
    with pytest.raises(UsageError, match=r"out\.jsonl exists"):
        main(told(folder, text_model))
    with pytest.raises(UsageError, match="the input as well"):
        main(told(folder, text_model, out_file=str(path)))
    assert other.read_text() == "mine\n" and path.read_bytes() == before


@pytest.mark.parametrize(
    "values", [{"text_model": "no/such/folder"}, {"instructions": "nowhere"}, {"device": "foo"}, {}]
)
def test_a_call_that_fails_before_its_first_answer_leaves_nothing_behind(folder, text_model, monkeypatch, values):
    write(folder / "in.jsonl", [question("low")])
    before = sorted(folder.rglob("*"))

    def out_of_memory(*_):
        raise MemoryLimitError("the model does not fit")

    monkeypatch.setattr(module, "load_language_model", out_of_memory)
    with pytest.raises(QwhisperError):
        main(told(folder, **{"text_model": text_model, "out_file": str(folder / "new/deep/out.jsonl")} | values))
    assert sorted(folder.rglob("*")) == before


def test_a_bad_line_beside_dialogues_that_had_their_answers_is_left_out(folder, text_model, capsys):
    answered = {"messages": [*question(None)["messages"], {"role": "assistant", "content": "low"}]}
    path = write(folder / "in.jsonl", [answered, "{no json\n"])
    assert main(told(folder, text_model)) == 0
    assert answers_in(folder / "out.jsonl") == ["low"] and f"{path}:2: not valid JSON" in capsys.readouterr().out


def test_an_output_that_cannot_be_is_refused_before_a_model_is_loaded(folder, text_model, monkeypatch):
    monkeypatch.setattr(module, "load_language_model", lambda *_: pytest.fail("a model was loaded for nothing"))
    path = write(folder / "in.jsonl.cache.jsonl", [question("low")])
    before = path.read_bytes()
    for out, reason in (
        ("in.jsonl", r"in\.jsonl\.cache\.jsonl is the input as well"),
        (".", "is a folder"),
        ("a.wav/out.jsonl", r"out\.jsonl\.cache\.jsonl can't be written"),
    ):
        with pytest.raises(UsageError, match=reason):
            main(told(folder, text_model, in_file=str(path), out_file=str(folder / out)))
    assert path.read_bytes() == before


def test_a_second_command_on_the_same_output_is_refused_also_after_a_batch(folder, text_model, monkeypatch):
    write(folder / "in.jsonl", [question(words) for words in WORDS])
    arguments, refused = told(folder, text_model, batch_size=2), []
    keep = module.keep_answers

    def keep_and_start_another(*given):
        keep(*given)
        with pytest.raises(UsageError, match="another `data answer` writes into it"):
            main(arguments)
        refused.append(True)

    monkeypatch.setattr(module, "keep_answers", keep_and_start_another)
    assert main(arguments) == 0 and len(refused) == 4
    assert main(arguments) == 0  # it is free again


def test_output_in_another_folder_still_finds_its_audio(folder, text_model, capsys):
    write(folder / "in.jsonl", [question("low")])
    main(told(folder, text_model))
    assert "--data_root" not in capsys.readouterr().out
    main(told(folder, text_model, out_file=str(folder / "new" / "out.jsonl")))
    assert capsys.readouterr().out.endswith(f"`train` and `data check` need --data_root {folder}\n")
    assert read_dialogues(folder / "new" / "out.jsonl", data_root=folder)[0].clips[0].path == str(folder / "a.wav")


def test_command_line_answers_and_the_file_passes_the_check_and_teaches(folder, text_model, capsys):
    lines = [question(words) for words in WORDS[:2]] + [{"audio": "a.wav", "transcript": words} for words in WORDS[2:]]
    path, out = write(folder / "in.jsonl", lines), folder / "train.jsonl"
    flags = ["--text_model", text_model, "--max_new_tokens", "6", "--batch_size", "4", "--device", "cpu"]
    assert cli(["data", "answer", str(path), str(out), *flags]) == 0
    said = capsys.readouterr().out
    assert f"{len(WORDS)} of them answered" in said and "cut" not in said
    report = check_dataset(out, tokenizer=AutoTokenizer.from_pretrained(text_model))
    assert report["ok"] and report["answers"] == len(WORDS)
    audio_model = str(Path(text_model).parent / "whisper")
    run = ["--output_dir", str(folder / "run"), "--audio_model", audio_model, "--text_model", text_model]
    short = ["--max_steps", "2", "--distill_weight", "0.5", "--audio_tail_silence", "0.1", "--device_map", "cpu"]
    assert cli(["train", "--train_file", str(out), *run, *short]) == 0
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["divergence"] > 0 for line in metrics] == [True, True]


def test_every_form_of_audio_is_answered_and_written_so_that_it_is_read_again(folder, text_model):
    write_chirp(folder / "a.wav")
    forms = parts_of(folder / "a.wav")
    stretch = {"offset": 0.25, "duration": 0.25, "channel": 0, "transcript": "low"}
    encoded, listed = forms["OpenAI: input_audio"], forms["datasets: list"]
    lines = [
        {"messages": [{"role": "user", "content": [part | stretch, "Pitch?"]}]}
        for part in (audio(None), encoded, listed)
    ]
    bare = [{"audio": "a.wav"} | stretch, encoded | stretch, {"audio": listed["audio"]} | stretch]
    write(folder / "in.jsonl", [*lines, *bare])
    assert main(told(folder, text_model)) == 0
    clips = [dialogue.clips[0] for dialogue in read_dialogues(folder / "out.jsonl")]
    assert [(clip.start, clip.end, clip.channel, clip.transcript) for clip in clips] == [(0.25, 0.5, 0, "low")] * 6
    expected = load_audio(folder / "a.wav", 0.25, 0.5)
    assert all(np.array_equal(load_clip(clip), expected) for clip in clips)
    written = [json.loads(line)["messages"][0]["content"][0]["audio"] for line in (folder / "out.jsonl").open()]
    assert [path[:5] for path in written] == ["a.wav", "data:", "data:"] * 2


def test_a_line_that_would_be_too_long_to_be_read_again_is_named(folder, text_model, monkeypatch):
    line = {"audio": [0.5, 0.0] * 400, "transcript": "low"}
    write(folder / "in.jsonl", [line])
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 4000)
    with pytest.raises(DataError, match=r"in\.jsonl:1: its line in .*out\.jsonl would have more than 4000 bytes"):
        main(told(folder, text_model))
    assert not (folder / "out.jsonl").exists()


def test_a_bare_lines_misspelled_key_is_named(folder, text_model, capsys):
    write(folder / "in.jsonl", [{"audio": "a.wav", "transcript": "low", "strat": 1}, question("low")])
    assert main(told(folder, text_model)) == 0
    assert "in.jsonl:1: message 1, part 1: unknown key `strat`; did you mean `start`?" in capsys.readouterr().out
