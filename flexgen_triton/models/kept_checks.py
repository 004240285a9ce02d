"""Checksums of a checkpoint that is read where it lies: made once, kept in a small file, trusted from then on.

Knows that file. Does not know where it is kept, nor who else makes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..memory.disk_files import open_regular
from ..memory.store import (
    CHUNK,
    UNREADABLE,
    Checksums,
    Stamp,
    Store,
    pack_checks,
    read_checked_json,
    unpack_checks,
    write_checked_json,
)
from .sources import CheckpointError

VERSION = 1
PIECE = 8 << 20  # bytes that are read at a time


def make(store: Store, progress: Callable[[int, int], None] | None) -> list[bytes]:
    """Read every file of a store and return its checksums (Store.checks). Raises CheckpointError where one changes."""
    done, found = 0, []
    buffer = memoryview(bytearray(PIECE))
    for n in range(len(store.files)):
        checks = Checksums()
        with open(open_regular(store.files[n]), "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while count := file.readinto(buffer):
                checks.add(buffer[:count])
                done += count
                if progress:
                    progress(done, sum(store.sizes))
            _check_unchanged(store, n, file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # others have a better use for the page cache
        found.append(checks.digests())
    return found


def save(path: Path, store: Store, checks: Sequence[bytes]) -> None:
    """Write the checksums and the state of the files that they are of."""
    files = [
        {"path": str(file.resolve()), "stamp": list(stamp), "xxh3_64": pack_checks(check)}
        for file, stamp, check in zip(store.files, store.stamps, checks, strict=True)
    ]
    write_checked_json(path, {"version": VERSION, "files": files})


def load(path: Path, store: Store) -> Store:
    """The store with the checksums kept at `path`; raises CheckpointError where they are of files in another state."""
    try:
        body = read_checked_json(path)
        if body["version"] != VERSION:
            raise ValueError(f"version {body['version']!r} instead of {VERSION}")
        stamps = [Stamp(*f["stamp"]) for f in body["files"]]
        checks = tuple(unpack_checks(f["xxh3_64"], s.nbytes) for f, s in zip(body["files"], stamps, strict=True))
        paths = [f["path"] for f in body["files"]]
    except UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete it, and its checksums are made anew") from error
    if paths != [str(file.resolve()) for file in store.files]:
        raise CheckpointError(f"{path} holds checksums of other files; delete it, and its checksums are made anew")
    for file, kept, found in zip(store.files, stamps, store.stamps, strict=True):
        if change := kept.change_to(found):
            raise CheckpointError(f"{file} {change} since its checksums were made; delete {path} to make them anew")
    remedy = f"download it again, or delete {path} if it is meant to be so"
    return replace(store, checks=checks, align=CHUNK, remedy=remedy)


def check_starts(store: Store, starts: Sequence[int]) -> None:
    """Check the chunks up to where each file's data begins, by which its tensors were found; raises StoreError."""
    for n, start in enumerate(starts):
        with open(open_regular(store.files[n]), "rb") as file:
            store.verify(n, 0, memoryview(file.read(-(-start // CHUNK) * CHUNK)))
            _check_unchanged(store, n, file.fileno())


def _check_unchanged(store: Store, n: int, fd: int) -> None:
    if change := store.stamps[n].change_to(Stamp.of(os.fstat(fd))):
        raise CheckpointError(f"{store.files[n]} {change} while its checksums were looked at; try again")
