"""The output of a batch that survives anything: whole lines appended, and on a new start what is done is known.

Owns the output file and the reading of the input's lines. Every output line begins with an id: the number and the
digest of the input line that it answers, and a digest of the answer. So the file itself says what is done, and what was
changed since: a killed job drops at most a last, torn line. Knows neither what a line asks for nor what an answer says.

- A name that is a link stands for the file it leads to: `OUTPUT.job` lies beside that, whatever name a job gives.
- Only one process at a time has the output: it holds a lock on it (not on the sidecar, which is replaced by a rename).
- The sidecar `OUTPUT.job` is written, whole, before the first answer, and stays. An output without one is not ours.
- An answer is one append. What was written a while ago, and all of it at the end, is made durable by fsync.
- The digests notice mistakes, not malice: whoever can write the output can make them too.
- Where an append fails the file is cut back to its last whole line.
"""

from __future__ import annotations

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
from typing import Any, BinaryIO, Protocol

import xxhash

from ..os_errors import reason
from .sidecar import JournalError, Sidecar

MAX_LINE = 8 << 20  # bytes of an input line; a longer one is read past in pieces
PIECE = 1 << 16
SYNC_S = 5.0  # between fsyncs, of 1 to 100 ms; what comes just after one the system writes within 30 s
MAX_GAP = 1 << 24  # lines in flight, at most by far; an id beyond is no id of this job, and its table would be huge
ID = re.compile(rb'\{"id": "batch_req_(\d{9,18}_[0-9a-f]{16})_([0-9a-f]{16})", ')
TRIES = 8  # at an output that others put new files in the place of


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
        """A name that only this line has, the same whenever it is read."""
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


def output_line(line: Line, record: Mapping[str, Any]) -> bytes:
    """The answer to a line as it stands in the output, sealed by its own digest."""
    rest = json.dumps(record, allow_nan=False)[1:].encode() + b"\n"
    tag = line.tag.encode()
    return b'{"id": "batch_req_%s_%016x", %s' % (tag, _seal(tag, rest), rest)


def _seal(tag: bytes, rest: bytes) -> int:
    """The digest of an output line: of the line that it answers, and of all that follows the id."""
    return xxhash.xxh64_intdigest(tag + rest)


class Answers(Protocol):
    """Takes answers, and knows what lines have theirs."""

    done: int

    def is_done(self, line: Line) -> bool: ...

    def check_end(self, lines: int) -> None: ...

    def confirm(self, fields: Mapping[str, Any]) -> None: ...

    def append(self, line: Line, record: Mapping[str, Any]) -> None: ...


class Passing:
    """Answers that go on to a stream as they come. Nothing is kept of them, so a job cannot go on: it begins anew."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name = stream, name
        self.done = 0

    def is_done(self, line: Line) -> bool:
        return False

    def check_end(self, lines: int) -> None:
        pass

    def confirm(self, fields: Mapping[str, Any]) -> None:
        pass

    def append(self, line: Line, record: Mapping[str, Any]) -> None:
        """Hand the answer on, whole. Raises BrokenPipeError where nobody reads, JournalError where it fails."""
        try:
            self._stream.write(output_line(line, record))
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise JournalError(
                f"{self._name} cannot be written past {self.done} lines: {reason(error)}; mend that, or name an output "
                "file, which keeps what is done"
            ) from error
        self.done += 1


class Journal:
    """The output file of a batch, as a context manager. `fingerprint`: what must be the same for answers to be.

    Raises JournalError for an output that is another process's, another job's or no job's, or was changed; OSError
    where it cannot be opened; an output that it made itself is then gone again. An empty output, with or without a
    sidecar, begins anew.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], *, sync_s: float = SYNC_S) -> None:
        self.path, self._real = path, Path(os.path.realpath(path))
        self._sidecar = Sidecar(self._real)
        self.done = 0
        self._digests = array("Q")  # by line number; 0: not done
        self._numbers_end = 0  # above the highest that is done
        self._size = 0
        self._sync_s, self._synced = sync_s, time.monotonic()
        self._file, is_new = self._open()
        try:
            self._begin(dict(fingerprint))
        except BaseException:
            if is_new:
                self._real.unlink(missing_ok=True)  # it is empty, and while the lock is held nobody else's
            os.close(self._file)
            raise

    def _open(self) -> tuple[int, bool]:
        """The output, opened and locked, and whether it was made just now. Raises JournalError and OSError."""
        for _ in range(TRIES):
            file, is_new = self._open_or_make()
            try:
                self._lock(file)
                if self._has_name(file):
                    return file, is_new
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # another process removed or replaced it meanwhile
        raise JournalError(f"{self.path} is replaced again and again by another process; name another output")

    def _open_or_make(self) -> tuple[int, bool]:
        """The output's file and whether it is new."""
        if self._real.is_dir():
            raise JournalError(f"{self.path} is a directory; name a file in it")
        if self._real.exists() and not self._real.is_file():
            raise self._no_file()
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(self._real, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            return os.open(self._real, flags | os.O_CREAT, 0o666), False

    def _no_file(self) -> JournalError:
        return JournalError(
            f"{self.path} is no ordinary file; a job that can go on needs one for its answers, and without going on "
            "-o - writes them to standard output"
        )

    def _lock(self, file: int) -> None:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise self._no_file()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(
                f"{self.path} is being written by another process; wait for it, stop it, or name another output"
            ) from error

    def _has_name(self, file: int) -> bool:
        """Return True if the output's name still leads to this file."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self._real, follow_symlinks=False), os.fstat(file))
        return False

    def _begin(self, fingerprint: dict[str, Any]) -> None:
        """Find out what is done, and note which job this is where nothing is."""
        is_empty = os.fstat(self._file).st_size == 0
        known = self._sidecar.read()
        if known is None and not is_empty:
            raise JournalError(
                f"{self.path} is not empty and has no {self._sidecar.path.name} beside it, so no batch wrote it; name "
                "another output"
            )
        self._sidecar.sweep()
        if is_empty or known is None:
            self._fingerprint = fingerprint
            self._write_sidecar()
        else:
            self._fingerprint = known
            self._compare(fingerprint)
            self._scan()

    def _write_sidecar(self) -> None:
        self._sidecar.write(self._fingerprint)
        self._sync_directory()

    def _sync_directory(self) -> None:
        """Make the names durable, of the sidecar and of the output."""
        directory = os.open(self._real.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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
        """Add fields to the fingerprint, known only now: a first run keeps them, later ones compare (JournalError)."""
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
        whole = begin is not None and _seal(begin[1], raw[begin.end() :]) == int(begin[2], 16)
        number, digest = begin[1].split(b"_") if begin else (b"0", b"0")
        if not whole or not 0 < int(number) <= at + MAX_GAP:
            raise JournalError(
                f"line {at} of {self.path} is not as this job wrote it; keep the {at - 1} lines before it and start "
                "again, or name another output"
            )
        if self._is_known(int(number)):
            raise JournalError(
                f"line {at} of {self.path} answers line {int(number)} of the input once more; take it out, or name "
                "another output"
            )
        self._note(int(number), int(digest, 16))

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
        """Return True if an earlier run answered the line. Raises JournalError if it answered another in its place."""
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
        left = memoryview(output_line(line, record))
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
        return JournalError(
            f"{self.path} cannot be written past {self._size} bytes: {reason(error)}; the {self.done} lines done are "
            "kept, and the same command goes on from there"
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
