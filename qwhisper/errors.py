"""Errors that a user can cause, each with the exit code that the command line ends with.

Everything else is a bug of ours and is allowed to crash with its traceback.
"""


def first_line(error: BaseException) -> str:
    """What an error says, without what PyTorch may add below; its type where it says nothing, as MemoryError does."""
    return str(error).partition("\n")[0] or type(error).__name__


class QwhisperError(Exception):
    """A fault that one sentence explains: what was found, where, and what to do next."""

    exit_code = 1


class UsageError(QwhisperError):
    """A flag, a recipe or a combination of them is wrong."""

    exit_code = 2


class DataError(QwhisperError):
    """The dialogues or the audio are at fault."""

    exit_code = 3


class BadClipError(DataError):
    """One clip is unreadable, not finite or silent: quarantined, unless too many are."""


class MemoryLimitError(QwhisperError):
    """Out of memory where no smaller pack could help."""

    exit_code = 4


class NumericalError(QwhisperError):
    """Numbers went wrong in a way that must not be passed over."""

    exit_code = 5


class CheckpointError(QwhisperError):
    """A checkpoint is damaged, incomplete or belongs to something else."""

    exit_code = 6


class NothingLearnedError(QwhisperError):
    """A training ran to its end, and its numbers say that it learned nothing."""

    exit_code = 7


class DiskError(QwhisperError):
    """The disk does not take what must be written."""

    exit_code = 8
