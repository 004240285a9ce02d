"""The weights of a model over three tiers: what stays is loaded once, the rest streams through rings.

Moves bytes and hands out views of them by name; does not know what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..plan.placement import LayerPlacement, Run, Segment, Share
from ..plan.plan import Plan
from ..plan.traffic import Part
from .arena import Arena
from .device import current_stream
from .disk import DiskQueue
from .scratch import Scratch, Uploads
from .store import Store
from .store_files import StoreFiles

LOAD_CHUNK = 64 << 20
BOUNCE_BYTES = 8 << 20

Place = Tensor | tuple[int, int, int]  # resident rows, or file, offset and bytes per row
Lookup = dict[str, list[tuple[int, int, Place]]]  # tensor name -> (first row, rows, place)
Ids = npt.NDArray[np.int64]
Segments = dict[str, list[tuple[int, Tensor]]]  # tensor name -> (first row, [rows, columns])


class Weights:
    """Resident shares on the GPU and the host, and access to the disk's share.

    `progress(done, total)` is told as resident bytes are loaded; `bytes_loaded` counts them.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        disk: DiskQueue,
        *,
        device: torch.device,
        dtype: torch.dtype,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._dtype, self._device = dtype, device
        self._dtypes = {t.name: getattr(torch, t.dtype) for bundle in plan.bundles for t in bundle.tensors}
        self._placements, self._tables, self._copies = plan.placements, plan.tables, plan.host_is_apart
        pin = device.type == "cuda" and plan.policy.pin_weight
        cpu, on_gpu = torch.device("cpu"), device.type == "cuda"
        self.bytes_loaded = 0
        self._resident: list[tuple[Tensor, Tensor]] = []
        with ExitStack() as opened:
            self._files = opened.enter_context(StoreFiles(store, disk))
            self._gpu = opened.enter_context(Arena("gpu weights", sum(p.gpu.nbytes for p in self._all()), device))
            host_bytes = sum(p.host.nbytes for p in self._all())
            self._host = opened.enter_context(Arena("host weights", host_bytes, cpu, pin=pin))
            bounce_bytes = BOUNCE_BYTES if on_gpu and not pin else 0
            self._bounce = opened.enter_context(Arena("bounce", bounce_bytes, cpu, pin=True))
            opened.callback(self._resident.clear)  # views keep the memory
            self.gpu_bytes, self.host_bytes = self._gpu.nbytes, self._host.nbytes
            with Arena("load staging", LOAD_CHUNK if on_gpu else 0, cpu, pin=True) as staging:
                self._resident += [self._load_resident(p, staging.buffer, progress) for p in self._all()]
            self._opened = opened.pop_all()
        self._lookup = self._build_lookup()

    def check(self) -> None:
        """Raise StoreError if anything of the store was ever found wrong, or its files are no longer those opened."""
        self._files.check()

    def _all(self) -> Sequence[LayerPlacement]:
        return (*self._placements, self._tables)

    # Loading what stays

    def _load_resident(
        self, placement: LayerPlacement, staging: Tensor, progress: Callable[[int, int], None] | None
    ) -> tuple[Tensor, Tensor]:
        gpu, host = self._gpu.take(placement.gpu.nbytes), self._host.take(placement.host.nbytes)
        total = sum(p.gpu.nbytes + p.host.nbytes for p in self._all())
        for share, buffer in ((placement.gpu, gpu), (placement.host, host)):
            for run in share.runs:
                for piece in _pieces(run, LOAD_CHUNK):
                    self._load_piece(piece, buffer, staging)
                    self.bytes_loaded += piece.nbytes
                    if progress:
                        progress(self.bytes_loaded, total)
        return gpu, host

    def _load_piece(self, run: Run, buffer: Tensor, staging: Tensor) -> None:
        target = buffer[run.at : run.at + run.nbytes]
        if target.device.type == "cpu":
            self._files.read([(run, target)])
            return
        staged = staging[: run.nbytes]
        self._files.read([(run, staged)])
        target.copy_(staged)

    # Streaming

    def read(self, part: Part, into: Tensor, *, staged: bool) -> None:
        """Read a part's share of the disk: into its place in a layer's slot, or to the start of a staging slot."""
        first = part.disk[0].at if part.disk and staged else 0
        self._files.read([(r, into[r.at - first : r.at - first + r.nbytes]) for r in part.disk])

    def load(self, j: int, part: Part, staged: Tensor | None, into: Tensor) -> None:
        """Copy a part from its staging slot and from the host's resident share to layer j's slot on the device."""
        if staged is not None and part.disk:
            at, nbytes = part.disk[0].at, part.disk_bytes
            into[at : at + nbytes].copy_(staged[:nbytes], non_blocking=True)
        if part.host_bytes:
            base = self._placements[j].disk.nbytes + part.host_at
            source = self._resident[j][1][part.host_at : part.host_at + part.host_bytes]
            self._copy(source, into[base : base + part.host_bytes])

    def _copy(self, source: Tensor, target: Tensor) -> None:
        if not self._bounce.nbytes:
            target.copy_(source, non_blocking=True)
            return
        for low in range(0, len(source), BOUNCE_BYTES):  # pageable: through a pinned buffer
            piece = source[low : low + BOUNCE_BYTES]
            staged = self._bounce.buffer[: len(piece)]
            current_stream(self._device).synchronize()
            staged.copy_(piece)
            target[low : low + len(piece)].copy_(staged, non_blocking=True)

    # Views

    def view(self, j: int, streamed: Tensor | None) -> Segments:
        """Layer j's tensors by name: views of the resident shares and of the streamed one's slot."""
        placement, (gpu, host) = self._placements[j], self._resident[j]
        found: Segments = {}
        self._add_views(found, placement.gpu, gpu)
        if not self._copies:
            self._add_views(found, placement.host, host)
        if streamed is not None:
            self._add_views(found, placement.disk, streamed)
            if self._copies:
                self._add_views(found, placement.host, streamed[placement.disk.nbytes :])
        return found

    def _add_views(self, found: Segments, share: Share, buffer: Tensor) -> None:
        for segment in share.segments:
            found.setdefault(segment.tensor, []).append((segment.row, self._typed(buffer, segment)))

    def _typed(self, buffer: Tensor, s: Segment) -> Tensor:
        return buffer[s.at : s.at + s.rows * s.row_bytes].view(self._dtypes[s.tensor]).view(s.rows, -1)

    # Looking rows up

    def _build_lookup(self) -> Lookup:
        """List (first row, rows, resident view or place on disk) of every tensor's pieces, for `rows`."""
        lookup: Lookup = {}
        for placement, (gpu, host) in zip(self._all(), self._resident, strict=True):
            for share, buffer in ((placement.gpu, gpu), (placement.host, host)):
                for s in share.segments:
                    lookup.setdefault(s.tensor, []).append((s.row, s.rows, self._typed(buffer, s)))
            for e in placement.disk.extents:
                lookup.setdefault(e.tensor, []).append((e.row, e.rows, (e.file, e.offset, e.row_bytes)))
        return lookup

    def rows(self, tensor: str, ids: Ids, scratch: Scratch, uploads: Uploads) -> Tensor:
        """Rows `ids` [T] of a table, gathered where they lie: [T, width] on the device, from `scratch`."""
        distinct, where = np.unique(ids, return_inverse=True)  # a position is the same row for every sequence
        width = _width(self._lookup[tensor][0][2], self._dtype)
        found = scratch.take(len(distinct), width, dtype=self._dtype)
        missing = len(distinct)
        for first, count, place in self._lookup[tensor]:
            low, high = np.searchsorted(distinct, (first, first + count))
            if low < high:
                self._gather(place, distinct[low:high] - first, found[low:high], uploads)
                missing -= high - low
        assert not missing, f"{missing} rows of {tensor} are nowhere, of ids {distinct}"
        out = scratch.take(len(ids), width, dtype=self._dtype)
        return torch.index_select(found, 0, uploads.numbers(where, torch.int64), out=out)

    def _gather(self, place: Place, local: Ids, into: Tensor, uploads: Uploads) -> None:
        """Rows `local` of one place, to the device."""
        if isinstance(place, Tensor) and place.device == into.device:
            torch.index_select(place, 0, uploads.numbers(local, torch.int64), out=into)
            return
        on_host = into if into.device.type == "cpu" else uploads.take(*into.shape, dtype=into.dtype)
        if isinstance(place, Tensor):
            torch.index_select(place, 0, torch.from_numpy(local), out=on_host)
        else:
            file, offset, row_bytes = place
            self._files.read_rows(
                file, [offset + r * row_bytes for r in local.tolist()], row_bytes, on_host.view(torch.uint8)
            )
        if on_host is not into:
            into.copy_(on_host, non_blocking=True)

    def close(self) -> None:
        self._lookup.clear()
        self._opened.close()


def _width(place: Place, dtype: torch.dtype) -> int:
    return place.shape[1] if isinstance(place, Tensor) else place[2] // dtype.itemsize


def _pieces(run: Run, limit: int) -> list[Run]:
    return [
        Run(run.file, run.offset + low, min(limit, run.nbytes - low), run.at + low)
        for low in range(0, run.nbytes, limit)
    ]
