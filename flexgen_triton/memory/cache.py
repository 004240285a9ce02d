"""The KV cache of one block of the schedule, over three tiers by sequences.

Layout on every tier, `[blocks, K and V, sequences, half]`, a half being the fields of K or V of one block of tokens of
one sequence (plan/layout.py). On disk only full blocks are kept; the open one stays on the host. What writes K and V is
handed the places they go to, attention the segments they lie in; neither asks which tier those are on.

Where host memory is apart from the device's, sparse attention is sent K alone of the host's sequences and is handed
their V at home: it fetches the few rows it needs. The disk's sequences are read whole: a head's row of V is at most a
few hundred bytes, and picking rows out of pages of 4096 would spare next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan.layout import Group, block_runs
from ..plan.plan import Plan
from ..plan.schedule import Op
from .buffers import Buffers
from .disk import DiskFile, DiskQueue, Read, Write

Home = tuple[int, int]  # layer, GPU batch
Fields = tuple[Tensor, ...]  # of K and V, each [blocks, n, 2, Hkv, tokens, width], or of one, without the 2


class Segment(NamedTuple):
    """Cached tokens of n sequences, each field [blocks, n, Hkv, tokens, width]; `lens` int32 [n] counts the valid ones.

    V may lie in host memory where K does not.
    """

    k: Fields
    v: Fields
    lens: Tensor


class PromptTarget(NamedTuple):
    """Where prompts' K and V go: of sequence s, `counts[s]` packed rows from `rows[s]` on, to the first positions."""

    fields: Fields
    rows: Sequence[int]
    counts: Sequence[int]


class TokenTarget(NamedTuple):
    """Where one new token of each sequence goes: rows `[first, first + n)` to a position of each sequence.

    `at` int32 [n] holds the positions on the device.
    """

    fields: Fields
    first: int
    positions: Sequence[int]
    at: Tensor


class Attended(NamedTuple):
    """The sequences of a GPU batch that the host attends to: where one token of each goes, and what attention reads."""

    group: Group
    target: TokenTarget
    segments: list[Segment]
    keep: Tensor  # int32 [n]: earlier tokens of each whose V sparse attention reads


class _PromptParts(NamedTuple):
    """A slot of prompts' K and V: the disk's full and open blocks, both kinds of the host's; and their counts."""

    blocks: Tensor
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
        self._open: dict[Home, Tensor] = {}  # the open blocks of the disk's sequences
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
        blocks = self._plan.cache_home_blocks(k)
        gpu, attended, host, disk = self._plan.groups[k].cache
        self._attended[home] = self._buffers.host.take(layout.dense(blocks, attended.size))
        self._gpu[home] = self._buffers.gpu.take(layout.dense(blocks, gpu.size))
        self._host[home] = self._buffers.host.take(layout.dense(blocks, host.size))
        self._open[home] = self._buffers.host.take(layout.dense(1, disk.size))
        full = layout.full(self._plan.workload.batches[k].max_len)
        self._offsets[home] = self._buffers.take_scratch(layout.dense(full, disk.size))

    # Views

    def _blocks(self, buffer: Tensor, size: int) -> Fields:
        """Dense uint8 blocks of `size` > 0 sequences as fields [blocks, size, 2, Hkv, tokens, width]."""
        return self._fields(buffer, size, self._layout.block_tokens, self._layout.half)

    def _keys(self, buffer: Tensor, size: int) -> Fields:
        """The same of K alone: [blocks, size, Hkv, tokens, width]."""
        return _half(self._fields(buffer, size, self._layout.block_tokens, self._layout.half, halves=1), 0)

    def _tokens(self, buffer: Tensor, size: int) -> Fields:
        """A slot of one new token for each of `size` sequences, as fields [1, size, 2, Hkv, 1, width]."""
        nbytes = self._layout.token_bytes
        return self._fields(buffer[: size * nbytes], size, 1, nbytes // 2)

    def _fields(self, buffer: Tensor, size: int, tokens: int, half: int, halves: int = 2) -> Fields:
        """A buffer [blocks, halves, size, `half` bytes] as fields [blocks, size, halves, Hkv, tokens, width]."""
        heads, block = self._layout.num_kv_heads, halves * size * half
        views, at = [], 0
        for field in self._layout.fields:
            dtype = getattr(torch, field.dtype)
            typed = buffer.view(dtype)
            shape = (len(buffer) // block, size, halves, heads, tokens, field.width)
            steps = (block, half, size * half, tokens * field.nbytes, field.nbytes, dtype.itemsize)
            offset = typed.storage_offset() + at // dtype.itemsize
            views.append(typed.as_strided(shape, [n // dtype.itemsize for n in steps], offset))
            at += heads * tokens * field.nbytes
        return tuple(views)

    def _split(self, op: Op, slot: Tensor, full: int, used: int, halves: int = 2) -> list[Tensor]:
        """Cut a slot: full and open blocks of the disk's sequences, `halves` of the blocks in use by the host's."""
        _, _, host, disk = self._plan.groups[op.k].cache
        dense = self._layout.dense
        ends = [0, *accumulate((dense(full, disk.size), dense(1, disk.size), dense(used, host.size, halves)))]
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
        """Full blocks, before this token step, of each of the disk's sequences."""
        return [self._layout.full(n) for n in self._plan.groups[op.k].cache.disk.cached(op.i)]

    def _used(self, op: Op) -> list[int]:
        """Blocks in use, before this token step, by each of the host's sequences."""
        return [self._layout.blocks(n) for n in self._plan.groups[op.k].cache.host.cached(op.i)]

    # Transfers

    @property
    def _file(self) -> DiskFile:
        assert self._buffers.scratch is not None
        return self._buffers.scratch

    def read(self, op: Op, into: Tensor) -> int:
        """disk_in: the disk's full blocks, dense, to the start of `into`; returns the bytes of them."""
        at = self._offsets[op.j, op.k]
        ranges = list(self._layout.ranges(self._live(op.k, self._plan.groups[op.k].cache.disk, self._full(op))))
        self._disk.read([Read(self._file, at + low, into[low:high]) for low, high in ranges])
        return sum(high - low for low, high in ranges)

    def load(self, op: Op, staged: Tensor | None, into: Tensor) -> int:
        """h2d: staged full blocks, open blocks and the host's blocks or their K, to a slot of the device's ring.

        Returns the bytes of them.
        """
        _, _, host, disk = self._plan.groups[op.k].cache
        full, used, home = self._full(op), self._used(op), self._host[op.j, op.k]
        blocks, opened, hosted = self._split(op, into, _most(full), _most(used), self._plan.host_halves)
        full, used = self._live(op.k, disk, full), self._live(op.k, host, used)
        nbytes = len(opened)
        if staged is not None:
            nbytes += self._copy_blocks(staged, blocks, full)
        opened.copy_(self._open[op.j, op.k], non_blocking=True)
        copy = self._copy_blocks if self._plan.host_halves == 2 else self._copy_keys
        return nbytes + copy(home, hosted, used)

    def _copy_blocks(self, source: Tensor, target: Tensor, counts: Sequence[int]) -> int:
        """Copy the blocks that sequences have, [blocks, 2, n, half]; one copy where every sequence has them all."""
        for low, high in self._layout.ranges(counts):
            target[low:high].copy_(source[low:high], non_blocking=True)
        return self._layout.dense(sum(counts), 1)

    def _copy_keys(self, source: Tensor, target: Tensor, counts: Sequence[int]) -> int:
        """Copy K of the blocks that sequences have, [blocks, 2, n, half] -> [blocks, n, half]: a copy for each."""
        half = self._layout.half
        for block, first, n in block_runs(counts):
            keys = source[(2 * block * len(counts) + first) * half :][: n * half]
            target[(block * len(counts) + first) * half :][: len(keys)].copy_(keys, non_blocking=True)
        return self._layout.dense(sum(counts), 1, halves=1)

    def store(self, op: Op, out: Tensor, staged: Tensor | None) -> None:
        """d2h: what attention handed over, to the host's homes and to a staging slot on the way to disk."""
        if op.i == 0:
            self._store_prompt(op, out, staged)
        else:
            self._store_token(op, out)

    def _store_prompt(self, op: Op, out: Tensor, staged: Tensor | None) -> None:
        home = op.j, op.k
        parts = self._prompt_parts(op, out)
        if staged is not None:
            self._copy_blocks(parts.blocks, staged, parts.full)
        self._open[home].copy_(parts.opened, non_blocking=True)
        for part, used, at in ((parts.hosted, parts.used, self._host), (parts.attended, parts.attends, self._attended)):
            self._copy_blocks(part, at[home], used)

    def _prompt_parts(self, op: Op, out: Tensor) -> _PromptParts:
        """Cut the slot that a prompt's K and V leave the device in."""
        _, attended, host, disk = self._plan.groups[op.k].cache
        full = [self._layout.full(n) for n in disk.prompt_lens]
        used, attends = ([self._layout.blocks(n) for n in group.prompt_lens] for group in (host, attended))
        blocks, opened, hosted = self._split(op, out, _most(full), _most(used))
        rest = out[len(blocks) + len(opened) + len(hosted) :][: self._layout.dense(_most(attends), attended.size)]
        return _PromptParts(blocks, opened, hosted, rest, full, used, attends)

    def _store_token(self, op: Op, out: Tensor) -> None:
        _, _, host, disk = self._plan.groups[op.k].cache
        new = [field[0, ..., 0, :].cpu() for field in self._tokens(out, host.size + disk.size)]  # [n, 2, Hkv, width]
        opened = [n % self._layout.block_tokens for n in disk.cached(op.i)]
        for buffer, group, positions in (
            (self._host[op.j, op.k], host, host.cached(op.i)),
            (self._open[op.j, op.k], disk, opened),
        ):
            if group.size:
                first = group.first - host.first
                rows = [field[first : first + group.size] for field in new]
                append_tokens(self._blocks(buffer, group.size), positions, rows)

    def write(self, op: Op, staged: Tensor | None) -> None:
        """disk_out: prefill's full blocks from `staged`, or the open blocks that this token step has filled."""
        opened, at, layout = self._open[op.j, op.k], self._offsets[op.j, op.k], self._layout
        disk = self._plan.groups[op.k].cache.disk
        if staged is not None:
            ranges = layout.ranges([layout.full(n) for n in disk.prompt_lens])
            self._disk.write([Write(self._file, at + low, staged[low:high]) for low, high in ranges])
            return
        filled = [(layout.full(n), s) for s, n in enumerate(disk.cached(op.i)) if (n + 1) % layout.block_tokens == 0]
        requests = []
        for _, run in groupby(enumerate(filled), key=lambda e: (e[1][0], e[1][1] - e[0])):
            neighbours = [entry for _, entry in run]
            block, first = neighbours[0]
            for low in (first * layout.half, (disk.size + first) * layout.half):  # K's and V's
                buffer = opened[low:][: len(neighbours) * layout.half]
                requests.append(Write(self._file, at + layout.dense(block, disk.size) + low, buffer))
        self._disk.write(requests)

    # Where new K and V go, and what attention reads

    def prompt_targets(self, op: Op, out: Tensor | None) -> list[PromptTarget]:
        """After prefill: where packed rows of K and V go, resident homes and, for the rest, the slot `out`."""
        gpu, attended, host, disk = self._plan.groups[op.k].cache
        home, layout = (op.j, op.k), self._layout
        batch = self._plan.workload.batches[op.k]
        if batch.new_tokens == 1:
            return []
        opened, hosted, attends = self._open[home], self._host[home], self._attended[home]
        full = [layout.full(n) for n in disk.prompt_lens]
        blocks: Tensor | None = None
        if self._plan.copies and out is not None:
            blocks, opened, hosted, attends, *_ = self._prompt_parts(op, out)
        elif out is not None:
            blocks = self._split(op, out, _most(full), 0)[0]
        first = [0, *accumulate(batch.prompt_lens)]  # packed row of each sequence
        targets = []
        for group, buffer in ((gpu, self._gpu[home]), (attended, attends), (host, hosted)):
            if group.size:
                rows = first[group.first : group.stop]
                targets.append(PromptTarget(self._blocks(buffer, group.size), rows, group.prompt_lens))
        if disk.size:
            rows = first[disk.first : disk.stop]
            whole = [n * layout.block_tokens for n in full]
            if blocks is not None and len(blocks):
                targets.append(PromptTarget(self._blocks(blocks, disk.size), rows, whole))
            rest = [n - m for n, m in zip(disk.prompt_lens, whole, strict=True)]
            rows = [r + m for r, m in zip(rows, whole, strict=True)]
            targets.append(PromptTarget(self._blocks(opened, disk.size), rows, rest))
        return targets

    def token_targets(self, op: Op, out: Tensor | None) -> list[TokenTarget]:
        """In decode: where one token of every sequence goes; `out` is the slot on the way to the host."""
        gpu, _, host, disk = self._plan.groups[op.k].cache
        home = (op.j, op.k)
        opened = [n % self._layout.block_tokens for n in disk.cached(op.i)]
        places = [(gpu, self._gpu[home], gpu.cached(op.i))]
        if not self._plan.copies:
            places += [(host, self._host[home], host.cached(op.i)), (disk, self._open[home], tuple(opened))]
        targets = []
        for group, buffer, positions in places:
            if group.size:
                at = self._valid((op.i, op.k, group.first, 6), positions)
                targets.append(TokenTarget(self._blocks(buffer, group.size), group.first, positions, at))
        away = host.size + disk.size
        if self._plan.copies and away:
            assert out is not None
            zeros = [0] * away
            at = self._valid((op.i, op.k, host.first, 7), zeros)
            targets.append(TokenTarget(self._tokens(out, away), host.first, zeros, at))
        return targets

    def attended(self, op: Op) -> Attended:
        """In decode: the sequences that the host attends to, where their new token goes and what attention reads."""
        group, buffer = self._plan.groups[op.k].cache.attended, self._attended[op.j, op.k]
        positions = group.cached(op.i)
        step, counts = self._attended_at[op.k]
        if step != op.i:
            cached = self.cached(op, group)
            counts.numpy()[:] = positions, [n + 1 for n in cached], [self._plan.kept(n) for n in cached]
            self._attended_at[op.k] = op.i, counts
        at, valid, keep = counts
        fields = self._blocks(buffer, group.size)
        used = self._layout.blocks(_most(positions) + 1)
        return Attended(group, TokenTarget(fields, 0, positions, at), [_segment(fields, valid, used)], keep)

    def segments(self, op: Op, slot: Tensor | None, out: Tensor | None) -> list[tuple[Group, list[Segment]]]:
        """In decode, the new tokens written: what attention reads, by group of sequences, the newest token last.

        `slot` is this block's slot of the cache ring, `out` its slot on the way to the host.
        """
        gpu, _, host, disk = self._plan.groups[op.k].cache
        found = [(gpu, self._resident(op, self._gpu, gpu))]
        if self._plan.copies:
            found += self._staged(op, slot, out)
        else:
            found += [(host, self._resident(op, self._host, host)), (disk, self._in_place(op, slot))]
        return [(group, segments) for group, segments in found if group.size]

    def _resident(self, op: Op, homes: dict[Home, Tensor], group: Group) -> list[Segment]:
        if not group.size:
            return []
        counts = [n + 1 for n in self.cached(op, group)]
        lens = self._valid((op.i, op.k, group.first, 0), counts)
        blocks = self._layout.blocks(_most(counts))
        return [_segment(self._blocks(homes[op.j, op.k], group.size), lens, blocks)]

    def _in_place(self, op: Op, slot: Tensor | None) -> list[Segment]:
        """The disk's sequences where host memory is the device's: full blocks from the ring, the open one at home."""
        group, tokens = self._plan.groups[op.k].cache.disk, self._layout.block_tokens
        if not group.size:
            return []
        lens = self._valid((op.i, op.k, group.first, 1), [n % tokens + 1 for n in group.cached(op.i)])
        opened = _segment(self._blocks(self._open[op.j, op.k], group.size), lens)
        return [*self._full_segment(op, slot), opened]

    def _full_segment(self, op: Op, slot: Tensor | None) -> list[Segment]:
        group, full = self._plan.groups[op.k].cache.disk, self._full(op)
        if not _most(full):
            return []
        assert slot is not None
        tokens = [n * self._layout.block_tokens for n in self._live(op.k, group, full)]
        lens = self._valid((op.i, op.k, group.first, 2), tokens)
        return [_segment(self._blocks(self._split(op, slot, _most(full), 0)[0], group.size), lens)]

    def _staged(self, op: Op, slot: Tensor | None, out: Tensor | None) -> list[tuple[Group, list[Segment]]]:
        """Host and disk sequences from the device's ring; the new token is a segment of its own."""
        _, _, host, disk = self._plan.groups[op.k].cache
        if out is None:
            return []
        if slot is None:  # all of them have ended, and attend to their newest token
            new = self._tokens(out, host.size + disk.size)
            return [(group, [self._newest(op, group, new)]) for group in (host, disk) if group.size]
        full, used, tokens = self._full(op), self._used(op), self._layout.block_tokens
        _, opened, hosted = self._split(op, slot, _most(full), _most(used), self._plan.host_halves)
        new = self._tokens(out, host.size + disk.size)
        found: list[tuple[Group, list[Segment]]] = []
        if host.size:
            lens = self._valid((op.i, op.k, host.first, 3), self.cached(op, host))
            earlier = self._host_segment(op, hosted, lens, _most(used))
            found.append((host, [earlier, self._newest(op, host, new)]))
        if disk.size:
            lens = self._valid((op.i, op.k, disk.first, 4), [n % tokens for n in disk.cached(op.i)])
            at_open = _segment(self._blocks(opened, disk.size), lens)
            found.append((disk, [*self._full_segment(op, slot), at_open, self._newest(op, disk, new)]))
        return found

    def _host_segment(self, op: Op, hosted: Tensor, lens: Tensor, blocks: int) -> Segment:
        """What the device was sent of the host's sequences; V from its home where only K was."""
        size = len(lens)
        if self._plan.host_halves == 2:
            return _segment(self._blocks(hosted, size), lens)
        home = self._blocks(self._host[op.j, op.k], size)
        return Segment(self._keys(hosted, size), _half([field[:blocks] for field in home], 1), lens)

    def _newest(self, op: Op, group: Group, new: Fields) -> Segment:
        first = group.first - self._plan.groups[op.k].cache.host.first
        ones = self._valid((op.i, op.k, group.first, 5), [1] * group.size)
        return _segment([field[:, first : first + group.size] for field in new], ones)


def _half(fields: Sequence[Tensor], number: int) -> Fields:
    """K (0) or V (1) of fields [blocks, n, halves, ...]."""
    return tuple(field[:, :, number] for field in fields)


def _segment(fields: Sequence[Tensor], lens: Tensor, blocks: int | None = None) -> Segment:
    """The first blocks of fields of K and V."""
    fields = [field[:blocks] for field in fields]
    return Segment(_half(fields, 0), _half(fields, 1), lens)


def append_tokens(fields: Fields, positions: Sequence[int], new: Sequence[Tensor]) -> None:
    """Write one token of every sequence, [n, 2, Hkv, width] by field, at its position."""
    tokens = fields[0].shape[4]
    at = torch.tensor(positions, device=fields[0].device)
    sequences = torch.arange(len(at), device=at.device)
    for field, rows in zip(fields, new, strict=True):
        if len(set(positions)) == 1:
            field[positions[0] // tokens, :, :, :, positions[0] % tokens] = rows
        else:
            field[at // tokens, sequences, :, :, at % tokens] = rows
