"""Files opened past the page cache, and reads and writes of their bytes by one thread.

Knows files, offsets, pages and buffers; not which threads read and write, nor what the bytes are.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import tempfile
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from .arena import ALIGN

Bytes = NDArray[np.uint8]

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


def read_exactly(file: DiskFile, offset: int, into: Bytes, want: int) -> None:
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


def read_buffered(file: DiskFile, offset: int, data: Bytes, _bounce: Bytes) -> int:
    """Read by the page cache, as far as the file goes, and leave nothing there; returns the bytes read."""
    want = min(len(data), file.size - offset)
    os.posix_fadvise(file.fd, offset, want, os.POSIX_FADV_WILLNEED)  # all of it at once, not by readahead windows
    read_exactly(file, offset, data, want)
    os.posix_fadvise(file.fd, offset, want, os.POSIX_FADV_DONTNEED)
    return want


def write_buffered(file: DiskFile, offset: int, data: Bytes, _bounce: Bytes) -> None:
    """Write by the page cache, which begins to write back at once."""
    _write_exactly(file, offset, data)
    os.posix_fadvise(file.fd, offset, len(data), os.POSIX_FADV_DONTNEED)  # starts writing back


def _in_phase(offset: int, data: Bytes) -> bool:
    """Return True if file and memory reach a page boundary at the same byte, at least a page before the end."""
    return (data.ctypes.data - offset) % ALIGN == 0 and align_up(offset) + ALIGN <= offset + len(data)


def read_direct(file: DiskFile, offset: int, data: Bytes, bounce: Bytes) -> int:
    """Read whole pages straight to `data`; what is left at both ends, or all of it if out of phase, by `bounce`."""
    want = min(len(data), file.size - offset)
    head = min(-offset % ALIGN, want) if _in_phase(offset, data) else want
    _read_bounced(file, offset, data[:head], bounce)
    body = min(align_down(len(data) - head), align_up(want - head))
    read_exactly(file, offset + head, data[head : head + body], min(body, want - head))
    done = min(head + body, want)
    _read_bounced(file, offset + done, data[done:want], bounce)
    return want


def _read_bounced(file: DiskFile, offset: int, data: Bytes, bounce: Bytes) -> None:
    done = 0
    while done < len(data):
        skip = (offset + done) % ALIGN
        count = min(len(bounce) - skip, len(data) - done)
        read_exactly(file, offset + done - skip, bounce[: align_up(skip + count)], skip + count)
        data[done : done + count] = bounce[skip : skip + count]
        done += count


def write_direct(file: DiskFile, offset: int, data: Bytes, bounce: Bytes) -> None:
    """Write whole pages straight from `data`; what is left at both ends, or all of it if out of phase, by `bounce`."""
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
                read_exactly(file, start + at, bounce[at : at + ALIGN], ALIGN)
            bounce[skip : skip + count] = data[done : done + count]
            _write_exactly(file, start, bounce[:span])
        done += count
