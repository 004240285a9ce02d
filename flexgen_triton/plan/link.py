"""Dependencies between a schedule's ops, derived from the slots they touch; and the schedule on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .schedule import Lane, Op, Slot

Wait = tuple[Lane, int]  # an op of another lane, by its position in that lane


class Linker:
    """Derives what each op must wait for from the slots it touches, in issue order.

    Keeps per slot only the last writer and the readers since, and nothing of slots that were overwritten, so a
    schedule of 10^6 ops stays as small as the memory it runs in.
    """

    def __init__(self, *, serial: bool = False) -> None:
        self._serial = serial
        self._counts = dict.fromkeys(Lane, 0)
        self._writer: dict[Slot, Wait] = {}
        self._readers: dict[Slot, dict[Lane, int]] = {}
        self._previous: Wait | None = None

    def link(self, op: Op) -> tuple[Wait, ...]:
        """The positions, at most one per other lane, that must be done before `op` may start."""
        me = (op.lane, self._counts[op.lane])
        self._counts[op.lane] += 1
        needs: dict[Lane, int] = {}

        def need(wait: Wait) -> None:
            lane, position = wait
            if lane is not op.lane:  # its own lane is in order
                needs[lane] = max(position, needs.get(lane, -1))

        for slot in (*op.reads, *op.writes, *op.overwrites):
            if slot in self._writer:
                need(self._writer[slot])
        for slot in (*op.writes, *op.overwrites):
            for reader in self._readers.get(slot, {}).items():
                need(reader)
        if self._serial and self._previous:
            need(self._previous)
        for slot in op.overwrites:
            self._writer.pop(slot, None)
            self._readers.pop(slot, None)
        for slot in op.reads:
            self._readers.setdefault(slot, {})[op.lane] = me[1]
        for slot in op.writes:
            self._writer[slot] = me
            self._readers[slot] = {}
        self._previous = me
        return tuple(needs.items())

    @property
    def slots(self) -> int:
        """Slots remembered now."""
        return len(self._writer.keys() | self._readers.keys())


@dataclass(frozen=True, slots=True)
class Span:
    """An op and when it ran, in seconds since the start of the run."""

    op: Op
    start: float
    end: float


def simulate(ops: Iterable[Op], seconds: Callable[[Op], float], *, serial: bool = False) -> Iterator[Span]:
    """Run a schedule on a virtual clock: each lane in order, each op when its waits are done."""
    linker = Linker(serial=serial)
    ends: dict[Lane, list[float]] = {lane: [] for lane in Lane}
    for op in ops:
        lane = ends[op.lane]
        start = max([lane[-1] if lane else 0.0, *(ends[other][n] for other, n in linker.link(op))])
        lane.append(start + seconds(op))
        yield Span(op, start, lane[-1])
