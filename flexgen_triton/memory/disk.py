"""A pool of threads that reads and writes files.

A submission queue of extents, and per caller a count of those not yet completed: the shape of io_uring, which could
take the pool's place. Knows requests and whose turn it is; not how a file is opened or read, nor what the bytes are.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from .arena import ALIGN, Arena
from .disk_files import (
    Bytes,
    Piece,
    Readable,
    align_up,
    read_buffered,
    read_direct,
    read_exactly,
    write_buffered,
    write_direct,
)

BOUNCE_BYTES = 1 << 20  # per thread, for what O_DIRECT cannot read or write in place
ROWS_PER_JOB = 16  # small reads are handed to a thread this many at a time: waking one costs as much as a read
Check = Callable[[int, memoryview], None]


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
            read_exactly(file, offset, bounce[low : align_up(high)], high - low)
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
            (write_direct if file.direct else write_buffered)(file, offset, data, bounce)
            return
        got = (read_direct if file.direct else read_buffered)(file, offset, data, bounce)
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
