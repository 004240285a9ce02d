"""Settings of the process that must be made before torch is first imported. The package imports this first.

Lanes share the cores with OpenMP's threads, which by default spin at the end of every parallel region: on two cores a
disk thread then waits for a scheduler's tick (4 ms measured for a 0.4 ms region). A value set by the user stays.

glibc gives threads heaps of their own, and each keeps what was freed in it. Lanes are new threads for every run: each
may get another of these heaps, so that in the end all are as large as the largest prompts ever made one of them. One
heap for all threads keeps a process as large as its largest run. How much of it may stay free, KEPT_BYTES, is glibc's
own choice once it has seen large blocks; the plan counts with it. To keep less is to take pages anew for every
computation of prompts and every sampled token: a quarter more processor time with OPT-125M.
"""

import ctypes
import os

MAPPED_BYTES = 32 << 20  # from here on a block is a mapping of its own, given back when it is freed
KEPT_BYTES = 64 << 20  # that the heap keeps free at its end
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # numbers of malloc.h
_SETTINGS = {  # by the variable that sets the same
    "MALLOC_ARENA_MAX": (_ARENA_MAX, 1),
    "MALLOC_MMAP_THRESHOLD_": (_MMAP_THRESHOLD, MAPPED_BYTES),
    "MALLOC_TRIM_THRESHOLD_": (_TRIM_THRESHOLD, KEPT_BYTES),
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
