"""Which implementation a tensor's operations have, and 16 bits widened to 32 for those of a CPU."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...memory.scratch import Scratch


def uses_triton(x: Tensor) -> bool:
    """Return True if operations on x run as Triton kernels."""
    return x.device.type == "cuda"


@lru_cache(maxsize=1)
def cpu_has_bf16() -> bool:
    """Ask torch, where it has the probes, for native products of bf16 on this processor (AVX-512 BF16 or AMX)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in probes if hasattr(torch.cpu, name))


def widened(x: Tensor, scratch: Scratch) -> Tensor:
    return x if x.dtype == torch.float32 else scratch.take(*x.shape, dtype=torch.float32).copy_(x)
