"""The sidecar beside a batch's output, `OUTPUT.job`: which job wrote the output, replaced whole or not at all.

Owns its name, its format and its temporary files. Never follows a link and never writes into a file that is there.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from ..os_errors import reason

VERSION = 2  # of the sidecar and of the output's ids
MAX_BYTES = 1 << 20  # a sidecar has a few hundred


class JournalError(ValueError):
    """An output that cannot be gone on with, or not be written; one sentence with a way out."""


class Sidecar:
    """The sidecar of an output. Whoever writes or sweeps holds the output's lock, so is the only one who does."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.job")
        # of its temporary files; not made of the output's name, which may be as long as names can be
        self.prefix = f".flexgen_triton-{xxhash.xxh64_hexdigest(os.fsencode(output.name))}"

    def read(self) -> dict[str, Any] | None:
        """The fingerprint of the job that wrote the output; None where there is no sidecar. Raises JournalError."""
        text = self._text()
        if text is None:
            return None
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._foreign() from error
        if not isinstance(found, dict) or not isinstance(found.get("fingerprint"), dict):
            raise self._foreign()
        if found.get("version") != VERSION:
            raise JournalError(
                f"{self.path} has version {found.get('version')}, this program writes {VERSION}; name another "
                "output, or finish the job with the program that began it"
            )
        return dict(found["fingerprint"])

    def _text(self) -> bytes | None:
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self._no_file() from error
            raise
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise self._no_file()
            text = os.read(file, MAX_BYTES + 1)
        finally:
            os.close(file)
        if len(text) > MAX_BYTES:
            raise self._foreign()
        return text

    def _foreign(self) -> JournalError:
        return JournalError(f"{self.path} is not what a batch writes; name another output")

    def _no_file(self) -> JournalError:
        return JournalError(
            f"{self.path} is no ordinary file, so no batch wrote it; move it away, or name another output"
        )

    def write(self, fingerprint: Mapping[str, Any]) -> None:
        """Replace the sidecar by one rename of a file that is whole and durable. Raises JournalError."""
        text = json.dumps({"version": VERSION, "fingerprint": dict(fingerprint)}, indent=1) + "\n"
        temporary = self.path.with_name(f"{self.prefix}-{secrets.token_hex(8)}.tmp")
        try:
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                _write_durably(file, text.encode())
                temporary.replace(self.path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise JournalError(
                f"{self.path} cannot be written: {reason(error)}; mend that, or name another output"
            ) from error

    def sweep(self) -> None:
        """Remove the temporary files of killed jobs on this output: by their name, ordinary, and of this user."""
        name = re.compile(re.escape(self.prefix) + r"-[0-9a-f]{16}\.tmp")
        with suppress(OSError), os.scandir(self.path.parent) as entries:  # one that stays costs nothing
            for entry in entries:
                if name.fullmatch(entry.name) and _is_own(entry.stat(follow_symlinks=False)):
                    os.unlink(entry.path)


def _write_durably(file: int, text: bytes) -> None:
    with open(file, "wb") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(file)


def _is_own(found: os.stat_result) -> bool:
    """Return True if the file may be one that `Sidecar.write` left behind when it was killed."""
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_size <= MAX_BYTES
