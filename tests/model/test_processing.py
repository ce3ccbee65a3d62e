import copy
import sys

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoTokenizer, WhisperFeatureExtractor

from qwhisper.data.audio import load_audio
from qwhisper.data.dialogue import AudioClip, Message, parse_dialogue
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.packing import pad_samples
from qwhisper.errors import BadClipError, DataError, UsageError
from qwhisper.model.mel import packed_log_mel
from qwhisper.model.processing_qwen3_audio import add_audio_token
from qwhisper.model.processor import Qwen3AudioProcessor
from tests.audio_parts import parts_of, write_chirp
from tests.small import tone


@pytest.fixture
def processor(joined):
    return joined[1]


@pytest.fixture(scope="module")
def real_tokenizer(shared):
    """(Qwen3's own tokenizer with the placeholder, the id that it got when it was added)"""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "qwen3-tokenizer")
    return tokenizer, add_audio_token(tokenizer)


@pytest.fixture
def clip_file(tmp_path):
    """0.4 s at 8 kHz: what is read is resampled."""
    path = tmp_path / "clip.wav"
    soundfile.write(path, tone(440, 0.4, 8000), 8000)
    return str(path)


@pytest.fixture
def without_audio_packages(monkeypatch):
    """transformers' own audio loader needs one of these; neither is among our dependencies."""
    monkeypatch.setitem(sys.modules, "librosa", None)
    monkeypatch.setitem(sys.modules, "torchcodec", None)


def dialogue(*parts) -> list[dict]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A tone."},
        {"role": "user", "content": "Sure?"},
    ]


def test_text_and_clips_become_placeholders_and_features(processor):
    clips = [tone(300, 0.3), tone(500, 0.02)]
    inputs = processor(text="<|audio_pad|>first<|audio_pad|>", audio=clips)
    tokens = [processor.frames.num_tokens(len(clip)) for clip in clips]
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.audio_token_id) == sum(tokens)
    assert ids[: tokens[0] + 1].count(processor.audio_token_id) == tokens[0]
    assert inputs["input_features"].shape == (2, 80, inputs["input_features_mask"].shape[1])
    assert inputs["input_features_mask"].sum(1).tolist() == [
        processor.frames.window_lengths(len(clip))[0] // 160 for clip in clips
    ]


def test_several_texts_are_padded_on_the_left(processor):
    inputs = processor(text=["a<|audio_pad|>", "bcd"], audio=tone(300, 0.1))
    assert inputs["attention_mask"].tolist() == [
        [1] * inputs["input_ids"].shape[1],
        [0] * (inputs["input_ids"].shape[1] - 3) + [1] * 3,
    ]
    assert processor.tokenizer.decode(inputs["input_ids"][1, -3:]) == "bcd"


def test_clips_and_placeholders_must_agree(processor):
    with pytest.raises(ValueError, match=r"number of .*audio_pad.* tokens in the prompts should be the same"):
        processor(text="<|audio_pad|>", audio=[tone(300, 0.1), tone(300, 0.1)])


@pytest.mark.usefixtures("without_audio_packages")
@pytest.mark.parametrize("key", ["audio", "path"])
def test_a_chat_with_files_needs_soundfile_alone(processor, clip_file, key):
    inputs = processor.apply_chat_template(
        dialogue({"type": "audio", key: clip_file}), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    given = processor.apply_chat_template(
        dialogue({"type": "audio", "audio": load_audio(clip_file)}),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    assert sorted(inputs) == ["attention_mask", "input_features", "input_features_mask", "input_ids"]
    for name, value in inputs.items():
        assert torch.equal(value, given[name]), name
    assert processor(text="<|audio_pad|>", audio=clip_file)["input_features"].equal(inputs["input_features"])


def test_a_chat_prompt_equals_the_prompt_that_was_trained_on(joined, clip_file):
    model, processor = joined
    model.float()  # bf16 on a GPU, where the two spectrograms, computed on two devices, would be rounded apart
    inputs = processor.apply_chat_template(
        dialogue({"type": "audio", "audio": clip_file}), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    encoder = encoder_of(processor)
    messages = [
        Message("system", ("Be brief.",)),
        Message("user", (AudioClip(clip_file, None, None, None), "What is it?")),
        Message("assistant", ("A tone.",)),
        Message("user", ("Sure?",)),
    ]
    sample = encoder.encode_prompt(messages)
    assert inputs["input_ids"][0].tolist() == sample.input_ids.tolist()
    batch = pad_samples([sample], encoder.pad_token_id, padding_side="left")
    batch = {name: value.to(model.device) for name, value in batch.items()}
    torch.testing.assert_close(model(**inputs.to(model.device)).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_tools_in_a_chat_prompt_are_those_that_were_trained_on(real_tokenizer, clip_file):
    tokenizer, _ = real_tokenizer
    lengths = {"projector_stack": 4, "max_encoder_frames": 1500, "audio_lead_silence": 0.0, "audio_tail_silence": 0.5}
    processor = Qwen3AudioProcessor(WhisperFeatureExtractor(), tokenizer, **lengths)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    call = {"type": "function", "function": {"name": "look", "arguments": {"where": "there"}}}
    messages = [
        {"role": "user", "content": [{"type": "audio", "audio": clip_file}]},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [call]},
        {"role": "tool", "content": '{"seen": "nothing."}'},
    ]
    ids = processor.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=True)[0]
    encoder = DialogueEncoder(
        tokenizer, processor.frames, audio_token_id=processor.audio_token_id, chat_template=processor.chat_template
    )
    record = {"messages": [*messages, {"role": "assistant", "content": "Nothing."}], "tools": tools}
    parsed = parse_dialogue(record, "here:1", "/", "/")
    assert ids == encoder.encode_prompt(parsed.messages[:3], tools=parsed.tools).input_ids.tolist()
    row, (_, (start, _)) = encoder.encode(parsed), encoder.encode(parsed).answer_spans
    assert ids == row.input_ids[:start].tolist()


def test_batches_of_dialogues_and_plain_text_are_rendered(processor, clip_file):
    one, two = dialogue({"type": "audio", "audio": clip_file}), [{"role": "user", "content": "Hello"}]
    inputs = processor.apply_chat_template([one, two], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert inputs["input_ids"].shape[0] == 2
    assert inputs["input_features"].shape[0] == 1
    text = processor.apply_chat_template(two, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ids = processor.apply_chat_template(two, add_generation_prompt=True, tokenize=True)
    assert processor.tokenizer.decode(ids[0]) == text


def test_saved_and_loaded_it_keeps_template_lengths_and_placeholder(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = Qwen3AudioProcessor.from_pretrained(tmp_path)
    assert again.chat_template == processor.chat_template
    assert again.frames == processor.frames
    assert again.frames.tail_silence_s == 0.1
    assert again.audio_token_id == processor.audio_token_id == len(again.tokenizer) - 1
    clip = tone(300, 0.3)
    expected, got = (p(text="hear <|audio_pad|>", audio=[clip]) for p in (processor, again))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_placeholder_takes_qwen3s_first_spare_row(real_tokenizer):
    tokenizer, added = real_tokenizer
    assert added == add_audio_token(tokenizer) == 151_669
    assert tokenizer("<|audio_pad|>x")["input_ids"][0] == 151_669


def test_float64_waveforms_are_taken_as_well(processor):
    clip = tone(300, 0.2)
    inputs = [
        processor(text="<|audio_pad|>", audio=c)["input_features"]
        for c in (clip, clip.astype(np.float64), clip.tolist())
    ]
    assert inputs[0].equal(inputs[1])
    assert inputs[0].equal(inputs[2])


def encoder_of(processor) -> DialogueEncoder:
    return DialogueEncoder(
        processor.tokenizer,
        processor.frames,
        audio_token_id=processor.audio_token_id,
        chat_template=processor.chat_template,
    )


def prompt_of(processor, messages, **keywords):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **keywords
    )


def trained_features(sample) -> torch.Tensor:
    """float32 [mel frames, mel bins] of a sample's windows end to end, as the model computes them."""
    return packed_log_mel(torch.from_numpy(np.concatenate(sample.windows)), [len(w) for w in sample.windows], 80)[0]


def features_of(inputs) -> torch.Tensor:
    mask = inputs["input_features_mask"].bool()
    return inputs["input_features"].transpose(1, 2)[mask]


STRETCHES = ({}, {"start": 0.3, "end": 0.55, "channel": 0})


@pytest.mark.parametrize("stretch", STRETCHES, ids=["whole", "stretch"])
def test_every_form_of_audio_is_the_prompt_and_the_features_of_training(processor, tmp_path, stretch):
    path, encoder = write_chirp(tmp_path / "a.wav"), encoder_of(processor)
    expected = encoder.encode_prompt(dialogue({"type": "audio", "audio": str(path), **stretch}))
    features = trained_features(expected)
    num_samples = 14_400 if not stretch else 4_000
    assert expected.input_ids.tolist().count(processor.audio_token_id) == processor.frames.num_tokens(num_samples)
    different = []
    for name, part in parts_of(path).items():
        messages = dialogue({k: v for k, v in part.items() if v is not None or not stretch} | stretch)
        inputs = prompt_of(processor, messages)
        same_ids = inputs["input_ids"][0].tolist() == expected.input_ids.tolist()
        if not same_ids or not torch.equal(features_of(inputs), features):
            different.append(name)
    assert different == []


def test_a_call_takes_every_form_of_audio(processor, tmp_path):
    path = write_chirp(tmp_path / "a.wav")
    expected = processor(text="<|audio_pad|>", audio=str(path))
    forms = [part for part in parts_of(path).values() if part.get("type") == "audio" and "sampling_rate" not in part]
    for audio in (*forms, *(part["audio"] for part in forms if "audio" in part)):
        for given in (audio, [audio], [[audio]]):
            assert processor(text="<|audio_pad|>", audio=given)["input_features"].equal(expected["input_features"])
    several = processor(text=["<|audio_pad|>", "x", "<|audio_pad|>"], audio=[[forms[0]], [], [forms[-1]]])
    assert several["input_features"].equal(expected["input_features"].repeat(2, 1, 1))
    assert "input_features" not in processor(text="x", audio=[])


def test_a_rate_given_with_the_call_is_that_of_arrays_without_one(processor, tmp_path):
    path = write_chirp(tmp_path / "a.wav")
    samples = soundfile.read(path, dtype="float32")[0]
    expected = processor(text="<|audio_pad|>", audio=path)["input_features"]
    part = {"type": "audio", "audio": samples}
    for keywords in ({"sampling_rate": 8000}, {"audio_kwargs": {"sampling_rate": 8000}}):
        assert processor(text="<|audio_pad|>", audio=samples, **keywords)["input_features"].equal(expected)
        assert prompt_of(processor, dialogue(part), **keywords)["input_features"].equal(expected)
        inputs = prompt_of(processor, dialogue(part), processor_kwargs=keywords)
        assert inputs["input_features"].equal(expected)
        inputs = prompt_of(processor, dialogue(part | {"sampling_rate": 16_000}), **keywords)
        assert inputs["input_features"].shape[2] < expected.shape[2]
    with pytest.raises(UsageError, match="sampling rate fast"):
        processor(text="<|audio_pad|>", audio=samples, sampling_rate="fast")


def test_keywords_of_a_call_reach_it_from_a_chat_too(processor, clip_file):
    messages = dialogue({"type": "audio", "audio": clip_file})
    inputs = prompt_of(processor, messages, padding="max_length", max_length=200, padding_side="right")
    assert inputs["input_ids"].shape == (1, 200)
    assert inputs["attention_mask"][0, -1] == 0
    assert isinstance(prompt_of(processor, messages, return_tensors="np")["input_ids"], np.ndarray)


REFUSED = {
    "missing key": ({"type": "audio"}, DataError, "message 2, part 1: an audio placeholder without audio"),
    "address": ({"type": "audio", "url": "https://host/a.wav"}, DataError, "nothing is downloaded"),
    "no file": (
        {"type": "audio_url", "audio_url": "gone.wav"},
        DataError,
        "part 1: audio file 'gone.wav' does not exist",
    ),
    "image": ({"type": "image", "image": "a.png"}, DataError, "message 2, part 1: neither a text nor an audio part"),
    "misspelled": ({"type": "audio", "audio": [0.1, 0.2], "strat": 1}, DataError, "did you mean `start`?"),
    "integers": ({"type": "audio", "audio": [1, 2, 3]}, DataError, "part 1: `audio` has samples of type int64"),
    "NaN": ({"type": "audio", "audio": [0.1, float("nan")]}, BadClipError, "message 2, part 1, `audio`: .*NaN or Inf"),
    "silence": ({"type": "audio", "audio": [0.0] * 800}, BadClipError, "message 2, part 1, `audio`: .*silent"),
    "nothing": ({"type": "audio", "audio": np.zeros(0)}, BadClipError, "message 2, part 1, `audio`: .*empty"),
    "loud": ({"type": "audio", "audio": [0.1, -4e4]}, BadClipError, "message 2, part 1, `audio`: .*4.0e[+]04"),
    "broken bytes": (
        {"input_audio": {"data": "UklGRiQAAABXQVZF"}},
        BadClipError,
        "message 2, part 1, `data`: .*unreadable",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_audio_that_cannot_be_used_never_becomes_features(processor, name):
    part, error, sentence = REFUSED[name]
    for messages in (dialogue(part), [dialogue("Hi"), dialogue(part)]):
        with pytest.raises(error, match=sentence):
            prompt_of(processor, messages)
    if "audio" in part and len(part) == 2:
        with pytest.raises(error, match=r"audio 1"):
            processor(text="<|audio_pad|>", audio=part["audio"])


def test_a_chats_own_messages_stay_as_they_were_and_metadata_is_named(processor, clip_file):
    messages = dialogue({"type": "audio", "audio": clip_file, "speaker": "f1"}, "Well.")
    before = copy.deepcopy(messages)
    with pytest.warns(UserWarning, match="not used: `speaker` in a part"):
        inputs = prompt_of(processor, messages)
    assert messages == before
    with pytest.warns(UserWarning, match="not used: `speaker` in a part"):
        expected = encoder_of(processor).encode_prompt(before)
    assert inputs["input_ids"][0].tolist() == expected.input_ids.tolist()


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "user", "contnet": "Hi"}, r"message 2: unknown key `contnet`; did you mean `content`\?"),
        ({"role": "user", "text": "Hi"}, "message 2.* `content`"),
        ({"role": "human", "content": "Hi"}, "message 2: unknown role 'human'; known are system, user, "),
        ({"role": "user", "content": "Hi", "images": ["a.png"]}, "message 2: the key `images` is not supported: "),
        ({"role": "user", "content": "Hi", "name": "Ann"}, None),
    ],
)
def test_keys_of_a_message_are_read_as_in_a_file_of_dialogues(processor, message, fault):
    messages = [{"role": "system", "content": "Be brief."}, message]
    readers = (lambda: prompt_of(processor, messages), lambda: encoder_of(processor).encode_prompt(messages))
    for read in readers:
        if fault is None:
            with pytest.warns(UserWarning, match="not used: `name` in a message"):
                read()
        else:
            with pytest.raises(DataError, match=fault):
                read()


def test_a_prompt_of_the_real_tokenizer_is_the_one_of_training(real_tokenizer, tmp_path):
    tokenizer, _ = real_tokenizer
    processor = Qwen3AudioProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer, 4, 1500, 0.25, 1.0)
    audio = {"type": "audio", "audio": str(write_chirp(tmp_path / "a.wav")), "end": 0.5}
    messages = dialogue("  First:\n", audio, "\n\nthen", audio, {"type": "text", "text": "which was 1. last?  "})
    inputs = prompt_of(processor, messages)
    expected = encoder_of(processor).encode_prompt(messages)
    assert inputs["input_ids"][0].tolist() == expected.input_ids.tolist()
    assert torch.equal(features_of(inputs), trained_features(expected))
