"""The KV cache of one round of the schedule, over three tiers by sequences.

Layout on every tier, `[pages, K and V, sequences, half]`, a half being the fields of K or V of one page of tokens of
one sequence (plan/layout.py). On disk only full pages are kept; the open one stays on the host. What writes K and V is
handed the places they go to, attention the segments they lie in; neither asks which tier those are on.

Where host memory is apart from the device's, sparse attention is sent K alone of the host's sequences and is handed
their V at home: it fetches the few rows it needs. The disk's sequences are read whole: a head's row of V is at most a
few hundred bytes, and picking rows out of pages of 4096 would spare next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan.layout import Group, page_runs
from ..plan.plan import Plan
from ..plan.schedule import Op
from .buffers import Buffers
from .disk import DiskQueue, Read, Readable, Write

Home = tuple[int, int]  # layer, GPU batch
Fields = tuple[Tensor, ...]  # of K and V, each [pages, n, 2, Hkv, tokens, width], or of one, without the 2


class Segment(NamedTuple):
    """Cached tokens of n sequences, each field [pages, n, Hkv, tokens, width]; `lens` int32 [n] counts the valid ones.

    V may lie in host memory where K does not.
    """

    k: Fields
    v: Fields
    lens: Tensor


class PromptTarget(NamedTuple):
    """Places for prompts' K and V: `counts[s]` packed rows from `rows[s]` on are the first positions of sequence s."""

    fields: Fields
    rows: Sequence[int]
    counts: Sequence[int]


class TokenTarget(NamedTuple):
    """A place for one new token of each sequence: rows `[first, first + n)` go to a position of each.

    `at` int32 [n] holds the positions on the device.
    """

    fields: Fields
    first: int
    positions: Sequence[int]
    at: Tensor


class Attended(NamedTuple):
    """Input of attention on the host: the place of each sequence's new token, and the segments that it reads."""

    target: TokenTarget
    segments: list[Segment]
    keep: Tensor  # int32 [n]: earlier tokens of each whose V sparse attention reads


class _PromptParts(NamedTuple):
    """A slot of prompts' K and V: the disk's full and open pages, both kinds of the host's; and their counts."""

    pages: Tensor
    opened: Tensor
    hosted: Tensor
    attended: Tensor
    full: list[int]
    used: list[int]
    attends: list[int]


def _most(counts: Sequence[int]) -> int:
    return max(counts, default=0)


class Cache:
    """Homes of K and V for every layer and GPU batch of a plan, and the transfers between them and attention.

    `ended(k)` says which sequences of GPU batch k have ended, sooner than planned perhaps: their K and V are left where
    they are. Where things lie in a slot never depends on it, for lanes may ask at different times.
    """

    def __init__(self, plan: Plan, buffers: Buffers, disk: DiskQueue, ended: Callable[[int], Sequence[bool]]) -> None:
        self._plan, self._buffers, self._disk, self._ended = plan, buffers, disk, ended
        self._layout = plan.cache_layout
        self._gpu: dict[Home, Tensor] = {}  # uint8, dense
        self._host: dict[Home, Tensor] = {}
        self._attended: dict[Home, Tensor] = {}  # on the host too
        self._open: dict[Home, Tensor] = {}  # the open pages of the disk's sequences
        self._tails: dict[Home, Tensor] = {}  # on the device: those of the host's and the disk's, where it keeps them
        self._offsets: dict[Home, int] = {}  # in the scratch file
        self._lens: dict[tuple[int, ...], Tensor] = {}
        # of what the host attends to, by GPU batch: token step; of each sequence position, valid tokens, kept ones
        sizes = [g.cache.attended.size for g in plan.groups]
        self._attended_at = [(0, torch.empty(3, n, dtype=torch.int32)) for n in sizes]
        for j, layer in enumerate(plan.layers):
            for k in range(len(plan.groups) if layer.has_cache else 0):
                self._make_home((j, k))

    def _make_home(self, home: Home) -> None:
        layout, k = self._layout, home[1]
        pages = self._plan.cache_home_pages(k)
        gpu, attended, host, disk = self._plan.groups[k].cache
        if self._plan.keeps_open:
            self._tails[home] = self._buffers.gpu.take(layout.dense(1, host.size + disk.size))
        self._attended[home] = self._buffers.host.take(layout.dense(pages, attended.size))
        self._gpu[home] = self._buffers.gpu.take(layout.dense(pages, gpu.size))
        self._host[home] = self._buffers.host.take(layout.dense(pages, host.size))
        self._open[home] = self._buffers.host.take(layout.dense(1, disk.size))
        full = layout.full(self._plan.workload.batches[k].max_len)
        self._offsets[home] = self._buffers.take_scratch(layout.dense(full, disk.size))

    # Views

    def _pages(self, buffer: Tensor, size: int) -> Fields:
        """Dense uint8 pages of `size` > 0 sequences as fields [pages, size, 2, Hkv, tokens, width]."""
        return self._fields(buffer, size, self._layout.page_tokens, self._layout.half)

    def _keys(self, buffer: Tensor, size: int) -> Fields:
        """The same of K alone: [pages, size, Hkv, tokens, width]."""
        return _half(self._fields(buffer, size, self._layout.page_tokens, self._layout.half, halves=1), 0)

    def _tokens(self, buffer: Tensor, size: int) -> Fields:
        """A slot of one new token for each of `size` sequences, as fields [1, size, 2, Hkv, 1, width]."""
        nbytes = self._layout.token_bytes
        return self._fields(buffer[: size * nbytes], size, 1, nbytes // 2)

    def _fields(self, buffer: Tensor, size: int, tokens: int, half: int, halves: int = 2) -> Fields:
        """A buffer [pages, halves, size, `half` bytes] as fields [pages, size, halves, Hkv, tokens, width]."""
        heads, page = self._layout.num_kv_heads, halves * size * half
        views, at = [], 0
        for field in self._layout.fields:
            dtype = getattr(torch, field.dtype)
            typed = buffer.view(dtype)
            shape = (len(buffer) // page, size, halves, heads, tokens, field.width)
            steps = (page, half, size * half, tokens * field.nbytes, field.nbytes, dtype.itemsize)
            offset = typed.storage_offset() + at // dtype.itemsize
            views.append(typed.as_strided(shape, [n // dtype.itemsize for n in steps], offset))
            at += heads * tokens * field.nbytes
        return tuple(views)

    def _split(self, op: Op, slot: Tensor, full: int, used: int, halves: int = 2) -> list[Tensor]:
        """Cut a slot: full and open pages of the disk's sequences, `halves` of the pages in use by the host's."""
        _, _, host, disk = self._plan.groups[op.k].cache
        dense = self._layout.dense
        sizes = dense(full, disk.size), self._plan.open_bytes(disk), dense(used, host.size, halves)
        ends = [0, *accumulate(sizes)]
        return [slot[low:high] for low, high in pairwise(ends)]

    def _valid(self, tag: tuple[int, ...], counts: Sequence[int]) -> Tensor:
        """Token counts as a tensor on the device, made once per token step."""
        if tag not in self._lens:
            self._lens[tag] = self._buffers.uploads.numbers(counts, torch.int32)
        return self._lens[tag]

    def _live(self, k: int, group: Group, counts: Sequence[int]) -> list[int]:
        """The counts of a group's sequences, 0 for those that have ended."""
        ended = self._ended(k)[group.first : group.stop]
        return [0 if gone else n for n, gone in zip(counts, ended, strict=True)]

    def cached(self, op: Op, group: Group) -> list[int]:
        """Tokens that attention reads of each sequence, besides its newest one."""
        return self._live(op.k, group, group.cached(op.i))

    def start_step(self) -> None:
        """Forget what was kept for the last token step."""
        self._lens.clear()

    def _full(self, op: Op) -> list[int]:
        """Full pages, before this token step, of each of the disk's sequences."""
        return [self._layout.full(n) for n in self._plan.groups[op.k].cache.disk.cached(op.i)]

    def _used(self, op: Op) -> list[int]:
        """Pages that the host holds, before this token step, of each of its sequences."""
        return self._plan.host_pages(self._plan.groups[op.k].cache.host.cached(op.i))

    # Transfers

    @property
    def _file(self) -> Readable:
        assert self._buffers.scratch is not None
        return self._buffers.scratch

    def read(self, op: Op, into: Tensor) -> int:
        """disk_in: the disk's full pages, dense, to the start of `into`; returns the bytes of them."""
        at = self._offsets[op.j, op.k]
        ranges = list(self._layout.ranges(self._live(op.k, self._plan.groups[op.k].cache.disk, self._full(op))))
        self._disk.read([Read(self._file, at + low, into[low:high]) for low, high in ranges])
        return sum(high - low for low, high in ranges)

    def load(self, op: Op, staged: Tensor | None, into: Tensor) -> int:
        """h2d: staged full pages, open pages and the host's pages or their K, to a slot of the device's ring.

        Returns the bytes of them.
        """
        _, _, host, disk = self._plan.groups[op.k].cache
        full, used, home = self._full(op), self._used(op), self._host[op.j, op.k]
        pages, opened, hosted = self._split(op, into, _most(full), _most(used), self._plan.host_halves)
        full, used = self._live(op.k, disk, full), self._live(op.k, host, used)
        nbytes = len(opened)
        if staged is not None:
            nbytes += self._copy_blocks(staged, pages, full)
        opened.copy_(self._open[op.j, op.k][: len(opened)], non_blocking=True)
        copy = self._copy_blocks if self._plan.host_halves == 2 else self._copy_keys
        return nbytes + copy(home, hosted, used)

    def _copy_blocks(self, source: Tensor, target: Tensor, counts: Sequence[int]) -> int:
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

    def store(self, op: Op, out: Tensor | None, staged: Tensor | None) -> None:
        """d2h: what attention handed over, to the host's homes and to a staging slot on the way to disk.

        Without `out`: the pages that a token step has filled, of those that the device keeps.
        """
        if out is None:
            self._store_filled(op)
        elif op.i == 0:
            self._store_prompt(op, out, staged)
        else:
            self._store_token(op, out)

    def _store_prompt(self, op: Op, out: Tensor, staged: Tensor | None) -> None:
        home = op.j, op.k
        parts = self._prompt_parts(op, out)
        if staged is not None:
            self._copy_blocks(parts.pages, staged, parts.full)
        self._open[home][: len(parts.opened)].copy_(parts.opened, non_blocking=True)
        for part, used, at in ((parts.hosted, parts.used, self._host), (parts.attended, parts.attends, self._attended)):
            self._copy_blocks(part, at[home], used)

    def _prompt_parts(self, op: Op, out: Tensor) -> _PromptParts:
        """Cut the slot that a prompt's K and V leave the device in."""
        _, attended, host, disk = self._plan.groups[op.k].cache
        full = [self._layout.full(n) for n in disk.prompt_lens]
        used = self._plan.host_pages(host.prompt_lens)
        attends = [self._layout.pages(n) for n in attended.prompt_lens]
        pages, opened, hosted = self._split(op, out, _most(full), _most(used))
        rest = out[len(pages) + len(opened) + len(hosted) :][: self._layout.dense(_most(attends), attended.size)]
        return _PromptParts(pages, opened, hosted, rest, full, used, attends)

    def _store_token(self, op: Op, out: Tensor) -> None:
        _, _, host, disk = self._plan.groups[op.k].cache
        size = host.size + disk.size
        landed = self._buffers.token_staging[: size * self._layout.token_bytes]
        # This waits. In one piece, for by strides torch copies through memory of its own.
        landed.copy_(out[: len(landed)])
        new = [field[0, ..., 0, :] for field in self._tokens(landed, size)]  # [n, 2, Hkv, width]
        opened = [n % self._layout.page_tokens for n in disk.cached(op.i)]
        for buffer, group, positions in (
            (self._host[op.j, op.k], host, host.cached(op.i)),
            (self._open[op.j, op.k], disk, opened),
        ):
            if group.size:
                first = group.first - host.first
                rows = [field[first : first + group.size] for field in new]
                append_tokens(self._pages(buffer, group.size), positions, rows)

    def _store_filled(self, op: Op) -> None:
        """Copy newly full pages off the device: the host's sequences' to their place, the disk's to be written."""
        _, _, host, disk = self._plan.groups[op.k].cache
        tails, half = self._tails[op.j, op.k].view(2, -1, self._layout.half), self._layout.half
        home = self._host[op.j, op.k].view(-1, 2, max(host.size, 1), half)
        opened = self._open[op.j, op.k].view(2, -1, half)
        for group in (host, disk):
            at = group.first - host.first
            for page, first, n in self._filled(group, op.i):
                to = home[page] if group is host else opened
                for half_to, tail in zip(to, tails, strict=True):  # one range each: what is strided takes temporaries
                    half_to[first : first + n].copy_(tail[at + first : at + first + n], non_blocking=True)

    def _filled(self, group: Group, step: int) -> Iterator[tuple[int, int, int]]:
        """(page, first, n): that page of the n neighbours from sequence `first` on becomes full in a token step."""
        cached = group.cached(step)
        filled = [(self._layout.full(cached[s]), s) for s in self._layout.filled(cached)]
        for _, run in groupby(enumerate(filled), key=lambda e: (e[1][0], e[1][1] - e[0])):
            neighbours = [entry for _, entry in run]
            yield *neighbours[0], len(neighbours)

    def write(self, op: Op, staged: Tensor | None) -> None:
        """disk_out: prefill's full pages from `staged`, or the open pages that this token step has filled."""
        opened, at, layout = self._open[op.j, op.k], self._offsets[op.j, op.k], self._layout
        disk = self._plan.groups[op.k].cache.disk
        if staged is not None:
            ranges = layout.ranges([layout.full(n) for n in disk.prompt_lens])
            self._disk.write([Write(self._file, at + low, staged[low:high]) for low, high in ranges])
            return
        requests = []
        for page, first, n in self._filled(disk, op.i):
            for low in (first * layout.half, (disk.size + first) * layout.half):  # K's and V's
                buffer = opened[low:][: n * layout.half]
                requests.append(Write(self._file, at + layout.dense(page, disk.size) + low, buffer))
        self._disk.write(requests)

    # Where new K and V go, and what attention reads

    def prompt_targets(self, op: Op, out: Tensor | None) -> list[PromptTarget]:
        """Places of a prefill's packed rows of K and V: resident homes and, for the rest, the slot `out`."""
        batch = self._plan.workload.batches[op.k]
        if batch.new_tokens == 1:
            return []
        first = [0, *accumulate(batch.prompt_lens)]  # packed row of each sequence
        targets = []
        for group, fields, skipped, counts in self._prompt_places(op, out):
            if any(counts):
                rows = [r + n for r, n in zip(first[group.first : group.stop], skipped, strict=True)]
                targets.append(PromptTarget(fields, rows, counts))
        return targets

    def _prompt_places(self, op: Op, out: Tensor | None) -> Iterator[tuple[Group, Fields, list[int], list[int]]]:
        """Yield each group with a buffer, how many tokens of each sequence come before it, and how many go into it."""
        gpu, attended, host, disk = self._plan.groups[op.k].cache
        home, layout = (op.j, op.k), self._layout
        full = [layout.full(n) for n in disk.prompt_lens]
        pages, opened, hosted, attends = self._gpu[home][:0], self._open[home], self._host[home], self._attended[home]
        if self._plan.host_is_apart and out is not None:
            pages, opened, hosted, attends, *_ = self._prompt_parts(op, out)
        elif out is not None:
            pages = self._split(op, out, _most(full), 0)[0]
        used = self._plan.host_pages(host.prompt_lens)
        for group, buffer in ((gpu, self._gpu[home]), (attended, attends)):
            if group.size:
                yield group, self._pages(buffer, group.size), [0] * group.size, list(group.prompt_lens)
        for group, held, buffer, behind in ((host, used, hosted, hosted[:0]), (disk, full, pages, opened)):
            if group.size:
                counts = [min(n, m * layout.page_tokens) for n, m in zip(group.prompt_lens, held, strict=True)]
                yield group, self._pages(buffer, group.size), [0] * group.size, counts
                rest = [n - m for n, m in zip(group.prompt_lens, counts, strict=True)]
                yield group, self._open_fields(home, group, behind), counts, rest

    def _open_fields(self, home: Home, group: Group, elsewhere: Tensor) -> Fields:
        """The open pages of a group: of those that the device keeps, or in the buffer given."""
        if not self._plan.keeps_open:
            return self._pages(elsewhere, group.size)
        _, _, host, disk = self._plan.groups[home[1]].cache
        rows = slice(group.first - host.first, group.stop - host.first)
        return tuple(field[:, rows] for field in self._pages(self._tails[home], host.size + disk.size))

    def token_targets(self, op: Op, out: Tensor | None) -> list[TokenTarget]:
        """Places of a token step's new tokens, one of each sequence; `out` is the slot that is stored to the host."""
        gpu, _, host, disk = self._plan.groups[op.k].cache
        home = (op.j, op.k)
        opened = [n % self._layout.page_tokens for n in disk.cached(op.i)]
        places = [(gpu, self._gpu[home], gpu.cached(op.i))]
        if not self._plan.host_is_apart:
            places += [(host, self._host[home], host.cached(op.i)), (disk, self._open[home], tuple(opened))]
        targets = []
        for group, buffer, positions in places:
            if group.size:
                at = self._valid((op.i, op.k, group.first, 6), positions)
                targets.append(TokenTarget(self._pages(buffer, group.size), group.first, positions, at))
        if self._plan.host_is_apart and host.size + disk.size:
            tail, places_there = self._tail(op, out)
            at = self._valid((op.i, op.k, host.first, 7), places_there)
            targets.append(TokenTarget(tail, host.first, places_there, at))
        return targets

    def _tail(self, op: Op, out: Tensor | None) -> tuple[Fields, list[int]]:
        """The device's newest tokens of the host's and the disk's sequences, and the newest one's position among them.

        They are that token alone, about to be stored from the slot `out`, or the whole open page.
        """
        _, _, host, disk = self._plan.groups[op.k].cache
        if self._plan.keeps_open:
            places = [n % self._layout.page_tokens for n in (*host.cached(op.i), *disk.cached(op.i))]
            return self._pages(self._tails[op.j, op.k], len(places)), places
        assert out is not None
        return self._tokens(out, host.size + disk.size), [0] * (host.size + disk.size)

    def attended(self, op: Op) -> Attended:
        """Input of the host's attention in a token step: the places of the new tokens, and the segments it reads."""
        group, buffer = self._plan.groups[op.k].cache.attended, self._attended[op.j, op.k]
        positions = group.cached(op.i)
        step, counts = self._attended_at[op.k]
        if step != op.i:
            cached = self.cached(op, group)
            counts.numpy()[:] = positions, [n + 1 for n in cached], [self._plan.kept(n) for n in cached]
            self._attended_at[op.k] = op.i, counts
        at, valid, keep = counts
        fields = self._pages(buffer, group.size)
        used = self._layout.pages(_most(positions) + 1)
        return Attended(TokenTarget(fields, 0, positions, at), [_segment(fields, valid, used)], keep)

    def segments(self, op: Op, slot: Tensor | None, out: Tensor | None) -> list[tuple[Group, list[Segment]]]:
        """Segments that attention reads in a token step, new tokens written: by group of sequences, newest token last.

        `slot` is this visit's slot of the cache ring, `out` the slot that is stored to the host.
        """
        gpu, _, host, disk = self._plan.groups[op.k].cache
        found = [(gpu, self._resident(op, self._gpu, gpu))]
        if self._plan.host_is_apart:
            found += self._staged(op, slot, out)
        else:
            found += [(host, self._resident(op, self._host, host)), (disk, self._in_place(op, slot))]
        return [(group, segments) for group, segments in found if group.size]

    def _resident(self, op: Op, homes: dict[Home, Tensor], group: Group) -> list[Segment]:
        if not group.size:
            return []
        counts = [n + 1 for n in self.cached(op, group)]
        lens = self._valid((op.i, op.k, group.first, 0), counts)
        pages = self._layout.pages(_most(counts))
        return [_segment(self._pages(homes[op.j, op.k], group.size), lens, pages)]

    def _in_place(self, op: Op, slot: Tensor | None) -> list[Segment]:
        """The disk's sequences where host memory is the device's: full pages from the ring, the open one at home."""
        group, tokens = self._plan.groups[op.k].cache.disk, self._layout.page_tokens
        if not group.size:
            return []
        lens = self._valid((op.i, op.k, group.first, 1), [n % tokens + 1 for n in group.cached(op.i)])
        opened = _segment(self._pages(self._open[op.j, op.k], group.size), lens)
        return [*self._full_segment(op, slot), opened]

    def _full_segment(self, op: Op, slot: Tensor | None) -> list[Segment]:
        group, full = self._plan.groups[op.k].cache.disk, self._full(op)
        if not _most(full):
            return []
        assert slot is not None
        tokens = [n * self._layout.page_tokens for n in self._live(op.k, group, full)]
        lens = self._valid((op.i, op.k, group.first, 2), tokens)
        return [_segment(self._pages(self._split(op, slot, _most(full), 0)[0], group.size), lens)]

    def _staged(self, op: Op, slot: Tensor | None, out: Tensor | None) -> list[tuple[Group, list[Segment]]]:
        """Host and disk sequences from the device's ring; the newest tokens are a segment of their own.

        Without a slot there is nothing before those, or all sequences have ended and attend to what there is.
        """
        _, _, host, disk = self._plan.groups[op.k].cache
        if not host.size + disk.size:
            return []
        tail, places = self._tail(op, out)
        found: list[tuple[Group, list[Segment]]] = []
        for group, earlier in ((host, self._sent_by_host), (disk, self._sent_by_disk)):
            if group.size:
                rows = slice(group.first - host.first, group.stop - host.first)
                lens = self._valid((op.i, op.k, group.first, 5), [n + 1 for n in places[rows]])
                newest = _segment([field[:, rows] for field in tail], lens)
                found.append((group, [*(earlier(op, slot) if slot is not None else []), newest]))
        return found

    def _sent_by_host(self, op: Op, slot: Tensor) -> list[Segment]:
        group, used = self._plan.groups[op.k].cache.host, self._used(op)
        if not _most(used):
            return []
        hosted = self._split(op, slot, _most(self._full(op)), _most(used), self._plan.host_halves)[2]
        held = [min(n, m * self._layout.page_tokens) for n, m in zip(self.cached(op, group), used, strict=True)]
        lens = self._valid((op.i, op.k, group.first, 3), held)
        return [self._host_segment(op, hosted, lens, _most(used))]

    def _sent_by_disk(self, op: Op, slot: Tensor) -> list[Segment]:
        group, found = self._plan.groups[op.k].cache.disk, self._full_segment(op, slot)
        if self._plan.keeps_open:
            return found
        opened = self._split(op, slot, _most(self._full(op)), 0)[1]
        lens = self._valid((op.i, op.k, group.first, 4), [n % self._layout.page_tokens for n in group.cached(op.i)])
        return [*found, _segment(self._pages(opened, group.size), lens)]

    def _host_segment(self, op: Op, hosted: Tensor, lens: Tensor, pages: int) -> Segment:
        """The host's sequences' cache as the device reads it: K as sent, V as sent or else in place on the host."""
        size = len(lens)
        if self._plan.host_halves == 2:
            return _segment(self._pages(hosted, size), lens)
        home = self._pages(self._host[op.j, op.k], size)
        return Segment(self._keys(hosted, size), _half([field[:pages] for field in home], 1), lens)


def _half(fields: Sequence[Tensor], number: int) -> Fields:
    """K (0) or V (1) of fields [pages, n, halves, ...]."""
    return tuple(field[:, :, number] for field in fields)


def _segment(fields: Sequence[Tensor], lens: Tensor, pages: int | None = None) -> Segment:
    """The first pages of fields of K and V."""
    fields = [field[:pages] for field in fields]
    return Segment(_half(fields, 0), _half(fields, 1), lens)


def append_tokens(fields: Fields, positions: Sequence[int], new: Sequence[Tensor]) -> None:
    """Write one token of every sequence, [n, 2, Hkv, width] by field, at its position: neighbours alike in one copy."""
    tokens, first = fields[0].shape[4], 0
    for position, same in groupby(positions):
        stop = first + len(list(same))
        for field, rows in zip(fields, new, strict=True):
            field[position // tokens, first:stop, :, :, position % tokens] = rows[first:stop]
        first = stop
