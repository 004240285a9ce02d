"""Several directories, on a drive each, as one disk: files striped over them, so that all drives read at the same time.

Knows how bytes are dealt out to the parts of a file. Does not know what they are.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from .disk_files import DiskFile, Piece, Readable, free_bytes, preallocate

STRIPE = 1 << 20  # bytes that lie together: one request's worth for a drive, and a whole number of checksums
THREADS = 4  # that keep a drive busy


def part_paths(name: str, directories: Sequence[Path]) -> tuple[Path, ...]:
    """Return where the parts of a file of that name lie, one in each directory; a whole file's name is its own."""
    num = len(directories)
    return tuple(d / (name if num == 1 else f"{name}.{n}-of-{num}") for n, d in enumerate(directories, 1))


def part_bytes(nbytes: int, num: int, part: int) -> int:
    """Return how many of a file's bytes lie in part `part` of `num`."""
    rounds, rest = divmod(nbytes, STRIPE * num)
    return rounds * STRIPE + min(max(rest - part * STRIPE, 0), STRIPE)


class StripedFile:
    """Open files whose stripes, dealt out in turn, are read and written as one file; their owner."""

    def __init__(self, parts: Sequence[DiskFile], name: str) -> None:
        self.parts: Sequence[DiskFile] = tuple(parts)
        self.name = name
        self.size = sum(part.size for part in parts)

    @classmethod
    def open(cls, paths: Sequence[Path]) -> StripedFile:
        """Open the parts of an existing file for reading; raises OSError."""
        return cls(_all_or_none(DiskFile.open(path) for path in paths), str(paths[0]))

    def pieces(self, offset: int, nbytes: int, limit: int) -> Iterator[Piece]:
        """Cut where the range crosses a stripe."""
        low = 0
        while low < nbytes:
            stripe, within = divmod(offset + low, STRIPE)
            high = min(nbytes, low + STRIPE - within, low + limit - within % limit)
            turn, part = divmod(stripe, len(self.parts))
            yield Piece(self.parts[part], turn * STRIPE + within, low, high)
            low = high

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Folders:
    """The directories of the disk tier, at least one. Files are striped over them evenly."""

    paths: tuple[Path, ...]

    @classmethod
    def of(cls, paths: str | Path | Sequence[str | Path]) -> Folders:
        """One directory or several; raises ValueError where one is given twice, or none."""
        several = [paths] if isinstance(paths, str | Path) else list(paths)
        found = [Path(p).expanduser() for p in several]
        if not found:
            raise ValueError("no offload directory was given; give at least one")
        twice = [p for p, count in Counter(p.resolve() for p in found).items() if count > 1]
        if twice:
            raise ValueError(f"the offload directory {twice[0]} was given twice; give each drive's once")
        return cls(tuple(found))

    @property
    def first(self) -> Path:
        """The one that holds what is not striped."""
        return self.paths[0]

    def __str__(self) -> str:
        more = len(self.paths) - 1
        return f"{self.first} and {more} more" if more else str(self.first)

    def directories(self, name: str) -> tuple[Path, ...]:
        """Return that directory's place in each, in an order which does not depend on that in which they were given."""
        paths = self.paths if len(self.paths) == 1 else sorted(p.resolve() for p in self.paths)
        return tuple(path / name for path in paths)

    @property
    def threads(self) -> int:
        """Return how many threads keep all drives busy."""
        return THREADS * len(self.paths)

    def make(self) -> None:
        """Make those that are missing, for this user alone; raises OSError."""
        for path in self.paths:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def free_bytes(self) -> int:
        """Bytes that may still be written, the same number to each directory."""
        sharing = Counter(os.stat(path).st_dev for path in self.paths)
        return min(free_bytes(p) // sharing[os.stat(p).st_dev] for p in self.paths) * len(self.paths)

    def scratch(self, nbytes: int) -> Readable:
        """Return a preallocated file of at least `nbytes` bytes to read and write, which dies with its owner.

        Raises OSError with the bytes needed and free when they do not fit.
        """
        if len(self.paths) == 1:
            return DiskFile.scratch(self.first, nbytes)
        each = -(-nbytes // (STRIPE * len(self.paths))) * STRIPE
        parts = _all_or_none(DiskFile.scratch(path, each) for path in self.paths)
        return StripedFile(parts, f"scratch file striped over {len(parts)} directories from {self.first} on")


def _all_or_none(files: Iterable[DiskFile]) -> list[DiskFile]:
    """Open all of the files; where one fails, close those before it."""
    with ExitStack() as opened:
        found = [opened.enter_context(file) for file in files]
        opened.pop_all()
    return found


class StripedWriter:
    """New files of `nbytes` in all, written from the first byte to the last, a stripe to each in turn.

    A context manager, which at its end makes them durable. Raises OSError, with numbers where they do not fit.
    """

    def __init__(self, paths: Sequence[Path], nbytes: int) -> None:
        self._at = 0
        with ExitStack() as opened:
            self._files = [opened.enter_context(path.open("xb", buffering=0)) for path in paths]
            for n, (file, path) in enumerate(zip(self._files, paths, strict=True)):
                preallocate(file.fileno(), part_bytes(nbytes, len(paths), n), path.parent)
            self._opened = opened.pop_all()

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        while data:
            stripe, within = divmod(self._at, STRIPE)
            written = os.write(self._files[stripe % len(self._files)].fileno(), data[: STRIPE - within])
            self._at += written
            data = data[written:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._opened:
            for file in self._files if error is None else ():
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # it will be read past the page cache
