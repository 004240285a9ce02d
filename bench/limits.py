"""Run a command under a memory limit that counts the process and its page cache.

The limit is a control group (v1 or v2) of our own, made where the system lets us and removed afterwards. Elsewhere the
command runs without a limit and a warning says so: an address-space limit would count memory that is never touched.

    python bench/limits.py --memory 1600MB -- python -c 'print("hello")'
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

CGROUP_ROOT = Path("/sys/fs/cgroup")
TIMED_OUT = 124  # the exit code of timeout(1)
KILLED = 137  # 128 + SIGKILL, what a shell reports
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True, slots=True)
class LimitedRun:
    """The end of a command. `peak_bytes` is the group's (page cache included), or without a group the process's own."""

    returncode: int  # the command's; 124 when it ran out of time; 128 + n when signal n ended it
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int | None
    oom_killed: bool
    limited: bool


@dataclass(frozen=True, slots=True)
class Interface:
    """The file names of one version of the memory controller. The swap file takes `swap`, or the limit when None."""

    limit_file: str
    swap_file: str
    swap: int | None
    peak_file: str
    events_file: str


V1 = Interface(
    "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", None, "memory.max_usage_in_bytes", "memory.oom_control"
)
V2 = Interface("memory.max", "memory.swap.max", 0, "memory.peak", "memory.events")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One control group of our own."""

    path: Path
    interface: Interface

    @property
    def procs_file(self) -> Path:
        return self.path / "cgroup.procs"

    def limit(self, limit_bytes: int) -> None:
        """Limits memory, and swap with it. Raises OSError when the memory controller is off here."""
        (self.path / self.interface.limit_file).write_text(str(limit_bytes))
        swap_file = self.path / self.interface.swap_file
        if swap_file.exists():
            swap_file.write_text(str(limit_bytes if self.interface.swap is None else self.interface.swap))

    def peak_bytes(self) -> int | None:
        """The most that the group ever held; None where the kernel does not say (v2 before Linux 5.19)."""
        file = self.path / self.interface.peak_file
        return int(file.read_text()) if file.exists() else None

    def oom_killed(self) -> bool:
        events = (self.path / self.interface.events_file).read_text()
        found = re.search(r"^oom_kill (\d+)$", events, re.MULTILINE)
        return found is not None and int(found[1]) > 0

    def remove(self, patience_s: float = 30.0) -> None:
        """Kills what is left inside and removes the group; raises OSError when it is still busy after `patience_s`."""
        deadline = time.monotonic() + patience_s
        while True:
            for pid in self.procs_file.read_text().split():
                _kill(int(pid))
            try:
                return self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def parse_bytes(text: str) -> int:
    """`1600MB`, `1.5GiB`, `6G` or a plain number, in bytes: MB are 10^6, MiB 2^20."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not found or found[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a number of bytes; write 1600MB, 1.5GiB or 1600000000")
    return int(float(found[1]) * _UNITS[found[2]])


def run_limited(cmd: list[str], limit_bytes: int | None, timeout_s: float | None = None) -> LimitedRun:
    """Runs `cmd` and waits for it, its memory and page cache together held to `limit_bytes` (None: only measured).

    Only pages that the command brings in are counted, so drop its files from the page cache first (drop_page_cache).
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        run = _run(cmd, limit_bytes, timeout_s, out, err)
        return replace(run, stdout=_text(out), stderr=_text(err))


def can_limit() -> bool:
    """Return True if this system lets us make a memory group."""
    group = _create_group(2**30)
    if group is not None:
        group.remove()
    return group is not None


def drop_page_cache(path: Path) -> None:
    """Writes a file, or all files under a directory, to disk and drops their clean pages from the page cache."""
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@contextmanager
def memory_group(limit_bytes: int | None) -> Iterator[MemoryGroup | None]:
    """A group held to `limit_bytes` for as long as the context, or None with a warning where none can be made."""
    group = _create_group(limit_bytes)
    if group is None and limit_bytes is not None:
        warnings.warn("no memory group can be made here: running without a memory limit", stacklevel=2)
    try:
        yield group
    finally:
        if group is not None:
            group.remove()


def _create_group(limit_bytes: int | None) -> MemoryGroup | None:
    for parent, interface in _parents():
        group = MemoryGroup(parent / f"bench-{uuid.uuid4().hex[:12]}", interface)
        try:
            group.path.mkdir()
        except OSError:
            continue
        try:
            if limit_bytes is not None:
                group.limit(limit_bytes)
            group.oom_killed()  # raises where the memory controller is off
            return group
        except OSError:
            group.remove()
    return None


def _parents() -> Iterator[tuple[Path, Interface]]:
    """Groups that ours could be a child of: the root, then our own and its ancestors, from the top."""
    root, interface = (CGROUP_ROOT / "memory", V1) if (CGROUP_ROOT / "memory").is_dir() else (CGROUP_ROOT, V2)
    own = Path(_own_group(interface))
    for path in dict.fromkeys([Path("/"), *reversed(own.parents), own]):
        parent = root / path.relative_to("/")
        if os.access(parent / "cgroup.procs", os.W_OK):
            yield parent, interface


def _own_group(interface: Interface) -> str:
    """Our path in the hierarchy, from lines `id:controllers:path`; v2's names no controllers."""
    file = Path("/proc/self/cgroup")
    for line in file.read_text().splitlines() if file.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "" if interface is V2 else "memory" in controllers.split(","):
            return path
    return "/"


def _run(
    cmd: list[str], limit_bytes: int | None, timeout_s: float | None, out: IO[bytes] | None, err: IO[bytes] | None
) -> LimitedRun:
    with memory_group(limit_bytes) as group:
        # The shell joins the group before it becomes the command, so that no page is counted elsewhere.
        join = 'echo $$ > "$0" && exec "$@"' if group else 'exec "$@"'
        stub = ["sh", "-c", join, str(group.procs_file) if group else "sh", *cmd]
        start = time.perf_counter()
        process = subprocess.Popen(stub, stdout=out, stderr=err, start_new_session=True)
        try:
            returncode, max_rss = _wait(process, timeout_s)
        finally:
            _kill(-process.pid)
        return LimitedRun(
            returncode=returncode,
            stdout="",
            stderr="",
            seconds=time.perf_counter() - start,
            peak_bytes=group.peak_bytes() if group else max_rss,
            oom_killed=group.oom_killed() if group else False,
            limited=group is not None and limit_bytes is not None,
        )


def _wait(process: subprocess.Popen[bytes], timeout_s: float | None) -> tuple[int, int]:
    """Waits for the process, kills its session when time is up, and gives its exit code and peak resident bytes."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    in_time = True
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            code = process.returncode if process.returncode >= 0 else 128 - process.returncode
            return code if in_time else TIMED_OUT, usage.ru_maxrss * 1024
        if in_time and deadline is not None and time.monotonic() > deadline:
            in_time = False
            _kill(-process.pid)
        time.sleep(0.02)


def _kill(pid: int) -> None:
    """Kills a process, or with a negative number a process group; it may be gone already."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def end_on_sigterm() -> None:
    """Lets a script that is told to end remove its group and its command first, as an interrupt does."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line's command with its output passed through; 137 and a sentence when killed for memory."""
    parser = argparse.ArgumentParser(description="Run a command under a memory limit (process and page cache).")
    parser.add_argument("--memory", type=parse_bytes, help="such as 1600MB or 1.5GiB; without it, only measured")
    parser.add_argument("--timeout", type=float, help="seconds")
    parser.add_argument("command", nargs="+", metavar="CMD")
    args = parser.parse_args(argv)
    end_on_sigterm()
    run = _run(args.command, args.memory, args.timeout, None, None)
    peak = "unknown" if run.peak_bytes is None else f"{run.peak_bytes / 1e6:.0f} MB"
    print(f"{run.seconds:.1f} s, peak memory {peak}", file=sys.stderr)
    if run.oom_killed and run.returncode != 0:
        print(f"killed for memory: {shlex.join(args.command)} needs over {args.memory / 1e6:.0f} MB", file=sys.stderr)
        return KILLED
    return run.returncode


if __name__ == "__main__":
    raise SystemExit(main())
