"""Declaration of a flag with its bounds: a value that no run can use is refused before anything is loaded.

The command line gives every flag the type of its field; from Python a value may have any type.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_type_hints

from qwhisper.errors import UsageError
from qwhisper.typed_json import checked

LARGEST = 2**63 - 1  # torch's integers hold no more
MOST_SAMPLES = 2**20  # at once, or in one optimizer step


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of a number: `at_least` and `at_most` are allowed values, `above` and `below` are not.

    besides: one allowed value outside the limits, such as the 0 that turns a bound off. why: the effect of a value
    outside, as the end of a sentence.
    """

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = LARGEST
    below: float = math.inf
    besides: float | None = None
    why: str = ""

    def fault(self, value: float) -> str | None:
        """What is wrong with `value`, or None."""
        if value == self.besides:
            return None
        if not -math.inf < value < math.inf:  # not math.isfinite, which overflows on an integer of 400 digits
            found = "must be a finite number"
        elif value < self.at_least:
            found = f"must be {self.at_least:.15g} or more"
        elif value <= self.above:
            found = f"must be above {self.above:.15g}"
        elif value > self.at_most:
            found = f"must be {self.at_most if isinstance(self.at_most, int) else format(self.at_most, '.15g')} or less"
        elif value >= self.below:
            found = f"must be below {self.below:.15g}"
        else:
            return None
        found += f", or {self.besides:g}" if self.besides is not None else ""
        return f"{found}: {self.why}" if self.why else found


LIMITS = [f.name for f in dataclasses.fields(Bounds)]  # what a flag's declaration may have


def flag(default: Any, help: str, **options: Any) -> Any:
    """A dataclass field. options: the limits of a number, by the names of `Bounds`, and what argparse takes."""
    limits = {name: options.pop(name) for name in LIMITS if name in options}
    metadata = {"help": help, **options} | ({"bounds": Bounds(**limits)} if limits else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(help: str) -> Any:
    """A field that must be given."""
    return field(metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Base of every verb's arguments. Construction checks each value."""

    # Name of a flag in other programs -> why this verb lacks it, as the rest of a sentence that begins with the name.
    NO_FLAGS: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        """Raise UsageError for the first field whose value is outside its `bounds` or not of its type. None is allowed
        if it is the default. Paths become strings.
        """
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            bounds, value = f.metadata.get("bounds"), getattr(self, f.name)
            if value is None and f.default is None:
                continue
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                object.__setattr__(self, f.name, value)  # the dataclass is frozen
            if bounds is not None and isinstance(value, int | float) and (fault := bounds.fault(value)):
                raise UsageError(f"--{f.name} {value}: {fault}")
            try:
                checked(hints[f.name], value, f"--{f.name}")
            except ValueError as error:
                raise UsageError(str(error)) from None
