import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwhisper.data.audio_marks import AUDIO_MARKS
from qwhisper.data.dialogue import (
    AudioClip,
    parse_dialogue,
    read_dialogues,
    scan_dialogues,
    to_record,
    unused_notes,
)
from qwhisper.data.records import MAX_LINE_BYTES
from qwhisper.errors import DataError


def text_message(role, content, **more):
    return {"role": role, "content": content, **more}


def dialogue(user="Say one.", assistant="One.", **more):
    return {"messages": [text_message("user", user), text_message("assistant", assistant)], **more}


def audio_part(**keys):
    return [{"type": "audio", **keys}, {"type": "text", "text": "Which digit?"}]


@pytest.fixture
def folder(tmp_path, recordings):
    (tmp_path / "clips").mkdir()
    shutil.copy(recordings[0], tmp_path / "clips" / "a.wav")
    shutil.copy(recordings[1], tmp_path / "clips" / "b.wav")
    return tmp_path


@pytest.fixture
def write(folder):
    def write_lines(*lines):
        path = folder / "train.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
        return path

    return write_lines


def test_canonical_form_is_read_as_it_stands(write, folder):
    record = {
        "id": "a1",
        "messages": [
            text_message("system", "You are helpful."),
            text_message("user", audio_part(audio="clips/a.wav", transcript="seven")),
            text_message("assistant", "Seven.", kind="digit"),
            text_message("user", audio_part(path=str(folder / "clips" / "b.wav"), start=0.1, end=0.3)),
            text_message("assistant", [{"type": "text", "text": "Nine."}]),
        ],
    }
    path = write("", record, "")
    (parsed,) = read_dialogues(path)
    assert parsed.id == "a1"
    assert parsed.source == f"{path}:2"
    assert parsed.clips == (
        AudioClip(str(folder / "clips" / "a.wav"), None, None, "seven"),
        AudioClip(str(folder / "clips" / "b.wav"), 0.1, 0.3, None),
    )
    system, first, reply, second, last = parsed.messages
    assert (system.role, system.text) == ("system", "You are helpful.")
    assert (first.text, len(first.clips)) == ("Which digit?", 1)
    assert (reply.text, reply.kind, reply.reasoning) == ("Seven.", "digit", None)
    assert second.content[1] == "Which digit?"
    assert last.text == "Nine."


FAULTS = {
    "not JSON": ("{'messages'", "not valid JSON"),
    "two objects": ('{"messages": []} {"messages": []}', "a line break is probably missing before character 18"),
    "more than an object": ('{"messages": []}}', "not valid JSON (Extra data"),
    "no object": ("[1]", "not a JSON object"),
    "no messages": ({"id": "x"}, "no `messages` list"),
    "empty dialogue": ({"messages": []}, "the dialogue is empty"),
    "message is a text": ({"messages": ["hello"]}, "message 1 is not an object"),
    "unknown role": ({"messages": [text_message("human", "hi")]}, "message 1: unknown role 'human'"),
    "no assistant": ({"messages": [text_message("user", "hi")]}, "no assistant message"),
    "empty reply": (dialogue(assistant=" \n"), "message 2: the assistant's reply is empty"),
    "only reasoning": (dialogue(assistant="<think>hm</think>"), "message 2: the assistant's reply is empty"),
    "empty user": (dialogue(user=" "), "message 1: the user message is empty"),
    "no content": (dialogue(user=None), "message 1: `content` must be a text or a list of parts, not NoneType"),
    "strange part": (dialogue(user=[{"type": "image"}]), "message 1, part 1: neither a text nor an audio part"),
    "placeholder part": (dialogue(user=audio_part()), "message 1, part 1: an audio placeholder without audio"),
    "missing file": (dialogue(user=audio_part(audio="clips/c.wav")), "audio file 'clips/c.wav' does not exist"),
    "outside": (dialogue(user=audio_part(audio="../a.wav")), "'../a.wav' lies outside"),
    "absolute outside": (dialogue(user=audio_part(audio="/etc/hostname")), "'/etc/hostname' lies outside"),
    "pipe": (dialogue(user=audio_part(audio="sph2pipe -f wav a.sph |")), "is a Kaldi pipe"),
    "reversed": (dialogue(user=audio_part(audio="clips/a.wav", start=2, end=1)), "0 <= start < end"),
    "negative": (dialogue(user=audio_part(audio="clips/a.wav", start=-1)), "0 <= start < end"),
    "start text": (dialogue(user=audio_part(audio="clips/a.wav", start="1")), "must be seconds"),
    "nan": (dialogue(user=audio_part(audio="clips/a.wav", start=float("nan"))), "0 <= start < end"),
    "start nested": (dialogue(user=audio_part(audio="clips/a.wav", start=[[[[[[[[[]]]]]]]]])), "must be seconds"),
    "deep": ('{"messages": ' + "[" * 100_000, "not valid JSON (nested too deeply)"),
    "surrogate": (dialogue(user="\ud800"), r"half of a surrogate pair, \ud800"),
    "surrogate id": (dialogue(id="\udfff"), r"half of a surrogate pair, \udfff"),
    "NUL": (dialogue(user=audio_part(audio="clips/a.wav\0")), "holds a NUL"),
    "folder": (dialogue(user=audio_part(audio="clips")), "audio file 'clips' is a folder, not a file"),
    "long name": (dialogue(user=audio_part(audio="x" * 10_000)), "File name too long"),
    "id list": (dialogue(id=[1]), "`id` must be a text or a number, not list"),
    "kind list": (
        {"messages": [text_message("user", "hi", kind=["a"]), text_message("assistant", "Yes.")]},
        "message 1: `kind` must be a text, not list",
    ),
    "key twice": (
        '{"messages": [{"role": "user", "role": "user"}]}',
        "the key 'role' appears twice in one object; keep",
    ),
    "key twice at the top": (
        '{"messages": [], "messages": []}',
        "the key 'messages' appears twice in one object; keep",
    ),
    "misspelled": ({"mesages": []}, "the dialogue: unknown key `mesages`; did you mean `messages`?"),
    "audio": (dialogue(audio="a.wav"), "the dialogue: unknown key `audio`; did you mean `audios`?"),
    "preference": (dialogue(rejected_response="Two."), "the key `rejected_response` is not supported: preferences"),
    "images": (dialogue(images=["a.png"]), "the key `images` is not supported: only audio is read"),
    "alpaca": ({"instruction": "Say one.", "output": "One."}, "no `messages` list: the canonical form is"),
    "misspelled in a message": (
        {"messages": [text_message("user", "hi"), text_message("assistant", "Yes.", weigth=0)]},
        "message 2: unknown key `weigth`; did you mean `weight`?",
    ),
    "mark alone": (dialogue(user="<audio>Which digit?"), "message 1: the text holds the placeholder <audio> without"),
    "token alone": (dialogue(user="<|audio_pad|>What?"), "the text holds the placeholder <|audio_pad|> without"),
    "too few audios": (dialogue(user="<audio><audio>?", audios=["clips/a.wav"]), "2 <audio> in the text but 1 in"),
    "too many audios": (dialogue(audios=["clips/a.wav"]), "0 <audio> in the text but 1 in `audios`: audio without a"),
    "audios no list": (dialogue(user="<audio>?", audios=[1]), "audio 1: `audio` is of type int; give a path"),
    "audios no list at all": (dialogue(user="<audio>?", audios=1), "`audios` must be a list of file names, not int"),
    "assistant audio": (dialogue(assistant=audio_part(audio="clips/a.wav")), "an assistant message holds audio"),
    "reasoning list": (
        {"messages": [text_message("user", "hi"), text_message("assistant", "Yes.", reasoning_content=[])]},
        "`reasoning_content` must be a text",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_with_file_and_line(write, name):
    line, sentence = FAULTS[name]
    path = write(dialogue(), "", line)
    with pytest.raises(DataError) as error:
        read_dialogues(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert sentence in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1_000


def test_emoji_escaped_as_surrogate_pairs_is_an_ordinary_text(write):
    (parsed,) = read_dialogues(write(dialogue(user="Hi \U0001f600")))
    assert parsed.messages[0].text == "Hi \U0001f600"


@pytest.mark.parametrize(("length", "fits"), [(MAX_LINE_BYTES, True), (MAX_LINE_BYTES + 1, False)])
def test_line_may_have_sixteen_megabytes_and_the_next_one_is_read(folder, length, fits):
    first, second = json.dumps(dialogue(user="")), json.dumps(dialogue())
    path = folder / "long.jsonl"
    long = json.dumps(dialogue(user="x" * (length - 1 - len(first))))  # 1: the line break
    path.write_text(f"{long}\n{second}\n", "utf-8")
    dialogues, faults = scan_dialogues(path)
    assert [c.source for c in dialogues] == [f"{path}:1", f"{path}:2"][1 - fits :]
    assert (
        faults == [] if fits else faults == [f"{path}:1: longer than 16777216 bytes; each line should be one dialogue"]
    )


def test_every_fault_of_a_file_is_named_and_the_twenty_first_only_counted(write):
    roles = [f"role {chr(ord('a') + n)}" for n in range(25)]
    path = write(*[{"messages": [{"role": role, "content": "Hi"}]} for role in roles])
    with pytest.raises(DataError) as error:
        read_dialogues(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert [line.split(": ")[0] for line in lines[:20]] == [f"{path}:{n}" for n in range(1, 21)]
    assert "5 more" in lines[20]
    dialogues, faults = scan_dialogues(path)
    assert dialogues == []
    assert len(faults) == 25


def test_equal_faults_are_one_line(write):
    many = [dialogue(user=audio_part(audio=f"{n}.wav")) for n in range(120)]
    path = write(dialogue(assistant=""), *many, dialogue(id=[]))
    with pytest.raises(DataError) as error:
        read_dialogues(path)
    first, empty, identity = str(error.value).splitlines()
    assert first.startswith(f"{path}:2, 3, 4 and 117 more: message 1, part 1: audio file '0.wav' does not exist")
    assert empty.startswith(f"{path}:1: ") and identity.startswith(f"{path}:122: ")


def test_two_faults_of_one_line_are_both_named(write):
    faults = scan_dialogues(write(dialogue(user=audio_part(audio="x.wav"), assistant="")))[1]
    assert ["does not exist" in faults[0], "reply is empty" in faults[1]] == [True, True]


def test_duplicate_id_names_both_lines(write):
    path = write(dialogue(id=7), dialogue(id="7"))
    with pytest.raises(DataError, match=rf"{path}:2: id '7' was used before, at {path}:1"):
        read_dialogues(path)


def test_missing_file_folder_and_empty_file_are_refused(write, folder):
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        read_dialogues(folder / "none.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_dialogues(folder)
    with pytest.raises(DataError, match="no dialogue in it"):
        read_dialogues(write("", ""))


def test_bytes_that_are_no_utf8_are_a_fault_of_their_line(folder):
    path = folder / "latin.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(dialogue()).encode() + b"\n" + '{"a": "é"}'.encode("latin-1"))
    dialogues, faults = scan_dialogues(path)
    assert len(dialogues) == 1
    assert faults[0].startswith(f"{path}:2: not UTF-8")


def test_max_samples_reads_no_further(write):
    path = write(dialogue(), dialogue(), "broken")
    assert [c.source for c in read_dialogues(path, max_samples=2)] == [f"{path}:1", f"{path}:2"]


def test_data_root_allows_what_the_folder_does_not(write, folder, recordings):
    path = write(dialogue(user=audio_part(audio=str(recordings[0]))))
    with pytest.raises(DataError, match="lies outside"):
        read_dialogues(path)
    (parsed,) = read_dialogues(path, data_root=recordings[0].parent)
    assert parsed.clips[0].path == str(recordings[0])


def test_link_that_leads_outside_is_refused(write, folder, recordings):
    (folder / "link.wav").symlink_to(recordings[0])
    with pytest.raises(DataError, match="lies outside"):
        read_dialogues(write(dialogue(user=audio_part(audio="link.wav"))))


def test_ms_swift_audios_take_the_place_of_their_marks(folder):
    record = {
        "messages": [
            text_message("user", "<audio>Then<audio>: which was last?"),
            text_message("assistant", "HTML has an <audio> tag too."),
        ],
        "audios": ["clips/a.wav", "clips/b.wav"],
    }
    user, assistant = parse_dialogue(record, "here", folder).messages
    first, between, second, after = user.content
    assert [first.path, second.path] == [str(folder / "clips" / "a.wav"), str(folder / "clips" / "b.wav")]
    assert [between, after] == ["Then", ": which was last?"]
    assert assistant.text == "HTML has an <audio> tag too."


@pytest.mark.parametrize("mark", [*AUDIO_MARKS, "<|audio_1|>", "<|audio_12|>", "<audio_1>", "<audio12>"])
@pytest.mark.parametrize("role", ["system", "user"])
def test_placeholder_of_any_model_is_a_fault_where_no_audio_is(mark, role):
    record = {
        "messages": [text_message(role, f"Say {mark}."), text_message("user", "hi"), text_message("assistant", mark)]
    }
    with pytest.raises(DataError) as error:
        parse_dialogue(record, "here", ".")
    assert str(error.value).startswith(f"here: message 1: the text holds the placeholder {mark} without audio; write")


@pytest.mark.parametrize("text", ["<audio src='a.wav'>", "<Audio>", "[audio]", "<|audio_123|>", "audio_1", "< audio >"])
def test_text_that_only_resembles_a_placeholder_is_text(text):
    assert parse_dialogue(dialogue(user=text), "here", ".").messages[0].text == text


def test_audios_fill_one_mark_and_another_is_still_a_fault(folder):
    record = dialogue(user="<audio> and <|AUDIO|>", audios=["clips/a.wav"])
    with pytest.raises(DataError, match=r"message 1: the text holds the placeholder <\|AUDIO\|> without audio"):
        parse_dialogue(record, "here", folder)


def test_metadata_is_counted_with_its_first_place(write):
    first, second = dialogue(speaker="a", lang="de"), dialogue(speaker="b", id=None, chosen=None)
    second["messages"][1]["duration"] = 1.5
    dialogues, faults = scan_dialogues(path := write(dialogue(), first, second, second))
    assert faults == []
    assert unused_notes(dialogues) == [
        f"dialogues with the key `speaker`, which is not used: 3; first at {path}:2",
        f"dialogues with the key `lang`, which is not used: 1; first at {path}:2",
        f"dialogues with the key `duration` in a message, which is not used: 2; first at {path}:3",
    ]
    many = scan_dialogues(write(dialogue(**{f"column{n}": 1 for n in range(25)})))[0]
    assert len(unused_notes(many)) == 21 and unused_notes(many)[-1] == "and 5 more keys that are not used"


LOSS = st.sampled_from(
    [{}, {"loss": False}, {"train": True}, {"weight": 0}, {"weight": None}, {"loss": 1, "weight": 1}]
)
WORDS = st.text(st.sampled_from('ab <>\n\ue000ü😀"\\'), max_size=6)
SAID = WORDS.map("a{}".format)
PARTS = st.lists(st.builds(lambda text: {"type": "text", "text": text}, WORDS), max_size=3)
ARGUMENTS = st.dictionaries(WORDS, st.one_of(st.none(), st.integers(), WORDS, st.lists(st.booleans())), max_size=2)
CALLS = st.lists(
    st.builds(lambda arguments, text: {"name": "look", "arguments": json.dumps(arguments) if text else arguments},
              ARGUMENTS, st.booleans()),
    max_size=2,
)  # fmt: skip


@st.composite
def records(draw) -> dict:
    """Dialogues in any of the forms that are read."""
    messages = [{"role": "developer", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        typed = [{"type": "text", "text": draw(SAID)}, *draw(PARTS)]
        messages.append({"role": "user", "content": typed, **draw(st.sampled_from([{}, {"loss": False}]))})
        thought = draw(st.sampled_from([{}, {"thinking": "Hm."}, {"reasoning": " "}]))
        text = draw(st.sampled_from(["{}", "Hm.</think>{}", "<think>\n\n</think>{}"])) if not thought else "{}"
        calls = draw(CALLS)
        answer = {"role": "assistant", "content": text.format(draw(SAID)), **thought, **draw(LOSS)}
        messages.append(
            answer | ({"tool_calls": calls, "kind": draw(st.sampled_from([None, "a", 1]))} if calls else {})
        )
        messages += [{"role": draw(st.sampled_from(["tool", "tool_response"])), "content": draw(WORDS)} for _ in calls]
    messages += [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    more = draw(st.sampled_from([{}, {"id": "x"}, {"tools": [{"name": "look"}]}, {"speaker": 1}, {"weight": 1}]))
    return {"messages": messages, **more} | ({} if messages[0]["role"] == "developer" else {"system": draw(WORDS)})


@settings(max_examples=100)
@given(records())
def test_every_form_is_written_so_that_the_same_dialogue_is_read(record):
    parsed = parse_dialogue(record, "here:1", ".")
    written = json.loads(json.dumps(to_record(parsed, ".")))
    assert parse_dialogue(written, "here:1", ".") == parsed
    assert to_record(parse_dialogue(written, "here:1", "."), ".") == written


@pytest.mark.parametrize(
    ("content", "given", "reasoning", "reply"),
    [
        ("Yes.", None, None, "Yes."),
        ("<think>\n\n</think>\n\nYes.", None, None, "Yes."),
        ("<think>\nWell, 1 + 1.\n</think>\n\nTwo.", None, "Well, 1 + 1.", "Two."),
        ("Two.", "Well.", "Well.", "Two."),
        ("Two.", "  ", None, "Two."),
    ],
)
def test_reasoning_is_kept_apart_from_the_reply(content, given, reasoning, reply):
    record = dialogue(assistant=content)
    record["messages"][1]["reasoning_content"] = given
    message = parse_dialogue(record, "here", ".").messages[1]
    assert (message.reasoning, message.text) == (reasoning, reply)


def test_what_is_written_is_read_back_as_the_same_dialogue(write, folder):
    sent = {
        "messages": [
            text_message("system", "Be brief."),
            text_message("user", audio_part(audio="clips/a.wav", transcript="seven", start=0.1, end=0.3), kind="digit"),
            text_message("assistant", "Seven.", reasoning_content="I heard it.", kind="digit"),
            text_message("user", "Sure?"),
            text_message("assistant", "Yes."),
        ]
    }
    path = write(sent | {"id": "a1"}, sent, {"audios": ["clips/b.wav"], **dialogue(user="<audio>Say it")})
    before = read_dialogues(path)
    records = [to_record(parsed, folder) for parsed in before]
    assert read_dialogues(write(*records)) == before
    assert records[0] == sent | {"id": "a1"} and records[1] == sent
    assert [part.get("audio") for part in records[2]["messages"][0]["content"]] == ["clips/b.wav", None]
    elsewhere = to_record(before[0], folder / "other")
    assert elsewhere["messages"][1]["content"][0]["audio"] == str(folder / "clips" / "a.wav")


def test_dialogue_that_awaits_its_answer_is_read_where_that_is_allowed(write):
    question = {"messages": [text_message("user", "Say one.")]}
    unfit = {"messages": [text_message("user", "Say one."), text_message("system", "Be brief.")]}
    path = write(question, dialogue(), unfit)
    dialogues, faults = scan_dialogues(path, answered=False)
    assert [len(parsed.messages) for parsed in dialogues] == [1, 2]
    assert [fault.split(": ")[0] for fault in faults] == [f"{path}:3"]
    assert len(scan_dialogues(path)[1]) == 2


def test_lines_of_another_form_are_converted_before_they_are_read(write):
    path = write({"say": "Say one."}, "no json", {"say": "Say two."})
    dialogues, faults = scan_dialogues(path, convert=lambda record: dialogue(user=record["say"]))
    assert [parsed.messages[0].text for parsed in dialogues] == ["Say one.", "Say two."]
    assert len(faults) == 1 and f"{path}:2" in faults[0]
