"""The disk queue beside plain O_DIRECT reads of the same file, the better of one thread and four."""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from flexgen_triton.memory.arena import Arena
from flexgen_triton.memory.disk import DiskQueue, Read, Write
from flexgen_triton.memory.disk_files import DiskFile

SIZE = 1 << 30
CHUNK = 4 << 20


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "big"
    with path.open("wb") as file:
        for _ in range(SIZE // CHUNK):
            file.write(os.urandom(CHUNK))
        os.fsync(file.fileno())
    return path


def plain_rate(path: Path, threads: int, *, write: bool = False) -> float:
    """Bytes a second of aligned 4 MiB transfers by that many threads; direct where the filesystem lets them be."""
    flags = os.O_RDWR if write else os.O_RDONLY
    try:
        fd = os.open(path, flags | os.O_DIRECT)
    except OSError:
        fd = os.open(path, flags)

    def work(first: int) -> None:
        buffer = mmap.mmap(-1, CHUNK)
        for at in range(first * CHUNK, SIZE, threads * CHUNK):
            os.pwritev(fd, [buffer], at) if write else os.preadv(fd, [buffer], at)

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    os.close(fd)
    return SIZE / (time.perf_counter() - began)


@pytest.mark.parametrize("part", [CHUNK, 64 << 20], ids=["4 MiB", "64 MiB"])
def test_read(benchmark, judge, big, part):
    """Sequential parts, one after another, as a weight's stream is read."""
    with Arena("target", part, torch.device("cpu")) as arena, DiskFile.open(big) as file, DiskQueue() as disk:

        def run() -> None:
            for at in range(0, SIZE, part):
                disk.read([Read(file, at, arena.buffer)])

        benchmark.pedantic(run, rounds=3, warmup_rounds=1)
        roof = max(plain_rate(big, n) for n in (1, 4, 1, 4, 4))
        judge(SIZE / benchmark.stats.stats.median / 1e9, "GB/s", roof / 1e9)


def test_write(benchmark, judge, tmp_path, big):
    """Sequential 64 MiB parts of a scratch file."""
    part = 64 << 20
    cpu = torch.device("cpu")
    with Arena("source", part, cpu) as arena, DiskFile.scratch(tmp_path, SIZE) as file, DiskQueue() as disk:

        def run() -> None:
            for at in range(0, SIZE, part):
                disk.write([Write(file, at, arena.buffer)])

        benchmark.pedantic(run, rounds=3, warmup_rounds=1)
        roof = max(plain_rate(big, n, write=True) for n in (1, 4, 1, 4, 4))
        judge(SIZE / benchmark.stats.stats.median / 1e9, "GB/s", roof / 1e9)
