import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwhisper.data.dialogue import AudioClip, Message
from qwhisper.data.template import (
    AUDIO_TOKEN,
    end_of_turn_ids,
    listening_template,
    render_pieces,
    supports_reasoning,
    template_fault,
)
from qwhisper.data.text_tokens import encode_text
from qwhisper.errors import DataError, UsageError
from tests.data.conftest import ENDLESS, MOVING_SYSTEM, OPEN_THINK, TEMPLATES, byte_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Sûr? 确定吗?"},
    {"role": "assistant", "content": "Yes."},
]


def render(tokenizer, messages, template=None, **options):
    options.setdefault("enable_thinking", False)
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)


def as_messages(messages):
    return [Message(m["role"], (m["content"],), reasoning=m.get("reasoning_content")) for m in messages]


def test_qwen3_template_is_its_own_with_a_think_block_in_every_turn(qwen3_tokenizer):
    template, origin = listening_template(qwen3_tokenizer)
    assert origin == "the tokenizer's own chat template, with its think block in every assistant turn"
    own = render(qwen3_tokenizer, MESSAGES)
    assert own.count("<think>\n\n</think>\n\n") == 1
    expected = own.replace("assistant\nTwo.", "assistant\n<think>\n\n</think>\n\nTwo.")
    assert render(qwen3_tokenizer, MESSAGES, template) == expected
    # One turn: nothing to fix.
    assert render(qwen3_tokenizer, MESSAGES[:3], template) == render(qwen3_tokenizer, MESSAGES[:3])
    assert template_fault(qwen3_tokenizer, qwen3_tokenizer.chat_template) is not None


def test_qwen3_keeps_reasoning_in_its_own_turn_and_drops_it_from_the_history(qwen3_tokenizer):
    template, _ = listening_template(qwen3_tokenizer)
    first = [*MESSAGES[:2], {**MESSAGES[2], "reasoning_content": "One and one."}]
    assert "<think>\nOne and one.\n</think>\n\nTwo.<|im_end|>" in render(qwen3_tokenizer, first, template)
    assert "One and one." not in render(qwen3_tokenizer, [*first, *MESSAGES[3:]], template)
    assert supports_reasoning(qwen3_tokenizer, template)
    assert not supports_reasoning(qwen3_tokenizer, TEMPLATES["chatml"])


def test_parts_become_text_with_a_placeholder_for_audio(qwen3_tokenizer):
    template, _ = listening_template(qwen3_tokenizer)
    content = [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "Which? "}, {"type": "audio", "path": "b"}]
    text = render(qwen3_tokenizer, [{"role": "user", "content": content}], template)
    assert text == f"<|im_start|>user\n{AUDIO_TOKEN}Which? {AUDIO_TOKEN}<|im_end|>\n"
    with pytest.raises((jinja2.TemplateError, TypeError)):  # why the preamble is there
        render(qwen3_tokenizer, [{"role": "user", "content": content}])


ORIGINS = {
    "chatml": "the tokenizer's own chat template",
    "qwen2.5": "the tokenizer's own chat template",
    "gemma": "the tokenizer's own chat template",
    "open think": "a table of turns probed from the tokenizer's own chat template",
    "moving system": "a table of turns probed from the tokenizer's own chat template",
    "endless": "a table of turns probed from the tokenizer's own chat template",
    "none": "a plain User/Assistant template, since the tokenizer has none",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_follows_its_generation_prompt(name):
    tokenizer = byte_tokenizer(TEMPLATES[name])
    template, origin = listening_template(tokenizer)
    assert origin == ORIGINS[name]
    for messages in (MESSAGES, MESSAGES[1:]):
        whole = render(tokenizer, messages, template)
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = render(tokenizer, messages[:turn], template, add_generation_prompt=True)
                assert whole.startswith(prompt + message["content"])
    assert template_fault(tokenizer, template) is None
    tokenizer.chat_template = template
    assert listening_template(tokenizer)[0] == template  # saved and loaded again it stays what it is


@pytest.mark.parametrize(("name", "end"), [("gemma", "<end_of_turn>"), ("chatml", "<|im_end|>"), ("endless", None)])
def test_generation_stops_at_the_end_of_a_turn_and_at_eos(name, end):
    tokenizer = byte_tokenizer(TEMPLATES[name])
    ends = end_of_turn_ids(tokenizer, listening_template(tokenizer)[0])
    assert tokenizer.convert_ids_to_tokens(ends) == [*([end] if end else []), "<|endoftext|>"]


def test_qwen3_generation_stops_at_im_end(qwen3_tokenizer):
    template, _ = listening_template(qwen3_tokenizer)
    assert end_of_turn_ids(qwen3_tokenizer, template)[0] == 151645


def test_default_system_prompt_comes_through_where_the_dialogue_has_none():
    tokenizer = byte_tokenizer(TEMPLATES["qwen2.5"])
    template, _ = listening_template(tokenizer)
    pieces = render_pieces(as_messages(MESSAGES[1:3]), tokenizer, template)
    assert pieces[0].kind == "scaffold"
    assert "You are a helpful assistant." in pieces[0].text
    assert "helpful" not in "".join(p.text for p in render_pieces(as_messages(MESSAGES[:3]), tokenizer, template))


def test_prompt_that_opens_a_think_block_has_it_closed():
    tokenizer = byte_tokenizer(OPEN_THINK)
    template, _ = listening_template(tokenizer)
    text = render(tokenizer, MESSAGES[1:3], template)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nTwo.<|im_end|>\n")


def test_endless_template_gets_an_eos_after_every_answer():
    tokenizer = byte_tokenizer(ENDLESS)
    template, _ = listening_template(tokenizer)
    assert render(tokenizer, MESSAGES, template).count("<|endoftext|>") == 2
    assert "no special token ends" in template_fault(tokenizer, ENDLESS)


def test_tokenizer_that_no_template_helps_is_refused():
    tokenizer = byte_tokenizer("{{- 'always the same' -}}")
    with pytest.raises(UsageError, match="no usable chat template"):
        listening_template(tokenizer)


def test_dialogue_that_a_template_refuses_is_named():
    tokenizer = byte_tokenizer(TEMPLATES["gemma"])
    messages = [Message("user", ("a",)), Message("user", ("b",)), Message("assistant", ("c",))]
    with pytest.raises(DataError, match="refuses a dialogue of user, user, assistant: Conversation roles must"):
        render_pieces(messages, tokenizer, listening_template(tokenizer)[0])
    with pytest.raises(DataError, match="drops, repeats or moves messages"):
        render_pieces(as_messages(MESSAGES), tokenizer, MOVING_SYSTEM)


def test_pieces_joined_are_the_rendered_text(qwen3_tokenizer):
    template, _ = listening_template(qwen3_tokenizer)
    messages = [*MESSAGES[:4], {**MESSAGES[4], "reasoning_content": "Surely."}]
    pieces = render_pieces(as_messages(messages), qwen3_tokenizer, template)
    assert "".join(piece.text for piece in pieces) == render(qwen3_tokenizer, messages, template)
    own = [(p.kind, p.text) for p in pieces if p.message_index == 4]
    assert own == [("scaffold", "<think>\n"), ("text", "Surely."), ("scaffold", "\n</think>\n\n"), ("text", "Yes.")]


def test_contents_are_stripped_and_clips_keep_their_places(chatml_tokenizer):
    clip = AudioClip("/a.wav")
    message = Message("user", (" ", " ", clip, " then ", "", clip, "which? \n"))
    pieces = render_pieces([message], chatml_tokenizer, TEMPLATES["chatml"])
    kinds = [(p.kind, p.text) for p in pieces if p.message_index == 0]
    assert kinds == [("audio", AUDIO_TOKEN), ("text", " then "), ("audio", AUDIO_TOKEN), ("text", "which?")]


CONTROL = ("<|im_end|>", "<|im_start|>", "<think>", "</think>", "<tool_call>", "<|endoftext|>", "<|vision_pad|>")
TYPED = st.lists(st.one_of(st.sampled_from([*CONTROL, "<", "<th", "ink>", "<|im_", "end|>"]), st.text(max_size=6)))


@settings(max_examples=150, deadline=None)
@given(TYPED.map("".join))
def test_nothing_typed_becomes_an_added_token(qwen3_tokenizer, text):
    ids = encode_text(qwen3_tokenizer, text)
    assert all(i < 151643 for i in ids)
    assert qwen3_tokenizer.decode(ids) == qwen3_tokenizer.backend_tokenizer.normalizer.normalize_str(text)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=40))
def test_ordinary_text_is_tokenised_as_ever(qwen3_tokenizer, text):
    assert encode_text(qwen3_tokenizer, text) == qwen3_tokenizer(text, add_special_tokens=False)["input_ids"]


def test_runs_of_line_breaks_that_are_added_tokens_stay_ordinary_text(chatml_tokenizer):
    ids = encode_text(chatml_tokenizer, "a\n\nb<|im_end|>")
    assert chatml_tokenizer.convert_ids_to_tokens(ids)[:3] == ["a", "\n\n", "b"]
    assert len(ids) == 3 + len("<|im_end|>")


def test_token_added_later_is_kept_out_as_well():
    tokenizer = byte_tokenizer(TEMPLATES["chatml"])
    assert len(encode_text(tokenizer, AUDIO_TOKEN)) == len(AUDIO_TOKEN)
    tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
    assert len(encode_text(tokenizer, AUDIO_TOKEN)) == len(AUDIO_TOKEN)
