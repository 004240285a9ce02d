"""The process's heap: one for all threads, and bounded in what it keeps; so runs after runs do not grow."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from flexgen_triton.environment import KEPT_BYTES
from flexgen_triton.plan.temporaries import HEAP_BYTES

MIB = 1 << 20
SETTINGS = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or later")

# What the tests ask of a process: heaps of so many threads, and what stays of large blocks.
PROGRAM = """
import ctypes, os, sys, tempfile, threading
import flexgen_triton

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]

def heaps():
    with tempfile.NamedTemporaryFile() as file:
        stream = libc.fopen(file.name.encode(), b"w")
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        return file.read().count(b"<heap nr")

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

started = threading.Barrier(6)
def work():
    block = libc.malloc(300_000)
    started.wait()
    libc.free(block)
threads = [threading.Thread(target=work) for _ in range(6)]
for t in threads: t.start()
for t in threads: t.join()

before = resident()
for turn in range(2):
    blocks = [libc.malloc(24 << 20) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, 24 << 20)
    for block in blocks:
        libc.free(block)
print(heaps(), resident() - before)
"""


def heaps_and_kept(**variables: str) -> tuple[int, int]:
    """Heaps after six threads ran at once, and bytes that stay resident of 192 MiB that were freed."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | variables
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    heaps, kept = done.stdout.split()
    return int(heaps), int(kept)


def test_threads_share_one_heap_that_keeps_no_more_than_the_plan_counts():
    heaps, kept = heaps_and_kept()
    assert heaps == 1
    assert kept <= HEAP_BYTES + MIB


def test_a_setting_of_the_users_stays():
    assert heaps_and_kept(MALLOC_ARENA_MAX="4")[0] == 4
    assert heaps_and_kept(GLIBC_TUNABLES="glibc.malloc.arena_max=3")[0] == 3


def test_the_plan_and_the_heap_agree():
    assert HEAP_BYTES == KEPT_BYTES
