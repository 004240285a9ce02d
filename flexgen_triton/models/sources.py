"""Sources of weights: safetensors, torch.save files, random numbers. Tensors by name, in pieces, checked by shape.

Knows the files of a checkpoint and the names in them. Does not know where the tensors go.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from ..memory.disk_files import irregular, open_regular
from ..memory.safetensors_format import SAFETENSORS_DTYPES, Header, TensorEntry, read_safetensors_header
from ..memory.store import Stamp, Store, StoreError
from ..plan.formats import STORED_BYTES
from ..plan.placement import ALIGN, Extent
from ..plan.spec import ModelSpec, TensorSpec
from .pickles import unsafe_globals

PIECE = 2 << 20  # elements that are converted at a time
MAPPED_BYTES = 256 << 20  # of a .bin file, before its mapping is dropped: mapped pages count as this process's memory
RANDOM_STD = 0.02
SHOWN_NAME = 80  # characters of a name that a message repeats
SHOWN_GLOBALS = 3

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
        if os.path.lexists(single := source / f"{stem}.{suffix}"):
            return (_regular(single),)
        if os.path.lexists(index):
            return _indexed(_regular(index))
        if found := sorted(source.glob(f"{shards}.{suffix}")):
            return tuple(map(_regular, found))
    names = ", ".join(sorted(p.name for p in source.iterdir())[:5]) or "nothing"
    raise CheckpointError(
        f"{source} has no model.safetensors, pytorch_model.bin or shards of them, only {names}; download them"
    )


def _regular(path: Path) -> Path:
    """The path, if it leads to a file; raises CheckpointError before anything else is opened, and waited for."""
    try:
        kind = irregular(path.stat().st_mode)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); download it again") from error
    if kind:
        raise CheckpointError(f"{path} is {kind}, not a file; put the file in its place or remove it")
    return path


def _indexed(index: Path) -> tuple[Path, ...]:
    """The shards that an index names; all must exist."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        plain = all(Path(n).name == n for n in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error!r:.200}); download it again") from error
    if not names or not plain:
        raise CheckpointError(f"{index} names no files of its own directory; download it again")
    missing = [n for n in names if not _exists(index.parent / n)]
    if missing:
        first = _shown(missing[0])
        raise CheckpointError(f"{index.parent} lacks {len(missing)} of {len(names)} shards: {first}; download them")
    return tuple(_regular(index.parent / n) for n in names)


def _shown(name: str) -> str:
    """A name from a file, as a message can show it."""
    text = ascii(name)[1:-1]
    return text if len(text) <= SHOWN_NAME else f"{text[:SHOWN_NAME]}... of {len(name)} characters"


def _exists(path: Path) -> bool:
    """Return True if there is anything of that name, however long it may be."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


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
        """A name of the source for messages."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all tensors by plain name."""

    def dtype(self, name: str) -> str:
        """The tensor's dtype; a word for messages where it is not one of `_DTYPES`."""

    def unfit(self, name: str) -> str:
        """The form of a tensor that is no block of numbers, and the way out; empty for one that is."""

    def pieces(self, name: str, low: int, high: int) -> Iterator[Tensor]:
        """Elements [low, high) of the flattened tensor, in its own dtype, in pieces of at most PIECE."""


class SafetensorsWeights:
    """The tensors of safetensors files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.where = str(files[0].parent)
        self.headers = tuple(_header(f) for f in files)
        self._found: dict[str, tuple[int, TensorEntry]] = {}
        for n, (file, header) in enumerate(zip(files, self.headers, strict=True)):
            for name, entry in header.entries.items():
                other = self._found.setdefault(plain_name(name), (n, entry))[0]
                if other != n:
                    raise CheckpointError(f"{file} and {files[other]} both have tensor {name}; remove one of them")

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, (_, entry) in self._found.items()}

    def dtype(self, name: str) -> str:
        return self._found[name][1].dtype

    def unfit(self, name: str) -> str:
        return ""

    def pieces(self, name: str, low: int, high: int) -> Iterator[Tensor]:
        n, entry = self._found[name]
        dtype = _DTYPES[entry.dtype]
        with open(open_regular(self.files[n]), "rb", buffering=0) as file:
            for start in range(low, high, PIECE):
                count = min(PIECE, high - start)
                data = os.pread(file.fileno(), count * dtype.itemsize, entry.begin + start * dtype.itemsize)
                if len(data) < count * dtype.itemsize:
                    raise CheckpointError(f"{self.files[n]} became shorter while it was read; download it again")
                if change := self.headers[n].stamp.change_to(Stamp.of(os.fstat(file.fileno()))):
                    raise CheckpointError(f"{self.files[n]} {change} while it was converted; try again")
                yield torch.frombuffer(bytearray(data), dtype=dtype)

    def usable_in_place(self, spec: ModelSpec) -> bool:
        """Return True if every tensor that the model needs has its dtype and lies at a multiple of its element size."""
        if spec.is_packed:
            return False
        entries = [self._found[s][1] for m in spec.modules for t in m.tensors for s in t.sources]
        return all(e.dtype == SAFETENSORS_DTYPES[spec.dtype] and e.begin % spec.itemsize == 0 for e in entries)

    def store_in_place(self, spec: ModelSpec) -> Store:
        """A store that is these files."""
        extents = {m.name: tuple(e for t in m.tensors for e in self._extents(t)) for m in spec.modules}
        stamps = tuple(h.stamp for h in self.headers)
        sizes = tuple(s.nbytes for s in stamps)
        unknown = (None,) * len(sizes)
        return Store(self.files, sizes, extents, spec.dtype, ALIGN, unknown, stamps, "download the checkpoint again")

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
        self._unfit: dict[str, str] = {}
        for file in files:
            for name, tensor in _load_bin(file).items():
                plain, unfit = plain_name(name), _unfit(tensor)
                if unfit:
                    self._unfit[plain] = unfit
                self._found.setdefault(plain, (file, name, () if unfit else tuple(tensor.shape), tensor.dtype))
        self._mapped: dict[str, Tensor] = {}
        self._mapped_file: Path | None = None
        self._touched = 0  # bytes of the present mapping

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for name, (_, _, shape, _) in self._found.items()}

    def dtype(self, name: str) -> str:
        dtype = self._found[name][3]
        return next((k for k, v in _DTYPES.items() if v == dtype), str(dtype).removeprefix("torch."))

    def unfit(self, name: str) -> str:
        return self._unfit.get(name, "")

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

    def unfit(self, name: str) -> str:
        return ""

    def pieces(self, name: str, low: int, high: int) -> Iterator[Tensor]:
        """Draw elements [low, high). Each PIECE of them has its own seed, so that any range can be made alone."""
        shape = self._shapes[name]
        mean = 1.0 if len(shape) == 1 and "norm" in name and name.endswith("weight") else 0.0
        for start in range(low // PIECE * PIECE, high, PIECE):
            seed = xxhash.xxh3_64_intdigest(f"{self._seed}:{name}:{start}".encode()) >> 1
            block = torch.empty(min(PIECE, prod(shape) - start))
            block.normal_(mean, RANDOM_STD, generator=torch.Generator().manual_seed(seed))
            yield block[max(low - start, 0) : high - start]


def _header(file: Path) -> Header:
    try:
        return read_safetensors_header(file)
    except StoreError as error:
        raise CheckpointError(str(error)) from error


def _load_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, mapped, not read; raises CheckpointError. Runs no code from the file."""
    with open(open_regular(file), "rb") as opened:
        is_zip = opened.read(4) == b"PK\x03\x04"
    if not is_zip:
        raise CheckpointError(
            _asks_for_code(file)
            or f"{file} is not a zip archive as torch.save writes it since 1.6 (legacy or damaged); load and save it "
            "with a current torch, or use safetensors"
        )
    try:
        with warnings.catch_warnings():  # of kinds of tensors that are refused in a sentence
            warnings.simplefilter("ignore")
            loaded = torch.load(str(file), weights_only=True, mmap=True, map_location="cpu")
    except _UNREADABLE as error:  # whose text, and traceback, may say how to load a dangerous file all the same
        raise CheckpointError(
            _asks_for_code(file) or f"{file} cannot be read ({_reason(error)}): truncated or damaged; download it again"
        ) from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file} holds a {type(loaded).__name__}, not tensors by name; save a state_dict")
    return {name: t.detach() for name, t in loaded.items() if isinstance(name, str) and isinstance(t, Tensor)}


def _asks_for_code(file: Path) -> str:
    """The sentence for a pickle that runs more than tensors need; empty for any other file."""
    names = unsafe_globals(file)
    if not names:
        return ""
    shown = ", ".join(map(_shown, names[:SHOWN_GLOBALS])) + (" ..." if len(names) > SHOWN_GLOBALS else "")
    return (
        f"{file} asks to run code when it is loaded ({shown}) and was not loaded; do not load it by other means "
        "either: take safetensors from a source that you trust"
    )


def _reason(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) and not isinstance(error, pickle.PickleError) else ""
    return text[:200] if text and "weights_only" not in text else type(error).__name__


def _unfit(tensor: Tensor) -> str:
    """The form of a tensor that is no block of numbers, and the way out; empty for one that is."""
    if tensor.is_nested:
        return "a nested tensor; save it as one tensor of numbers (torch.nested.to_padded_tensor)"
    if tensor.is_meta:
        return "a meta tensor, which has a shape but no numbers; save the model after its weights were loaded"
    if tensor.is_quantized:
        return "a quantised tensor; save what its dequantize() returns, or use an unquantised checkpoint"
    return "" if tensor.layout == torch.strided else "a sparse tensor; save what its to_dense() returns"


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
        if unfit := weights.unfit(name):
            raise CheckpointError(f"{weights.where} has {name} as {unfit}")
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
