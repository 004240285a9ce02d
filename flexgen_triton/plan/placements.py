"""Placements of a whole model's bundles, of which most are alike: the same but for names, and for places in files.

One of those that are alike is placed and costed for all of them; a bundle's own files and names are worked out when a
run asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields
from functools import cache, lru_cache
from operator import attrgetter

from .placement import Extent, LayerPlacement, packed_module, place_layer
from .spec import Bundle, ModelSpec, ModuleSpec, StageSpec, TensorSpec

Extents = Mapping[str, Sequence[Extent]]  # by module
Cuts = tuple[float, float]  # per cent of a bundle's bytes on the GPU and on the host

_of_tensor = attrgetter(*(f.name for f in fields(TensorSpec) if f.name not in ("name", "sources")))
_of_stage = attrgetter(*(f.name for f in fields(StageSpec) if f.name != "tensors"))


class Placements:
    """Each tier's share of every bundle, and of the tables that are looked up, which are never streamed."""

    def __init__(self, model: ModelSpec, sep_layer: bool, cuts: Cuts, align: int, extents: Extents | None) -> None:
        """Place the weights where `extents` say they are stored; without, as a store of our own would hold them."""
        self.bundles: tuple[Bundle, ...] = model.bundles(sep_layer)
        self._cuts, self._align = cuts, align
        self._gathered = {t.name for m in model.modules for t in m.tensors if t.gathered}
        self._extents_of = _packed(model) if extents is None else lambda m: extents[m.name]
        relative = self._which_stream if extents is None else self._relative
        firsts: dict[Hashable, int] = {}
        self.first_alike: tuple[int, ...] = tuple(  # of each bundle, the first that is like it
            firsts.setdefault((_without_names(bundle), relative(bundle)), n) for n, bundle in enumerate(self.bundles)
        )
        looked_up = [m for m in model.modules if any(t.name in self._gathered for t in m.tensors)]
        tables = [e for m in looked_up for e in self._extents_of(m) if e.tensor in self._gathered]
        self.tables: LayerPlacement = place_layer(tables, *cuts, align)
        self.place = cache(self._place)

    def _place(self, n: int) -> LayerPlacement:
        return place_layer(self._streamed(self.bundles[n]), *self._cuts, self._align)

    def _streamed(self, bundle: Bundle) -> list[Extent]:
        return [e for m in bundle.modules for e in self._extents_of(m) if e.tensor not in self._gathered]

    def _which_stream(self, bundle: Bundle) -> Hashable:
        """All that a placement in a store of our own depends on beside the tensors' shapes."""
        return tuple(t.name in self._gathered for t in bundle.tensors)

    def _relative(self, bundle: Bundle) -> Hashable:
        """Everything that a placement depends on: the places of rows, from the aligned one before the first."""
        starts: dict[int, tuple[int, int]] = {}  # of each file: its number here, and where the first read may begin
        found = []
        for e in sorted(self._streamed(bundle), key=lambda e: (e.file, e.offset)):
            number, start = starts.setdefault(e.file, (len(starts), e.offset // self._align * self._align))
            found.append((e.row, e.rows, e.row_bytes, number, e.offset - start))
        return tuple(found)


@lru_cache(maxsize=64)
def packed_placements(model: ModelSpec, sep_layer: bool, cuts: Cuts, align: int) -> Placements:
    """Placements in a store of our own; a search asks for the same few again and again."""
    return Placements(model, sep_layer, cuts, align, None)


def _packed(model: ModelSpec) -> Callable[[ModuleSpec], Sequence[Extent]]:
    files = {m.name: file for file, m in enumerate(model.modules)}
    return lambda module: packed_module(module, files[module.name])


def _without_names(bundle: Bundle) -> Hashable:
    """Everything that a bundle's placement and costs depend on."""
    return tuple((_of_stage(s), tuple(map(_of_tensor, s.tensors))) for s in bundle.stages)
