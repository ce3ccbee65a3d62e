"""Swapped audio: if a model gives the same answer after other clips, it has not heard the audio.

Works on dialogues, without a model. Only clips are exchanged; all text, earlier answers included, stays.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qwhisper.data.dialogue import AudioClip
from qwhisper.evaluate.metrics import normalise
from qwhisper.evaluate.turns import Turn


@dataclass(frozen=True)
class SwappedTurn:
    """A turn with its partner's clips. same_question: the partner was asked the same, so its reference is now right."""

    turn: Turn
    partner: Turn
    same_question: bool


def swap_audio(turns: Sequence[Turn], *, seed: int = 0) -> list[SwappedTurn | None]:
    """Each turn with the clips of another dialogue that has a different right answer; None if there are no such clips.

    The first choice is a turn with the same user messages and number of clips but another reference; then any turn with
    the same number of clips and another reference. Each new clip must differ from the one that it replaces, and say
    something else if both transcripts are known. A turn without clips before it gives None.
    """
    references = [normalise(turn.reference) for turn in turns]
    same_question, as_many_clips = defaultdict(list), defaultdict(list)
    for position, turn in enumerate(turns):
        same_question[_question(turn)].append(position)
        as_many_clips[len(turn.clips)].append(position)

    def swap(position: int) -> SwappedTurn | None:
        turn = turns[position]
        pools = ((same_question[_question(turn)], True), (as_many_clips[len(turn.clips)], False)) if turn.clips else ()
        generator = np.random.default_rng([seed, position])
        for pool, is_same in pools:
            for other in _from_random_place(pool, generator):
                if references[other] != references[position] and _fits(turn, turns[other]):
                    return SwappedTurn(_heard_instead(turn, turns[other]), turns[other], is_same)
        return None

    return [swap(position) for position in range(len(turns))]


def _question(turn: Turn) -> Hashable:
    """All that was said to the model before its answer, with the places of the clips."""
    return tuple((m.role, normalise(m.text), len(m.clips)) for m in turn.history if m.role != "assistant")


def _from_random_place(pool: Sequence[int], generator: np.random.Generator) -> Iterator[int]:
    """The whole pool once, in order, starting at a random place and continuing from its beginning."""
    first = int(generator.integers(len(pool)))
    yield from pool[first:]
    yield from pool[:first]


def _fits(turn: Turn, other: Turn) -> bool:
    if other.dialogue.id == turn.dialogue.id:
        return False
    return all(_says_something_else(*clips) for clips in zip(turn.clips, other.clips, strict=True))


def _says_something_else(clip: AudioClip, other: AudioClip) -> bool:
    if clip.transcript is not None and other.transcript is not None:
        return normalise(clip.transcript) != normalise(other.transcript)
    return replace(clip, transcript=None) != replace(other, transcript=None)


def _heard_instead(turn: Turn, other: Turn) -> Turn:
    """The turn with the clips of `other` in their order."""
    rest = iter(other.clips)
    history = [
        replace(message, content=tuple(next(rest) if isinstance(part, AudioClip) else part for part in message.content))
        for message in turn.history
    ]
    return Turn(replace(turn.dialogue, messages=(*history, turn.answer)), turn.index)
