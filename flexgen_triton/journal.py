"""The output of a batch that survives anything: whole lines appended, and on a new start what is done is known.

Owns the output file, the sidecar beside it that says which job wrote it, and the reading of the input's lines. Every
output line begins with the number and the digest of the input line that it answers, so the file itself says what is
done: a killed job drops at most a last, torn line. Knows neither what a line asks for nor what an answer says.

- Only one process at a time has the output: it holds a lock on it (not on the sidecar, which is replaced by a rename).
- The sidecar `OUTPUT.job` is written, whole, before the first answer, and stays. An output without one is not ours.
- An answer is one append. What was written a while ago, and all of it at the end, is made durable by fsync.
- Where an append fails the file is cut back to its last whole line.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import xxhash

MAX_LINE = 8 << 20  # bytes of an input line; a longer one is read past in pieces
PIECE = 1 << 16
SYNC_S = 5.0  # between fsyncs, of 1 to 100 ms; what comes just after one the system writes within 30 s
VERSION = 1  # of the sidecar and of the ids
MAX_GAP = 1 << 24  # lines in flight, at most by far; an id beyond is no id of this job, and its table would be huge
ID = re.compile(rb'\{"id": "batch_req_(\d{9,18})_([0-9a-f]{16})", ')


class JournalError(ValueError):
    """An output that cannot be gone on with, or not be written; one sentence with a way out."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input: its number from 1, its digest without the line end, its bytes where there are few enough."""

    number: int
    digest: int
    size: int
    raw: bytes | None

    @property
    def is_blank(self) -> bool:
        return self.raw is not None and not self.raw.strip()

    @property
    def tag(self) -> str:
        """What is unique to the line, and the same whenever it is read."""
        return f"{self.number:09d}_{self.digest:016x}"


def read_lines(file: BinaryIO, limit: int = MAX_LINE) -> Iterator[Line]:
    """The input's lines in order, holding one of them; of a longer one than `limit` bytes, a piece."""
    number = 0
    while raw := file.readline(limit + 1):
        number += 1
        if len(raw) <= limit or raw.endswith(b"\n"):
            raw = raw.removesuffix(b"\n")
            yield Line(number, xxhash.xxh64_intdigest(raw), len(raw), raw)
        else:
            yield _long_line(number, raw, file)


def _long_line(number: int, raw: bytes, file: BinaryIO) -> Line:
    digest, size = xxhash.xxh64(), 0
    while raw:
        part = raw.removesuffix(b"\n")
        digest.update(part)
        size += len(part)
        raw = b"" if len(part) < len(raw) else file.readline(PIECE)
    return Line(number, digest.intdigest(), size, None)


class Journal:
    """The output file of a batch, as a context manager. `fingerprint`: what must be the same for answers to be.

    Raises JournalError for an output that is another process's, another job's or no job's, or was changed; OSError
    where it cannot be opened. An empty output, with or without a sidecar, begins anew.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], *, sync_s: float = SYNC_S) -> None:
        self.path, self._sidecar = path, path.with_name(f"{path.name}.job")
        self.done = 0
        self._digests = array("Q")  # by line number; 0: not done
        self._numbers_end = 0  # above the highest that is done
        self._size = 0
        self._sync_s, self._synced = sync_s, time.monotonic()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            self._lock()
            self._open(dict(fingerprint))
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise JournalError(f"{self.path} is no ordinary file; a job that can go on needs one for its answers")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(f"{self.path} is being written by another process; wait for it, or stop it") from error

    def _open(self, fingerprint: dict[str, Any]) -> None:
        is_empty = os.fstat(self._file).st_size == 0
        known = self._read_sidecar()
        if known is None and not is_empty:
            raise JournalError(
                f"{self.path} is not empty and has no {self._sidecar.name} beside it, so no batch wrote it; name "
                "another output"
            )
        if is_empty or known is None:
            self._fingerprint = fingerprint
            self._write_sidecar()
        else:
            self._fingerprint = known
            self._compare(fingerprint)
            self._scan()

    def _read_sidecar(self) -> dict[str, Any] | None:
        """The fingerprint of the job that wrote the output; None where there is no sidecar."""
        try:
            text = self._sidecar.read_bytes()
        except FileNotFoundError:
            return None
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise JournalError(f"{self._sidecar} is not what a batch writes; name another output") from error
        if not isinstance(found, dict) or not isinstance(found.get("fingerprint"), dict):
            raise JournalError(f"{self._sidecar} is not what a batch writes; name another output")
        if found.get("version") != VERSION:
            raise JournalError(
                f"{self._sidecar} has version {found.get('version')}, this program writes {VERSION}; name another "
                "output, or finish the job with the program that began it"
            )
        return dict(found["fingerprint"])

    def _write_sidecar(self) -> None:
        """Replace the sidecar by one rename of a file that is whole and durable."""
        temporary = self._sidecar.with_name(f"{self._sidecar.name}.tmp")
        try:
            with temporary.open("w") as file:
                file.write(json.dumps({"version": VERSION, "fingerprint": self._fingerprint}, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._sidecar)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise JournalError(f"{self._sidecar} cannot be written: {error.strerror}") from error
        self._sync_directory()

    def _sync_directory(self) -> None:
        """Make the names durable, of the sidecar and of the output."""
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _compare(self, given: Mapping[str, Any]) -> None:
        """Raise JournalError for the first field that differs from the sidecar's."""
        for name, value in given.items():
            if name in self._fingerprint and self._fingerprint[name] != value:
                raise JournalError(
                    f"{self.path} was begun with {name} {_shown(self._fingerprint[name])}, this is {_shown(value)}; "
                    "give what it was begun with, or name another output"
                )

    def confirm(self, fields: Mapping[str, Any]) -> None:
        """More of the fingerprint, known only now: kept by the first run, compared by later ones (JournalError)."""
        self._compare(fields)
        if not fields.keys() <= self._fingerprint.keys():
            self._fingerprint |= fields
            self._write_sidecar()

    def _scan(self) -> None:
        """Learn from the output which lines are done, and cut off a torn last line."""
        number = 0
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            while (raw := file.readline()).endswith(b"\n"):
                number += 1
                self._learn(number, raw)
                self._size += len(raw)
        if raw:
            os.ftruncate(self._file, self._size)

    def _learn(self, at: int, raw: bytes) -> None:
        """Take note of the output's line `at`. Raises JournalError where it is not as this job wrote it."""
        begin = ID.match(raw)
        try:
            whole = begin is not None and isinstance(json.loads(raw), dict)
        except (ValueError, RecursionError):
            whole = False
        number = int(begin[1]) if begin else 0
        if begin is None or not whole or not 0 < number <= at + MAX_GAP:
            raise JournalError(
                f"line {at} of {self.path} is not as this job wrote it; keep the {at - 1} lines before it and start "
                "again, or name another output"
            )
        if self._is_known(number):
            raise JournalError(
                f"line {at} of {self.path} answers line {number} of the input once more; take it out, or name another "
                "output"
            )
        self._note(number, int(begin[2], 16))

    def _note(self, number: int, digest: int) -> None:
        missing = number + 1 - len(self._digests)
        if missing > 0:
            self._digests.frombytes(bytes(8 * (missing + PIECE)))
        self._digests[number] = digest or 1
        self._numbers_end = max(self._numbers_end, number + 1)
        self.done += 1

    def _is_known(self, number: int) -> bool:
        return number < len(self._digests) and self._digests[number] != 0

    def is_done(self, line: Line) -> bool:
        """Whether an earlier run answered the line. Raises JournalError where it answered another one in its place."""
        if not self._is_known(line.number):
            return False
        if self._digests[line.number] != (line.digest or 1):
            raise JournalError(
                f"line {line.number} of the input is not the one that {self.path} answers; give the input it was begun "
                "with, or name another output"
            )
        return True

    def check_end(self, lines: int) -> None:
        """Raise JournalError where an earlier run answered a line beyond the input's last."""
        if self._numbers_end > lines + 1:
            raise JournalError(
                f"{self.path} answers line {self._numbers_end - 1}, the input has {lines} lines; give the input it was "
                "begun with, or name another output"
            )

    def append(self, line: Line, record: Mapping[str, Any]) -> None:
        """Write the answer to a line; all of it is in the file, or nothing. Raises JournalError where it cannot be."""
        text = json.dumps({"id": f"batch_req_{line.tag}", **record}, allow_nan=False)
        left = memoryview(text.encode() + b"\n")
        end = self._size + len(left)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            self._cut()
            raise self._failed(error) from error
        self._size = end
        self.done += 1
        if time.monotonic() - self._synced >= self._sync_s:
            self.sync()

    def sync(self) -> None:
        """Make durable what was written. Raises JournalError where the disk fails."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._failed(error) from error
        self._synced = time.monotonic()

    def _cut(self) -> None:
        """Cut the file back to its last whole line. Should that fail too, the next start does it."""
        with suppress(OSError):
            if os.fstat(self._file).st_size > self._size:
                os.ftruncate(self._file, self._size)

    def _failed(self, error: OSError) -> JournalError:
        reason = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}.get(
            error.errno or 0, (error.strerror or "it failed").lower()
        )
        return JournalError(
            f"{self.path} cannot be written past {self._size} bytes: {reason}; the {self.done} lines done are kept, "
            "and the same command goes on from there"
        )

    def close(self) -> None:
        """Make everything durable and let go of the output; also after an append that was interrupted midway."""
        if self._file < 0:
            return
        try:
            self._cut()
            self.sync()
        finally:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
