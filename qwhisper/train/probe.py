"""The listening probe: how much the true audio lowers the loss, compared with audio that has another right answer
(the listening gain), and how much a model that hears has kept of the text model.

A loss can fall because of the text alone, and does not show what is forgotten. The probe only observes: it draws no
random number, keeps no gradient, and leaves model and optimizer unchanged.
"""

import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qwhisper.data.dialogue import Dialogue
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.processes import Poll, nothing
from qwhisper.data.rows import Sample
from qwhisper.engine.executor import Executor
from qwhisper.errors import MemoryLimitError
from qwhisper.evaluate.forgetting import (
    MAX_QUESTIONS,
    Questions,
    Score,
    answered_by_text_model,
    own_answers,
    scores_by_ear,
)
from qwhisper.evaluate.listening import SwappedTurn, swap_audio
from qwhisper.evaluate.turns import Decoded, Turn, first_whole, turns_of
from qwhisper.memory import is_out_of_memory
from qwhisper.train.learning import SHORTEST

TIME_SHARE = 0.005  # of the training time, at most
MAX_PAIRS = 16  # a probe is then 32 forward passes of one dialogue each: 4 steps of 4 dialogues
MIN_PAIRS = 8  # with fewer, the estimate of the noise is too uncertain
MAX_DIALOGUES = 256  # searched for pairs
TEXT_ROWS = 16  # answers, some 500 tokens: once generated, they cost a hundredth of the pairs
WARMUP_STEPS = 600  # twice what a 1.5B language model needed to hear spoken digits at the stable recipe's rate
LAST_SHARE = 0.1  # of the training time, for the single probe at the end of a short run
MIN_WARMUP_STEPS = 300  # for short runs; batches of 16 at a projector rate of 1e-3 took 50 to 100


@dataclass(frozen=True)
class ListeningGain:
    """gain: loss with swapped audio minus loss with true audio, nats a supervised token. noise: its standard error."""

    gain: float
    noise: float
    pairs: int
    tokens: int


@dataclass(frozen=True)
class Probed(ListeningGain):
    """The result of a probe.

    text_shift: divergence of the language model from its base on the base's answers to text, nats a token; None if the
    base answers everything alike. retention, hearing: scores on speech, on kinds of question that were never trained on
    and on trained ones; None if too few were asked.
    """

    text_shift: float | None
    retention: Score | None = None
    hearing: Score | None = None


@dataclass(frozen=True)
class Pair:
    """One answer after its own audio, and after another dialogue's audio, for which it is wrong."""

    true: Sample
    swapped: Sample


@dataclass
class ProbeState:
    """Seconds of all steps, all probes, the last probe, and the steps since; saved with the run as JSON."""

    trained: float = 0.0
    probed: float = 0.0
    last_probe: float = 0.0
    trained_since: float = 0.0


class ListeningProbe:
    """Decides when to probe the model, and probes it. The caller saves `state`."""

    def __init__(
        self,
        executor: Executor,
        encoder: DialogueEncoder,
        pairs: Sequence[Pair],
        state: ProbeState,
        *,
        first_step: int,
        questions: Questions | None = None,
        asks_from: int = 0,
    ):
        self.executor = executor
        self.encoder = encoder
        self.pairs = list(pairs)
        self.state = state
        self.first_step = first_step
        self.questions = questions or Questions()
        self.asks_from = asks_from
        # Made when first needed: the base's answers, and the questions that it answers right.
        self.text: list[Sample] | None = None
        self.known: Questions | None = None

    def due(self, step: int, step_seconds: float) -> bool:
        """Whether to probe now. Call once after each step, with its number and its seconds.

        The first probe is at `first_step`. The next follows when the last probe took at most TIME_SHARE of the steps
        since, and all probes with the next take at most TIME_SHARE of all steps.
        """
        state = self.state
        state.trained += step_seconds
        state.trained_since += step_seconds
        paid = state.last_probe <= TIME_SHARE * state.trained_since
        return step >= self.first_step and paid and state.probed + state.last_probe <= TIME_SHARE * state.trained

    def measure(self, *, ask: bool = True) -> Probed | None:
        """Probe the model. ask: whether to ask the questions, which cost more than all the rest.

        Returns None if a loss is not finite or memory runs out: the run matters more.
        """
        started = time.perf_counter()
        try:
            found = self._look(ask)
        except Exception as error:
            if not (isinstance(error, MemoryLimitError) or is_out_of_memory(error)):
                raise
            found = None
        self._spend(time.perf_counter() - started)
        return found

    def _look(self, ask: bool) -> Probed | None:
        losses = self.executor.sample_losses([pair.true for pair in self.pairs] + [pair.swapped for pair in self.pairs])
        if not losses or not all(map(math.isfinite, losses)):
            return None
        count = len(self.pairs)
        gain = listening_gain(losses[:count], losses[count:], [pair.true.num_supervised for pair in self.pairs])
        retention, hearing = self._ask() if ask and self.questions else (None, None)
        return Probed(**vars(gain), text_shift=self.text_shift(), retention=retention, hearing=hearing)

    def text_shift(self) -> float | None:
        if self.text is None:
            # This takes minutes on a CPU, so signals are polled before each token.
            polling = self.executor.model.register_forward_pre_hook(lambda *_: self.executor.before_pack())
            try:
                with self.executor.evaluation_mode():
                    self.text = own_answers(self.executor.model, self.encoder, TEXT_ROWS)
            finally:
                polling.remove()
        return self.executor.shift_from_base(self.text) if self.text else None

    def _ask(self) -> tuple[Score | None, Score | None]:
        if self.known is None:
            self.known = answered_by_text_model(self.executor, self.questions)
        return scores_by_ear(self.executor, self.known)

    def _spend(self, seconds: float) -> None:
        self.state.last_probe, self.state.trained_since = seconds, 0.0
        self.state.probed += seconds


def make_probe(
    executor: Executor,
    encoder: DialogueEncoder,
    dialogues: Sequence[Dialogue],
    state: ProbeState,
    *,
    first_step: int,
    seed: int,
    trained_kinds: Collection[str] = (),
    questions: Questions | None = None,
    asks_from: int = 0,
    num_workers: int = 0,
    poll: Poll = nothing,
) -> ListeningProbe | None:
    """A probe on `dialogues`, whose audio it decodes, in `num_workers` processes if there are any. poll: as in
    `first_whole`.

    questions: asked in probes from step `asks_from` on. Returns None if the dialogues give fewer than MIN_PAIRS pairs,
    as text-only ones do.
    """
    pairs = choose_pairs(dialogues, encoder, seed=seed, trained_kinds=trained_kinds, num_workers=num_workers, poll=poll)
    if len(pairs) < MIN_PAIRS:
        return None
    return ListeningProbe(
        executor, encoder, pairs, state, first_step=first_step, questions=questions, asks_from=asks_from
    )


def first_probe_step(*, total_steps: int, freeze_projector_steps: int, samples_per_step: int) -> int:
    """The step of the first probe, from which a missing gain is a fault.

    After the steps with a frozen projector, half of the run, but at least MIN_WARMUP_STEPS and at most WARMUP_STEPS;
    later if the probe would take more than TIME_SHARE of the time by then.
    """
    warmup = min(WARMUP_STEPS, max(MIN_WARMUP_STEPS, total_steps // 2))
    return freeze_projector_steps + max(warmup, _steps_that_pay_for(2 * MAX_PAIRS, samples_per_step))


def shortest_probed(*, samples_per_step: int) -> int:
    """Steps of the shortest run that gets one probe at its end, to report whether the model hears."""
    return max(SHORTEST, math.ceil(_steps_that_pay_for(2 * MAX_PAIRS, samples_per_step) * TIME_SHARE / LAST_SHARE))


def first_questions_step(*, samples_per_step: int) -> int:
    """The first step at which a probe with all questions takes at most TIME_SHARE of the time. The model hears each
    question in every probe, and reads it once, which takes half as long.
    """
    return _steps_that_pay_for(2 * MAX_PAIRS + 3 * MAX_QUESTIONS, samples_per_step)


def _steps_that_pay_for(passes: int, samples_per_step: int) -> int:
    """The number of steps of which TIME_SHARE is as long as `passes` forward passes of a dialogue.

    A forward pass costs half as much as training on the same dialogue: through frozen weights, the backward pass takes
    as long as the forward pass.
    """
    return math.ceil(passes / (2 * samples_per_step) / TIME_SHARE)


def listening_gain(true: Sequence[float], swapped: Sequence[float], tokens: Sequence[int]) -> ListeningGain:
    """The gain and its noise from each pair's losses, which are sums over its supervised tokens, in nats.

    The gain is a ratio of sums, so long answers count for more. Its standard error is that of a ratio estimator
    (Cochran, Sampling Techniques, 1977, chapter 6).
    """
    count, total = len(tokens), sum(tokens)
    gains = [with_other - with_own for with_own, with_other in zip(true, swapped, strict=True)]
    gain = sum(gains) / total
    residuals = sum((own - gain * n) ** 2 for own, n in zip(gains, tokens, strict=True))
    return ListeningGain(gain, math.sqrt(residuals * count / (count - 1)) / total, count, total)


def choose_pairs(
    dialogues: Sequence[Dialogue],
    encoder: DialogueEncoder,
    *,
    seed: int,
    trained_kinds: Collection[str] = (),
    num_workers: int = 0,
    poll: Poll = nothing,
) -> list[Pair]:
    """At most MAX_PAIRS pairs, from as many dialogues as possible: two answers of one dialogue are not independent.

    Uses kinds of question beyond `trained_kinds` only if there are too few pairs without them: a model that hears may
    still not know the answer. Leaves out pairs with a bad clip, and pairs that `encoder` would cut, because the cut may
    change the right answer.
    """
    chosen = np.random.default_rng(seed).permutation(len(dialogues))[:MAX_DIALOGUES]
    turns = turns_of([dialogues[index] for index in chosen])
    of_trained_kinds = [turn for turn in turns if turn.answer.kind is None or turn.answer.kind in trained_kinds]
    heard: Decoded = {}

    def pairs_of(turns: Sequence[Turn]) -> list[Pair]:
        groups = [(turn, swapped.turn) for turn, swapped in _by_preference(turns, swap_audio(turns, seed=seed))]
        return [Pair(*rows) for rows in first_whole(groups, MAX_PAIRS, encoder, heard, num_workers, poll)]

    pairs = pairs_of(of_trained_kinds)
    if len(pairs) >= MIN_PAIRS or len(of_trained_kinds) == len(turns):
        return pairs
    return pairs_of(turns)


def _by_preference(turns: Sequence[Turn], swaps: Sequence[SwappedTurn | None]) -> Iterator[tuple[Turn, SwappedTurn]]:
    """One turn of every dialogue, then a second one of each, and so on.

    Within a dialogue, turns whose partner was asked the same question come first, because only the audio differs; then
    earlier turns, which are shorter.
    """
    by_dialogue: dict[str, list[tuple[Turn, SwappedTurn]]] = {}
    for turn, swapped in zip(turns, swaps, strict=True):
        if swapped is not None:
            by_dialogue.setdefault(turn.dialogue.id, []).append((turn, swapped))
    ranked = [sorted(found, key=lambda item: not item[1].same_question) for found in by_dialogue.values()]
    for rank in range(max(map(len, ranked), default=0)):
        of_this_rank = [found[rank] for found in ranked if rank < len(found)]
        yield from sorted(of_this_rank, key=lambda item: not item[1].same_question)
