"""The order in which the stages of a program are visited, and the homes of what a visit makes.

Knows bundles, attention and GPU batches; not bytes, rings or ops.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from .schedule import Program, Slot

Visit = tuple[int, int, int]  # token step, stage, GPU batch
Homes = tuple[Slot, Slot]  # on disk and on the host


class Piece(NamedTuple):
    """Stages `first` to `stop` that are computed as one op."""

    first: int
    stop: int


Row = list[Piece]


class Visits:
    """The pieces of a program's token steps, the visit that follows another, and homes by visit."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.num_bundles = len(program.weights)
        self.starts = [program.bundles.index(n) for n in range(self.num_bundles)] + [len(program.bundles)]
        self.attentions = [j for j, attends in enumerate(program.attends) if attends]
        self.num_batches = len(program.batch_steps)

    def rows(self, i: int) -> list[Row]:
        """Lists the pieces that each GPU batch in turn computes: a bundle's stages as one.

        Where the host attends, a bundle is cut at attention, and a row goes from one attention to the next. So host
        attention of one batch has the time of all others, and its lane need not wait for a row's last batch before it
        gets the next row's first.
        """
        bundles = [Piece(*ends) for ends in pairwise(self.starts)]
        if not self.is_cut(i):
            return [[piece] for piece in bundles]
        rows: list[Row] = [[]]
        for first, stop in bundles:
            attention = next((a for a in self.attentions if first <= a < stop), None)
            if attention is None:
                rows[-1].append(Piece(first, stop))
            else:
                rows[-1].append(Piece(first, attention))
                rows.append([Piece(attention + 1, stop)])
        return rows[:-1] + [[piece] for piece in rows[-1]]  # behind the last one nothing is gained by holding weights

    def is_cut(self, i: int) -> bool:
        """True where attention is computed apart from its neighbours."""
        return i > 0 and self.program.host_attends

    def projects(self, i: int, piece: Piece) -> bool:
        """True of a piece that ends before attention."""
        return self.is_cut(i) and piece.stop < len(self.program.attends) and self.program.attends[piece.stop]

    def finishes(self, i: int, piece: Piece) -> bool:
        """True of a piece that begins behind attention."""
        return self.is_cut(i) and piece.first > 0 and self.program.attends[piece.first - 1]

    def attention(self, piece: Piece) -> int | None:
        """The stage of attention that a piece has or leads to, if any."""
        return next((a for a in self.attentions if piece.first <= a <= piece.stop), None)

    def instance(self, i: int, piece: Piece) -> int:
        """The use of a bundle's weights, counted over all token steps."""
        return i * self.num_bundles + self.program.bundles[piece.first]

    def next_visit(self, visit: Visit, stages: Sequence[int], live: Sequence[int]) -> Visit:
        """The visit after this one, of the GPU batches `live`, where only `stages` are visited."""
        i, j, k = visit
        later = [b for b in live if b > k]
        if later:
            return i, j, later[0]
        n = bisect_right(stages, j)
        return (i, stages[n], live[0]) if n < len(stages) else (i + 1, stages[0], live[0])

    def cache_homes(self, visit: Visit) -> Homes:
        """The places where a visit's K and V are kept."""
        home = visit[1] * self.num_batches + visit[2]
        return Slot("cache_disk", home), Slot("cache_host", home)

    def hidden_homes(self, visit: Visit) -> Homes:
        """The places where the hidden state that a visit makes is kept."""
        return Slot("hidden_disk", visit[2]), Slot("hidden_host", visit[2])

    def open_home(self, visit: Visit) -> Slot:
        """The place on the device of a visit's pages that are being filled."""
        return Slot("cache_open", visit[1] * self.num_batches + visit[2])

    def attended_home(self, visit: Visit) -> Slot:
        """The place of K and V of the sequences that the host attends to."""
        return Slot("cache_attended", visit[1] * self.num_batches + visit[2])
