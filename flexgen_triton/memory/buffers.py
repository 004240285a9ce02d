"""The buffers of one run: rings on the device and in pinned host memory, homes, scratch space on disk.

Sized by the largest of the plans that share them; every view of them is handed out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..plan.placement import Tier
from ..plan.plan import HOST_RINGS, Plan
from ..plan.schedule import Slot
from .arena import Arena
from .disk import DiskFile


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of every ring and of the homes on each tier."""

    rings: Mapping[str, int]
    homes: Mapping[Tier, int]

    @classmethod
    def of(cls, plan: Plan) -> Sizes:
        return cls(plan.rings, plan.homes)

    def __or__(self, other: Sizes) -> Sizes:
        """Enough for both."""
        return Sizes(_most(self.rings, other.rings), _most(self.homes, other.homes))

    def hold(self, plan: Plan) -> bool:
        """Whether they are enough for the plan."""
        return self == self | Sizes.of(plan)


def _most(one: Mapping[Any, int], other: Mapping[Any, int]) -> dict[Any, int]:
    return {key: max(nbytes, other[key]) for key, nbytes in one.items()}


class Buffers:
    """Arenas for the rings and the homes of cache and hidden states, and the scratch file of the disk tier.

    Raises OSError when the scratch file does not fit the disk.
    """

    def __init__(self, sizes: Sizes, *, device: torch.device, offload_dir: Path) -> None:
        self.device, self.sizes = device, sizes
        rings, homes = sizes.rings, sizes.homes
        on_host = sum(rings[n] for n in HOST_RINGS)
        pin = device.type == "cuda"
        self.gpu = Arena("gpu homes", homes[Tier.GPU], device)
        self.host = Arena("host homes", homes[Tier.HOST], torch.device("cpu"), pin=pin)
        self._device_rings = Arena("device rings", sum(rings.values()) - on_host, device)
        self._host_rings = Arena("host rings", on_host, torch.device("cpu"), pin=pin)
        self._rings = {
            name: (self._host_rings if name in HOST_RINGS else self._device_rings).take(size)
            for name, size in rings.items()
        }
        self.scratch = DiskFile.scratch(offload_dir, homes[Tier.DISK]) if homes[Tier.DISK] else None
        self._scratch_used = 0

    def slot(self, slot: Slot) -> Tensor:
        """The bytes of a ring's slot, uint8 [nbytes]."""
        return self._rings[slot.ring][slot.at : slot.at + slot.nbytes]

    def take_scratch(self, nbytes: int) -> int:
        """Reserve bytes of the scratch file; returns their offset."""
        offset = self._scratch_used
        self._scratch_used += nbytes
        return offset

    def reset(self) -> None:
        """Take all homes back, for the next plan."""
        self.gpu.reset()
        self.host.reset()
        self._scratch_used = 0

    def close(self) -> None:
        self._rings.clear()
        for arena in (self.gpu, self.host, self._device_rings, self._host_rings):
            arena.close()
        if self.scratch is not None:
            self.scratch.close()
