"""JSON from `dataclasses.asdict` back to the dataclasses, with every key and type checked.

A field that older checkpoints don't have declares `metadata=ADDED_LATER`; any other is required.
"""

import dataclasses
import math
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

ADDED_LATER = types.MappingProxyType({"added_later": True})
T = TypeVar("T")


def from_json(cls: type[T], value: Any, where: str = "") -> T:
    """Raises ValueError naming the key whose value is missing, unknown, of another type or not finite."""
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'} is {_kind(value)} where an object is expected")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    dot = f"{where}." if where else ""
    if unknown := sorted(value.keys() - fields.keys()):
        raise ValueError(f"{dot}{unknown[0]} is not known to this version")
    if missing := [name for name in fields if name not in value and "added_later" not in fields[name].metadata]:
        raise ValueError(f"{dot}{missing[0]} is missing")
    hints = get_type_hints(cls)
    return cls(**{name: checked(hints[name], value[name], f"{dot}{name}") for name in fields if name in value})


def checked(hint: Any, value: Any, where: str) -> Any:
    """`value` as a field of type `hint`. Raises ValueError as `from_json` does.

    A whole number is accepted as a float; true and false are not numbers. `Any` accepts every value unchecked.
    """
    if hint is Any:
        return value
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        kinds = [kind for kind in inner if kind is not type(None)]
        for kind in kinds[:-1]:
            try:
                return checked(kind, value, where)
            except ValueError:
                continue
        return checked(kinds[-1], value, where)
    if origin is Literal and value in inner:
        return value
    if origin is list and isinstance(value, list):
        return [checked(inner[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: checked(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, float | int) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}")
        return value
    if hint in (int, str, bool) and type(value) is hint:
        return value
    expected = f"one of {', '.join(map(str, inner))}" if origin is Literal else getattr(hint, "__name__", hint)
    raise ValueError(f"{where} is {_kind(value)} where {expected} is expected")


def _kind(value: Any) -> str:
    return f"{value!r:.40} ({type(value).__name__})"
