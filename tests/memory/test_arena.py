"""Arenas are exact, aligned, zero-filled and freed whole; limits of control groups are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexgen_triton.memory import device as device_module
from flexgen_triton.memory.arena import ALIGN, Arena, ArenaError, host_available, peak_rss, reset_peak_rss, rss

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize("nbytes", [0, 1, ALIGN - 1, ALIGN, ALIGN + 1, 3 * MIB + 5])
def test_an_arena_has_exactly_its_bytes_aligned_and_zero(nbytes: int) -> None:
    with Arena("a", nbytes, CPU) as arena:
        assert arena.buffer.shape == (nbytes,)
        assert arena.buffer.dtype == torch.uint8
        assert arena.buffer.data_ptr() % ALIGN == 0
        assert not arena.buffer.any()


def test_views_are_disjoint_aligned_and_end_with_the_arena() -> None:
    arena = Arena("weights", 3 * ALIGN, CPU)
    first, second = arena.take(5), arena.take(2 * ALIGN)
    first.fill_(1)
    second.fill_(2)
    assert second.data_ptr() - first.data_ptr() == ALIGN
    assert first.tolist() == [1] * 5
    assert arena.take(0).numel() == 0
    with pytest.raises(ArenaError, match=r"weights has 12288 bytes, 12288 in use; 1 more"):
        arena.take(1)
    arena.reset()
    assert arena.take(3 * ALIGN).data_ptr() == first.data_ptr()


def test_alignment_can_be_finer_than_a_page() -> None:
    arena = Arena("a", 100, CPU)
    arena.take(3, align=1)
    assert arena.take(8, align=16).data_ptr() - arena.buffer.data_ptr() == 16


def test_close_gives_the_memory_back_and_leaves_views_readable() -> None:
    arena = Arena("a", 64 * MIB, CPU)
    arena.buffer.fill_(7)
    view = arena.take(100)
    before = rss()
    arena.close()
    assert view.tolist() == [7] * 100
    del view
    assert before - rss() > 48 * MIB


def test_an_arena_is_committed_only_where_it_is_touched() -> None:
    before = rss()
    with Arena("a", 1 << 30, CPU) as arena:
        arena.buffer[:ALIGN].fill_(1)
        assert rss() - before < 64 * MIB


def test_an_impossible_arena_is_refused_with_numbers() -> None:
    with pytest.raises(ArenaError, match=rf"huge needs {1 << 60} bytes of host memory; \d+ are available"):
        Arena("huge", 1 << 60, CPU)


class FakeDriver:
    """The two calls of the CUDA driver that pinning needs."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:  # noqa: N802
        if not self.status:
            self.registered[pointer] = nbytes
        return self.status

    def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802
        del self.registered[pointer]
        return 0


def fake_cuda(monkeypatch: pytest.MonkeyPatch, status: int) -> FakeDriver:
    driver = FakeDriver(status)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device_module, "_runtime", lambda: driver)
    return driver


def test_a_pinned_arena_is_registered_once_and_unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = fake_cuda(monkeypatch, 0)
    with Arena("a", 5 * ALIGN, CPU, pin=True) as arena:
        assert arena.pinned
        assert driver.registered == {arena.buffer.data_ptr(): 5 * ALIGN}
    assert not driver.registered
    with Arena("empty", 0, CPU, pin=True) as empty:
        assert not empty.pinned


def test_an_arena_that_cannot_be_pinned_warns_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, 2)
    with pytest.warns(UserWarning, match="20480 bytes could not be pinned"):
        arena = Arena("a", 5 * ALIGN, CPU, pin=True)
    assert not arena.pinned
    arena.take(5).fill_(1)
    arena.close()


def write(root: Path, files: dict[str, object]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


MEMINFO = "MemTotal: 100 kB\nMemAvailable: 90 kB\n"
UNLIMITED_V1 = 9223372036854771712


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({"proc/self/cgroup": "0::/a/b"}, 90 * 1024, id="no group files"),
        pytest.param(
            {
                "proc/self/cgroup": "0::/a/b",
                "cg/a/b/memory.max": "max",
                "cg/a/b/memory.current": 10,
                "cg/a/memory.max": 5000,
                "cg/a/memory.current": 4000,
                "cg/a/memory.stat": "anon 7\ninactive_file 300\nactive_file 20",
            },
            1320,
            id="v2, limited above",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:cpu:/x\n3:memory:/x/y\n0::/",
                "cg/memory/x/y/memory.limit_in_bytes": 8000,
                "cg/memory/x/y/memory.usage_in_bytes": 3000,
                "cg/memory/x/y/memory.stat": "inactive_file 1\ntotal_inactive_file 100\ntotal_active_file 10",
                "cg/memory/memory.limit_in_bytes": UNLIMITED_V1,
                "cg/memory/memory.usage_in_bytes": 10**12,
            },
            5110,
            id="v1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "3:memory:/not/mounted/here",
                "cg/memory/memory.limit_in_bytes": 700,
                "cg/memory/memory.usage_in_bytes": 100,
            },
            600,
            id="v1 in a container",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/", "cg/memory.max": 10, "cg/memory.current": 50}, 0, id="over the limit"
        ),
        pytest.param({"proc/self/cgroup": "garbage"}, 90 * 1024, id="garbage"),
    ],
)
def test_host_available_is_the_tightest_limit(tmp_path: Path, files: dict[str, object], expected: int) -> None:
    write(tmp_path, {"proc/meminfo": MEMINFO, **files})
    assert host_available(tmp_path / "proc", tmp_path / "cg") == expected


def test_host_available_of_this_machine_is_plausible() -> None:
    assert MIB < host_available() < 1 << 50


def test_peak_rss_sees_what_is_gone_again() -> None:
    reset_peak_rss()
    with Arena("a", 64 * MIB, CPU) as arena:
        arena.buffer.fill_(1)
        high = rss()
    assert peak_rss() >= high - MIB
    assert rss() < high - 32 * MIB
    assert peak_rss() > rss() + 32 * MIB
