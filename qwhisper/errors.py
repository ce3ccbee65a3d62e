"""Errors that a user can cause, each with the exit code that the command line ends with.

Everything else is a bug and may crash with its traceback.
"""


def first_line(error: BaseException) -> str:
    """First part of an error's message, without PyTorch's additions; its type if the message is empty (MemoryError)."""
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
    """Out of memory, and no smaller pack helps."""

    exit_code = 4


class ExecutionError(QwhisperError):
    """A pack can't be compiled or recorded as a CUDA graph; it may run plain."""


class NumericalError(QwhisperError):
    """The numbers are wrong, and the run must not continue."""

    exit_code = 5


class CheckpointError(QwhisperError):
    """A checkpoint is damaged, incomplete or belongs to something else."""

    exit_code = 6


class NothingLearnedError(QwhisperError):
    """A training finished, and its numbers show that it learned nothing."""

    exit_code = 7


class DiskError(QwhisperError):
    """The disk can't write what must be saved."""

    exit_code = 8
