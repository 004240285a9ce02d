"""Chips, by the properties that launches depend on: those that kernels are compiled for, and the one a tensor lies on.

`CHIPS` are the targets that every shipped configuration is compiled for in the tests. `chip_of(device)` is what a
launcher plans for: the table's row with the device's own count of multiprocessors and its own shared memory. A CPU gets
`INTERPRETER`, the portable path that Triton's interpreter runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Chip:
    """One GPU architecture; `num_sms` is that of a usual board until `chip_of` fills in the real one."""

    name: str
    backend: str  # Triton's: "cuda", "hip"
    arch: int | str
    warp_size: int
    shared_bytes: int  # that one program may use
    num_sms: int
    has_bf16: bool = True
    has_mma: bool = True  # Triton turns tl.dot into matrix instructions
    asm: bool = True  # unpack.py's inline assembly


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_75", "cuda", 75, 32, 65536, 40, has_bf16=False, has_mma=False, asm=False),
        Chip("sm_80", "cuda", 80, 32, 166912, 108),
        Chip("sm_86", "cuda", 86, 32, 101376, 72),
        Chip("sm_89", "cuda", 89, 32, 101376, 128),
        Chip("sm_90", "cuda", 90, 32, 232448, 132),
        Chip("sm_100", "cuda", 100, 32, 232448, 148),
        Chip("sm_120", "cuda", 120, 32, 101376, 170),
        Chip("gfx942", "hip", "gfx942", 64, 65536, 304, asm=False),
    )
}
INTERPRETER = Chip("interpreter", "cpu", 0, 32, 65536, 4, has_bf16=False, asm=False)


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip of a device; one that is not in the table is planned for as the nearest older one."""
    if device.type == "cpu":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return replace(CHIPS["gfx942"], num_sms=found.multi_processor_count)
    arch = 10 * found.major + found.minor
    older = [chip for chip in CHIPS.values() if chip.backend == "cuda" and chip.arch <= arch]
    if not older:
        raise ValueError(f"{found.name} is sm_{arch}; the kernels need sm_75 or later")
    return replace(
        max(older, key=lambda chip: chip.arch),
        arch=arch,
        shared_bytes=found.shared_memory_per_block_optin,
        num_sms=found.multi_processor_count,
    )
