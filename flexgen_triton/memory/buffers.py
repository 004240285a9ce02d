"""The buffers of one run: rings on the device and in pinned host memory, homes, scratch space on disk.

Sized by the largest of the plans that share them; every view of them is handed out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..plan.footprint import RING_TIERS
from ..plan.placement import Tier
from ..plan.plan import Plan
from ..plan.schedule import Slot
from .arena import Arena
from .scratch import Scratch, Uploads
from .stripes import Folders


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of every ring, of the homes on each tier, and of what computations need beside them."""

    rings: Mapping[str, int]
    homes: Mapping[Tier, int]
    temporaries: Mapping[str, int]

    @classmethod
    def of(cls, plan: Plan) -> Sizes:
        return cls(plan.footprint.rings, plan.footprint.homes, plan.footprint.temporaries)

    def __or__(self, other: Sizes) -> Sizes:
        """Enough for both."""
        return Sizes(
            _most(self.rings, other.rings),
            _most(self.homes, other.homes),
            _most(self.temporaries, other.temporaries),
        )

    def hold(self, plan: Plan) -> bool:
        """Return True if buffers of these sizes are large enough for the plan."""
        return self == self | Sizes.of(plan)


def _most(one: Mapping[Any, int], other: Mapping[Any, int]) -> dict[Any, int]:
    return {key: max(nbytes, other[key]) for key, nbytes in one.items()}


class Buffers:
    """Arenas for the rings, the homes of cache and hidden states and temporaries; the scratch file of the disk tier.

    `work` is for a computation's temporaries, `hosted` for attention's on the host, `dense` for what is kept as long as
    a load of the weights, `uploads` for what a token step hands the device, `token_staging` for new tokens on
    their way home. Raises OSError when the scratch file does not fit the disk.
    """

    def __init__(self, sizes: Sizes, *, device: torch.device, folders: Folders) -> None:
        self.device, self.sizes = device, sizes
        rings, homes = sizes.rings, sizes.homes
        on_host = sum(size for name, size in rings.items() if RING_TIERS[name] is Tier.HOST)
        pin = device.type == "cuda"
        self.gpu = Arena("gpu homes", homes[Tier.GPU], device)
        self.host = Arena("host homes", homes[Tier.HOST], torch.device("cpu"), pin=pin)
        self._device_rings = Arena("device rings", sum(rings.values()) - on_host, device)
        self._host_rings = Arena("host rings", on_host, torch.device("cpu"), pin=pin)
        self._rings = {
            name: (self._host_rings if RING_TIERS[name] is Tier.HOST else self._device_rings).take(size)
            for name, size in rings.items()
        }
        need = sizes.temporaries
        widened, panel = (need["widened"], need["panel"]) if device.type == "cpu" else (0, 0)
        on_device = [need["decode"] + widened, panel, need["dense"], 0 if device.type == "cpu" else need["uploads"]]
        self._temporaries = Arena("temporaries", sum(on_device), device)
        self._uploads = Arena("uploads", need["uploads"], torch.device("cpu"), pin=pin)
        work, wide, self.dense, uploads = (self._temporaries.take(n) for n in on_device)
        self._hosted = Arena("host attention", need["hosted"], torch.device("cpu"))
        self._token_staging = Arena("token_staging", need["token_staging"], torch.device("cpu"), pin=pin)
        self.work, self.hosted = Scratch(work, wide), Scratch(self._hosted.buffer)
        self.uploads = Uploads(self._uploads.buffer, None if device.type == "cpu" else uploads)
        self.token_staging = self._token_staging.buffer
        self.scratch = folders.scratch(homes[Tier.DISK]) if homes[Tier.DISK] else None
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
        self._forget()

    def _forget(self) -> None:
        for views in (self.work, self.hosted, self.uploads):
            views.forget()

    def close(self) -> None:
        self._rings.clear()
        self._forget()
        for arena in (
            self.gpu,
            self.host,
            self._device_rings,
            self._host_rings,
            self._temporaries,
            self._uploads,
            self._hosted,
            self._token_staging,
        ):
            arena.close()
        if self.scratch is not None:
            self.scratch.close()
