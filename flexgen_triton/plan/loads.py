"""Loads of weights, cache and hidden states, issued ahead of their use as far as the rings have room.

Knows how much of each comes from where, and what has been brought. Does not know what is computed from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .ring import Ring
from .schedule import (
    LOAD_CACHE,
    LOAD_HIDDEN,
    LOAD_WEIGHT,
    READ_CACHE,
    READ_HIDDEN,
    READ_WEIGHT,
    CacheTraffic,
    HiddenTraffic,
    Op,
    Program,
    Slot,
    WeightTraffic,
)
from .visits import Homes, Piece, Visit, Visits

IN = {"weight": (READ_WEIGHT, LOAD_WEIGHT), "cache": (READ_CACHE, LOAD_CACHE), "hidden": (READ_HIDDEN, LOAD_HIDDEN)}


def use(ring: Ring, slots: dict[Visit, Slot], visit: Visit) -> list[Slot]:
    """The slot that was brought for a visit, if any; the ring may have it back when the next op has read it."""
    if visit not in slots:
        return []
    ring.release(slots[visit])
    return [slots.pop(visit)]


class Loads:
    """Yields the ops that bring what visits need; `live` are the GPU batches that go on, its owner's list."""

    def __init__(self, program: Program, visits: Visits, rings: Mapping[str, Ring], live: Sequence[int]) -> None:
        self.program = program
        self._visits = visits
        self._rings = rings
        self._live = live
        self._weight_slots: dict[int, Slot] = {}  # instance, i * bundles + bundle -> its slot
        self._weight_next = (0, 0)  # instance and part to load next
        self._cache_slots: dict[Visit, Slot] = {}
        self._cache_next: Visit = (1, visits.attentions[0], 0)
        self._hidden_slots: dict[Visit, Slot] = {}
        self._hidden_next: Visit = (0, visits.starts[1], 0)

    def drop(self, i: int, k: int) -> None:
        """Give back what was brought for a GPU batch that ends before token step i."""
        for slots, ring in ((self._cache_slots, "cache"), (self._hidden_slots, "hidden")):
            for visit in [b for b in slots if b[0] >= i and b[2] == k]:
                self._rings[ring].release(slots.pop(visit))

    # Weights: parts of a bundle, spread over the GPU batches of the bundles before it.

    def load_weights(self, instance: int, k: int) -> Iterator[Op]:
        """Yield parts of this bundle not yet issued, then a share of the bundles ahead: as far as the ring has room."""
        filling = instance == 0 and k == self._live[0]  # nothing runs yet
        issued = 0
        while self._weight_next[0] < self._visits.num_bundles * max(self.program.batch_steps):
            n, part = self._weight_next
            traffic = self.program.weights[n % self._visits.num_bundles]
            if n > instance:
                quota = -(-len(traffic.disk_parts) // len(self._live))
                if self.program.serial or (issued == quota and not filling):
                    return
                issued += 1
            old: tuple[Slot, ...] = ()
            if n not in self._weight_slots:
                if n > instance and not self._rings["weight"].fits(traffic.slot):
                    return
                self._weight_slots[n], old = self._rings["weight"].take(traffic.slot)
            yield from self._weight_part(n, part, traffic, old)
            last = part + 1 == len(traffic.disk_parts)
            self._weight_next = (n + 1, 0) if last else (n, part + 1)

    def _weight_part(self, n: int, part: int, traffic: WeightTraffic, old: tuple[Slot, ...]) -> Iterator[Op]:
        i, bundle = divmod(n, self._visits.num_bundles)
        visit = (i, self._visits.starts[bundle], self._live[0])
        disk, host = traffic.disk_parts[part], traffic.host_parts[part]
        yield from self._bring("weight", visit, part, self._weight_slots[n], old, disk=disk, host=host)

    def release_weights(self, instance: int) -> None:
        """Give the ring back the weights of a bundle that all GPU batches have used."""
        self._rings["weight"].release(self._weight_slots.pop(instance))

    def weights_in_use(self, i: int, piece: Piece) -> list[Slot]:
        """The slot of a piece's weights, if any of them are streamed."""
        slot = self._weight_slots[self._visits.instance(i, piece)]
        return [slot] if slot.nbytes else []

    # Cache: what an earlier token step stored for the same layer and GPU batch.

    def load_caches(self, visit: Visit) -> Iterator[Op]:
        """Yield the loads of this visit's cache, if not yet issued, and of those ahead that the ring has room for."""
        i, j, k = visit
        limit = visit if self.program.serial else (i + 1, j, k)  # never ahead of the store it reads
        steps = self.program.batch_steps
        while self._cache_next < limit or self._cache_next == visit:
            ahead = self._cache_next
            traffic = self.program.cache(ahead[0], ahead[2])
            wanted = ahead >= visit and ahead[0] < steps[ahead[2]] and ahead[2] in self._live
            if wanted and traffic.slot:
                if ahead != visit and not self._rings["cache"].fits(traffic.slot):
                    return
                yield from self._cache_load(ahead, traffic)
            self._cache_next = self._visits.next_visit(ahead, self._visits.attentions, self._live)

    def _cache_load(self, visit: Visit, traffic: CacheTraffic) -> Iterator[Op]:
        slot, old = self._rings["cache"].take(traffic.slot)
        self._cache_slots[visit] = slot
        yield from self._bring(
            "cache",
            visit,
            0,
            slot,
            old,
            disk=traffic.disk_read,
            host=traffic.host_load,
            stage=traffic.read_slot,
            homes=self._visits.cache_homes(visit),
        )

    def use_cache(self, visit: Visit) -> list[Slot]:
        """The slot of a visit's cache, if one was brought, which is read for the last time."""
        return use(self._rings["cache"], self._cache_slots, visit)

    # Hidden states: what the layer before stored for the same GPU batch.

    def load_hiddens(self, visit: Visit) -> Iterator[Op]:
        """Yield the loads of this visit's hidden state, if not yet issued, and of the GPU batches' after it."""
        ahead, horizon = visit, 1 if self.program.serial else len(self._live)
        for _ in range(horizon):
            i, j, k = ahead
            traffic = self.program.hidden(i, j - 1, k) if j else HiddenTraffic()
            nbytes = traffic.host + traffic.disk
            if nbytes and ahead not in self._hidden_slots and ahead >= self._hidden_next:
                if ahead != visit and not self._rings["hidden"].fits(nbytes):
                    return
                yield from self._hidden_load(ahead, traffic)
                self._hidden_next = self._visits.next_visit(ahead, self._visits.starts[:-1], self._live)
            ahead = self._visits.next_visit(ahead, self._visits.starts[:-1], self._live)
            if ahead[0] > visit[0] or (self._visits.is_cut(visit[0]) and ahead[1] > visit[1]):
                return

    def _hidden_load(self, visit: Visit, traffic: HiddenTraffic) -> Iterator[Op]:
        slot, old = self._rings["hidden"].take(traffic.host + traffic.disk)
        self._hidden_slots[visit] = slot
        homes = self._visits.hidden_homes(visit)
        yield from self._bring("hidden", visit, 0, slot, old, disk=traffic.disk, host=traffic.host, homes=homes)

    def use_hidden(self, visit: Visit) -> list[Slot]:
        """The slot of a visit's hidden state, if one was brought, which is read for the last time."""
        return use(self._rings["hidden"], self._hidden_slots, visit)

    # The ways in, by host memory where that is apart from the device's.

    def _bring(
        self,
        kind: str,
        visit: Visit,
        part: int,
        slot: Slot,
        old: tuple[Slot, ...],
        *,
        disk: int,
        host: int,
        stage: int = 0,
        homes: Homes | None = None,
    ) -> Iterator[Op]:
        """Fill a ring's slot with bytes from the disk (through `stage` bytes of staging) and from the host."""
        read, load = IN[kind]
        on_disk, on_host = (homes[:1], homes[1:]) if homes else ((), ())
        if not self.program.host_is_apart:
            if disk or old:
                yield Op(read, *visit, part, on_disk, (slot,), old, disk)
            return
        pageable = kind == "weight" and host > 0 and not self.program.pinned
        staged: tuple[Slot, ...] = ()
        if disk:
            staging, gone = self._rings["stage_in"].take(stage or disk)
            yield Op(read, *visit, part, on_disk, (staging,), gone, disk)
            staged = (staging,)
            self._rings["stage_in"].release(staging)
        if disk or host or old:
            reads = (*staged, *on_host)
            yield Op(load, *visit, part, reads, (slot,), old, disk + host, pageable=pageable)
