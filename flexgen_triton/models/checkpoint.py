"""From a checkpoint directory to a store: read in place where that is possible, converted once where it is not.

Knows safetensors and torch.save files and the names of tensors in them. Does not know what a model does with them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from ..memory.disk import free_bytes
from ..memory.store import (
    CHUNK,
    SAFETENSORS_DTYPES,
    STORE_VERSION,
    Store,
    StoreError,
    TensorEntry,
    pack_header,
    read_safetensors_header,
    write_safetensors,
)
from ..plan.placement import PAGE, Extent, packed_layout
from ..plan.spec import ModelSpec, ModuleSpec, TensorSpec

PIECE = 2 << 20  # elements that are converted at a time
MAPPED_BYTES = 256 << 20  # of a .bin file, before its mapping is dropped: mapped pages count as this process's memory
RANDOM_STD = 0.02
FLOAT16_OVERFLOW = 65520.0  # the smallest number that rounds to infinity
OUR_STEM = re.compile(r"\.[A-Za-z0-9._-]+-[0-9a-f]{16}")  # of lock files and temporary directories
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_UNREADABLE = (
    RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, pickle.PickleError,
)  # fmt: skip

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


def open_store(
    spec: ModelSpec, source: Path | None, offload_dir: Path, *, progress: Progress | None = None, seed: int = 0
) -> Store:
    """The weights of `spec` from the checkpoint directory `source`, or random ones if that is None.

    A safetensors checkpoint of the same dtype is read where it lies. Anything else is converted into a directory in
    `offload_dir`, once, and found there the next time. Raises CheckpointError.
    """
    files = find_weights(source) if source else ()
    if files and files[0].suffix == ".safetensors":
        weights = SafetensorsWeights(files)
        check_weights(spec, weights)
        if weights.usable_in_place(spec):
            return weights.store_in_place(spec)
    target = offload_dir / store_name(spec, files, seed)
    return _existing(target) or _build(spec, files, seed, target, progress)


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
        entries = [self._found[s][1] for m in spec.modules for t in m.tensors for s in t.sources]
        return all(e.dtype == SAFETENSORS_DTYPES[spec.dtype] and e.begin % spec.itemsize == 0 for e in entries)

    def store_in_place(self, spec: ModelSpec) -> Store:
        """A store that is these files."""
        extents = {m.name: tuple(e for t in m.tensors for e in self._extents(t, spec.itemsize)) for m in spec.modules}
        sizes = tuple(f.stat().st_size for f in self.files)
        return Store(self.files, sizes, extents, spec.dtype, PAGE, (None,) * len(sizes))

    def _extents(self, tensor: TensorSpec, itemsize: int) -> Iterator[Extent]:
        """One extent per source; a vector is one row, numbered by its first element."""
        row, width = tensor.row, prod(tensor.shape[1:]) * itemsize
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
            shapes[source] = (max(used, first + rows), *tensor.shape[1:])
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


# Converting


def store_name(spec: ModelSpec, files: Sequence[Path], seed: int) -> str:
    """A readable name and a digest of all that decides a store's bytes: format, model, and source files or seed."""
    model = [(m.name, [(t.name, t.shape, t.sources, t.source_rows, t.row) for t in m.tensors]) for m in spec.modules]
    origin: list[object] = [_fingerprint(f) for f in files] or [seed]
    digest = hashlib.sha256(json.dumps([STORE_VERSION, spec.dtype, model, origin]).encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", spec.name.rsplit("/", 1)[-1]).strip(".-")[:48] or "model"
    return f"{readable}-{digest[:16]}"


def _fingerprint(file: Path) -> tuple[str, int, int, str]:
    """Name, size, time and a hash of the file's end, which in a .bin holds the checksums of all tensors."""
    stat = file.stat()
    with file.open("rb") as opened:
        opened.seek(max(0, stat.st_size - CHUNK))
        return file.name, stat.st_size, stat.st_mtime_ns, xxhash.xxh3_64_hexdigest(opened.read())


def _existing(target: Path) -> Store | None:
    """The store in `target`, if it is complete."""
    try:
        return Store.load(target)
    except StoreError:
        return None


def _build(spec: ModelSpec, files: Sequence[Path], seed: int, target: Path, progress: Progress | None) -> Store:
    """Convert into a temporary directory and rename it to `target`; another process's store is used if it was first."""
    directory = target.parent
    directory.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    with _lock(directory / f".{target.name}.lock"):
        if store := _existing(target):
            return store
        weights = _open_weights(spec, files, seed)
        check_weights(spec, weights)
        _check_space(spec, directory)
        with _full_disk_explained(spec.name), _work_directory(target) as work:
            _convert(spec, weights, work, progress)
            _publish(work, target)
    return Store.load(target)


@contextmanager
def _full_disk_explained(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise CheckpointError(f"{name} could not be converted: {error.strerror}") from error


@contextmanager
def _work_directory(target: Path) -> Iterator[Path]:
    """A directory beside `target` for its maker alone; what is not renamed from it in time is removed."""
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))  # 0700
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _open_weights(spec: ModelSpec, files: Sequence[Path], seed: int) -> Weights:
    if not files:
        return RandomWeights(spec, seed)
    return SafetensorsWeights(files) if files[0].suffix == ".safetensors" else BinWeights(files)


def _check_space(spec: ModelSpec, directory: Path) -> None:
    headers = sum(len(_module_header(m, spec.dtype)) for m in spec.modules)
    needed, free = spec.weight_bytes + headers, free_bytes(directory)
    if needed > free:
        raise CheckpointError(
            f"{spec.name} needs {needed} bytes in {directory} to be converted, which has {free} free; free "
            f"{needed - free} or choose another offload directory"
        )


def _tensor_table(module: ModuleSpec, dtype: str) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(t.name, dtype, t.shape) for t in module.tensors]


def _module_header(module: ModuleSpec, dtype: str) -> bytes:
    return pack_header(_tensor_table(module, dtype))


def _convert(spec: ModelSpec, weights: Weights, work: Path, progress: Progress | None) -> None:
    """Write one file per module, and the manifest last."""
    done = 0
    files, sizes, checks = [], [], []
    for module in spec.modules:
        files.append(work / f"{module.name}.safetensors")
        pieces = _module_bytes(module, weights, spec.dtype)
        size, check = write_safetensors(files[-1], _tensor_table(module, spec.dtype), pieces)
        sizes.append(size)
        checks.append(check)
        done += sum(t.numel for t in module.tensors) * spec.itemsize
        if progress:
            progress(done, spec.weight_bytes)
    extents = {m.name: e for m, e in zip(spec.modules, _layout(spec), strict=True)}
    Store(tuple(files), tuple(sizes), extents, spec.dtype, CHUNK, tuple(checks)).save(work)


def _layout(spec: ModelSpec) -> list[tuple[Extent, ...]]:
    """packed_layout, moved where a header outgrows one page."""
    layout = packed_layout(spec.modules, spec.itemsize, 0)
    starts = [len(_module_header(m, spec.dtype)) for m in spec.modules]
    return [tuple(replace(e, offset=e.offset + n) for e in es) for es, n in zip(layout, starts, strict=True)]


def _module_bytes(module: ModuleSpec, weights: Weights, dtype: str) -> Iterator[memoryview]:
    """A module's tensors one after another, their sources concatenated, converted a piece at a time."""
    for tensor in module.tensors:
        width = prod(tensor.shape[1:])
        for source, first, rows in source_ranges(tensor):
            for piece in weights.pieces(source, first * width, (first + rows) * width):
                yield _as_bytes(_cast(piece, getattr(torch, dtype), f"{weights.where}: {source}"))


def _cast(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """To the model's dtype, refusing to turn a number into infinity."""
    if dtype == torch.float16 != piece.dtype:
        low, high = torch.aminmax(piece)
        largest = max(-float(low), float(high))
        if largest >= FLOAT16_OVERFLOW:
            raise CheckpointError(f"{name} has values up to {largest:.3g}, too large for float16; use bfloat16")
    return piece.to(dtype)


def _as_bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def _publish(work: Path, target: Path) -> None:
    """Rename a finished store into place, over a damaged one but never over a complete one."""
    _sync(work)
    if not _existing(target) and target.exists():
        target.rename(work.with_name(f"{work.name}-damaged"))
    try:
        work.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _sync(target.parent)
    shutil.rmtree(work.with_name(f"{work.name}-damaged"), ignore_errors=True)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# Two processes at once


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock file that is gone afterwards. Without locks in the filesystem, the rename decides who was first."""
    fd = _acquire(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        _release(path, fd)


def _acquire(path: Path, operation: int) -> int | None:
    """A descriptor that holds the lock of `path`; None if another process has it or there are no locks."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, operation)
            if os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(fd)
            if not isinstance(error, BlockingIOError):
                path.unlink(missing_ok=True)
            return None
        os.close(fd)  # whoever held the lock before has removed the file: take the next one's


def _release(path: Path, fd: int | None) -> None:
    if fd is not None:
        path.unlink(missing_ok=True)
        os.close(fd)


def _sweep(directory: Path) -> None:
    """Remove temporary directories whose process has died: nobody holds their lock."""
    for work in directory.glob(".*.tmp-*"):
        stem = work.name.split(".tmp-")[0]
        if not OUR_STEM.fullmatch(stem) or not _is_mine(work):
            continue
        lock = directory / f"{stem}.lock"
        if (fd := _acquire(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None:
            shutil.rmtree(work, ignore_errors=True)
            _release(lock, fd)


def _is_mine(directory: Path) -> bool:
    try:
        return directory.lstat().st_uid == os.getuid()
    except FileNotFoundError:  # renamed meanwhile
        return False
