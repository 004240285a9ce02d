"""The places of a model's weights in files, and the manifest that records them.

Knows names, offsets and checksums. Does not know the files' format, what the tensors mean, nor where they will be held.
"""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import xxhash

from ..plan.placement import STORE_ALIGN, Extent
from .disk_files import DiskFile, Readable, open_regular
from .stripes import StripedFile, part_bytes, part_paths

STORE_VERSION = 3
MANIFEST = "manifest.json"
CHUNK = STORE_ALIGN  # bytes under one checksum
HASH_BYTES = 8
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)  # for JSON of any content

T = TypeVar("T")


class StoreError(ValueError):
    """Files that are not what they should be; the message says which and what to do."""


class Stamp(NamedTuple):
    """The state of a file, by which a change is told."""

    nbytes: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Self:
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)

    def change_to(self, now: Stamp) -> str:
        """The change in words that follow the file's name; empty where there is none."""
        if self.inode != now.inode:
            return "was replaced by another file"
        if self.nbytes != now.nbytes:
            return f"has {now.nbytes} bytes instead of {self.nbytes}: it was changed"
        return "was written to" if self.mtime_ns != now.mtime_ns else ""


@dataclass(frozen=True, slots=True)
class Store:
    """The places of a model's weights in files; immutable.

    `extents` are by ModuleSpec.name, in the order of its tensors. Their `row` counts in the whole tensor, from
    TensorSpec.row on. A vector is one row; one that is concatenated from several sources in place is several
    extents of one row each, whose `row` is their first element.
    """

    files: tuple[Path, ...]
    sizes: tuple[int, ...]  # bytes of each file
    extents: dict[str, tuple[Extent, ...]]
    dtype: str
    align: int  # read at multiples of this; checksums are per CHUNK
    checks: tuple[bytes | None, ...]  # of each file: 8 bytes of xxh3_64 per CHUNK, or None where nothing is known
    stamps: tuple[Stamp, ...] = field(default=(), compare=False)  # of `paths` when they were found; (): not known
    remedy: str = field(default="", compare=False)  # against damage; "": to have the store rebuilt
    others: tuple[Path, ...] = ()  # directories that hold the further parts of files that are striped

    @property
    def weight_bytes(self) -> int:
        return sum(e.nbytes for extents in self.extents.values() for e in extents)

    def parts(self, file: int) -> tuple[Path, ...]:
        """The paths of a file: its own, or those of its parts."""
        return part_paths(self.files[file].name, (self.files[file].parent, *self.others))

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files and parts of files there are, in their order."""
        return tuple(path for file in range(len(self.files)) for path in self.parts(file))

    def open(self, file: int) -> Readable:
        """Open a file for reading; raises OSError."""
        parts = self.parts(file)
        return DiskFile.open(parts[0]) if len(parts) == 1 else StripedFile.open(parts)

    def verify(self, file: int, offset: int, data: memoryview) -> None:
        """Check every chunk of `file` that lies whole in `data`, read at `offset`; raises StoreError."""
        checks = self.checks[file]
        if checks is None:
            return
        size, end = self.sizes[file], offset + len(data)
        for start in range(-(-offset // CHUNK) * CHUNK, end, CHUNK):
            stop = min(start + CHUNK, size)
            at = start // CHUNK * HASH_BYTES
            if stop <= end and _hash(data[start - offset : stop - offset]) != checks[at : at + HASH_BYTES]:
                remedy = self.remedy or f"delete {self.files[file].parent} and it will be rebuilt"
                raise StoreError(
                    f"{self.files[file]} is damaged: bytes {start} to {stop} do not match their checksum; {remedy}"
                )

    def save(self, directory: Path) -> None:
        """Write the manifest of a store whose files all lie in `directory`, and sync it to disk."""
        files = [
            {"name": f.name, "bytes": size, "xxh3_64": None if check is None else pack_checks(check)}
            for f, size, check in zip(self.files, self.sizes, self.checks, strict=True)
        ]
        body = {
            "version": STORE_VERSION,
            "dtype": self.dtype,
            "align": self.align,
            "parts": 1 + len(self.others),
            "files": files,
            "extents": {name: [list(asdict(e).values()) for e in extents] for name, extents in self.extents.items()},
        }
        write_checked_json(directory / MANIFEST, body)

    @classmethod
    def load(cls, directory: Path, others: Sequence[Path] = ()) -> Store:
        """Read the manifest in `directory`; raises StoreError unless it is whole and the files have their sizes.

        `others` are the directories of the further parts of its files, where they are striped.

        Its files are plain ones of that directory: nothing outside is opened, whatever the manifest says.
        """
        path = directory / MANIFEST
        try:
            body = read_checked_json(path)
            if body["version"] != STORE_VERSION:
                raise ValueError(f"version {body['version']!r} instead of {STORE_VERSION}")
            store = cls._from_body(directory, tuple(others), body)
        except UNREADABLE as error:
            raise StoreError(
                f"{path} is missing or damaged ({error}); delete {directory}, it will be rebuilt"
            ) from error
        num = 1 + len(store.others)
        sizes = (part_bytes(size, num, part) for size in store.sizes for part in range(num))
        for path, size, stamp in zip(store.paths, sizes, store.stamps, strict=True):
            if size != stamp.nbytes:
                raise StoreError(
                    f"{path} has {stamp.nbytes} bytes instead of {size}; delete {directory}, it will be rebuilt"
                )
        return store

    @classmethod
    def _from_body(cls, directory: Path, others: tuple[Path, ...], body: Mapping[str, Any]) -> Store:
        """The store that a manifest describes; raises one of UNREADABLE where a field is not what `save` writes."""
        if body["parts"] != 1 + len(others):
            raise ValueError(f"{body['parts']!r} parts instead of {1 + len(others)}")
        names = tuple(_typed(f["name"], str) for f in body["files"])
        sizes = tuple(_typed(f["bytes"], int) for f in body["files"])
        return cls(
            files=tuple(directory / name for name in names),
            sizes=sizes,
            extents={name: tuple(_extent(e, sizes) for e in extents) for name, extents in body["extents"].items()},
            dtype=_typed(body["dtype"], str),
            align=_typed(body["align"], int),
            checks=tuple(_unpacked_checks(f["xxh3_64"], f["bytes"]) for f in body["files"]),
            stamps=tuple(_plain_file(p) for name in names for p in part_paths(_plain(name), (directory, *others))),
            others=others,
        )


def _typed(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:  # a bool is an int, and 1.0 equals 1
        raise TypeError(f"{value!r:.40} is no {kind.__name__}")
    return value


def _extent(fields: Any, sizes: Sequence[int]) -> Extent:
    """An extent as `Store.save` writes it, within its file."""
    name, *numbers = fields
    found = Extent(_typed(name, str), *(_typed(n, int) for n in numbers))
    if min(numbers) < 0 or found.end > sizes[found.file]:
        raise ValueError(f"{found} lies outside of its file")
    return found


def pack_checks(checks: bytes) -> str:
    return base64.b64encode(checks).decode()


def _unpacked_checks(text: Any, nbytes: int) -> bytes | None:
    """The checksums of a file of `nbytes` as a manifest holds them."""
    return None if text is None else unpack_checks(text, nbytes)


def unpack_checks(text: Any, nbytes: int) -> bytes:
    """The checksums of a file of `nbytes` from what `pack_checks` made of them; raises ValueError."""
    checks = base64.b64decode(text, validate=True)
    if len(checks) != -(-nbytes // CHUNK) * HASH_BYTES:
        raise ValueError(f"{len(checks)} bytes of checksums for {nbytes} bytes")
    return checks


def _plain(name: str) -> str:
    """A file's name, which is one without a path."""
    if Path(name).name != name:
        raise ValueError(f"{name!r:.80} is no name of a file in the store")
    return name


def _plain_file(path: Path) -> Stamp:
    """The state of a file that is not a link."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path.name!r:.80} is no plain file")
    return Stamp.of(found)


# JSON with a checksum of its own: what tells whether others are damaged must be no less trusted than they


def write_checked_json(path: Path, body: Mapping[str, Any]) -> None:
    """Write a file that `read_checked_json` reads, and sync it to disk."""
    with path.open("w", encoding="ascii") as file:
        json.dump({"xxh3_64": _body_check(body), "store": body}, file)
        file.flush()
        os.fsync(file.fileno())


def read_checked_json(path: Path) -> Any:
    """Read what `write_checked_json` wrote; raises one of UNREADABLE where it is damaged or no file at all."""
    with open(open_regular(path), encoding="ascii") as file:
        whole = json.load(file)
    if whole["xxh3_64"] != _body_check(whole["store"]):
        raise ValueError("its checksum does not match")
    return whole["store"]


def _hash(data: memoryview) -> bytes:
    return xxhash.xxh3_64_digest(data)


def _body_check(body: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(body).encode())


class Checksums:
    """Hashes a stream of bytes per CHUNK."""

    def __init__(self) -> None:
        self.total = 0
        self._done = bytearray()
        self._open = xxhash.xxh3_64()

    def add(self, data: memoryview) -> None:
        while data:
            head = data[: CHUNK - self.total % CHUNK]
            self._open.update(head)
            self.total += len(head)
            data = data[len(head) :]
            if self.total % CHUNK == 0:
                self._done += self._open.digest()
                self._open.reset()

    def digests(self) -> bytes:
        return bytes(self._done) + (self._open.digest() if self.total % CHUNK else b"")
