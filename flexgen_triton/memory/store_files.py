"""A store's files at work: no byte leaves them that was not found right, and after one that was wrong, none at all.

Knows files, chunks and checksums. Does not know what the bytes mean, nor where they will be held.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import NoReturn, Self

from torch import Tensor

from ..plan.placement import Run
from .disk import BOUNCE_BYTES, DiskQueue, Read, Scan
from .disk_files import Readable
from .store import CHUNK, HASH_BYTES, Stamp, Store, StoreError


class StoreFiles:
    """The open files of a store, read through a disk queue; a context manager.

    Each chunk with a checksum is checked before any byte of it is first used. A chunk that is wrong, or a file that is
    no longer the one that was opened, raises StoreError, and so does, in the same words, all that is asked afterwards.
    Files that are written to while they are read are told by their time: looked at after each read, so that what was
    read before it is what was opened.
    """

    def __init__(self, store: Store, disk: DiskQueue) -> None:
        self._store, self._disk = store, disk
        self._paths = [[p.absolute() for p in store.parts(n)] for n in range(len(store.files))]  # wherever it goes
        self._right = [None if c is None else bytearray(len(c) // HASH_BYTES) for c in store.checks]  # 1: a chunk is
        self._failure: str | None = None
        with ExitStack() as opened:
            self._files = [opened.enter_context(self._open(n)) for n in range(len(store.files))]
            stamps = iter(store.stamps or [Stamp.of(os.fstat(p.fd)) for file in self._files for p in file.parts])
            self._stamps = [[next(stamps) for _ in file.parts] for file in self._files]
            for n in range(len(self._files)):
                self._check_unchanged(n)
            self._opened = opened.pop_all()

    def _open(self, n: int) -> Readable:
        try:
            return self._store.open(n)
        except FileNotFoundError as error:
            self._fail(f"{error.filename} is gone since it was found; open the model again")

    def check(self) -> None:
        """Raise StoreError if anything was found wrong so far, or a file's name no longer leads to what was opened."""
        self._check_failure()
        for n, paths in enumerate(self._paths):
            for part, path in enumerate(paths):
                try:
                    found = path.stat()
                except OSError as error:
                    self._fail(f"{path} is gone since it was opened ({error.strerror}); open the model again")
                self._compare(n, part, found)

    def read(self, runs: Sequence[tuple[Run, Tensor]]) -> None:
        """Fill each buffer, [n] uint8 on the CPU, with a range of a file, as far as the file goes."""
        self._check_failure()
        self._disk.read([self._request(run, buffer) for run, buffer in runs])
        for run, _ in runs:
            flags, (first, end) = self._right[run.file], self._chunks(run.file, run.offset, run.nbytes)
            assert flags is None or flags.find(0, first, end) < 0, (run, first, end)
            self._check_unchanged(run.file)

    def read_rows(self, n: int, offsets: Sequence[int], row_bytes: int, out: Tensor) -> None:
        """Gather rows that start at any `offsets` of file `n`: [len(offsets), row_bytes] uint8."""
        self._check_failure()
        self._check_chunks_of(n, offsets, row_bytes)
        self._disk.read_rows(self._files[n], offsets, row_bytes, out)
        self._check_unchanged(n)

    # Chunks

    def _request(self, run: Run, buffer: Tensor) -> Read:
        """A read of one run, checked unless all its chunks were."""
        flags, (first, end) = self._right[run.file], self._chunks(run.file, run.offset, run.nbytes)
        known = flags is None or flags.find(0, first, end) < 0
        return Read(self._files[run.file], run.offset, buffer, None if known else partial(self._verify, run.file))

    def _chunks(self, n: int, offset: int, nbytes: int) -> tuple[int, int]:
        """First and end of the chunks that hold a range, which may reach past the end of the file."""
        return offset // CHUNK, -(-min(offset + nbytes, self._store.sizes[n]) // CHUNK)

    def _check_chunks_of(self, n: int, offsets: Sequence[int], row_bytes: int) -> None:
        """Read and check whole those chunks that hold a row and were not checked yet."""
        flags = self._right[n]
        if flags is None or 0 not in flags:
            return
        held = {c for o in offsets for c in range(o // CHUNK, -(-(o + row_bytes) // CHUNK))}
        unknown = _stretches(sorted(c for c in held if not flags[c]), BOUNCE_BYTES // CHUNK)
        file, verify = self._files[n], partial(self._verify, n)
        self._disk.scan([Scan(file, first * CHUNK, count * CHUNK, verify) for first, count in unknown])

    def _verify(self, n: int, offset: int, data: memoryview) -> None:
        """Check the chunks that lie whole in `data`, and note that they are right. Called on the queue's threads."""
        try:
            self._store.verify(n, offset, data)
        except StoreError as error:
            self._fail(str(error))
        flags, end = self._right[n], offset + len(data)
        assert flags is not None
        for chunk in range(-(-offset // CHUNK), -(-end // CHUNK)):
            if min((chunk + 1) * CHUNK, self._store.sizes[n]) <= end:
                flags[chunk] = 1

    # Failures

    def _check_unchanged(self, n: int) -> None:
        for part, file in enumerate(self._files[n].parts):
            self._compare(n, part, os.fstat(file.fd))

    def _compare(self, n: int, part: int, found: os.stat_result) -> None:
        if change := self._stamps[n][part].change_to(Stamp.of(found)):
            self._fail(f"{self._paths[n][part]} {change} since it was opened; open the model again")

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise StoreError(self._failure)

    def _fail(self, sentence: str) -> NoReturn:
        self._failure = self._failure or sentence  # the first one is what all the others follow from
        raise StoreError(self._failure)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _stretches(numbers: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Rising numbers as stretches (first, count) of consecutive ones, at most so many in each."""
    found: list[tuple[int, int]] = []
    for n in numbers:
        if found and n == sum(found[-1]) and found[-1][1] < most:
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((n, 1))
    return found
