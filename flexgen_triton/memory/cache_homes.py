"""Homes of K and V: the bytes that hold them, by layer and group of sequences, and how bytes read as numbers.

Layout on every tier, `[pages, K and V, sequences, half]`, a half being the fields of K or V of one page of tokens of
one sequence (plan/layout.py). On disk only full pages are kept; open ones stay on the host until they are full. Knows
neither what moves between homes nor what reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan.layout import CacheLayout, Group
from ..plan.placement import Tier
from ..plan.plan import Plan
from ..plan.schedule import Op
from .buffers import Buffers

Fields = tuple[Tensor, ...]  # of K and V, each [pages, n, 2, Hkv, tokens, width], or of one, without the 2


class Home(NamedTuple):
    """The bytes of a group's K and V in one layer."""

    group: Group
    memory: Tensor  # uint8, dense: all pages on the GPU or the host; of the disk's sequences the open ones, on the host
    offset: int  # of the disk's full pages, in the scratch file


class CacheHomes:
    """Homes of every layer, GPU batch and group of a plan, and the open pages that the device keeps."""

    def __init__(self, plan: Plan, buffers: Buffers) -> None:
        self._plan, self._layout = plan, plan.cache_layout
        self._homes: dict[tuple[int, int, int], Home] = {}  # by stage of attention, GPU batch and first sequence
        self._device_open: dict[tuple[int, int], Tensor] = {}
        for j, (k, groups) in product(plan.cached_stages, enumerate(plan.groups)):
            self._device_open[j, k] = buffers.gpu.take(plan.device_open_bytes(k))
            for group in groups.cache:
                self._homes[j, k, group.first] = self._take(k, group, buffers)

    def _take(self, k: int, group: Group, buffers: Buffers) -> Home:
        nbytes = self._plan.home_bytes(k, group)
        if group.tier is Tier.DISK:
            opened = buffers.host.take(self._plan.open_home_bytes(group))
            return Home(group, opened, buffers.take_scratch(nbytes))
        arena = buffers.gpu if group.tier is Tier.GPU else buffers.host
        return Home(group, arena.take(nbytes), 0)

    def __getitem__(self, place: tuple[Op, Group]) -> Home:
        """The home of a group in the layer and the GPU batch that an op is about."""
        op, group = place
        return self._homes[self._plan.attention_of(op.j), op.k, group.first]

    def places(self, group: Group, step: int) -> list[int]:
        """Positions, in the memory of its home, of the new tokens of a group's sequences."""
        cached = group.cached(step)
        return [n % self._layout.page_tokens for n in cached] if group.tier is Tier.DISK else list(cached)

    def device_open(self, op: Op) -> Tensor:
        """Open pages on the device of all sequences that are sent to it, in their order."""
        return self._device_open[self._plan.attention_of(op.j), op.k]


def page_fields(layout: CacheLayout, buffer: Tensor, size: int) -> Fields:
    """Dense uint8 pages of `size` > 0 sequences as fields [pages, size, 2, Hkv, tokens, width]."""
    return _fields(layout, buffer, size, layout.page_tokens, layout.half)


def key_fields(layout: CacheLayout, buffer: Tensor, size: int) -> Fields:
    """Dense uint8 pages that hold K alone as fields [pages, size, Hkv, tokens, width]."""
    return one_half(_fields(layout, buffer, size, layout.page_tokens, layout.half, halves=1), 0)


def token_fields(layout: CacheLayout, buffer: Tensor, size: int) -> Fields:
    """A slot of one new token for each of `size` sequences, as fields [1, size, 2, Hkv, 1, width]."""
    return _fields(layout, buffer[: size * layout.token_bytes], size, 1, layout.token_bytes // 2)


def one_half(fields: Sequence[Tensor], number: int) -> Fields:
    """K (0) or V (1) of fields [pages, n, halves, ...]."""
    return tuple(field[:, :, number] for field in fields)


def _fields(layout: CacheLayout, buffer: Tensor, size: int, tokens: int, half: int, halves: int = 2) -> Fields:
    """A buffer [pages, halves, size, `half` bytes] as fields [pages, size, halves, Hkv, tokens, width]."""
    heads, page = layout.num_kv_heads, halves * size * half
    views, at = [], 0
    for field in layout.fields:
        dtype = getattr(torch, field.dtype)
        typed = buffer.view(dtype)
        shape = (len(buffer) // page, size, halves, heads, tokens, field.width)
        steps = (page, half, size * half, tokens * field.nbytes, field.nbytes, dtype.itemsize)
        offset = typed.storage_offset() + at // dtype.itemsize
        views.append(typed.as_strided(shape, [n // dtype.itemsize for n in steps], offset))
        at += heads * tokens * field.nbytes
    return tuple(views)
