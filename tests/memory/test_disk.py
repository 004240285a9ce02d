"""Whatever the alignment, a queue reads and writes what plain reads and writes would; errors name their place."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_triton.memory import disk_files
from flexgen_triton.memory.arena import ALIGN, Arena
from flexgen_triton.memory.disk import BOUNCE_BYTES, DiskQueue, Read, Scan, Write
from flexgen_triton.memory.disk_files import DiskFile, align_down

EXTENT = 4 * ALIGN
SIZE = 11 * EXTENT + 1234  # ends in the middle of a page
CPU = torch.device("cpu")


def random_bytes(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def aligned(n: int, shift: int = 0) -> torch.Tensor:
    """[n] uint8 that starts `shift` bytes after a page boundary."""
    return Arena("test", n + shift, CPU).buffer[shift:]


@pytest.fixture(scope="module")
def content() -> torch.Tensor:
    return random_bytes(SIZE)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, content: torch.Tensor) -> Path:
    path = tmp_path_factory.mktemp("disk") / "data"
    path.write_bytes(bytes(content.tolist()))
    return path


@pytest.fixture(scope="module")
def queue() -> Iterator[DiskQueue]:
    with DiskQueue(3, EXTENT) as queue:
        yield queue


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behave like a filesystem without O_DIRECT."""
    real = fcntl.fcntl

    def refusing(fd: int, command: int, argument: int = 0) -> Any:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real(fd, command, argument)

    monkeypatch.setattr(disk_files.fcntl, "fcntl", refusing)


@pytest.fixture(params=["direct", "buffered"], scope="module")
def file(request: pytest.FixtureRequest, path: Path) -> Iterator[DiskFile]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "buffered":
            refuse_direct(patch)
        file = DiskFile.open(path)
    if request.param == "direct" and not file.direct:
        pytest.skip("this filesystem refuses O_DIRECT")
    assert file.direct == (request.param == "direct")
    with file:
        yield file


places = st.tuples(st.integers(0, SIZE - 1), st.integers(0, 3 * EXTENT), st.sampled_from([0, 1, 7, ALIGN - 1, 512]))
near_pages = st.builds(
    lambda page, d, n, e, shift: (max(0, page * ALIGN + d), max(0, n * ALIGN + e), (page * ALIGN + d + shift) % ALIGN),
    st.integers(0, SIZE // ALIGN - 1),
    st.integers(-2, 2),
    st.integers(0, 9),
    st.integers(-2, 2),
    st.sampled_from([0, 1]),
)


@given(asked=st.lists(st.one_of(places, near_pages), min_size=1, max_size=4))
@settings(max_examples=120, deadline=None)
def test_reads_are_those_of_a_plain_read(
    queue: DiskQueue, file: DiskFile, content: torch.Tensor, asked: list[tuple[int, int, int]]
) -> None:
    """Any offset, length and address, also past the end: there the buffer's rest is not asked for."""
    buffers = [aligned(length, shift) for _, length, shift in asked]
    queue.read([Read(file, offset, buffer) for (offset, _, _), buffer in zip(asked, buffers, strict=True)])
    for (offset, length, _), buffer in zip(asked, buffers, strict=True):
        there = min(length, SIZE - offset)
        assert torch.equal(buffer[:there], content[offset : offset + there])


@pytest.mark.parametrize("shift", [0, 8])
def test_nothing_outside_of_the_buffer_is_touched(
    queue: DiskQueue, file: DiskFile, content: torch.Tensor, shift: int
) -> None:
    whole = aligned(8 * ALIGN, shift).fill_(0xEE)
    queue.read([Read(file, 100, whole[ALIGN + 100 : 6 * ALIGN + 300])])
    assert (whole[: ALIGN + 100] == 0xEE).all()
    assert (whole[6 * ALIGN + 300 :] == 0xEE).all()
    assert torch.equal(whole[ALIGN + 100 : 6 * ALIGN + 300], content[100 : 5 * ALIGN + 300])


def test_an_unaligned_read_larger_than_the_bounce_buffer(tmp_path: Path) -> None:
    data = random_bytes(3 * BOUNCE_BYTES + 17)
    (tmp_path / "big").write_bytes(bytes(data.tolist()))
    with DiskQueue(2, 4 * BOUNCE_BYTES) as queue, DiskFile.open(tmp_path / "big") as file:
        buffer = aligned(len(data) - 3, 1)
        queue.read([Read(file, 3, buffer)])
        assert torch.equal(buffer, data[3:])


@pytest.mark.parametrize("row_bytes", [1, 100, ALIGN, 5000])
def test_rows_are_gathered_in_order_and_repeated(
    queue: DiskQueue, file: DiskFile, content: torch.Tensor, row_bytes: int
) -> None:
    offsets = [SIZE - row_bytes, 0, 77, ALIGN - 1, 77, *range(0, 30000, 997)]
    rows = queue.read_rows(file, offsets, row_bytes)
    assert torch.equal(rows, torch.stack([content[o : o + row_bytes] for o in offsets]))
    out = torch.empty_like(rows)
    assert queue.read_rows(file, offsets, row_bytes, out) is out
    assert torch.equal(out, rows)


def test_no_rows_and_no_requests_are_no_work(queue: DiskQueue, file: DiskFile) -> None:
    assert queue.read_rows(file, [], 10).shape == (0, 10)
    queue.read([])
    queue.read([Read(file, 0, aligned(0))])


def test_a_row_past_the_end_is_an_error(queue: DiskQueue, file: DiskFile) -> None:
    with pytest.raises(OSError, match=f"ends at {SIZE}"):
        queue.read_rows(file, [0, SIZE - 5], 6)
    with pytest.raises(OSError, match=f"ends at {SIZE}"):
        queue.read([Read(file, SIZE, aligned(1))])


def test_checks_see_each_extent_once_up_to_the_end_of_the_file(queue: DiskQueue, file: DiskFile) -> None:
    seen: dict[int, bytes] = {}
    queue.read([Read(file, 0, aligned(SIZE + ALIGN), lambda o, data: seen.update({o: bytes(data)}))])
    assert sorted(seen) == list(range(0, SIZE, EXTENT))
    assert b"".join(seen[o] for o in sorted(seen)) == Path(file.name).read_bytes()


def test_requests_are_cut_at_whole_pages_of_the_file(queue: DiskQueue, file: DiskFile) -> None:
    seen: list[int] = []
    queue.read([Read(file, ALIGN + 100, aligned(2 * EXTENT), lambda o, data: seen.append(o))])
    assert sorted(seen) == [ALIGN + 100, ALIGN + EXTENT, ALIGN + 2 * EXTENT]


def test_what_a_check_raises_reaches_the_caller_with_its_place(queue: DiskQueue, file: DiskFile) -> None:
    def check(offset: int, data: memoryview) -> None:
        if offset == EXTENT:
            raise ZeroDivisionError("bad bytes")

    with pytest.raises(ZeroDivisionError, match="bad bytes") as caught:
        queue.read([Read(file, 0, aligned(3 * EXTENT), check)])
    assert caught.value.__notes__ == [f"while reading {EXTENT} bytes at offset {EXTENT} of {file.name}"]
    queue.read([Read(file, 0, aligned(EXTENT))])  # the threads survived it


def test_scans_show_what_a_plain_read_would_up_to_the_end_of_the_file(
    queue: DiskQueue, file: DiskFile, content: torch.Tensor
) -> None:
    seen: dict[int, bytes] = {}
    places = [(0, EXTENT), (3 * ALIGN, 100), (2 * EXTENT, 3 * ALIGN + 1), (align_down(SIZE), EXTENT)]
    queue.scan([Scan(file, offset, n, lambda o, data: seen.update({o: bytes(data)})) for offset, n in places])
    assert seen == {offset: content[offset : offset + n].numpy().tobytes() for offset, n in places}


def test_what_a_scan_finds_wrong_reaches_the_caller_with_its_place(queue: DiskQueue, file: DiskFile) -> None:
    def check(offset: int, data: memoryview) -> None:
        raise ZeroDivisionError("bad bytes")

    with pytest.raises(ZeroDivisionError, match="bad bytes") as caught:
        queue.scan([Scan(file, EXTENT, EXTENT, check)])
    assert caught.value.__notes__ == [f"while checking {EXTENT} bytes at offset {EXTENT} of {file.name}"]


def test_the_first_error_drops_what_has_not_begun(path: Path) -> None:
    begun = []

    def check(offset: int, data: memoryview) -> None:
        begun.append(offset)
        raise ValueError("no")

    with DiskQueue(1, ALIGN) as queue, DiskFile.open(path) as file, pytest.raises(ValueError, match="no"):
        queue.read([Read(file, 0, aligned(8 * ALIGN), check)])
    assert begun == [0]


@pytest.mark.parametrize("left", [5 * ALIGN, 5 * ALIGN + 100, 0])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_file_truncated_after_opening_is_an_error(tmp_path: Path, left: int, shift: int) -> None:
    (tmp_path / "f").write_bytes(b"x" * 9 * ALIGN)
    with DiskFile.open(tmp_path / "f") as file, DiskQueue(2, EXTENT) as queue:
        os.truncate(tmp_path / "f", left)
        with pytest.raises(OSError, match="truncated") as caught:
            queue.read([Read(file, 0, aligned(9 * ALIGN, shift))])
        assert "f" in caught.value.__notes__[0]


def test_a_file_that_cannot_be_opened_is_an_os_error_and_leaks_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        DiskFile.open(tmp_path / "none")

    def broken(fd: int, buffers: list[Any], offset: int) -> int:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "preadv", broken)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="broken disk"):
        DiskFile.open(path)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_filesystem_that_takes_the_flag_but_refuses_to_read_is_buffered(
    path: Path, content: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def refusing(fd: int, buffers: list[Any], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refusing)
    with DiskFile.open(path) as file, DiskQueue(1) as queue:
        assert not file.direct
        buffer = aligned(SIZE)
        queue.read([Read(file, 0, buffer)])
        assert torch.equal(buffer, content)


# Writing


@pytest.fixture(params=["direct", "buffered"])
def scratch(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DiskFile]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "buffered":
            refuse_direct(patch)
        file = DiskFile.scratch(tmp_path / "offload", 16 * EXTENT)
    if request.param == "direct" and not file.direct:
        pytest.skip("this filesystem refuses O_DIRECT")
    with file:
        yield file


def test_scratch_has_no_name_is_private_and_preallocated(scratch: DiskFile, tmp_path: Path) -> None:
    assert list((tmp_path / "offload").iterdir()) == []
    stat = os.fstat(scratch.fd)
    assert stat.st_nlink == 0
    assert stat.st_mode & 0o777 == 0o600
    assert stat.st_size == scratch.size == 16 * EXTENT
    assert stat.st_blocks * 512 >= scratch.size


def test_scratch_of_odd_and_of_no_bytes(tmp_path: Path, queue: DiskQueue) -> None:
    with DiskFile.scratch(tmp_path, 5) as file:
        queue.write([Write(file, 0, aligned(5).fill_(3))])
        assert queue.read_rows(file, [0, 1], 4).tolist() == [[3] * 4] * 2
    with DiskFile.scratch(tmp_path, 0) as file:
        assert file.size == 0


@given(
    asked=st.lists(
        st.tuples(
            st.integers(0, 15 * EXTENT), st.integers(0, EXTENT), st.sampled_from([0, 1, ALIGN - 3]), st.booleans()
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=80, deadline=None)
def test_writes_change_their_bytes_and_no_others(
    tmp_path_factory: pytest.TempPathFactory, queue: DiskQueue, asked: list[tuple[int, int, int, bool]]
) -> None:
    expected = random_bytes(16 * EXTENT, 1)
    with DiskFile.scratch(tmp_path_factory.getbasetemp(), 16 * EXTENT) as file:
        queue.write([Write(file, 0, expected)])
        for n, (offset, length, shift, in_phase) in enumerate(asked):
            buffer = aligned(length, offset % ALIGN if in_phase else shift).copy_(random_bytes(length, n))
            queue.write([Write(file, offset, buffer)])
            expected[offset : offset + length] = buffer
        found = aligned(16 * EXTENT)
        queue.read([Read(file, 0, found)])
    assert torch.equal(found, expected)


def test_neighbours_within_one_page_can_be_written_at_once(scratch: DiskFile) -> None:
    """Every page is shared by five writes of one call: each reads and rewrites the whole page."""
    data = random_bytes(12 * EXTENT, 5)
    with DiskQueue(8, EXTENT) as queue:
        queue.write([Write(scratch, low, data[low : low + 900]) for low in range(0, len(data), 900)])
        found = aligned(len(data))
        queue.read([Read(scratch, 0, found)])
    assert torch.equal(found, data)


def test_a_scratch_file_that_does_not_fit_is_refused_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=rf"{1 << 60} bytes are needed in {tmp_path}, which has \d+ free") as caught:
        DiskFile.scratch(tmp_path, 1 << 60)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_found_out_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="8192 bytes are needed") as caught:
        DiskFile.scratch(tmp_path, 5000)
    assert caught.value.errno == errno.ENOSPC


def test_a_failed_write_names_its_place(scratch: DiskFile, queue: DiskQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, buffers: list[Any], offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="full") as caught:
        queue.write([Write(scratch, ALIGN, aligned(ALIGN))])
    assert f"while writing {ALIGN} bytes at offset {ALIGN} of scratch file" in caught.value.__notes__[0]


# The pool


def test_several_extents_are_in_flight_and_complete_in_any_order(path: Path) -> None:
    """Extent 0 waits until the others are done; with one thread, or in order, it would wait for ever."""
    others = threading.Barrier(3)

    def check(offset: int, data: memoryview) -> None:
        others.wait(timeout=30)

    with DiskQueue(3, EXTENT) as queue, DiskFile.open(path) as file:
        queue.read([Read(file, 0, aligned(3 * EXTENT), check)])


def test_a_long_call_does_not_hold_up_a_short_one(path: Path) -> None:
    started, release, order = threading.Event(), threading.Event(), []

    def slow(offset: int, data: memoryview) -> None:
        started.set()
        release.wait(30)
        order.append("long")

    with DiskQueue(1, ALIGN) as queue, DiskFile.open(path) as file:
        long = threading.Thread(target=queue.read, args=([Read(file, 0, aligned(8 * ALIGN), slow)],))
        long.start()
        started.wait(30)
        short = threading.Thread(
            target=queue.read, args=([Read(file, 0, aligned(10), lambda o, d: order.append("short"))],)
        )
        short.start()
        while len(queue._batches) < 2:
            time.sleep(0.001)
        release.set()
        long.join()
        short.join()
    assert order.index("short") <= 2
    assert order.count("long") == 8


def test_callers_from_many_threads_get_their_own_bytes(queue: DiskQueue, file: DiskFile, content: torch.Tensor) -> None:
    wrong = []

    def call(n: int) -> None:
        for offset in range(n, SIZE - EXTENT, 7 * ALIGN + n):
            buffer = aligned(EXTENT)
            queue.read([Read(file, offset, buffer)])
            if not torch.equal(buffer, content[offset : offset + EXTENT]):
                wrong.append((n, offset))

    callers = [threading.Thread(target=call, args=(n,)) for n in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_close_ends_the_threads() -> None:
    queue = DiskQueue(2)
    threads = [t for t in threading.enumerate() if t in queue._threads]
    assert sorted(t.name for t in threads) == ["disk-0", "disk-1"]
    assert all(t.daemon for t in threads)
    queue.close()
    assert not any(t.is_alive() for t in threads)
