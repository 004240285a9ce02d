"""Speed at which a machine's bytes move, by size: memory, the links between a GPU and the host, and the disk.

Moves them as the engine does. Does not know what the figures are for; machine/measure.py makes a profile of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from random import Random

import torch
from torch import Tensor

from ..memory.device import current_stream
from ..memory.disk import DiskQueue, Read, Write
from ..memory.disk_files import Readable
from ..memory.stripes import Folders
from ..memory.weights import BOUNCE_BYTES
from ..plan.hardware import Curve
from .workbench import CPU, MIB, Clock, Task, Workbench

COPY_BYTES = tuple(64 << 10 << n for n in range(0, 11, 2))  # to 64 MiB
DISK_BYTES = (16 << 10, *(256 << 10 << n for n in range(0, 9, 2)))  # to 64 MiB
EXTENT_BYTES = (1 * MIB, 4 * MIB, 8 * MIB)
DISK_THREADS = (1, 2, 4, 8)
TABLE_ROW_BYTES = 4096


# Memory and links


def memory_read(bench: Workbench, clock: Clock, budget_s: float) -> float:
    """Bytes per second at which all of the arena is summed."""
    numbers = bench.arena.buffer.view(torch.float32)
    return clock.rate(Task(bench.nbytes, bench.nbytes, numbers.sum), budget_s)


def copies_in_place(bench: Workbench, clock: Clock, budget_s: float) -> Curve:
    """Bytes per second copied from one place of the arena to another, by the bytes of a copy."""
    half = bench.nbytes // 2
    low, high = bench.arena.buffer[:half], bench.arena.buffer[half:]
    return clock.curve([_copy_task(low, high, n) for n in COPY_BYTES if n <= half], budget_s)


def _copy_task(source: Tensor, target: Tensor, nbytes: int) -> Task:
    """Copies of `nbytes` bytes to and from all over both."""
    starts = cycle(range(0, min(len(source), len(target)) - nbytes + 1, nbytes))

    def run() -> None:
        at = next(starts)
        target[at : at + nbytes].copy_(source[at : at + nbytes], non_blocking=True)

    return Task(nbytes, nbytes, run)


def links(bench: Workbench, pinned: Workbench, pageable: Workbench, clock: Clock, budget_s: float) -> dict[str, Curve]:
    """Bytes per second between a GPU's arena and the host's, by name of the link and bytes of a copy."""
    device, host, other = bench.arena.buffer, pinned.arena.buffer, pageable.arena.buffer
    bounce = host[:BOUNCE_BYTES]
    sizes = [n for n in COPY_BYTES if n <= len(host)]
    return clock.curves(
        {
            "h2d": [_copy_task(host, device, n) for n in sizes],
            "d2h": [_copy_task(device, host, n) for n in sizes],
            "h2d_pageable": [_bounced_task(other, bounce, device, n) for n in sizes],
            "d2h_pageable": [_copy_task(device, other, n) for n in sizes],
        },
        budget_s,
    )


def _bounced_task(source: Tensor, bounce: Tensor, target: Tensor, nbytes: int) -> Task:
    """Pageable bytes to the device as memory/weights.py takes them there: a piece at a time by a pinned buffer."""

    def run() -> None:
        for low in range(0, nbytes, len(bounce)):
            piece = source[low : min(low + len(bounce), nbytes)]
            current_stream(target.device).synchronize()
            staged = bounce[: len(piece)].copy_(piece)
            target[low : low + len(piece)].copy_(staged, non_blocking=True)

    return Task(nbytes, nbytes, run)


# Disk


@dataclass(frozen=True, slots=True)
class DiskRates:
    """Speeds of a directory's disk: bytes per second by the bytes of an operation, rows per second, and a table."""

    read: Curve
    write: Curve
    rows: float
    table: tuple[tuple[float, float, float], ...]  # bytes of an extent, threads, bytes per second read


def disk(folders: Folders, buffer: Tensor, *, quick: bool, budget_s: float) -> DiskRates:
    """Measure with a scratch file in `folders`; `buffer` [n] uint8 is what is read and written, pages of the host.

    Raises OSError with the bytes needed when the file does not fit.
    """
    size = 64 * MIB if quick else 512 * MIB
    clock = Clock(CPU, quick=quick)
    with closing(folders.scratch(size)) as file:
        with DiskQueue(folders.threads) as queue:
            for at in range(0, size, 16 * MIB):  # what was never written is read without the disk
                queue.write([Write(file, at, buffer[: 16 * MIB])])
            both = clock.curves(_disk_tasks(queue, file, buffer, quick=quick), budget_s / 2)
            rows = clock.rate(_rows_task(queue, file), budget_s / 20)
        table = tuple(_queue_rates(file, buffer, clock, budget_s / 3))
    return DiskRates(both["read"], both["write"], rows, table)


def _disk_tasks(queue: DiskQueue, file: Readable, buffer: Tensor, *, quick: bool) -> dict[str, list[Task]]:
    sizes = [n for n in (DISK_BYTES[:-1] if quick else DISK_BYTES) if n <= len(buffer)]
    return {
        "read": [_disk_task(queue, file, buffer[:n], write=False) for n in sizes],
        "write": [_disk_task(queue, file, buffer[:n], write=True) for n in sizes],
    }


def _disk_task(queue: DiskQueue, file: Readable, buffer: Tensor, *, write: bool) -> Task:
    """One operation of the buffer's size at a time, from the file's start to its end and again."""
    size = len(buffer)
    starts = cycle(range(0, file.size - size + 1, size))

    def run() -> None:
        if write:
            queue.write([Write(file, next(starts), buffer)])
        else:
            queue.read([Read(file, next(starts), buffer)])

    return Task(size, size, run)


def _rows_task(queue: DiskQueue, file: Readable, count: int = 1024) -> Task:
    """Rows at random places, as embeddings are looked up."""
    random = Random(0)
    places = [
        [random.randrange(file.size // TABLE_ROW_BYTES) * TABLE_ROW_BYTES for _ in range(count)] for _ in range(8)
    ]
    turns = cycle(places)
    return Task(count, count, lambda: queue.read_rows(file, next(turns), TABLE_ROW_BYTES))


def _queue_rates(file: Readable, buffer: Tensor, clock: Clock, budget_s: float) -> Iterator[tuple[float, float, float]]:
    """Bytes per second read by queues of other extents and numbers of threads."""
    whole = buffer[: min(len(buffer), file.size // 2, 64 * MIB)]
    each = budget_s / (len(EXTENT_BYTES) * len(DISK_THREADS))
    for extent in EXTENT_BYTES:
        for threads in DISK_THREADS:
            with DiskQueue(threads, extent) as queue:
                task = _disk_task(queue, file, whole, write=False)
                yield extent, threads, clock.rate(task, each)
