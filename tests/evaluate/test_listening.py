"""The rules by which clips are swapped, on dialogues drawn at random."""

from hypothesis import given, settings
from hypothesis import strategies as st

from qwhisper.data.dialogue import AudioClip, Dialogue, Message
from qwhisper.data.tools import ToolCall
from qwhisper.data.waveform import sound_of_bytes
from qwhisper.evaluate.listening import swap_audio
from qwhisper.evaluate.metrics import normalise
from qwhisper.evaluate.turns import Turn, turns_of

WORDS = ("one", "two", "three")
QUESTIONS = ("Which?", "The last one?", "")


def question(draw, number: int) -> Message:
    clips = []
    for _ in range(draw(st.integers(0, 2))):
        word = draw(st.sampled_from(WORDS))
        known = draw(st.booleans())
        clips.append(AudioClip(f"/{word}-{draw(st.integers(0, 2))}.wav", transcript=word if known else None))
    text = draw(st.sampled_from(QUESTIONS)) or (f"so {number}?" if not clips else "")
    return Message("user", (*clips, text) if text else tuple(clips))


@st.composite
def files(draw) -> list[Dialogue]:
    dialogues = []
    for number in range(draw(st.integers(1, 8))):
        messages = [Message("system", ("Be brief.",))] if draw(st.booleans()) else []
        for _ in range(draw(st.integers(1, 3))):
            answer = Message("assistant", (draw(st.sampled_from(["One.", "one", "two", "yes"])),))
            messages += [question(draw, number), answer]
        dialogues.append(Dialogue(f"d{number}", tuple(messages), f"f:{number}"))
    return dialogues


def says_else(clip: AudioClip, other: AudioClip) -> bool:
    if clip.transcript and other.transcript:
        return clip.transcript != other.transcript
    return clip.path != other.path


def allowed(turn: Turn, other: Turn) -> bool:
    """The rules, written down once more."""
    return (
        other.dialogue.id != turn.dialogue.id
        and len(other.clips) == len(turn.clips)
        and normalise(other.reference) != normalise(turn.reference)
        and all(says_else(*pair) for pair in zip(turn.clips, other.clips, strict=True))
    )


def asked_the_same(turn: Turn, other: Turn) -> bool:
    def said(of: Turn):
        return [(m.role, m.text.lower(), len(m.clips)) for m in of.history if m.role != "assistant"]

    return said(turn) == said(other)


def test_masked_answers_and_calls_are_history_and_not_asked_for():
    call = Message("assistant", ("Let me look.",), tool_calls=(ToolCall("look", "{}"),))
    wrong = Message("assistant", ("Two.",), learned=False)
    user, tool, right = Message("user", ("One?",)), Message("tool", ("1",)), Message("assistant", ("One.",))
    dialogue = Dialogue("a", (user, wrong, user, call, tool, right), "f:1")
    (turn,) = turns_of([dialogue])
    assert turn.index == 5 and turn.history == (user, wrong, user, call, tool)


@settings(max_examples=75, deadline=None)
@given(files())
def test_partner_keeps_the_rules_and_is_found_where_there_is_one(dialogues):
    turns = turns_of(dialogues)
    for turn, swapped in zip(turns, swap_audio(turns), strict=True):
        partners = [other for other in turns if turn.clips and allowed(turn, other)]
        if swapped is None:
            assert partners == []
            continue
        assert swapped.partner in partners
        same = [other for other in partners if asked_the_same(turn, other)]
        assert swapped.same_question == bool(same)
        assert not same or swapped.partner in same


@settings(max_examples=50, deadline=None)
@given(files())
def test_clips_alone_are_exchanged(dialogues):
    turns = turns_of(dialogues)
    for turn, swapped in zip(turns, swap_audio(turns), strict=True):
        if swapped is None:
            continue
        changed = swapped.turn
        assert changed.clips == swapped.partner.clips
        assert changed.answer == turn.answer
        assert changed.dialogue.id == turn.dialogue.id
        assert [m.role for m in changed.history] == [m.role for m in turn.history]
        for after, before in zip(changed.history, turn.history, strict=True):
            assert [isinstance(p, AudioClip) for p in after.content] == [
                isinstance(p, AudioClip) for p in before.content
            ]
            assert after.text == before.text


@settings(max_examples=25, deadline=None)
@given(files(), st.integers(0, 3))
def test_same_seed_same_clips(dialogues, seed):
    turns = turns_of(dialogues)
    assert swap_audio(turns, seed=seed) == swap_audio(turns_of(dialogues), seed=seed)


def test_seed_chooses_among_partners():
    def dialogue(number: int) -> Dialogue:
        question = Message("user", (AudioClip(f"/{number}.wav"), "Which?"))
        return Dialogue(str(number), (question, Message("assistant", (str(number),))), "f")

    turns = turns_of([dialogue(number) for number in range(50)])
    first, second = (swap_audio(turns, seed=seed) for seed in (0, 1))
    assert all(swapped and swapped.same_question for swapped in first)
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 40


def test_answer_without_a_question_is_no_turn():
    greeting = Message("assistant", ("Hello.",))
    messages = (greeting, Message("user", ("Hi",)), greeting, greeting)
    assert [turn.index for turn in turns_of([Dialogue("a", messages, "f")])] == [2, 3]


def test_another_channel_or_other_bytes_are_another_clip_and_equal_bytes_are_not():
    left, right = (AudioClip("/stereo.wav", channel=channel) for channel in (0, 1))
    one, again, two = (
        AudioClip("", sound=sound_of_bytes(data, name)) for data, name in ((b"one", "a"), (b"one", "b"), (b"two", "c"))
    )
    assert partners(left, right) == [1, 0]
    assert partners(left, left) == [None, None]
    assert partners(one, two) == [1, 0]
    assert partners(one, again) == [None, None]


def partners(*clips: AudioClip) -> list[int | None]:
    """Whose clip each of two dialogues with different answers is given."""
    dialogues = [
        Dialogue(str(n), (Message("user", (clip, "Who?")), Message("assistant", (f"{n}.",))), f"f:{n}")
        for n, clip in enumerate(clips)
    ]
    swapped = swap_audio(turns_of(dialogues))
    return [None if turn is None else int(turn.partner.dialogue.id) for turn in swapped]
