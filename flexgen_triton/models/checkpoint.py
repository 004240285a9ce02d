"""The way from a checkpoint directory to a store: read in place where that is possible, else converted once."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from math import prod
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from ..kernels.sizes import BLOCK_ROWS
from ..memory.disk_files import open_regular
from ..memory.safetensors_format import pack_header, write_safetensors
from ..memory.store import CHUNK, STORE_VERSION, Store, StoreError
from ..memory.stripes import Folders, part_paths
from ..plan.placement import Extent, packed_layout
from ..plan.spec import ModelSpec, ModuleSpec, TensorSpec
from . import kept_checks, ops
from .sources import (
    BinWeights,
    CheckpointError,
    RandomWeights,
    SafetensorsWeights,
    Weights,
    check_weights,
    find_weights,
    source_ranges,
)

FLOAT16_OVERFLOW = 65520.0  # the smallest number that rounds to infinity
OUR_STEM = re.compile(r"\.[A-Za-z0-9._-]+-[0-9a-f]{16}")  # of lock files and temporary directories
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def open_store(
    spec: ModelSpec,
    source: Path | None,
    offload_dir: Path | Sequence[Path],
    *,
    progress: Progress | None = None,
    seed: int = 0,
    verify: bool = False,
    streamed: bool = True,
) -> Store:
    """The weights of `spec` from the checkpoint directory `source`, or random ones if that is None.

    A safetensors checkpoint of the same dtype is read where it lies; with `verify` its checksums are made once, kept in
    `offload_dir`, and checked from then on. Anything else is converted into a directory in `offload_dir`, once, and
    found there the next time; its checksums are always checked. Of several directories each gets its stripes of it, and
    a checkpoint is converted that could be read where it lies, unless it is not `streamed`: read once, at the start.
    Raises CheckpointError or StoreError.
    """
    folders = Folders.of(offload_dir)
    files = find_weights(source) if source else ()
    if files and files[0].suffix == ".safetensors":
        weights = SafetensorsWeights(files)
        check_weights(spec, weights)
        if weights.usable_in_place(spec) and not (streamed and len(folders.paths) > 1):
            store = weights.store_in_place(spec)
            return (
                _verified(spec, store, folders.first, [h.start for h in weights.headers], progress) if verify else store
            )
    name = store_name(spec, files, seed, len(folders.paths))
    return _existing(folders.directories(name), spec) or _build(spec, files, seed, folders, progress)


# Checksums of files that are read in place


def _verified(
    spec: ModelSpec, store: Store, directory: Path, starts: Sequence[int], progress: Progress | None
) -> Store:
    """The store with the checksums that are kept of its files, made now if there are none; `starts`: of their data."""
    paths = [str(f.resolve()) for f in store.files]
    name = f"{_readable(spec)}-{hashlib.sha256(json.dumps(paths).encode()).hexdigest()[:16]}"
    kept = directory / f"{name}.checks"
    directory.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    with _lock(directory / f".{name}.lock"):
        if not os.path.lexists(kept):
            with _work_directory(directory / name) as work:
                kept_checks.save(work / kept.name, store, kept_checks.make(store, progress))
                (work / kept.name).rename(kept)
            _sync(directory)
    checked = kept_checks.load(kept, store)
    kept_checks.check_starts(checked, starts)
    return checked


# Converting


def store_name(spec: ModelSpec, files: Sequence[Path], seed: int, num_parts: int = 1) -> str:
    """A readable name and a digest of all that decides a store's bytes: format, model, source files or seed, parts."""
    model = [(m.name, [(t.name, t.shape, t.sources, t.source_rows, t.row) for t in m.tensors]) for m in spec.modules]
    origin: list[object] = [_fingerprint(f) for f in files] or [seed]
    digest = hashlib.sha256(json.dumps([STORE_VERSION, spec.dtype, model, origin, num_parts]).encode()).hexdigest()
    return f"{_readable(spec)}-{digest[:16]}"


def _readable(spec: ModelSpec) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", spec.name.rsplit("/", 1)[-1]).strip(".-")[:48] or "model"


def _fingerprint(file: Path) -> tuple[str, int, int, str]:
    """Name, size, time and a hash of the file's end, which in a .bin holds the checksums of all tensors."""
    with open(open_regular(file), "rb") as opened:
        stat = os.fstat(opened.fileno())
        opened.seek(max(0, stat.st_size - CHUNK))
        return file.name, stat.st_size, stat.st_mtime_ns, xxhash.xxh3_64_hexdigest(opened.read())


def _existing(targets: Sequence[Path], spec: ModelSpec) -> Store | None:
    """The store in `targets`, if it is complete and what a conversion of `spec` makes."""
    try:
        store = Store.load(targets[0], targets[1:])
    except StoreError:
        return None
    names = [f"{m.name}.safetensors" for m in spec.modules]
    is_ours = (
        [f.name for f in store.files] == names
        and store.extents == _extents(spec)
        and (store.dtype, store.align) == (spec.dtype, CHUNK)
        and None not in store.checks
    )
    return store if is_ours else None


def _build(spec: ModelSpec, files: Sequence[Path], seed: int, folders: Folders, progress: Progress | None) -> Store:
    """Convert into temporary directories and rename them; another process's store is used if it was first."""
    name = store_name(spec, files, seed, len(folders.paths))
    targets = folders.directories(name)
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
    with ExitStack() as held:
        for target in targets:
            held.enter_context(_lock(target.parent / f".{name}.lock"))
        if store := _existing(targets, spec):
            return store
        weights = _open_weights(spec, files, seed)
        check_weights(spec, weights)
        _check_space(spec, folders)
        with _full_disk_explained(spec.name):
            works = [held.enter_context(_work_directory(target)) for target in targets]
            _convert(spec, weights, works, progress)
            if store_name(spec, files, seed, len(targets)) != name:
                raise CheckpointError(f"{weights.where} was changed while it was converted; try again")
            _publish(works, targets, spec)
    return Store.load(targets[0], targets[1:])


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


def _check_space(spec: ModelSpec, folders: Folders) -> None:
    headers = sum(len(_module_header(m)) for m in spec.modules)
    needed, free = spec.weight_bytes + headers, folders.free_bytes()
    if needed > free:
        raise CheckpointError(
            f"{spec.name} needs {needed} bytes in {folders} to be converted, which has {free} free; free "
            f"{needed - free} or choose another offload directory"
        )


def _tensor_table(module: ModuleSpec) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(t.name, t.dtype, t.shape) for t in module.tensors]


def _module_header(module: ModuleSpec) -> bytes:
    return pack_header(_tensor_table(module))


def _convert(spec: ModelSpec, weights: Weights, works: Sequence[Path], progress: Progress | None) -> None:
    """Write one file per module, a part of it in each directory, and the manifest last."""
    done = 0
    files, sizes, checks = [], [], []
    for module in spec.modules:
        files.append(works[0] / f"{module.name}.safetensors")
        paths = part_paths(files[-1].name, works)
        size, check = write_safetensors(paths, _tensor_table(module), _module_bytes(module, weights))
        sizes.append(size)
        checks.append(check)
        done += sum(t.nbytes for t in module.tensors)
        if progress:
            progress(done, spec.weight_bytes)
    store = Store(tuple(files), tuple(sizes), _extents(spec), spec.dtype, CHUNK, tuple(checks), others=tuple(works[1:]))
    store.save(works[0])


def _extents(spec: ModelSpec) -> dict[str, tuple[Extent, ...]]:
    """Extents by module: those of packed_layout, moved where a header outgrows one page."""
    layout = zip(spec.modules, packed_layout(spec.modules, 0), strict=True)
    return {m.name: tuple(replace(e, offset=e.offset + len(_module_header(m))) for e in es) for m, es in layout}


def _module_bytes(module: ModuleSpec, weights: Weights) -> Iterator[memoryview]:
    """A module's tensors one after another, their sources concatenated, converted a piece at a time."""
    for _, parts in groupby(module.tensors, key=lambda t: t.weight):
        yield from _weight_bytes(next(iter(parts)), weights)


def _weight_bytes(tensor: TensorSpec, weights: Weights) -> Iterator[memoryview]:
    """All parts of the weight that `tensor` is the first part of."""
    if tensor.packed is None:
        for source, piece in _pieces(tensor, weights):
            yield _as_bytes(_cast(piece, getattr(torch, tensor.dtype), f"{weights.where}: {source}"))
        return
    later: list[Sequence[Tensor]] = []  # parts behind the first, of each block of rows
    for rows in _row_blocks(tensor.packed.shape, (piece for _, piece in _pieces(tensor, weights))):
        first, *others = ops.encode(tensor.packed.format, rows)
        later.append(others)
        yield _as_bytes(first)
    for part in zip(*later, strict=True):
        yield from map(_as_bytes, part)


def _pieces(tensor: TensorSpec, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """A tensor's elements in order, with the name of the source they come from."""
    width = prod(tensor.source_shape[1:])
    for source, first, rows in source_ranges(tensor):
        for piece in weights.pieces(source, first * width, (first + rows) * width):
            yield source, piece


def _row_blocks(shape: tuple[int, int], pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """Elements of a matrix as blocks of whole rows [256, K] fp32, the last one of what is left."""
    rows, columns = shape
    block = torch.empty(min(rows, BLOCK_ROWS) * columns)
    filled = 0
    for piece in pieces:
        while len(piece):
            taken = piece[: len(block) - filled]
            block[filled : filled + len(taken)] = taken
            filled, piece = filled + len(taken), piece[len(taken) :]
            if filled == len(block):
                yield block.view(-1, columns)
                filled = 0
    if filled:
        yield block[:filled].view(-1, columns)


def _cast(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Convert to the model's dtype, refusing to turn a number into infinity."""
    if dtype == torch.float16 != piece.dtype:
        low, high = torch.aminmax(piece)
        largest = max(-float(low), float(high))
        if largest >= FLOAT16_OVERFLOW:
            raise CheckpointError(f"{name} has values up to {largest:.3g}, too large for float16; use bfloat16")
    return piece.to(dtype)


def _as_bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _publish(works: Sequence[Path], targets: Sequence[Path], spec: ModelSpec) -> None:
    """Rename a finished store into place, over a damaged one but never over a complete one; its manifest last."""
    is_complete = _existing(targets, spec) is not None
    for work, target in reversed(list(zip(works, targets, strict=True))):
        damaged = work.with_name(f"{work.name}-damaged")
        _sync(work)
        if not is_complete and os.path.lexists(target):
            target.rename(damaged)
        try:
            work.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        _sync(target.parent)
        shutil.rmtree(damaged, ignore_errors=True)


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
