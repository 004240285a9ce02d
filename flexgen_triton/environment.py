"""Settings of the process that must be made before torch is first imported. The package imports this first.

Lanes share the cores with OpenMP's threads, which by default spin at the end of every parallel region: on two cores a
disk thread then waits for a scheduler's tick (4 ms measured for a 0.4 ms region). A value set by the user stays.

glibc gives threads heaps of their own and keeps in each what was freed there, of blocks up to 32 MiB once it has seen
one so large. Lanes are new threads for every run: each may get another of these heaps, so that in the end all are as
large as the largest prompts ever made one of them. One heap for all threads, and blocks from `MAPPED_BYTES` on mapped
and given back one by one, keep a process as large as what it uses.
"""

import ctypes
import os

MAPPED_BYTES = 1 << 20
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # numbers of malloc.h
_SETTINGS = {  # by the variable that sets the same
    "MALLOC_ARENA_MAX": (_ARENA_MAX, 1),
    "MALLOC_MMAP_THRESHOLD_": (_MMAP_THRESHOLD, MAPPED_BYTES),
    "MALLOC_TRIM_THRESHOLD_": (_TRIM_THRESHOLD, MAPPED_BYTES),
}


def _share_one_heap() -> None:
    """Tell glibc's malloc, where it is the one in use and the user did not; any other has no such settings."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return
    for variable, (parameter, value) in _SETTINGS.items():
        if variable not in os.environ:
            mallopt(parameter, value)


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_share_one_heap()
