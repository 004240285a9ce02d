"""Files read and written past the page cache by a pool of threads.

A submission queue of extents, and per caller a count of those not yet completed: the shape of io_uring, which could
take the pool's place. Knows files, offsets and buffers; not what the bytes are.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .arena import ALIGN, Arena

BOUNCE_BYTES = 1 << 20  # per thread, for what O_DIRECT cannot read or write in place
ROWS_PER_JOB = 16  # small reads are handed to a thread this many at a time: waking one costs as much as a read

Bytes = NDArray[np.uint8]
Check = Callable[[int, memoryview], None]

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def align_up(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


def align_down(n: int) -> int:
    return n // ALIGN * ALIGN


class Piece(NamedTuple):
    """Bytes [low, high) of a range, which lie together at `offset` of one file."""

    file: DiskFile
    offset: int
    low: int
    high: int


class Readable(Protocol):
    """An open file, or several that are read and written as one."""

    @property
    def name(self) -> str:
        """A name for messages."""

    @property
    def size(self) -> int:
        """Bytes of the file."""

    @property
    def parts(self) -> Sequence[DiskFile]:
        """The files that it consists of."""

    def pieces(self, offset: int, nbytes: int, limit: int) -> Iterator[Piece]:
        """Cut a range in pieces of at most `limit` bytes, the first of which may begin within a page."""

    def close(self) -> None:
        """Close the descriptors."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...


class DiskFile:
    """An open file of `size` bytes; `direct` if it goes past the page cache (O_DIRECT), else buffered.

    Owns the descriptor. Make one with `open` or `scratch`.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        self.size = os.fstat(fd).st_size
        self.direct = _make_direct(fd, self.size)
        self.edges = threading.Lock()  # held while a page is read, changed in part and written back

    @classmethod
    def open(cls, path: Path) -> DiskFile:
        """Open an existing file for reading; raises OSError."""
        return cls(open_regular(path), str(path))

    @classmethod
    def scratch(cls, directory: Path, nbytes: int) -> DiskFile:
        """A preallocated file of at least `nbytes` bytes to read and write, which has no name and dies with its owner.

        Raises OSError with the bytes needed and free when they do not fit.
        """
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:  # 0600, O_TMPFILE or unlinked at once
            preallocate(file.fileno(), align_up(nbytes), directory)
            return cls(os.dup(file.fileno()), f"scratch file in {directory}")

    @property
    def parts(self) -> Sequence[DiskFile]:
        return (self,)

    def pieces(self, offset: int, nbytes: int, limit: int) -> Iterator[Piece]:
        """Cut where the range crosses a multiple of `limit` from the page it begins in."""
        first = limit - (offset - align_down(offset))
        for low, high in pairwise([0, *range(first, nbytes, limit), nbytes]):
            yield Piece(self, offset + low, low, high)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def irregular(mode: int) -> str | None:
    """The kind of file that a mode (os.stat) tells, "a FIFO" for one; None for a regular file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def open_regular(path: Path) -> int:
    """A descriptor to read a regular file; raises OSError for anything else, and never waits for a writer."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if kind := irregular(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{path} is {kind}, not a file; put the file in its place")
    return fd


def _make_direct(fd: int, size: int) -> bool:
    """Turn O_DIRECT on where the filesystem takes it, and tell; some take the flag but refuse the read."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        if size:
            os.preadv(fd, [mmap.mmap(-1, ALIGN)], 0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            os.close(fd)
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return False
    return True


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write to the filesystem of `directory`."""
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def preallocate(fd: int, nbytes: int, directory: Path) -> None:
    """Give the file all its blocks now, so that a full disk is found out before anything is written.

    Raises OSError in one sentence with numbers.
    """
    free = free_bytes(directory)
    try:
        if nbytes > free:  # a filesystem may take long to fail
            raise OSError(errno.ENOSPC, "")
        if nbytes:
            os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{nbytes} bytes are needed in {directory}, which has {free} free; free some or choose another directory "
            f"({os.strerror(error.errno or 0)})",
        ) from None


@dataclass(frozen=True, slots=True)
class Read:
    """Fill `buffer`, [n] uint8 on the CPU, from `offset` of `file`, as far as the file goes.

    `check(offset, data)` is called on the worker as each extent completes; what it raises, `DiskQueue.read` raises.
    """

    file: Readable
    offset: int
    buffer: Tensor
    check: Check | None = None


@dataclass(frozen=True, slots=True)
class Write:
    """Write `buffer`, [n] uint8 on the CPU, to `offset` of `file`, within its size."""

    file: Readable
    offset: int
    buffer: Tensor


class _Task(Protocol):
    """Part of a call that one thread does; its text says what it was about when it fails."""

    def run(self, bounce: Bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Scan:
    """Show `nbytes` from `offset` of `file`, as far as the file goes, to `check`; they are kept nowhere.

    `offset` is a multiple of ALIGN, `nbytes` at most BOUNCE_BYTES.
    """

    file: Readable
    offset: int
    nbytes: int
    check: Check

    def run(self, bounce: Bytes) -> None:
        want = min(self.nbytes, self.file.size - self.offset)
        for file, offset, low, high in self.file.pieces(self.offset, want, BOUNCE_BYTES):
            _read_exactly(file, offset, bounce[low : align_up(high)], high - low)
        self.check(self.offset, bounce[:want].data)

    def __str__(self) -> str:
        return f"checking {self.nbytes} bytes at offset {self.offset} of {self.file.name}"


@dataclass(frozen=True, slots=True)
class _Extent:
    """A piece of a request's buffer."""

    request: Read | Write
    piece: Piece

    def run(self, bounce: Bytes) -> None:
        file, offset, low, high = self.piece
        data = self.request.buffer.numpy()[low:high]
        if isinstance(self.request, Write):
            (_write_direct if file.direct else _write_buffered)(file, offset, data, bounce)
            return
        got = (_read_direct if file.direct else _read_buffered)(file, offset, data, bounce)
        if self.request.check:
            self.request.check(self.request.offset + low, data[:got].data)

    def __str__(self) -> str:
        verb = "writing" if isinstance(self.request, Write) else "reading"
        file, offset, low, high = self.piece
        return f"{verb} {high - low} bytes at offset {offset} of {file.name}"


class _Batch:
    """The jobs of one call; its caller waits until all are completed or dropped. Guarded by the queue's lock."""

    def __init__(self, jobs: Sequence[Sequence[_Task]]) -> None:
        self.waiting = deque(jobs)
        self.pending = len(self.waiting)
        self.error: BaseException | None = None
        self.done = threading.Event()

    def complete(self, error: BaseException | None) -> None:
        self.pending -= 1
        if error and not self.error:  # only the first is raised; what has not begun is dropped
            self.error = error
            self.pending -= len(self.waiting)
            self.waiting.clear()
        if not self.pending:
            self.done.set()


class DiskQueue:
    """A pool of threads that reads and writes extents of at most `extent_bytes`, several at a time, in any order.

    Callable from several threads at once; their calls take turns extent by extent, so that a long one does not hold up
    a short one.
    """

    def __init__(self, threads: int = 4, extent_bytes: int = 4 << 20) -> None:
        assert threads > 0, threads
        assert extent_bytes > 0 and extent_bytes % ALIGN == 0, extent_bytes
        self._extent_bytes = extent_bytes
        self._batches: deque[_Batch] = deque()  # those with jobs that no thread has taken yet
        self._changed = threading.Condition()
        self._closed = False
        self._bounce = Arena("disk bounce", threads * BOUNCE_BYTES, torch.device("cpu"))
        bounces = [self._bounce.take(BOUNCE_BYTES).numpy() for _ in range(threads)]
        self._threads = [
            threading.Thread(target=self._work, args=(b,), name=f"disk-{n}", daemon=True) for n, b in enumerate(bounces)
        ]
        for thread in self._threads:
            thread.start()

    def read(self, requests: Sequence[Read]) -> None:
        """Do all reads and return. Raises the first error, with a note that names file, offset and bytes."""
        self._run([[e] for r in requests for e in self._extents(r)])

    def write(self, requests: Sequence[Write]) -> None:
        """Do all writes and return; requests of one call must not overlap. Raises as `read` does."""
        for r in requests:
            assert r.offset + len(r.buffer) <= r.file.size, (r.file.name, r.offset, len(r.buffer), r.file.size)
        self._run([[e] for r in requests for e in self._extents(r)])

    def scan(self, scans: Sequence[Scan]) -> None:
        """Do all scans and return. Raises as `read` does."""
        for s in scans:
            assert s.offset % ALIGN == 0 and s.nbytes <= BOUNCE_BYTES, s
        self._run([[s] for s in scans])

    def read_rows(self, file: Readable, offsets: Sequence[int], row_bytes: int, out: Tensor | None = None) -> Tensor:
        """Gather rows that start at any `offsets` of `file`: [len(offsets), row_bytes] uint8, in `out` if given."""
        rows = torch.empty(len(offsets), row_bytes, dtype=torch.uint8) if out is None else out
        for offset in offsets:
            if offset + row_bytes > file.size:
                raise OSError(errno.EIO, f"{file.name} ends at {file.size}; a row lies at {offset}+{row_bytes}")
        reads = [Read(file, o, row) for o, row in zip(offsets, rows, strict=True) if row_bytes]
        extents = [_Extent(r, p) for r in reads for p in file.pieces(r.offset, row_bytes, self._extent_bytes)]
        self._run([extents[n : n + ROWS_PER_JOB] for n in range(0, len(extents), ROWS_PER_JOB)])
        return rows

    def _extents(self, request: Read | Write) -> list[_Extent]:
        """Cut a request into what one thread reads or writes at a time."""
        b, size, offset = request.buffer, len(request.buffer), request.offset
        assert b.dtype == torch.uint8 and b.ndim == 1 and b.is_contiguous(), (b.dtype, b.shape, b.stride())
        if size and not 0 <= offset < request.file.size:
            raise OSError(errno.EIO, f"{request.file.name} ends at {request.file.size}; asked for {offset}+{size}")
        beyond = request.file.size - offset  # an aligned superset may reach past the end of the file
        pieces = request.file.pieces(offset, size, self._extent_bytes)
        return [_Extent(request, p) for p in pieces if p.low < min(p.high, beyond)]

    def _run(self, jobs: Sequence[Sequence[_Task]]) -> None:
        """Submit jobs and wait until none is left or in flight: the caller's buffers are its own again."""
        if not jobs:
            return
        batch = _Batch(jobs)
        with self._changed:
            assert not self._closed, "the queue is closed"
            self._batches.append(batch)
            self._changed.notify(len(jobs))
        batch.done.wait()
        if batch.error:
            raise batch.error

    def _take(self) -> tuple[_Batch, Sequence[_Task]] | None:
        """The next job, the batches in turn; None when the queue is closed and empty."""
        with self._changed:
            while not (self._batches and self._batches[0].waiting):
                if self._batches:
                    self._batches.popleft()  # its last jobs were dropped
                elif self._closed:
                    return None
                else:
                    self._changed.wait()
            batch = self._batches.popleft()
            job = batch.waiting.popleft()
            if batch.waiting:
                self._batches.append(batch)
            return batch, job

    def _work(self, bounce: Bytes) -> None:
        while taken := self._take():
            batch, job = taken
            error = _attempt(job, bounce)
            with self._changed:
                batch.complete(error)

    def close(self) -> None:
        """Finish what was submitted and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # which may be the one that collects the queue's owner
                thread.join()
        self._bounce.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _attempt(job: Sequence[_Task], bounce: Bytes) -> BaseException | None:
    """Run a job and hand back what it raised: an error is its caller's, and must not end the thread."""
    for task in job:
        try:
            task.run(bounce)
        except BaseException as error:
            error.add_note(f"while {task}")
            return error
    return None


def _read_exactly(file: DiskFile, offset: int, into: Bytes, want: int) -> None:
    """Read at least `want` bytes; `into` may be longer, to be a whole number of pages at the file's end."""
    done = 0
    while done < want:
        count = os.preadv(file.fd, [into[done:].data], offset + done)
        if count == 0 or (file.direct and count % ALIGN and done + count < want):
            raise OSError(
                errno.EIO, f"{file.name} ends at {offset + done + count}, before its {file.size} bytes: truncated"
            )
        done += count


def _write_exactly(file: DiskFile, offset: int, data: Bytes) -> None:
    done = 0
    while done < len(data):
        done += os.pwritev(file.fd, [data[done:].data], offset + done)


def _read_buffered(file: DiskFile, offset: int, data: Bytes, _bounce: Bytes) -> int:
    want = min(len(data), file.size - offset)
    os.posix_fadvise(file.fd, offset, want, os.POSIX_FADV_WILLNEED)  # all of it at once, not by readahead windows
    _read_exactly(file, offset, data, want)
    os.posix_fadvise(file.fd, offset, want, os.POSIX_FADV_DONTNEED)
    return want


def _write_buffered(file: DiskFile, offset: int, data: Bytes, _bounce: Bytes) -> None:
    _write_exactly(file, offset, data)
    os.posix_fadvise(file.fd, offset, len(data), os.POSIX_FADV_DONTNEED)  # starts writing back


def _in_phase(offset: int, data: Bytes) -> bool:
    """Return True if file and memory reach a page boundary at the same byte, at least a page before the end."""
    return (data.ctypes.data - offset) % ALIGN == 0 and align_up(offset) + ALIGN <= offset + len(data)


def _read_direct(file: DiskFile, offset: int, data: Bytes, bounce: Bytes) -> int:
    """Whole pages go straight to `data`; what is left at both ends, or all of it if out of phase, by `bounce`."""
    want = min(len(data), file.size - offset)
    head = min(-offset % ALIGN, want) if _in_phase(offset, data) else want
    _read_bounced(file, offset, data[:head], bounce)
    body = min(align_down(len(data) - head), align_up(want - head))
    _read_exactly(file, offset + head, data[head : head + body], min(body, want - head))
    done = min(head + body, want)
    _read_bounced(file, offset + done, data[done:want], bounce)
    return want


def _read_bounced(file: DiskFile, offset: int, data: Bytes, bounce: Bytes) -> None:
    done = 0
    while done < len(data):
        skip = (offset + done) % ALIGN
        count = min(len(bounce) - skip, len(data) - done)
        _read_exactly(file, offset + done - skip, bounce[: align_up(skip + count)], skip + count)
        data[done : done + count] = bounce[skip : skip + count]
        done += count


def _write_direct(file: DiskFile, offset: int, data: Bytes, bounce: Bytes) -> None:
    head = -offset % ALIGN if _in_phase(offset, data) else len(data)
    _write_bounced(file, offset, data[:head], bounce)
    done = head + align_down(len(data) - head)
    _write_exactly(file, offset + head, data[head:done])
    _write_bounced(file, offset + done, data[done:], bounce)


def _write_bounced(file: DiskFile, offset: int, data: Bytes, bounce: Bytes) -> None:
    """Write by `bounce`; a page at either end that is not covered whole is read first."""
    done = 0
    while done < len(data):
        skip = (offset + done) % ALIGN
        count = min(len(bounce) - skip, len(data) - done)
        start, span = offset + done - skip, align_up(skip + count)
        edges = {0} if skip else set()
        edges |= {span - ALIGN} if span > skip + count else set()
        with file.edges:
            for at in edges:
                _read_exactly(file, start + at, bounce[at : at + ALIGN], ALIGN)
            bounce[skip : skip + count] = data[done : done + count]
            _write_exactly(file, start, bounce[:span])
        done += count
