"""Where weights come from: safetensors, torch.save files, random numbers. Tensors by name, in pieces, checked by shape.

Knows the files of a checkpoint and the names in them. Does not know where the tensors go.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from ..memory.store import SAFETENSORS_DTYPES, Store, StoreError, TensorEntry, read_safetensors_header
from ..plan.placement import PAGE, Extent
from ..plan.spec import STORED_BYTES, ModelSpec, TensorSpec

PIECE = 2 << 20  # elements that are converted at a time
MAPPED_BYTES = 256 << 20  # of a .bin file, before its mapping is dropped: mapped pages count as this process's memory
RANDOM_STD = 0.02

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_UNREADABLE = (
    RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, pickle.PickleError,
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


# Finding files


def find_weights(source: Path) -> tuple[Path, ...]:
    """The weight files of a checkpoint directory, safetensors before .bin; raises CheckpointError if there are none."""
    if not source.is_dir():
        raise CheckpointError(f"{source} is not a directory; give the directory of a checkpoint")
    for stem, suffix, shards in (("model", "safetensors", "*"), ("pytorch_model", "bin", "pytorch_model-*")):
        index = source / f"{stem}.{suffix}.index.json"
        if (single := source / f"{stem}.{suffix}").is_file():
            return (single,)
        if index.is_file():
            return _indexed(index)
        if found := sorted(source.glob(f"{shards}.{suffix}")):
            return tuple(found)
    names = ", ".join(sorted(p.name for p in source.iterdir())[:5]) or "nothing"
    raise CheckpointError(
        f"{source} has no model.safetensors, pytorch_model.bin or shards of them, only {names}; download them"
    )


def _indexed(index: Path) -> tuple[Path, ...]:
    """The shards that an index names; all must exist."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        plain = all(Path(n).name == n for n in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error!r}); download it again") from error
    if not names or not plain:
        raise CheckpointError(f"{index} names no files of its own directory; download it again")
    missing = [n for n in names if not (index.parent / n).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards: {missing[0]}; download them"
        )
    return tuple(index.parent / n for n in names)


def plain_name(name: str) -> str:
    """A checkpoint's name for a tensor without any "model." prefixes."""
    while name.startswith("model."):
        name = name.removeprefix("model.")
    return name


# Where weights come from


class Weights(Protocol):
    """Tensors by name, readable in pieces."""

    @property
    def where(self) -> str:
        """For messages."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By plain name."""

    def dtype(self, name: str) -> str:
        """For messages where it is not one of `_DTYPES`."""

    def pieces(self, name: str, low: int, high: int) -> Iterator[Tensor]:
        """Elements [low, high) of the flattened tensor, in its own dtype, in pieces of at most PIECE."""


class SafetensorsWeights:
    """The tensors of safetensors files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.where = str(files[0].parent)
        self._found: dict[str, tuple[int, TensorEntry]] = {}
        for n, file in enumerate(files):
            for name, entry in _header(file).items():
                other = self._found.setdefault(plain_name(name), (n, entry))[0]
                if other != n:
                    raise CheckpointError(f"{file} and {files[other]} both have tensor {name}; remove one of them")

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, (_, entry) in self._found.items()}

    def dtype(self, name: str) -> str:
        return self._found[name][1].dtype

    def pieces(self, name: str, low: int, high: int) -> Iterator[Tensor]:
        n, entry = self._found[name]
        dtype = _DTYPES[entry.dtype]
        with self.files[n].open("rb", buffering=0) as file:
            for start in range(low, high, PIECE):
                count = min(PIECE, high - start)
                data = os.pread(file.fileno(), count * dtype.itemsize, entry.begin + start * dtype.itemsize)
                if len(data) < count * dtype.itemsize:
                    raise CheckpointError(f"{self.files[n]} became shorter while it was read; download it again")
                yield torch.frombuffer(bytearray(data), dtype=dtype)

    def usable_in_place(self, spec: ModelSpec) -> bool:
        """Whether all that the model needs has its dtype and lies at a multiple of its elements."""
        if spec.is_4bit:
            return False
        entries = [self._found[s][1] for m in spec.modules for t in m.tensors for s in t.sources]
        return all(e.dtype == SAFETENSORS_DTYPES[spec.dtype] and e.begin % spec.itemsize == 0 for e in entries)

    def store_in_place(self, spec: ModelSpec) -> Store:
        """A store that is these files."""
        extents = {m.name: tuple(e for t in m.tensors for e in self._extents(t)) for m in spec.modules}
        sizes = tuple(f.stat().st_size for f in self.files)
        return Store(self.files, sizes, extents, spec.dtype, PAGE, (None,) * len(sizes))

    def _extents(self, tensor: TensorSpec) -> Iterator[Extent]:
        """One extent per source; a vector is one row, numbered by its first element."""
        row, width = tensor.row, prod(tensor.shape[1:]) * STORED_BYTES[tensor.dtype]
        for source, first, rows in source_ranges(tensor):
            n, entry = self._found[source]
            count, row_bytes = (rows, width) if len(tensor.shape) > 1 else (1, rows * width)
            yield Extent(tensor.name, row, count, row_bytes, n, entry.begin + first * width)
            row += rows


class BinWeights:
    """The tensors of zip files written by torch.save, mapped and unmapped as they are read."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.where = str(files[0].parent)
        self._found: dict[str, tuple[Path, str, tuple[int, ...], torch.dtype]] = {}
        for file in files:
            for name, tensor in _load_bin(file).items():
                self._found.setdefault(plain_name(name), (file, name, tuple(tensor.shape), tensor.dtype))
        self._mapped: dict[str, Tensor] = {}
        self._mapped_file: Path | None = None
        self._touched = 0  # bytes of the present mapping

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for name, (_, _, shape, _) in self._found.items()}

    def dtype(self, name: str) -> str:
        dtype = self._found[name][3]
        return next((k for k, v in _DTYPES.items() if v == dtype), str(dtype).removeprefix("torch."))

    def pieces(self, name: str, low: int, high: int) -> Iterator[Tensor]:
        for start in range(low, high, PIECE):
            yield self._tensor(name).reshape(-1)[start : min(start + PIECE, high)]

    def _tensor(self, name: str) -> Tensor:
        """The mapped tensor, of which at most one piece is about to be read."""
        file, key, _, dtype = self._found[name]
        if file != self._mapped_file or self._touched > MAPPED_BYTES:
            self._mapped, self._mapped_file, self._touched = _load_bin(file), file, 0
        self._touched += PIECE * dtype.itemsize
        return self._mapped[key]


class RandomWeights:
    """Normal random weights of the model's shapes, the same for the same seed; no tensor is all zeros or ones."""

    where = "random weights"

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self._shapes, self._seed = source_shapes(spec), seed

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> str:
        return "F32"

    def pieces(self, name: str, low: int, high: int) -> Iterator[Tensor]:
        """Each block of PIECE elements has a seed of its own, so that any range of rows can be made alone."""
        shape = self._shapes[name]
        mean = 1.0 if len(shape) == 1 and "norm" in name and name.endswith("weight") else 0.0
        for start in range(low // PIECE * PIECE, high, PIECE):
            seed = xxhash.xxh3_64_intdigest(f"{self._seed}:{name}:{start}".encode()) >> 1
            block = torch.empty(min(PIECE, prod(shape) - start))
            block.normal_(mean, RANDOM_STD, generator=torch.Generator().manual_seed(seed))
            yield block[max(low - start, 0) : high - start]


def _header(file: Path) -> dict[str, TensorEntry]:
    try:
        return read_safetensors_header(file)
    except StoreError as error:
        raise CheckpointError(str(error)) from error


def _load_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, mapped, not read; raises CheckpointError. Runs no code from the file."""
    with file.open("rb") as opened:
        if opened.read(4) != b"PK\x03\x04":
            raise CheckpointError(
                f"{file} is not a zip archive as torch.save writes it since 1.6 (legacy or damaged); load and save it "
                "with a current torch, or use safetensors"
            )
    try:
        loaded = torch.load(str(file), weights_only=True, mmap=True, map_location="cpu")
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} cannot be read ({reason}): truncated or damaged; download it again") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file} holds a {type(loaded).__name__}, not tensors by name; save a state_dict")
    return {name: t for name, t in loaded.items() if isinstance(name, str) and isinstance(t, Tensor)}


# What the model needs of them


def source_ranges(tensor: TensorSpec) -> Iterator[tuple[str, int, int]]:
    """(source, its first row, rows) of each source that a tensor is concatenated from."""
    assert tensor.row == 0 or len(tensor.sources) == 1, tensor
    for source, rows in zip(tensor.sources, tensor.source_rows, strict=True):
        yield source, tensor.row, rows


def source_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape that each source tensor must have: as many rows as the model uses of it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in (t for m in spec.modules for t in m.tensors):
        for source, first, rows in source_ranges(tensor):
            used = shapes.get(source, (0,))[0]
            shapes[source] = (max(used, first + rows), *tensor.source_shape[1:])
    return shapes


def check_weights(spec: ModelSpec, weights: Weights) -> None:
    """Raise CheckpointError unless every tensor is there, in the right shape and in a dtype that can be converted."""
    found = weights.shapes()
    for name, shape in source_shapes(spec).items():
        if name not in found:
            some = next(iter(found), "none")
            raise CheckpointError(
                f"{weights.where} has no tensor {name} among its {len(found)} ({some}, ...); is it a complete "
                f"{spec.family} model?"
            )
        if found[name] != shape:
            raise CheckpointError(
                f"{weights.where} has {name} of shape {list(found[name])}, its config asks for {list(shape)}; use the "
                "config.json of this checkpoint"
            )
        if weights.dtype(name) not in _DTYPES:
            raise CheckpointError(
                f"{weights.where} has {name} of dtype {weights.dtype(name)}; only {', '.join(_DTYPES)} can be "
                "read: use an unquantised checkpoint"
            )
