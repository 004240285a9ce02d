"""The KV cache on the move: transfers between the homes of K and V, the disk and the slots that attention is handed.

A slot of the rings holds pages of the groups one behind the other, as the plan lays it out (`Traffic.slot_pages`).
Where host memory is apart from the device's, sparse attention is sent K alone of the host's sequences: it fetches the
few rows of V that it needs. The disk's sequences move whole: a head's row of V is at most a few hundred bytes, and
picking rows out of pages of 4096 would spare next to nothing. Knows nothing of what attention does with any of it
(cache_places.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from torch import Tensor

from ..plan.layout import Group, SlotPages, page_runs
from ..plan.placement import Tier
from ..plan.plan import Plan
from ..plan.schedule import Op
from .buffers import Buffers
from .cache_homes import CacheHomes, page_fields, token_fields
from .disk import DiskQueue, Read, Write
from .disk_files import Readable


class Cache:
    """Transfers of one round's K and V.

    `ended(k)` says which sequences of GPU batch k have ended, sooner than planned perhaps: their K and V are left where
    they are. Where things lie in a slot never depends on it, for lanes may ask at different times.
    """

    def __init__(
        self,
        plan: Plan,
        homes: CacheHomes,
        buffers: Buffers,
        disk: DiskQueue,
        ended: Callable[[int], Sequence[bool]],
    ) -> None:
        self._plan, self._homes, self._buffers, self._disk, self._ended = plan, homes, buffers, disk, ended
        self._layout = plan.cache_layout

    @property
    def _file(self) -> Readable:
        assert self._buffers.scratch is not None
        return self._buffers.scratch

    def _live(self, op: Op, pages: SlotPages) -> Sequence[int]:
        """Pages of each sequence that are worth moving; open ones move in one piece."""
        return pages.counts if pages.are_open else pages.group.live(pages.counts, self._ended(op.k))

    # To attention

    def read(self, op: Op, into: Tensor) -> int:
        """disk_in: the disk's full pages, dense, to the start of `into`; returns the bytes of them."""
        requests = []
        for pages in self._plan.slot_pages(op.i, op.k):
            if pages.pass_disk:
                ranges = self._ranges(op, pages, self._live(op, pages), into)
                requests += [Read(self._file, at, buffer) for at, buffer in ranges]
        self._disk.read(requests)
        return sum(len(r.buffer) for r in requests)

    def _ranges(self, op: Op, pages: SlotPages, counts: Sequence[int], slot: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield offsets in the scratch file with the bytes of a slot that belong there: so many pages of each."""
        offset, own = self._homes[op, pages.group].offset, slot[pages.at]
        for low, high in self._layout.ranges(counts):
            yield offset + low, own[low:high]

    def load(self, op: Op, staged: Tensor | None, into: Tensor) -> int:
        """h2d: staged full pages, open pages and the host's pages or their K, to a slot of the device's ring.

        Returns the bytes of them.
        """
        nbytes = 0
        for pages in self._plan.slot_pages(op.i, op.k):
            source = self._homes[op, pages.group].memory
            if pages.pass_disk:
                assert staged is not None, op
                source = staged[pages.at]
            copy = self._copy_pages if pages.halves == 2 else self._copy_keys
            nbytes += copy(source, into[pages.at], self._live(op, pages))
        return nbytes

    def _copy_pages(self, source: Tensor, target: Tensor, counts: Sequence[int]) -> int:
        """Copy the pages that sequences have, [pages, 2, n, half]; one copy where every sequence has them all."""
        for low, high in self._layout.ranges(counts):
            target[low:high].copy_(source[low:high], non_blocking=True)
        return self._layout.dense(sum(counts), 1)

    def _copy_keys(self, source: Tensor, target: Tensor, counts: Sequence[int]) -> int:
        """Copy K of the pages that sequences have, [pages, 2, n, half] -> [pages, n, half]: a copy for each."""
        half = self._layout.half
        for page, first, n in page_runs(counts):
            keys = source[(2 * page * len(counts) + first) * half :][: n * half]
            target[(page * len(counts) + first) * half :][: len(keys)].copy_(keys, non_blocking=True)
        return self._layout.dense(sum(counts), 1, halves=1)

    # From attention

    def store(self, op: Op, out: Tensor | None, staged: Tensor | None) -> None:
        """d2h: what attention handed over, to the host's homes and to a staging slot on the way to disk.

        Without `out`: the pages that a token step has filled, of those that the device keeps.
        """
        if out is None:
            self._store_filled(op)
        elif op.i == 0:
            self._store_prompts(op, out, staged)
        else:
            self._store_tokens(op, out)

    def _store_prompts(self, op: Op, out: Tensor, staged: Tensor | None) -> None:
        for pages in self._plan.slot_pages(0, op.k):
            target = self._homes[op, pages.group].memory
            if pages.pass_disk:
                assert staged is not None, op
                target = staged[pages.at]
            self._copy_pages(out[pages.at], target, pages.counts)

    def _store_tokens(self, op: Op, out: Tensor) -> None:
        sent = self._plan.groups[op.k].cache.sent
        landed = self._buffers.token_staging[: sent.size * self._layout.token_bytes]
        # This waits. In one piece, for by strides torch copies through memory of its own.
        landed.copy_(out[: len(landed)])
        new = [field[0, ..., 0, :] for field in token_fields(self._layout, landed, sent.size)]  # [n, 2, Hkv, width]
        for group in sent:
            first = group.first - sent.first
            memory = page_fields(self._layout, self._homes[op, group].memory, group.size)
            rows = [field[first : first + group.size] for field in new]
            append_tokens(memory, self._homes.places(group, op.i), rows)

    def _store_filled(self, op: Op) -> None:
        """Copy the device's open pages that are full now: to the host's homes, the disk's to where they leave from."""
        half, sent = self._layout.half, self._plan.groups[op.k].cache.sent
        opened = self._homes.device_open(op).view(2, -1, half)  # [K and V, n, half]
        for group in sent:
            memory = self._homes[op, group].memory.view(-1, 2, group.size, half)
            at = group.first - sent.first
            for page, first, n in self._filled(group, op.i):
                to = memory[0 if group.tier is Tier.DISK else page]
                for half_to, half_from in zip(to, opened, strict=True):  # a range each: strides take temporaries
                    half_to[first : first + n].copy_(half_from[at + first : at + first + n], non_blocking=True)

    def _filled(self, group: Group, step: int) -> Iterator[tuple[int, int, int]]:
        """(page, first, n): that page of the n neighbours from sequence `first` on becomes full in a token step."""
        cached = group.cached(step)
        filled = [(self._layout.full(cached[s]), s) for s in self._layout.filled(cached)]
        for _, run in groupby(enumerate(filled), key=lambda e: (e[1][0], e[1][1] - e[0])):
            neighbours = [entry for _, entry in run]
            yield *neighbours[0], len(neighbours)

    def write(self, op: Op, staged: Tensor | None) -> None:
        """disk_out: prefill's full pages from `staged`, or the open pages that this token step has filled."""
        requests: list[Write] = []
        if staged is not None:
            for pages in (p for p in self._plan.slot_pages(0, op.k) if p.pass_disk):
                ranges = self._ranges(op, pages, pages.counts, staged)
                requests += [Write(self._file, at, buffer) for at, buffer in ranges]
        else:
            for group in self._plan.groups[op.k].cache.on_disk:
                requests += self._filled_writes(op, group)
        self._disk.write(requests)

    def _filled_writes(self, op: Op, group: Group) -> Iterator[Write]:
        home, half = self._homes[op, group], self._layout.half
        for page, first, n in self._filled(group, op.i):
            for low in (first * half, (group.size + first) * half):  # K's and V's
                at = home.offset + self._layout.dense(page, group.size) + low
                yield Write(self._file, at, home.memory[low:][: n * half])


def append_tokens(fields: Sequence[Tensor], positions: Sequence[int], new: Sequence[Tensor]) -> None:
    """Write one token of every sequence, [n, 2, Hkv, width] by field, at its position: neighbours alike in one copy."""
    tokens, first = fields[0].shape[4], 0
    for position, same in groupby(positions):
        stop = first + len(list(same))
        for field, rows in zip(fields, new, strict=True):
            field[position // tokens, first:stop, :, :, position % tokens] = rows[first:stop]
        first = stop
