"""Packed sequences on the device: the small integer tables that kernels need, from lengths that the host knows.

A table depends on the lengths only, so every layer of a step asks for the same one: it is built once and kept. It goes
to the device from pinned memory, so nothing waits for the device. Tables are kept per stream, because another stream
would not wait for the copy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

KEPT = 64  # tables: a few batches, each in a few shapes


def tiles(lens: Sequence[int], rows: int, device: torch.device) -> Tensor:
    """int32 [num_tiles, 3]: for every tile of `rows` tokens, its sequence's first token, length and first tile.

    Longest sequences first, so that a grid over the table ends with short work.
    """
    return _tiles(tuple(lens), rows, device, _stream(device))


def slots(lens: Sequence[int], device: torch.device) -> Tensor:
    """int32 [2, T]: every token's sequence, and its position in that sequence."""
    return _slots(tuple(lens), device, _stream(device))


@functools.lru_cache(maxsize=KEPT)
def _tiles(lens: tuple[int, ...], rows: int, device: torch.device, _: int) -> Tensor:
    length = torch.tensor(lens, dtype=torch.int32)
    start = length.cumsum(0) - length
    length, order = length.sort(descending=True, stable=True)
    count = (length + rows - 1) // rows
    table = torch.stack((start[order], length, count.cumsum(0) - count), 1).int()
    return _copy(table.repeat_interleave(count, 0), device)


@functools.lru_cache(maxsize=KEPT)
def _slots(lens: tuple[int, ...], device: torch.device, _: int) -> Tensor:
    length = torch.tensor(lens, dtype=torch.int64)
    sequence = torch.arange(len(lens)).repeat_interleave(length)
    position = torch.arange(len(sequence)) - (length.cumsum(0) - length)[sequence]
    return _copy(torch.stack((sequence, position)).int(), device)


def _copy(table: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return table.contiguous()
    return table.pin_memory().to(device, non_blocking=True)


def _stream(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
