"""How large the rows of a data set are, by headers and the length of texts: nothing is decoded or tokenised."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

from qwhisper.data.dialogue import Dialogue
from qwhisper.data.lengths import length_by_header
from qwhisper.frames import FRAME_SAMPLES, SAMPLE_RATE, FrameArithmetic

BYTES_A_TOKEN = 4.0  # of UTF-8: about four letters of English, or one and a third of Chinese
TEMPLATE_TOKENS = 6  # around each message in Qwen's chat template
MANY_PACKS = 100  # beside so many it does not matter how full the last one is
MOST_MEASURED = 500  # dialogues, spread over the file: a header takes about a millisecond to read


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The dialogues of a data set as rows, in means a row; `spread` is the standard deviation of `tokens`.

    frames: of the encoder, silence included. seconds: of audio. The defaults are clips of 8.5 s with a question and an
    answer in text, as in benchmarks/throughput.py.
    """

    tokens: float = 208.0
    spread: float = 75.0
    longest: int = 537
    supervised: float = 61.0
    audio_tokens: float = 109.0
    frames: float = 485.0
    seconds: float = 8.46

    def most(self, count: int, steps: int) -> int:
        """Tokens of the largest of `steps` steps of `count` rows each: its expectation, for sums that are normal (Blom,
        1958).
        """
        deviations = NormalDist().inv_cdf((steps - 0.375) / (steps + 0.25))
        return math.ceil(max(self.longest, count * self.tokens + deviations * self.spread * math.sqrt(count)))

    def packs(self, count: int, tokens: int) -> float:
        """Packs of at most `tokens` tokens that a step of `count` rows makes, on average."""
        step = NormalDist(count * self.tokens, max(1e-9, self.spread * math.sqrt(count)))
        # The mean of the number of packs, ceil(step / tokens), is the sum of the chances that it is above 0, 1, 2 …
        most = math.ceil((step.mean + 6 * step.stdev) / tokens)
        if most > MANY_PACKS:
            return step.mean / tokens + 0.5
        return max(1.0, sum(1.0 - step.cdf(number * tokens) for number in range(most)))


def rows_of(dialogues: Sequence[Dialogue], frames: FrameArithmetic, max_length: int | None = None) -> Rows:
    """Of at most MOST_MEASURED dialogues, evenly spread, one row each. max_length: tokens at which a row is cut."""
    count = min(len(dialogues), MOST_MEASURED)
    borders = [round(i * len(dialogues) / count) for i in range(count + 1)]
    found = [_row(dialogues[start], frames) for start, _ in pairwise(borders)]
    tokens = [min(row.tokens, max_length or row.tokens) for row in found]
    return Rows(
        tokens=statistics.fmean(tokens),
        spread=statistics.pstdev(tokens),
        longest=math.ceil(max(tokens)),
        supervised=statistics.fmean(row.supervised for row in found),
        audio_tokens=statistics.fmean(row.audio_tokens for row in found),
        frames=statistics.fmean(row.frames for row in found),
        seconds=statistics.fmean(row.seconds for row in found),
    )


def _row(dialogue: Dialogue, frames: FrameArithmetic) -> Rows:
    """One dialogue; its spread is 0."""
    samples = [length_by_header(clip) for clip in dialogue.clips]
    windows = [window for number in samples for window in frames.window_lengths(number)]
    audio_tokens = sum(map(frames.num_tokens, samples))
    texts = [(m.is_answer and m.learned, _tokens(m.text + (m.reasoning or ""))) for m in dialogue.messages]
    tokens = audio_tokens + sum(number for _, number in texts) + sum(map(_tokens, dialogue.tools))
    return Rows(
        tokens=tokens,
        spread=0.0,
        longest=math.ceil(tokens),
        supervised=sum(number for learned, number in texts if learned),
        audio_tokens=audio_tokens,
        frames=sum(windows) / FRAME_SAMPLES,
        seconds=sum(samples) / SAMPLE_RATE,
    )


def _tokens(text: str) -> float:
    return TEMPLATE_TOKENS + len(text.encode("utf-8", "replace")) / BYTES_A_TOKEN
