"""The search through the weights, as they lie in the store, for the reason why logits are no numbers.

Reads a piece at a time and stops at the first tensor that explains it. Needs no engine and next to no memory.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from ..kernels.sizes import BLOCK_ROWS
from ..memory.store import Store
from ..plan.placement import Extent
from ..plan.spec import ModelSpec, TensorSpec

PIECE_BYTES = 8 << 20
ABSURD = 1e4  # no weight of a trained model is nearly as large
AGAIN = "the checkpoint is damaged; download it again"


def diagnose(spec: ModelSpec, store: Store, told: Callable[[], object] = lambda: None) -> str:
    """A sentence on what the model's weights have to do with logits that are not finite.

    `told` is called with every piece that is read; it may raise.
    """
    largest, where = 0.0, "any of them"
    try:
        for piece in _pieces(spec, store):
            told()
            size = piece.size
            if not size < torch.inf:
                return f"{_damage(spec, store, piece.tensor)}: {AGAIN}"
            if size > largest:
                largest, where = size, piece.source(piece.place_of_largest)
    except OSError as error:
        return f"the weights cannot be looked through for the cause ({error})"
    if largest > ABSURD:
        return f"{where} holds {largest:.6g}, and no trained model has a weight over {ABSURD:g}: {AGAIN}"
    return f"the weights are finite, none larger than {largest:.3g} ({where}), so {_overflow(spec.dtype)}"


def _overflow(dtype: str) -> str:
    if dtype == "float16":
        return "hidden states outgrew float16, which ends at 65504: run it with dtype bfloat16 or float32"
    more = ": run it with dtype float32" if dtype != "float32" else ""
    return f"hidden states outgrew {dtype}{more}, or are not what its config.json says"


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some numbers of a tensor, [n]; `first` is the place of the first one in the extent that they lie in."""

    tensor: TensorSpec
    extent: Extent
    first: int
    numbers: Tensor

    @property
    def size(self) -> float:
        """The largest, whatever its sign; not a number where one is not."""
        low, high = self.numbers.amin(), self.numbers.amax()
        return float(torch.maximum(-low, high))

    @property
    def place_of_largest(self) -> int:
        return int(self.numbers.abs().argmax())

    def source(self, place: int) -> str:
        """The checkpoint's name of the tensor that one of the numbers comes from."""
        t, ends = self.tensor, list(accumulate(self.tensor.source_rows))
        row = self._row(self.first + place) - t.row
        return t.sources[min(bisect_right(ends, row), len(ends) - 1)]  # what fills up the last block is the last one's

    def _row(self, place: int) -> int:
        t, first = self.tensor, self.extent.row
        if len(t.shape) == 1:
            return first + place
        row = first + place // prod(t.shape[1:])
        return row if t.packed is None else row * BLOCK_ROWS + place % BLOCK_ROWS


def _pieces(spec: ModelSpec, store: Store) -> Iterator[_Piece]:
    """Yield all numbers of the model; of 4-bit matrices the scales and minima, for every code is a number."""
    for module in spec.modules:
        for tensor in module.tensors:
            if tensor.packed is None or tensor.part == tensor.packed.format.numbers_part:
                for extent in store.extents[module.name]:
                    if extent.tensor == tensor.name:
                        yield from _read(store, tensor, extent)


def _read(store: Store, tensor: TensorSpec, extent: Extent) -> Iterator[_Piece]:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    with store.files[extent.file].open("rb", buffering=0) as file:
        for at in range(extent.offset, extent.end, PIECE_BYTES):
            data = os.pread(file.fileno(), min(PIECE_BYTES, extent.end - at), at)
            whole = len(data) // dtype.itemsize * dtype.itemsize  # less than asked for where the file was cut off
            if whole:
                numbers = torch.frombuffer(bytearray(data[:whole]), dtype=dtype).float()
                yield _Piece(tensor, extent, (at - extent.offset) // dtype.itemsize, numbers)


def _damage(spec: ModelSpec, store: Store, tensor: TensorSpec) -> str:
    """Counts of a tensor's numbers that are not finite, by the checkpoint's names."""
    nans: Counter[str] = Counter()
    infinite: Counter[str] = Counter()
    for piece in _pieces(spec, store):
        if piece.tensor is tensor:
            for place in piece.numbers.isfinite().logical_not_().nonzero().flatten().tolist():
                (nans if piece.numbers[place].isnan() else infinite)[piece.source(place)] += 1
    return "; ".join(_count(name, nans[name], infinite[name], tensor) for name in {**nans, **infinite})


def _count(name: str, nans: int, infinite: int, tensor: TensorSpec) -> str:
    kinds = [f"{count} {kind}" for count, kind in ((nans, "NaN"), (infinite, "infinite")) if count]
    what = "value" if tensor.packed is None else "scale or minimum of a 4-bit group"
    many = "values" if tensor.packed is None else "scales or minima of 4-bit groups"
    return f"{name} holds {' and '.join(kinds)} {what if nans + infinite == 1 else many}"
