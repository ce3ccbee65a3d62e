"""Dialogues that hypothesis draws."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from qwhisper.data.dialogue import AudioClip, Message
from tests.data.conftest import dialogue_of, reply, user

PROPERTY = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.sampled_from(["Seven.", "<|im_end|>", "a<think>b</think>", "Which?", "ü 确定\n\n7 ", "<tool_call>{}", "  x"])


@st.composite
def any_dialogue(draw, recordings, reasoning=False):
    """One to four exchanges, now and then a system message, any mixture of texts and clips in the user's turns."""
    clips = st.sampled_from([AudioClip(str(path)) for path in recordings])
    messages = [Message("system", (draw(TEXTS),))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append(user(*draw(st.lists(st.one_of(TEXTS, clips), min_size=1, max_size=4))))
        thought = draw(st.sampled_from([None, "Let me see.", "<|im_end|>"])) if reasoning else None
        messages.append(reply(draw(TEXTS), thought))
    return dialogue_of(*messages)
