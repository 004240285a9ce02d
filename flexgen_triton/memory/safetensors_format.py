"""The safetensors format, read strictly and written.

A file is 8 bytes of header length, little endian; a JSON header, which may be padded with spaces; data.
Knows headers, dtype names and where tensors' bytes lie in a file. Does not know the manifest of a store, nor what the
tensors mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from math import prod
from pathlib import Path
from typing import Any

from ..plan.placement import ALIGN
from .disk_files import open_regular
from .store import Checksums, Stamp, StoreError
from .stripes import StripedWriter

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int16": "I16"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a safetensors file: bytes [begin, end) of the file."""

    dtype: str  # the format's own name: "F16"
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a safetensors file by name, where their data begins, and the file's state when it was read."""

    entries: dict[str, TensorEntry]
    start: int
    stamp: Stamp


def read_safetensors_header(path: Path) -> Header:
    """Read a safetensors file's header; raises StoreError where it breaks a rule of the format, and OSError."""
    with open(open_regular(path), "rb") as file:
        stamp = Stamp.of(os.fstat(file.fileno()))
        length = int.from_bytes(file.read(8), "little")
        if stamp.nbytes < 8 or length > stamp.nbytes - 8:
            raise _broken(path, f"has {stamp.nbytes} bytes, too few for its header: truncated")
        if length > MAX_HEADER_BYTES:
            raise _broken(path, f"has a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        raw = file.read(length)
    header = _parse_header(path, raw)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    _check_cover(path, entries, 8 + length, stamp.nbytes)
    return Header(entries, 8 + length, stamp)


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _broken(path, "names a key of its header twice")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique) if raw[:1] == b"{" else None
    except StoreError:
        raise
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"has a header that is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(path, "has a header that is not a JSON object")
    return header


def _entry(path: Path, name: str, fields: Any, start: int) -> TensorEntry:
    """One tensor of the header; its dtype, shape and number of bytes must agree. `start` is where the data begins."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"describes tensor {name} by other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _broken(path, f"has tensor {name} of unknown dtype {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _broken(
            path, f"has tensor {name} of shape {shape!r} at {offsets!r}, which are not lists of natural numbers"
        )
    begin, end = offsets
    if (end - begin) * 8 != prod(shape) * _BITS[dtype]:
        raise _broken(path, f"has {end - begin} bytes for tensor {name} of {dtype} {shape}")
    return TensorEntry(dtype, tuple(shape), start + begin, start + end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_cover(path: Path, entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """The tensors must fill the file from the header to its end, without overlap or hole."""
    spans = sorted((e.begin, e.end, name) for name, e in entries.items())
    for (_, end, before), (begin, _, name) in pairwise([(0, start, "the header"), *spans]):
        if begin != end:
            raise _broken(path, f"has {'a hole' if begin > end else 'an overlap'} between {before} and {name}")
    last = max((e.end for e in entries.values()), default=start)
    if last != size:
        raise _broken(path, f"has {size} bytes instead of {last}" + (": truncated" if size < last else ""))


def _broken(path: Path, problem: str) -> StoreError:
    return StoreError(f"{path} {problem}; download or write it again")


def pack_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The start of a file of (name, dtype, shape) tensors, one after another, padded to a whole number of pages.

    `dtype` is a name of SAFETENSORS_DTYPES.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        code = SAFETENSORS_DTYPES[dtype]
        end = at + prod(shape) * _BITS[code] // 8
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    paths: Sequence[Path], tensors: Sequence[tuple[str, str, tuple[int, ...]]], pieces: Iterable[memoryview]
) -> tuple[int, bytes]:
    """Write a new file whose data, the tensors' bytes in order, comes in `pieces` of any size, and sync it to disk.

    Of several `paths`, each holds its stripes. Returns the file's size and its checksums (Store.checks). Its data
    begins at a multiple of ALIGN. Raises OSError.
    """
    header = pack_header(tensors)
    nbytes = len(header) + sum(prod(shape) * _BITS[SAFETENSORS_DTYPES[dtype]] // 8 for _, dtype, shape in tensors)
    checks = Checksums()
    with StripedWriter(paths, nbytes) as file:
        for piece in chain([memoryview(header)], pieces):
            file.write(piece)
            checks.add(piece)
        assert checks.total == nbytes, (paths, checks.total, nbytes)
    return checks.total, checks.digests()
