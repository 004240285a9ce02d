"""Hidden states of the GPU batches between layers, over three tiers by sequences.

A batch's packed rows `[T, E]` stand in the order of its sequences: the GPU's (and, where host memory is the device's,
the host's) rows stay in a home on the device, the others leave through the out ring and come back through a ring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan.layout import pad
from ..plan.placement import Tier
from ..plan.plan import Plan
from ..plan.schedule import Op
from .buffers import Buffers
from .disk import DiskQueue, Read, Write
from .scratch import Scratch


class Activations:
    """Homes of the hidden states of one round of the schedule, and the transfers between them and compute."""

    def __init__(self, plan: Plan, buffers: Buffers, disk: DiskQueue, dtype: torch.dtype) -> None:
        self._plan, self._buffers, self._disk, self._dtype = plan, buffers, disk, dtype
        self._row = plan.model.hidden * plan.model.itemsize
        self._gpu, self._host, self._offsets = [], [], []
        for groups in plan.groups:
            gpu, host, disk_rows = (pad(g.tokens(0) * self._row) for g in groups.hidden)
            self._gpu.append(buffers.gpu.take(gpu))
            self._host.append(buffers.host.take(host))
            self._offsets.append(buffers.take_scratch(disk_rows))

    def _nbytes(self, i: int, k: int, tier: Tier) -> int:
        group = next(g for g in self._plan.groups[k].hidden if g.tier is tier)
        return group.tokens(i) * self._row

    def _rows(self, buffer: Tensor, nbytes: int) -> Tensor:
        return buffer[:nbytes].view(self._dtype).view(-1, self._plan.model.hidden)

    def _homes(self, i: int, k: int) -> list[Tensor]:
        """Rows that compute reaches without a transfer."""
        homes = [self._rows(self._gpu[k], self._nbytes(i, k, Tier.GPU))]
        if not self._plan.host_is_apart:
            homes.append(self._rows(self._host[k], self._nbytes(i, k, Tier.HOST)))
        return homes

    def _away(self, i: int, k: int, slot: Tensor) -> list[Tensor]:
        """Rows in a ring's slot: the host's (behind the disk's, which start the slot aligned), then the disk's."""
        on_disk = self._nbytes(i, k, Tier.DISK)
        rows = [self._rows(slot, on_disk)]
        if self._plan.host_is_apart:
            rows.insert(0, self._rows(slot[pad(on_disk) :], self._nbytes(i, k, Tier.HOST)))
        return rows

    def get(self, op: Op, slot: Tensor | None, scratch: Scratch) -> Tensor:
        """The hidden state [T, E] that enters a layer."""
        parts = self._homes(op.i, op.k) + (self._away(op.i, op.k, slot) if slot is not None else [])
        parts = [p for p in parts if len(p)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, out=scratch.take(sum(map(len, parts)), parts[0].shape[1], dtype=self._dtype))

    def put(self, op: Op, x: Tensor, out: Tensor | None) -> None:
        """Keep a layer's result [T, E]: its rows to their homes and to the slot on the way to the others."""
        parts = self._homes(op.i, op.k) + (self._away(op.i, op.k, out) if out is not None else [])
        at = 0
        for part in parts:
            part.copy_(x[at : at + len(part)])
            at += len(part)
        assert at == len(x), f"{op}: {len(x)} rows, room for {at}"

    def store(self, op: Op, out: Tensor, staged: Tensor | None) -> None:
        """d2h: the host's rows home, the disk's to a staging slot."""
        on_disk, on_host = pad(self._nbytes(op.i, op.k, Tier.DISK)), self._nbytes(op.i, op.k, Tier.HOST)
        self._host[op.k][:on_host].copy_(out[on_disk : on_disk + on_host], non_blocking=True)
        if staged is not None:
            staged[:on_disk].copy_(out[:on_disk], non_blocking=True)

    def load(self, op: Op, staged: Tensor | None, into: Tensor) -> None:
        """h2d: the opposite of `store`."""
        on_disk, on_host = pad(self._nbytes(op.i, op.k, Tier.DISK)), self._nbytes(op.i, op.k, Tier.HOST)
        into[on_disk : on_disk + on_host].copy_(self._host[op.k][:on_host], non_blocking=True)
        if staged is not None:
            into[:on_disk].copy_(staged[:on_disk], non_blocking=True)

    def read(self, op: Op, into: Tensor) -> None:
        """disk_in: the disk's rows to the start of `into`."""
        nbytes = pad(self._nbytes(op.i, op.k, Tier.DISK))
        assert self._buffers.scratch is not None
        self._disk.read([Read(self._buffers.scratch, self._offsets[op.k], into[:nbytes])])

    def write(self, op: Op, staged: Tensor) -> None:
        """disk_out: the opposite of `read`."""
        nbytes = pad(self._nbytes(op.i, op.k, Tier.DISK))
        assert self._buffers.scratch is not None
        self._disk.write([Write(self._buffers.scratch, self._offsets[op.k], staged[:nbytes])])
