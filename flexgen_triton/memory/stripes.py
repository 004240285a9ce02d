"""Several directories, on a drive each, as one disk: files striped over them, so that all drives read at the same time.

Knows how bytes are dealt out to the parts of a file. Does not know what they are.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from .disk import DiskFile, Piece, Readable, free_bytes

STRIPE = 1 << 20  # bytes that lie together: one request's worth for a drive, and a whole number of checksums
THREADS = 4  # that keep a drive busy


def part_bytes(nbytes: int, num: int, part: int) -> int:
    """Return how many of a file's bytes lie in part `part` of `num`."""
    rounds, rest = divmod(nbytes, STRIPE * num)
    return rounds * STRIPE + min(max(rest - part * STRIPE, 0), STRIPE)


class StripedFile:
    """Open files whose stripes, dealt out in turn, are read and written as one file; their owner."""

    def __init__(self, parts: Sequence[DiskFile], name: str) -> None:
        self.parts, self.name = tuple(parts), name
        self.size = sum(part.size for part in parts)

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
        parts: list[DiskFile] = []
        try:
            for path in self.paths:
                parts.append(DiskFile.scratch(path, each))
        except BaseException:
            for part in parts:
                part.close()
            raise
        return StripedFile(parts, f"scratch file striped over {len(parts)} directories from {self.first} on")
