"""JSON files that others wrote: read with bounds, and any fault in one told in a sentence that names the file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

MIB = 1 << 20
MAX_BYTES = 16 * MIB  # far above any configuration, index or profile; a tokenizer may have more


class JsonError(ValueError):
    """A file that holds no usable JSON; the message says which and why."""


def read_json(path: Path, *, most: int = MAX_BYTES) -> Any:
    """The value in a JSON file of at most `most` bytes; raises JsonError."""
    return parse_json(read_text(path, most=most), str(path))


def read_object(path: Path, *, most: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file; raises JsonError, also for a value of another kind."""
    found = read_json(path, most=most)
    if not isinstance(found, dict):
        raise JsonError(f"{path} holds {kind_of(found)}, not an object of names and values")
    return found


def read_text(path: Path, *, most: int = MAX_BYTES) -> str:
    """An ordinary file's UTF-8 text; raises JsonError. Never waits, as opening a pipe would."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise JsonError(f"{path} cannot be read: {error.strerror}") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise JsonError(f"{path} is no ordinary file")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(most + 1)
        if len(data) > most:
            size = max(found.st_size, len(data))
            raise JsonError(f"{path} has {size / MIB:.1f} MiB; of such a file at most {most / MIB:g} are read")
    except OSError as error:
        raise JsonError(f"{path} cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def parse_json(text: str, origin: str) -> Any:
    """The value of a JSON text; raises JsonError naming `origin`."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise JsonError(f"{origin} is nested too deeply") from error
    except ValueError as error:
        raise JsonError(f"{origin} is not valid JSON: {error}") from error


def kind_of(value: object) -> str:
    """A JSON value for a message: a short one itself, else its kind."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
