"""Single values of a line: their types and bounds, and how a message shows them.

Knows JSON's values. Does not know which fields a request has. Every refusal is a `LineError`, one sentence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

BIGGEST = 1 << 64  # of any number but a token id
MAX_TOKEN_ID = 1 << 31
TYPES = {bool: "true or false", str: "a text", dict: "an object"}


class LineError(ValueError):
    """A line that cannot be answered: a code for programs and one sentence for people."""

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.code = code


def check_neutral(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise LineError where a field that is not done here asks for something."""
    if any(type(value) is type(each) and value == each for each in allowed):  # 0 == False
        return
    if allowed and all(isinstance(each, bool) for each in allowed):
        check_type(name, value, bool)
    raise LineError(f"{name} is {shown(value)}, which is not supported; leave it out", "unsupported_parameter")


def check_type(name: str, value: object, kind: type) -> None:
    """Raise LineError for a value of any type but `kind`, which is one of TYPES."""
    if type(value) is not kind:
        raise LineError(f"{name} is {shown(value)}; it must be {TYPES[kind]}")


def read_whole(name: str, value: object) -> int:
    """Return a whole number; raises LineError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise LineError(f"{name} is {shown(value)}; it must be a whole number")
    if abs(value) >= BIGGEST:
        raise LineError(f"{name} is {shown(value)}; it must be below 2^64")
    return value


def read_real(name: str, value: object) -> float:
    """Return a number; raises LineError for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < BIGGEST:
        raise LineError(f"{name} is {shown(value)}; it must be a number below 2^64")
    return value


def read_flag(name: str, value: object) -> bool:
    """Return true or false; raises LineError for anything else."""
    if not isinstance(value, bool):
        raise LineError(f"{name} is {shown(value)}; it must be true or false")
    return value


def read_text(name: str, value: object) -> str:
    """Return a text, which has an encoding: JSON may hold half of a character that needs two escapes."""
    if not isinstance(value, str):
        raise LineError(f"{name} is {shown(value)}; it must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise LineError(f"character {error.start + 1} of {name} is half a surrogate pair, so no text") from error
    return value


def read_token_ids(name: str, value: object) -> tuple[int, ...]:
    """Return a list of token ids; raises LineError for anything else."""
    if not isinstance(value, list):
        raise LineError(f"{name} is {shown(value)}; it must be a list of token ids")
    bad = next((t for t in value if type(t) is not int or not 0 <= t < MAX_TOKEN_ID), None)
    if bad is not None or None in value:
        raise LineError(f"{name} holds {shown(bad)}, which is no token id")
    return tuple(value)


def shown_field(fields: Mapping[str, Any], name: str) -> str:
    """ "missing", or the value."""
    return shown(fields[name]) if name in fields else "missing"


def shown_name(name: str) -> str:
    """A field's name as a message can show it."""
    return shown(name) if len(name) > 40 or not name.isidentifier() else name


def shown(value: object) -> str:
    """A value of JSON in a few words, however large it is."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 40 else value[:40] + "...")
    if isinstance(value, int) and abs(value) >= BIGGEST:
        return f"a number of {len(str(abs(value)))} digits"
    return json.dumps(value)
