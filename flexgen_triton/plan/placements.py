"""Placements of a whole model's layers, of which most are alike: the same but for names, and for where their files are.

One of the layers that are alike is placed and costed for all of them; a layer's own files and names are worked out when
a run asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields
from functools import cache, lru_cache
from operator import attrgetter

from .placement import Extent, LayerPlacement, packed_module, place_layer
from .spec import LayerSpec, ModelSpec, ModuleSpec, TensorSpec

Extents = Mapping[str, Sequence[Extent]]  # by module
Cuts = tuple[float, float]  # per cent of a layer's bytes on the GPU and on the host

_of_tensor = attrgetter(*(f.name for f in fields(TensorSpec) if f.name not in ("name", "sources")))
_of_module = attrgetter(*(f.name for f in fields(ModuleSpec) if f.name not in ("index", "tensors")))


class Placements:
    """Each tier's share of every layer, and of the tables that are looked up, which are never streamed."""

    def __init__(self, model: ModelSpec, sep_layer: bool, cuts: Cuts, align: int, extents: Extents | None) -> None:
        """Place the weights where `extents` say they are stored; without, as a store of our own would hold them."""
        self.layers: tuple[LayerSpec, ...] = model.layers(sep_layer)
        self._cuts, self._align = cuts, align
        self._gathered = {t.name for m in model.modules for t in m.tensors if t.gathered}
        self._extents_of = _packed(model) if extents is None else lambda m: extents[m.name]
        relative = self._which_stream if extents is None else self._relative
        firsts: dict[Hashable, int] = {}
        self.first_alike: tuple[int, ...] = tuple(  # of each layer, the first that is like it
            firsts.setdefault((_without_names(layer), relative(layer)), j) for j, layer in enumerate(self.layers)
        )
        looked_up = [m for m in model.modules if any(t.name in self._gathered for t in m.tensors)]
        tables = [e for m in looked_up for e in self._extents_of(m) if e.tensor in self._gathered]
        self.tables: LayerPlacement = place_layer(tables, *cuts, align)
        self.layer = cache(self._layer)

    def _layer(self, j: int) -> LayerPlacement:
        return place_layer(self._streamed(self.layers[j]), *self._cuts, self._align)

    def _streamed(self, layer: LayerSpec) -> list[Extent]:
        return [e for m in layer.modules for e in self._extents_of(m) if e.tensor not in self._gathered]

    def _which_stream(self, layer: LayerSpec) -> Hashable:
        """All that a placement in a store of our own depends on beside the tensors' shapes."""
        return tuple(t.name in self._gathered for t in layer.tensors)

    def _relative(self, layer: LayerSpec) -> Hashable:
        """Everything that a layer's placement depends on: places of its rows, from the aligned one before the first."""
        starts: dict[int, tuple[int, int]] = {}  # of each file: its number here, and where the first read may begin
        found = []
        for e in sorted(self._streamed(layer), key=lambda e: (e.file, e.offset)):
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


def _without_names(layer: LayerSpec) -> Hashable:
    """Everything that a layer's placement and costs depend on."""
    return tuple((_of_module(m), tuple(map(_of_tensor, m.tensors))) for m in layer.modules)
