"""Rounds the sizes of a pack up to a few that occur again, so that few compilations and CUDA graphs serve a run.

What is added is padding: rows of zeros on which no result depends (`engine.batch`). Sizes rise in steps of a quarter of
a power of two, and of an eighth in packs above half of the largest, where most packs are. The other sizes of a pack
follow from its tokens in coarse steps: a padded border, window or supervised row costs little beside a padded token.
"""

from dataclasses import replace

from qwhisper.engine.batch import PackShape

LEAST = 64  # tokens or frames
TOKENS_A_SEGMENT = (64, 16, 4, 1)  # padded tokens a segment; the first that has enough segments
FRAMES_A_WINDOW = (128, 32, 8, 1)
SUPERVISED = (0.125, 0.25, 0.375, 0.5, 1.0)  # shares of the tokens
AUDIO = (0.25, 0.5, 0.625, 0.75, 1.0)
OF_SMALL_PACKS = (0.5, 1.0)  # both shares
SMALL = 1024  # tokens
LONGEST = (1024, 4096)  # tokens of the longest segment; attention's cost hardly depends on it


def rounded_shape(exact: PackShape, max_tokens: int, longest_window: int) -> PackShape:
    """A shape that holds the pack, one of few. max_tokens: of a pack of this run; a longer sample has sizes beyond it.
    longest_window: encoder frames of a whole window.
    """
    parts = 8 if exact.tokens > max_tokens // 2 else 4
    tokens = rounded(exact.tokens, parts)
    if exact.tokens <= max_tokens < tokens:
        tokens = max_tokens
    # Padding is a segment too, of at most the longest length, which may be short in a pack of short samples.
    max_length = next((length for length in LONGEST if length >= exact.max_length), power_of_two(exact.max_length))
    spare = -(-(tokens - exact.tokens) // max_length)
    supervised, teacher = _share(SUPERVISED, exact.supervised, tokens), None
    if exact.teacher is not None:  # its row may be shorter than the supervised positions of the pack
        teacher = rounded_shape(replace(exact.teacher, supervised=0), max_tokens, longest_window)
        teacher = replace(teacher, supervised=supervised)
    text = replace(
        exact,
        tokens=tokens,
        segments=_count(exact.segments + spare, tokens, TOKENS_A_SEGMENT),
        max_length=max_length,
        supervised=supervised,
        teacher=teacher,
    )
    return _with_audio(text, exact, longest_window, parts) if exact.windows else text


def _with_audio(text: PackShape, exact: PackShape, longest_window: int, parts: int) -> PackShape:
    audio_tokens = _share(AUDIO, exact.audio_tokens, text.tokens)
    if not exact.mel_frames:  # cached features, whose number no pass depends on
        return replace(text, audio_tokens=audio_tokens)
    frames = rounded(exact.encoder_frames, parts)
    spare = -(-(frames - exact.encoder_frames) // longest_window)
    return replace(
        text,
        audio_tokens=audio_tokens,
        encoder_frames=frames,
        mel_frames=2 * frames,
        windows=_count(exact.windows + spare, frames, FRAMES_A_WINDOW),
        max_window=longest_window,
    )


def rounded(count: int, parts: int) -> int:
    """The next of the powers of two from LEAST and `parts - 1` sizes between each two."""
    power = max(LEAST, power_of_two(count + 1) // 2)  # at or below the count
    step = power // parts
    return max(LEAST, -(-count // step) * step)


def power_of_two(least: int) -> int:
    """The first power of two that is not below `least`."""
    return 1 << (least - 1).bit_length()


def _share(shares: tuple[float, ...], count: int, tokens: int) -> int:
    """The first of the shares of `tokens` that holds `count`; `count` can't exceed the tokens."""
    shares = OF_SMALL_PACKS if tokens <= SMALL else shares
    return next(found for share in shares if (found := int(share * tokens)) >= count)


def _count(count: int, rows: int, rows_each: tuple[int, ...]) -> int:
    return next(found for each in rows_each if (found := rows // each) >= count)
