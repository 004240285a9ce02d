"""The only module that allocates the engine's large buffers, and what this process knows of the host's memory.

An arena is one allocation of exact size, handed out as views and freed whole. It does not know what it holds.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from .device import gpu_memory, has_gpu, register, synchronize, unregister

ALIGN = 4096
HUGE_PAGE = 2 << 20
UNLIMITED = 1 << 62  # cgroup v1 writes "no limit" as a number near 2**63


class ArenaError(ValueError):
    """An allocation that does not fit."""


class Arena:
    """One page-aligned, zero-filled allocation of `nbytes` bytes on `device`, handed out as uint8 views.

    On the CPU the pages are anonymous and committed when first touched. `pin` registers them with the CUDA driver, so
    that copies to a GPU can be asynchronous; where that fails the arena warns and stays pageable. Raises ArenaError if
    the memory cannot be had.
    """

    def __init__(self, name: str, nbytes: int, device: torch.device, *, pin: bool = False) -> None:
        assert nbytes >= 0, (name, nbytes)
        self.name = name
        self.nbytes = nbytes
        self.device = device
        self.pinned = False
        self.used = 0
        self.buffer = _device_bytes(name, nbytes, device) if device.type != "cpu" else _host_bytes(name, nbytes)
        if pin and nbytes and device.type == "cpu" and has_gpu():
            self.pinned = _register(name, self.buffer)

    def take(self, nbytes: int, align: int = ALIGN) -> Tensor:
        """The next `nbytes` bytes that start at a multiple of `align`, as a view: [nbytes] uint8.

        Raises ArenaError if they do not fit.
        """
        start = -(-self.used // align) * align
        if start + nbytes > self.nbytes:
            raise ArenaError(f"arena {self.name} has {self.nbytes} bytes, {self.used} in use; {nbytes} more do not fit")
        self.used = start + nbytes
        return self.buffer[start : self.used]

    def reset(self) -> None:
        """Hand everything back; views taken so far must no longer be used."""
        self.used = 0

    def close(self) -> None:
        """Free the arena whole. Views that are still alive stay readable and keep the memory until they die."""
        if self.pinned:
            unregister(self.buffer)
            self.pinned = False
        self.buffer = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.nbytes = self.used = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _host_bytes(name: str, nbytes: int) -> Tensor:
    """Anonymous zero pages: [nbytes] uint8. The tensor keeps the mapping alive."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ArenaError(
            f"arena {name} needs {nbytes} bytes of host memory; {host_available()} are available"
        ) from error
    if nbytes >= HUGE_PAGE:
        with suppress(OSError):  # a kernel without transparent huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _device_bytes(name: str, nbytes: int, device: torch.device) -> Tensor:
    """[nbytes] uint8 zeros on a GPU."""
    try:
        zeros = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        synchronize(device)  # other streams will write here, and must not be overtaken by the zeros
        return zeros
    except torch.OutOfMemoryError as error:
        free, _ = gpu_memory(device)
        raise ArenaError(f"arena {name} needs {nbytes} bytes of {device}; {free} are free") from error


def _register(name: str, buffer: Tensor) -> bool:
    """Pin `buffer` with the CUDA driver, or warn and leave it pageable."""
    status = register(buffer)
    if status:
        warnings.warn(
            f"arena {name}: {buffer.numel()} bytes could not be pinned (CUDA error {status}; is `ulimit -l` or the "
            "container's memory limit lower?) and stay pageable: copies to the GPU will be slower",
            stacklevel=3,
        )
    return status == 0


def host_available(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still allocate: the machine's, or those of its tightest control group."""
    machine = _numbers(proc / "meminfo").get("MemAvailable:", UNLIMITED // 1024) * 1024
    return max(0, min([machine, *_group_headrooms(proc, cgroups)]))


def _group_headrooms(proc: Path, cgroups: Path) -> Iterator[int]:
    """Bytes left in each control group this process is in, innermost first; groups without a limit are left out.

    In a container the path may lead outside of what is mounted; the mount's root is then the container's own group.
    """
    for line in _read(proc / "self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        parts = [p for p in path.split("/") if p not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            headroom = _headroom(root.joinpath(*parts[:depth]), *names)
            if headroom is not None:
                yield headroom


def _headroom(group: Path, limit_name: str, usage_name: str) -> int | None:
    """Limit less usage, page cache that can be dropped counted as free; None where there is no limit."""
    limit, usage = _read(group / limit_name).strip(), _read(group / usage_name).strip()
    if not limit.isdecimal() or not usage.isdecimal() or int(limit) >= UNLIMITED:
        return None
    stat = _numbers(group / "memory.stat")
    cache = sum(stat.get(f"total_{key}", stat.get(key, 0)) for key in ("inactive_file", "active_file"))
    return int(limit) - int(usage) + cache


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes of this process that are in memory: all, and those that no file holds; the others come and go."""

    total: int
    anonymous: int

    @classmethod
    def now(cls) -> Resident:
        status = _numbers(Path("/proc/self/status"))
        total, private, shared = (status.get(f"{name}:", 0) * 1024 for name in ("VmRSS", "RssAnon", "RssShmem"))
        return cls(total, private + shared)


def rss() -> int:
    """Bytes of this process that are in memory now, mapped files included."""
    return Resident.now().total


def peak_rss() -> int:
    """The most bytes this process had in memory since it began, or since `reset_peak_rss`."""
    return _numbers(Path("/proc/self/status")).get("VmHWM:", 0) * 1024


def reset_peak_rss() -> None:
    """Start `peak_rss` anew, where the kernel allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each "name number ..." line of a kernel file; empty if there is no such file."""
    fields = (line.split() for line in _read(path).splitlines())
    return {f[0]: int(f[1]) for f in fields if len(f) > 1 and f[1].isdecimal()}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
