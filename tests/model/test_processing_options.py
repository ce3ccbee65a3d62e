"""Options of transformers' processors, with ours: each has its effect or is refused."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from qwhisper import Qwen3AudioProcessor
from qwhisper.data.template_texts import AUDIO_TOKEN
from qwhisper.errors import DataError, UsageError
from qwhisper.frames import DEFAULT_LEAD_SILENCE_S, DEFAULT_TAIL_SILENCE_S
from qwhisper.model.processor import encoder_of
from tests.small import small_tokenizer, tone

CLIP = tone(300, 0.3)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "audio", "audio": CLIP}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A tone."},
    {"role": "user", "content": [{"type": "text", "text": "And now?"}, {"type": "audio", "audio": tone(500, 0.5)}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Higher."}]},
]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "there"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
WITH_TOOLS = [
    TURNS[1],
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "nothing"},
    {"role": "assistant", "content": "Nothing."},
]
WITH_REASONING = [TURNS[1], {"role": "assistant", "reasoning_content": "High, long.", "content": "A tone."}]


@pytest.fixture
def processor(joined):
    return joined[1]


def inputs_of(processor, messages, **options):
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)


def test_nested_options_are_the_flat_ones(processor):
    asked = {"text": ["a", f"bcd{AUDIO_TOKEN}"], "audio": CLIP}
    flat = processor(**asked, padding="max_length", max_length=60, return_tensors="np", sampling_rate=8000)
    nested = processor(
        **asked,
        text_kwargs={"padding": "max_length", "max_length": 60},
        audio_kwargs={"sampling_rate": 8000},
        common_kwargs={"return_tensors": "np"},
    )
    assert flat.keys() == nested.keys()
    for name, value in flat.items():
        assert isinstance(value, np.ndarray) and np.array_equal(value, nested[name]), name
    assert flat["input_ids"].shape == (2, 60)
    common = processor(**asked, common_kwargs={"sampling_rate": 8000})
    assert np.array_equal(flat["input_features"], common["input_features"])


def test_an_option_that_is_given_twice_is_refused(processor):
    with pytest.raises(ValueError, match="padding was passed two times"):
        processor(text="a", padding="max_length", text_kwargs={"padding": False})
    with pytest.raises(UsageError, match="two sampling rates, 8000 and 16000; give one"):
        processor(text=AUDIO_TOKEN, audio=CLIP, sampling_rate=8000, audio_kwargs={"sampling_rate": 16_000})


def test_texts_are_padded_on_the_left_whatever_side_the_tokenizer_was_saved_with(processor):
    processor.tokenizer.padding_side = processor.tokenizer.init_kwargs["padding_side"] = "right"
    for options in ({}, {"text_kwargs": {}}, {"padding_side": None}, {"common_kwargs": {"return_tensors": "pt"}}):
        assert processor(text=["abc", "d"], **options)["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    for options in ({"padding_side": "right"}, {"text_kwargs": {"padding_side": "right"}}):
        assert processor(text=["abc", "d"], **options)["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_truncation_cuts_text_and_never_audio(processor):
    assert processor(text="abcdef", truncation=True, max_length=3)["input_ids"].shape == (1, 3)
    inputs = processor(text=f"{AUDIO_TOKEN}abcdef", audio=CLIP, truncation=True, max_length=30)
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == processor.frames.num_tokens(len(CLIP))
    assert inputs["input_features"].equal(processor(text=AUDIO_TOKEN, audio=CLIP)["input_features"])
    for call in (
        lambda: processor(text=f"ab{AUDIO_TOKEN}", audio=CLIP, truncation=True, max_length=4),
        lambda: inputs_of(processor, TURNS, processor_kwargs={"truncation": True, "max_length": 60}),
    ):
        with pytest.raises(ValueError, match=r"Mismatch in `audio` token count.*increase `max_length`"):
            call()
    with pytest.raises(ValueError, match="clips are never cut"):
        processor(text=AUDIO_TOKEN, audio=CLIP, audio_kwargs={"truncation": True, "max_length": 1600})


def test_without_tensors_a_call_gives_lists(processor):
    asked = {"text": ["a", f"bcd{AUDIO_TOKEN}"], "audio": CLIP, "padding": False}
    for options in ({"return_tensors": None}, {"text_kwargs": {"return_tensors": None}}):
        inputs = processor(**asked, **options)
        assert all(isinstance(value, list) for value in inputs.values())
        assert [len(row) for row in inputs["input_ids"]] == [1, 3 + processor.frames.num_tokens(len(CLIP))]
        features = torch.from_numpy(inputs["input_features"][0])
        assert features.equal(processor(text=AUDIO_TOKEN, audio=CLIP)["input_features"][0])


def test_a_chat_gives_lists_of_ids_or_tensors_of_all_inputs_unless_told_otherwise(processor):
    ids = processor.apply_chat_template(TURNS, tokenize=True)
    assert ids == inputs_of(processor, TURNS)["input_ids"].tolist()
    assert ids == inputs_of(processor, TURNS, return_tensors=None)["input_ids"]
    assert ids == processor.apply_chat_template(TURNS, tokenize=True, return_tensors="pt").tolist()
    assert (
        ids == processor.apply_chat_template(TURNS, tokenize=True, processor_kwargs={"return_tensors": "np"}).tolist()
    )


def masked(inputs, row: int = 0) -> list[int]:
    """The tokens that a mask has of a row."""
    return inputs["input_ids"][row][inputs["assistant_masks"][row].bool()].tolist()


@pytest.mark.parametrize(("messages", "tools"), [(TURNS, None), (WITH_TOOLS, TOOLS), (WITH_REASONING, None)])
def test_the_mask_of_the_assistants_tokens_is_what_training_supervises(processor, messages, tools):
    inputs = inputs_of(processor, messages, return_assistant_tokens_mask=True, tools=tools)
    sample = encoder_of(processor).encode({"messages": messages} | ({"tools": tools} if tools else {}))
    # The template ends with a line break, which is in no row of training after the last answer that it keeps.
    ids, labels = inputs["input_ids"][0].tolist(), sample.labels.tolist()
    assert ids == sample.input_ids.tolist()
    assert inputs["assistant_masks"][0].tolist() == [int(label != -100) for label in labels]
    assert inputs.keys() == {"input_ids", "attention_mask", "input_features", "input_features_mask", "assistant_masks"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_of_the_assistants_tokens_knows_padding_and_forms(processor, side):
    batch = [TURNS, TURNS[1:3]]
    inputs = inputs_of(processor, batch, return_assistant_tokens_mask=True, padding_side=side)
    for row, messages in enumerate(batch):
        alone = inputs_of(processor, messages, return_assistant_tokens_mask=True)
        assert masked(inputs, row) == masked(alone) != []
    assert inputs["assistant_masks"].shape == inputs["input_ids"].shape
    expected = inputs["assistant_masks"].tolist()
    for form, kind in (("np", np.ndarray), (None, list)):
        other = inputs_of(
            processor, batch, return_assistant_tokens_mask=True, padding_side=side, return_tensors=form,
            processor_kwargs={"return_offsets_mapping": True},
        )  # fmt: skip
        assert isinstance(other["assistant_masks"], kind) and np.array_equal(other["assistant_masks"], expected)
        assert "offset_mapping" in other and "text_replacement_offsets" not in other


MARKED = (
    "{%- for message in messages -%}{{ message.role }}:"
    "{%- if message.role == 'assistant' -%}{% generation %}{{ message.content[0].text }}.{% endgeneration %}"
    "{%- else -%}{%- for part in message.content -%}{{ part.text if part.type == 'text' else '<|audio_pad|>' }}"
    "{%- endfor -%}{%- endif -%}\n{%- endfor -%}"
)


def test_a_template_that_marks_answers_gives_its_own_mask_behind_clips(processor):
    messages = [*TURNS[3:], TURNS[1], {"role": "assistant", "content": [{"type": "text", "text": "Low"}]}]
    inputs = inputs_of(processor, messages, return_assistant_tokens_mask=True, chat_template=MARKED)
    assert processor.tokenizer.decode(masked(inputs)) == "Higher..Low."


def test_a_mask_that_cannot_be_found_is_refused(processor):
    unmarked = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "{{ '<|im_end|>' }}")
    unstable = processor.chat_template.replace("{%- if true %}", "{%- if loop.last %}", 1)
    assert unstable != processor.chat_template
    sentences = {unmarked: "answers of this chat template can't be found", unstable: "message 3: .* another beginning"}
    for (template, sentence), messages in zip(sentences.items(), (TURNS[3:], TURNS), strict=True):
        with pytest.raises(ValueError, match=sentence + ".*put {% generation %} and {% endgeneration %} around them"):
            inputs_of(processor, messages, return_assistant_tokens_mask=True, chat_template=template)


def test_two_arguments_make_a_processor_of_the_models_defaults(tmp_path):
    processor = Qwen3AudioProcessor(WhisperFeatureExtractor(), small_tokenizer())
    assert (processor.frames.stack, processor.frames.max_encoder_frames) == (4, 1500)
    silence = (processor.frames.lead_silence_s, processor.frames.tail_silence_s)
    assert silence == (DEFAULT_LEAD_SILENCE_S, DEFAULT_TAIL_SILENCE_S)
    assert AUDIO_TOKEN in processor.apply_chat_template(TURNS)
    processor.save_pretrained(tmp_path)
    assert Qwen3AudioProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_a_template_that_is_given_is_saved_and_reloaded_one_or_several(tmp_path):
    parts = (WhisperFeatureExtractor(), small_tokenizer())
    for n, template in enumerate((MARKED, {"default": MARKED, "other": "{{ messages[0].role }}"})):
        Qwen3AudioProcessor(*parts, chat_template=template).save_pretrained(tmp_path / str(n))
        processor = Qwen3AudioProcessor.from_pretrained(tmp_path / str(n))
        assert processor.chat_template == template
        assert processor.apply_chat_template(TURNS[3:4]) == f"user:And now?{AUDIO_TOKEN}"
    assert processor.apply_chat_template(TURNS[3:4], chat_template="other") == "user"
    processor.chat_template = {"other": "x"}
    with pytest.raises(ValueError, match=r"no chat template is named default \(other\): give `chat_template`"):
        processor.apply_chat_template(TURNS)


def test_answers_are_decoded_with_and_without_control_tokens(processor):
    ids = torch.tensor([processor.tokenizer("yes<|im_end|>")["input_ids"]])
    assert processor.batch_decode(ids) == ["yes<|im_end|>"]
    assert processor.decode(ids[0], skip_special_tokens=True) == "yes"
    assert processor.post_process_image_text_to_text(ids) == processor.post_process_multimodal_output(ids) == ["yes"]


def test_names_of_inputs_are_those_of_a_call(processor):
    assert set(processor.model_input_names) == set(processor(text=AUDIO_TOKEN, audio=CLIP))


@dataclass
class Object:
    """A message as an object, of which values that are None count as absent."""

    role: str
    content: object
    tool_calls: object = None


class Dumped:
    """As Pydantic's models are."""

    def __init__(self, **values):
        self.values = values

    def model_dump(self, *, exclude_none):
        return dict(self.values)


def test_messages_may_be_objects(processor):
    expected = inputs_of(processor, TURNS)
    for messages in ([Object(**message) for message in TURNS], [Dumped(**message) for message in TURNS]):
        for given in (messages, [messages]):
            inputs = inputs_of(processor, given)
            assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    with pytest.raises(DataError, match="message 1, part 1: neither a text nor an audio part"):
        processor.apply_chat_template([Object("user", [Dumped(type="image", image="a.png")])])


@pytest.mark.parametrize("option", ["images", "videos", "load_audio_from_video"])
def test_what_belongs_to_models_that_see_is_refused(processor, option):
    with pytest.raises(ValueError, match=f"`{option}` can't be used: this model reads text and audio"):
        processor(text="a", **{option: ["a.png"]})


@pytest.mark.parametrize("option", ["load_audio_from_video", "sanitize_control_tokens"])
def test_options_of_a_chat_that_have_no_effect_are_refused(processor, option):
    with pytest.raises(UsageError, match=f"`{option}` can't be used"):
        inputs_of(processor, TURNS, **{option: True})
    assert inputs_of(processor, TURNS, **{option: False}).keys() == inputs_of(processor, TURNS).keys()
