"""The place of every byte of the weights: on disk, and the share of each layer that stays on each tier.

A layer's bytes have one order, that of its file. Two cuts, each at a row boundary, divide them into the GPU's share,
the host's and the disk's, so each share is one contiguous range (DESIGN: placement is byte-exact). A share is read as
few aligned runs of the file and kept exactly as read; tensors are views into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise

from .spec import ModuleSpec, TensorSpec

ALIGN = 4096  # of what is read past the page cache, and of buffers
STORE_ALIGN = 256 << 10  # that a store of our own is read at multiples of: it has a checksum for each


class Tier(Enum):
    """A memory that holds weights, cache and hidden states."""

    GPU = "gpu"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Extent:
    """Rows (along the first dimension) of one tensor as consecutive bytes of one file. A vector is a single row."""

    tensor: str
    row: int
    rows: int
    row_bytes: int
    file: int  # index into the store's files
    offset: int  # in that file

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def split(self, rows: int) -> tuple[Extent, Extent]:
        """The first `rows` rows and the others."""
        head = replace(self, rows=rows)
        return head, replace(self, row=self.row + rows, rows=self.rows - rows, offset=head.end)


@dataclass(frozen=True, slots=True)
class Run:
    """An aligned range of a file and where its first byte lands in the buffer that holds it."""

    file: int
    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of one tensor as a view of a share's buffer, starting at byte `at`."""

    tensor: str
    row: int
    rows: int
    row_bytes: int
    at: int


@dataclass(frozen=True, slots=True)
class Share:
    """One tier's part of a layer: the file ranges it is read from and the views that lie in it."""

    extents: tuple[Extent, ...]
    runs: tuple[Run, ...]
    segments: tuple[Segment, ...]
    useful: int  # bytes of weights
    nbytes: int  # bytes of buffer: the same plus alignment

    def parts(self, count: int, align: int) -> tuple[tuple[Run, ...], ...]:
        """Cut the runs into `count` sets of ranges of nearly equal bytes, cut at multiples of `align`."""
        parts: list[tuple[Run, ...]] = []
        total = sum(r.nbytes for r in self.runs)
        bounds = [total * p // count // align * align for p in range(count)] + [total]
        for low, high in pairwise(bounds):
            part, seen = [], 0
            for run in self.runs:
                a, b = max(low - seen, 0), min(high - seen, run.nbytes)
                if a < b:
                    part.append(Run(run.file, run.offset + a, b - a, run.at + a))
                seen += run.nbytes
            parts.append(tuple(part))
        return tuple(parts)


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """A layer's weights, cut over the tiers. `gathered` tensors take part in the cut but are never streamed."""

    gpu: Share
    host: Share
    disk: Share

    def share(self, tier: Tier) -> Share:
        return {Tier.GPU: self.gpu, Tier.HOST: self.host, Tier.DISK: self.disk}[tier]


def make_share(extents: Sequence[Extent], align: int) -> Share:
    """Lay extents out as few aligned runs; neighbours in the file are read together."""
    runs: list[Run] = []
    segments: list[Segment] = []
    at = 0
    for e in extents:
        low, high = e.offset // align * align, -(-e.end // align) * align
        last = runs[-1] if runs else None
        if last and last.file == e.file and last.offset <= low <= last.offset + last.nbytes:
            grown = max(last.nbytes, high - last.offset)
            at += grown - last.nbytes
            runs[-1] = replace(last, nbytes=grown)
        else:
            runs.append(Run(e.file, low, high - low, at))
            at += high - low
        segments.append(Segment(e.tensor, e.row, e.rows, e.row_bytes, runs[-1].at + e.offset - runs[-1].offset))
    return Share(tuple(extents), tuple(runs), tuple(segments), sum(e.nbytes for e in extents), at)


def cut(extents: Iterable[Extent], nbytes: float) -> tuple[list[Extent], list[Extent]]:
    """Divide extents, in order, at the row boundary nearest to `nbytes`."""
    head: list[Extent] = []
    tail: list[Extent] = []
    for e in extents:
        rows = min(e.rows, max(0, round(nbytes / e.row_bytes)))
        nbytes -= rows * e.row_bytes
        first, rest = e.split(rows)
        if first.rows:
            head.append(first)
        if rest.rows:
            nbytes = 0  # the order is the file's: nothing after a cut goes before it
            tail.append(rest)
    return head, tail


def place_layer(
    extents: Sequence[Extent], gpu_percent: float, cpu_percent: float, align: int = ALIGN
) -> LayerPlacement:
    """Cut a layer's extents, in their order, into the three tiers' shares; each cut is within one row of exact."""
    ordered = sorted(extents, key=lambda e: (e.file, e.offset))
    total = sum(e.nbytes for e in ordered)
    gpu, rest = cut(ordered, total * gpu_percent / 100)
    host, disk = cut(rest, total * (gpu_percent + cpu_percent) / 100 - sum(e.nbytes for e in gpu))
    return LayerPlacement(make_share(gpu, align), make_share(host, align), make_share(disk, align))


def whole_tensor(tensor: TensorSpec, file: int, offset: int) -> Extent:
    """A whole tensor laid out at `offset` of `file`."""
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    return Extent(tensor.name, tensor.row, rows, tensor.nbytes // rows, file, offset)


def packed_layout(modules: Sequence[ModuleSpec], header: int = ALIGN) -> list[list[Extent]]:
    """The layout of a store of our own: one file per module, its tensors one after another behind the header."""
    return [packed_module(module, file, header) for file, module in enumerate(modules)]


def packed_module(module: ModuleSpec, file: int, header: int = ALIGN) -> list[Extent]:
    """The layout of one module in its file of a store of our own."""
    offset, extents = header, []
    for tensor in module.tensors:
        extents.append(whole_tensor(tensor, file, offset))
        offset = extents[-1].end
    return extents
