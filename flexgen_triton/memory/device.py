"""The GPU as torch and the driver show it: its memory, streams and events, and the pinning of host memory.

The one place that names `torch.cuda`, so that whatever stands in for a GPU is put here. Knows no lanes and no arenas.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

Stream = torch.cuda.Stream
Event = torch.cuda.Event


def num_gpus() -> int:
    """Count the GPUs that this process may use."""
    return torch.cuda.device_count()


def has_gpu() -> bool:
    return torch.cuda.is_available()


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if has_gpu() else "cpu")


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def gpu_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability, as (major, minor)."""
    return torch.cuda.get_device_capability(device)


def gpu_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes that are free on a GPU and those that it has."""
    return torch.cuda.mem_get_info(device)


def reserved_bytes(device: torch.device) -> int:
    """Bytes of a GPU that torch's allocator holds, in use or not."""
    return torch.cuda.memory_reserved(device)


def allocated_bytes(device: torch.device | str) -> int:
    """Bytes of a GPU that tensors take now."""
    return torch.cuda.memory_allocated(device)


def peak_allocated_bytes(device: torch.device | str) -> int:
    """The most bytes of a GPU that tensors took since the process began, or since `reset_peak_allocated`."""
    return torch.cuda.max_memory_allocated(device)


def reset_peak_allocated(device: torch.device) -> None:
    torch.cuda.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Wait for all work of a GPU; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def new_stream(device: torch.device) -> Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def current_stream(device: torch.device) -> Stream:
    """The stream that this thread's work goes to."""
    return torch.cuda.current_stream(device)


def on_stream(stream: Stream) -> AbstractContextManager[Any]:
    """Send this thread's work to `stream` inside."""
    return torch.cuda.stream(stream)


def record(stream: Stream) -> Event:
    """Return a timed event behind all work of `stream` so far."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def register(buffer: Tensor) -> int:
    """Register host memory with the driver, so that copies may be asynchronous; returns CUDA's status, 0 for success.

    `buffer` is [nbytes] uint8.
    """
    return int(_runtime().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))


def unregister(buffer: Tensor) -> None:
    """Undo `register`."""
    _runtime().cudaHostUnregister(buffer.data_ptr())


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
