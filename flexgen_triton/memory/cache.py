"""The KV cache of one block of the schedule, over three tiers by sequences.

Layout on every tier, `[blocks, sequences, chunk]`, a chunk being K and V of one block of tokens of one sequence,
`[2, KV heads, tokens, head_dim]` (plan/layout.py). On disk only full blocks are kept; the open one stays on the host.
Attention is handed lists of segments; it never asks which tier they came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor

from ..plan.layout import Group, block_runs
from ..plan.plan import Plan
from ..plan.schedule import Op
from .buffers import Buffers
from .disk import DiskFile, DiskQueue, Read, Write

Home = tuple[int, int]  # layer, GPU batch
Segment = tuple[Tensor, Tensor]  # K and V [blocks, n, 2, Hkv, tokens, D], valid tokens of each sequence [n]


def _most(counts: Sequence[int]) -> int:
    return max(counts, default=0)


class Cache:
    """Homes of K and V for every layer and GPU batch of a plan, and the transfers between them and attention."""

    def __init__(self, plan: Plan, buffers: Buffers, disk: DiskQueue, dtype: torch.dtype) -> None:
        self._plan, self._buffers, self._disk, self._dtype = plan, buffers, disk, dtype
        self._layout = plan.cache_layout
        self._gpu: dict[Home, Tensor] = {}  # uint8, dense
        self._host: dict[Home, Tensor] = {}
        self._open: dict[Home, Tensor] = {}  # the open blocks of the disk's sequences
        self._offsets: dict[Home, int] = {}  # in the scratch file
        self._lens: dict[tuple[int, ...], Tensor] = {}
        for j, layer in enumerate(plan.layers):
            for k in range(len(plan.groups) if layer.has_cache else 0):
                self._make_home((j, k))

    def _make_home(self, home: Home) -> None:
        layout, k = self._layout, home[1]
        blocks = self._plan.cache_home_blocks(k)
        gpu, host, disk = self._plan.groups[k].cache
        self._gpu[home] = self._buffers.gpu.take(layout.dense(blocks, gpu.size))
        self._host[home] = self._buffers.host.take(layout.dense(blocks, host.size))
        self._open[home] = self._buffers.host.take(layout.dense(1, disk.size))
        full = layout.full(self._plan.workload.batches[k].max_len)
        self._offsets[home] = self._buffers.take_scratch(layout.dense(full, disk.size))

    # Views

    def _chunks(self, buffer: Tensor, size: int) -> Tensor:
        """Dense uint8 blocks of `size` > 0 sequences as [blocks, size, 2, Hkv, tokens, D]."""
        layout = self._layout
        shape = (2, layout.num_kv_heads, layout.block_tokens, layout.head_dim)
        wide = buffer.view(self._dtype).view(-1, size, layout.stride // layout.itemsize)
        chunk = wide[..., : layout.token_bytes * layout.block_tokens // layout.itemsize]
        return chunk.view(len(wide), size, *shape)

    def _split(self, buffer: Tensor, *parts: tuple[int, Group]) -> list[Tensor]:
        """Cut a slot into dense ranges of (blocks, group)."""
        cuts, at = [], 0
        for blocks, group in parts:
            end = at + self._layout.dense(blocks, group.size)
            cuts.append(buffer[at:end])
            at = end
        return cuts

    def _valid(self, tag: tuple[int, ...], counts: Sequence[int]) -> Tensor:
        """Token counts as a tensor on the device, made once per token step."""
        if tag not in self._lens:
            self._lens[tag] = torch.tensor(counts, device=self._buffers.device)
        return self._lens[tag]

    def start_step(self) -> None:
        """Forget what was kept for the last token step."""
        self._lens.clear()

    def _full(self, op: Op) -> list[int]:
        """Full blocks, before this token step, of each of the disk's sequences."""
        return [self._layout.full(n) for n in self._plan.groups[op.k].cache[2].cached(op.i)]

    def _used(self, op: Op) -> list[int]:
        """Blocks in use, before this token step, by each of the host's sequences."""
        return [self._layout.blocks(n) for n in self._plan.groups[op.k].cache[1].cached(op.i)]

    # Transfers

    def _disk_ranges(self, home: Home, counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(offset in the scratch file, start, end in a dense slot) of the blocks that sequences have."""
        row = len(counts) * self._layout.stride
        for block, n in block_runs(counts):
            low = block * row
            yield self._offsets[home] + low, low, low + n * self._layout.stride

    @property
    def _file(self) -> DiskFile:
        assert self._buffers.scratch is not None
        return self._buffers.scratch

    def read(self, op: Op, into: Tensor) -> None:
        """disk_in: the disk's full blocks, dense, to the start of `into`."""
        ranges = self._disk_ranges((op.j, op.k), self._full(op))
        self._disk.read([Read(self._file, at, into[low:high]) for at, low, high in ranges])

    def load(self, op: Op, staged: Tensor | None, into: Tensor) -> None:
        """h2d: staged full blocks, open blocks and the host's blocks, to a slot of the device's cache ring."""
        _, host, disk = self._plan.groups[op.k].cache
        full, used = self._full(op), self._used(op)
        blocks, opened, hosted = self._split(
            into, (max(full, default=0), disk), (1, disk), (max(used, default=0), host)
        )
        if staged is not None:
            self._copy_blocks(staged, blocks, full)
        opened.copy_(self._open[op.j, op.k], non_blocking=True)
        self._copy_blocks(self._host[op.j, op.k], hosted, used)

    def _copy_blocks(self, source: Tensor, target: Tensor, counts: Sequence[int]) -> None:
        """Copy the blocks that sequences have between dense ranges; one copy where every sequence has them all."""
        stride = self._layout.stride
        row = len(counts) * stride
        for n, run in groupby(block_runs(counts), key=lambda block: block[1]):
            blocks = [b for b, _ in run]
            low, high = blocks[0] * row, (blocks[-1] + 1) * row
            if n == len(counts):
                target[low:high].copy_(source[low:high], non_blocking=True)
                continue
            for at in range(low, high, row):
                target[at : at + n * stride].copy_(source[at : at + n * stride], non_blocking=True)

    def store(self, op: Op, out: Tensor, staged: Tensor | None) -> None:
        """d2h: what attention handed over, to the host's homes and to a staging slot on the way to disk."""
        if op.i == 0:
            self._store_prompt(op, out, staged)
        else:
            self._store_token(op, out)

    def _store_prompt(self, op: Op, out: Tensor, staged: Tensor | None) -> None:
        _, host, disk = self._plan.groups[op.k].cache
        full = [self._layout.full(n) for n in disk.prompt_lens]
        used = [self._layout.blocks(n) for n in host.prompt_lens]
        blocks, opened, hosted = self._split(out, (_most(full), disk), (1, disk), (_most(used), host))
        if staged is not None:
            self._copy_blocks(blocks, staged, full)
        self._open[op.j, op.k].copy_(opened, non_blocking=True)
        self._copy_blocks(hosted, self._host[op.j, op.k], used)

    def _store_token(self, op: Op, out: Tensor) -> None:
        _, host, disk = self._plan.groups[op.k].cache
        new = self._tokens(out, host.size + disk.size).cpu()
        self._append(self._host[op.j, op.k], host, host.cached(op.i), new[: host.size])
        opened = [n % self._layout.block_tokens for n in disk.cached(op.i)]
        self._append(self._open[op.j, op.k], disk, opened, new[host.size :])

    def write(self, op: Op, staged: Tensor | None) -> None:
        """disk_out: prefill's full blocks from `staged`, or the open blocks that this token step has filled."""
        home, layout = (op.j, op.k), self._layout
        disk = self._plan.groups[op.k].cache[2]
        if staged is not None:
            ranges = self._disk_ranges(home, [layout.full(n) for n in disk.prompt_lens])
            self._disk.write([Write(self._file, at, staged[low:high]) for at, low, high in ranges])
            return
        filled = [(layout.full(n), s) for s, n in enumerate(disk.cached(op.i)) if (n + 1) % layout.block_tokens == 0]
        requests = []
        for _, run in groupby(enumerate(filled), key=lambda e: (e[1][0], e[1][1] - e[0])):
            neighbours = [entry for _, entry in run]
            block, first = neighbours[0]
            low, high = first * layout.stride, (first + len(neighbours)) * layout.stride
            at = self._offsets[home] + block * disk.size * layout.stride + low
            requests.append(Write(self._file, at, self._open[home][low:high]))
        self._disk.write(requests)

    # What attention reads and writes

    def put_prompt(self, op: Op, k: Tensor, v: Tensor, out: Tensor | None) -> None:
        """After prefill: packed K and V [T, Hkv, D] to resident homes and, for the rest, to the slot `out`."""
        gpu, host, disk = self._plan.groups[op.k].cache
        home, layout = (op.j, op.k), self._layout
        if self._plan.workload.batches[op.k].new_tokens == 1:
            return
        cuts = (0, gpu.tokens(0), gpu.tokens(0) + host.tokens(0), len(k))
        packed = [(k[a:b], v[a:b]) for a, b in pairwise(cuts)]
        full = max((layout.full(n) for n in disk.prompt_lens), default=0)
        opened, hosted = self._open[home], self._host[home]
        blocks: Tensor | None = None
        if self._plan.copies and out is not None:
            used = max((layout.blocks(n) for n in host.prompt_lens), default=0)
            blocks, opened, hosted = self._split(out, (full, disk), (1, disk), (used, host))
        elif out is not None:
            blocks = self._split(out, (full, disk))[0]
        self._scatter_prompt(self._gpu[home], gpu, *packed[0])
        self._scatter_prompt(hosted, host, *packed[1])
        self._scatter_prompt_to_disk(blocks, opened, disk, *packed[2])

    def _runs(self, group: Group) -> Iterator[tuple[int, int, int, int]]:
        """(first sequence, sequences, tokens each, first packed row) of the runs of equal prompt length."""
        first = at = 0
        for length, same in groupby(group.prompt_lens):
            n = len(list(same))
            yield first, n, length, at
            first, at = first + n, at + n * length

    def _scatter_prompt(self, buffer: Tensor, group: Group, k: Tensor, v: Tensor) -> None:
        if not group.size:
            return
        home, tokens = self._chunks(buffer, group.size), self._layout.block_tokens
        for first, n, length, at in self._runs(group):
            for c, packed in enumerate((k, v)):
                rows = (
                    packed[at : at + n * length].reshape(n, length, *packed.shape[1:]).transpose(1, 2)
                )  # [n, Hkv, L, D]
                for low in range(0, length, tokens):
                    piece = rows[:, :, low : low + tokens]
                    home[low // tokens, first : first + n, c, :, : piece.shape[2]] = piece

    def _scatter_prompt_to_disk(
        self, blocks: Tensor | None, opened: Tensor, group: Group, k: Tensor, v: Tensor
    ) -> None:
        if not group.size:
            return
        tokens = self._layout.block_tokens
        home = self._chunks(opened, group.size)[0]
        dense = self._chunks(blocks, group.size) if blocks is not None and len(blocks) else None
        for first, n, length, at in self._runs(group):
            for c, packed in enumerate((k, v)):
                rows = packed[at : at + n * length].reshape(n, length, *packed.shape[1:]).transpose(1, 2)
                for b in range(length // tokens):
                    assert dense is not None
                    dense[b, first : first + n, c] = rows[:, :, b * tokens : (b + 1) * tokens]
                rest = rows[:, :, length // tokens * tokens :]
                home[first : first + n, c, :, : rest.shape[2]] = rest

    def put_token(
        self, op: Op, k: Tensor, v: Tensor, slot: Tensor | None, out: Tensor | None
    ) -> list[tuple[Group, list[Segment]]]:
        """In decode: append K and V [B, Hkv, D] and return, per group of sequences, what attention must read.

        `slot` is this block's slot of the cache ring, `out` its slot on the way to the host.
        """
        gpu, host, disk = self._plan.groups[op.k].cache
        new = torch.stack((k, v), 1)  # [B, 2, Hkv, D]
        if out is not None:
            self._tokens(out, host.size + disk.size).copy_(new[gpu.size :])
        segments = [(gpu, self._resident(op, self._gpu, gpu, new))]
        if self._plan.copies:
            segments += self._staged(op, slot, new)
        else:
            segments += [(host, self._resident(op, self._host, host, new)), (disk, self._in_place(op, slot, new))]
        return [(group, found) for group, found in segments if group.size]

    def _tokens(self, buffer: Tensor, size: int) -> Tensor:
        """A slot of new tokens as [size, 2, Hkv, D]."""
        layout = self._layout
        shape = (size, 2, layout.num_kv_heads, layout.head_dim)
        return buffer[: size * layout.token_bytes].view(self._dtype).view(shape)

    def _append(self, buffer: Tensor, group: Group, positions: Sequence[int], new: Tensor) -> None:
        """Write new [n, 2, Hkv, D] at each sequence's position of a dense home."""
        if not group.size:
            return
        home, tokens = self._chunks(buffer, group.size), self._layout.block_tokens
        if len(set(positions)) == 1:
            home[positions[0] // tokens, :, :, :, positions[0] % tokens] = new
            return
        at = torch.tensor(positions, device=buffer.device)
        home[at // tokens, torch.arange(group.size, device=buffer.device), :, :, at % tokens] = new

    def _resident(self, op: Op, homes: dict[Home, Tensor], group: Group, new: Tensor) -> list[Segment]:
        if not group.size:
            return []
        cached, buffer = group.cached(op.i), homes[op.j, op.k]
        self._append(buffer, group, cached, new[group.first : group.stop])
        blocks = self._layout.blocks(cached[0] + 1)
        lens = self._valid((op.i, op.k, group.first, 0), [n + 1 for n in cached])
        return [(self._chunks(buffer, group.size)[:blocks], lens)]

    def _in_place(self, op: Op, slot: Tensor | None, new: Tensor) -> list[Segment]:
        """The disk's sequences where host memory is the device's: full blocks from the ring, the open one at home."""
        group, tokens = self._plan.groups[op.k].cache[2], self._layout.block_tokens
        if not group.size:
            return []
        opened = [n % tokens for n in group.cached(op.i)]
        buffer = self._open[op.j, op.k]
        self._append(buffer, group, opened, new[group.first :])
        lens = self._valid((op.i, op.k, group.first, 1), [n + 1 for n in opened])
        return [*self._full_segment(op, slot), (self._chunks(buffer, group.size), lens)]

    def _full_segment(self, op: Op, slot: Tensor | None) -> list[Segment]:
        group, full = self._plan.groups[op.k].cache[2], self._full(op)
        if not max(full, default=0):
            return []
        assert slot is not None
        lens = self._valid((op.i, op.k, group.first, 2), [n * self._layout.block_tokens for n in full])
        return [(self._chunks(self._split(slot, (full[0], group))[0], group.size), lens)]

    def _staged(self, op: Op, slot: Tensor | None, new: Tensor) -> list[tuple[Group, list[Segment]]]:
        """Host and disk sequences from the device's ring; the new token is a segment of its own."""
        _, host, disk = self._plan.groups[op.k].cache
        if slot is None:
            return []
        full, used, tokens = self._full(op), self._used(op), self._layout.block_tokens
        _, opened, hosted = self._split(slot, (_most(full), disk), (1, disk), (_most(used), host))
        found: list[tuple[Group, list[Segment]]] = []
        if host.size:
            lens = self._valid((op.i, op.k, host.first, 3), host.cached(op.i))
            found.append((host, [(self._chunks(hosted, host.size), lens), self._new_segment(op, host, new)]))
        if disk.size:
            lens = self._valid((op.i, op.k, disk.first, 4), [n % tokens for n in disk.cached(op.i)])
            at_open = (self._chunks(opened, disk.size), lens)
            found.append((disk, [*self._full_segment(op, slot), at_open, self._new_segment(op, disk, new)]))
        return found

    def _new_segment(self, op: Op, group: Group, new: Tensor) -> Segment:
        ones = self._valid((op.i, op.k, group.first, 5), [1] * group.size)
        return new[group.first : group.stop].unsqueeze(3).unsqueeze(0), ones
