"""Makes the ops of a program, in the order they are issued.

One generator walks the visits row by row and issues every load ahead of its use, as far as the rings have room; the
paper's strategies (FlexGen, section 4.2) are settings of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from .ring import Ring
from .schedule import (
    ATTEND_HOST,
    COMPUTE,
    LOAD_ATTENDED,
    LOAD_CACHE,
    LOAD_HIDDEN,
    LOAD_WEIGHT,
    READ_CACHE,
    READ_HIDDEN,
    READ_WEIGHT,
    STORE_CACHE,
    STORE_HIDDEN,
    STORE_QUERY,
    WRITE_CACHE,
    WRITE_HIDDEN,
    CacheTraffic,
    HiddenTraffic,
    Kind,
    Op,
    Program,
    Slot,
    WeightTraffic,
)

IN = {"weight": (READ_WEIGHT, LOAD_WEIGHT), "cache": (READ_CACHE, LOAD_CACHE), "hidden": (READ_HIDDEN, LOAD_HIDDEN)}
OUT = {"cache": (STORE_CACHE, WRITE_CACHE), "hidden": (STORE_HIDDEN, WRITE_HIDDEN)}
Visit = tuple[int, int, int]  # token step, stage, GPU batch
Homes = tuple[Slot, Slot]  # on disk and on the host


class Piece(NamedTuple):
    """Stages `first` to `stop` that are computed as one op."""

    first: int
    stop: int


Row = list[Piece]


class Generator:
    """Yields the ops of a program in issue order.

    `alive(i, k)` is asked once, when token step i of GPU batch k is about to be issued; False drops the batch.
    """

    def __init__(self, program: Program, alive: Callable[[int, int], bool] | None = None) -> None:
        self.program = program
        self._alive_fn = alive or (lambda i, k: True)
        self._num_bundles = len(program.weights)
        self._starts = [program.bundles.index(n) for n in range(self._num_bundles)] + [len(program.bundles)]
        self._attentions = [j for j, attends in enumerate(program.attends) if attends]
        self._num_batches = len(program.batch_steps)
        self._live = list(range(self._num_batches))
        self._rings = {name: Ring(name, size) for name, size in program.rings.items()}
        self._weight_slots: dict[int, Slot] = {}  # instance, i * bundles + bundle -> its slot
        self._weight_next = (0, 0)  # instance and part to load next
        self._cache_slots: dict[Visit, Slot] = {}
        self._cache_next: Visit = (1, self._attentions[0], 0)
        self._hidden_slots: dict[Visit, Slot] = {}
        self._hidden_next: Visit = (0, self._starts[1], 0)
        self._answers: dict[Visit, Slot] = {}
        self._results: dict[Visit, Slot] = {}

    def __iter__(self) -> Iterator[Op]:
        for i in range(max(self.program.batch_steps)):
            for row in self._rows(i):
                for k in tuple(self._live):
                    if row[0].first == 0 and not self._still_alive(i, k):
                        self._drop(i, k)
                        continue
                    yield from self._visit(i, row, k)
                if not self._live:
                    return
                for piece in row:
                    if not self._projects(i, piece):
                        self._release_weights(self._instance(i, piece))

    def _rows(self, i: int) -> list[Row]:
        """Lists the pieces that each GPU batch in turn computes: a bundle's stages as one.

        Where the host attends, a bundle is cut at attention, and a row goes from one attention to the next. So host
        attention of one batch has the time of all others, and its lane need not wait for a row's last batch before it
        gets the next row's first.
        """
        bundles = [Piece(*ends) for ends in pairwise(self._starts)]
        if not self._is_cut(i):
            return [[piece] for piece in bundles]
        rows: list[Row] = [[]]
        for first, stop in bundles:
            attention = next((a for a in self._attentions if first <= a < stop), None)
            if attention is None:
                rows[-1].append(Piece(first, stop))
            else:
                rows[-1].append(Piece(first, attention))
                rows.append([Piece(attention + 1, stop)])
        return rows[:-1] + [[piece] for piece in rows[-1]]  # behind the last one nothing is gained by holding weights

    def _is_cut(self, i: int) -> bool:
        """True where attention is computed apart from its neighbours."""
        return i > 0 and self.program.host_attends

    def _projects(self, i: int, piece: Piece) -> bool:
        """True of a piece that ends before attention."""
        return self._is_cut(i) and piece.stop < len(self.program.attends) and self.program.attends[piece.stop]

    def _finishes(self, i: int, piece: Piece) -> bool:
        """True of a piece that begins behind attention."""
        return self._is_cut(i) and piece.first > 0 and self.program.attends[piece.first - 1]

    def _attention(self, piece: Piece) -> int | None:
        """The stage of attention that a piece has or leads to, if any."""
        return next((a for a in self._attentions if piece.first <= a <= piece.stop), None)

    def _instance(self, i: int, piece: Piece) -> int:
        return i * self._num_bundles + self.program.bundles[piece.first]

    def _still_alive(self, i: int, k: int) -> bool:
        return i < self.program.batch_steps[k] and self._alive_fn(i, k)

    def _drop(self, i: int, k: int) -> None:
        self._live.remove(k)
        for slots, ring in ((self._cache_slots, "cache"), (self._hidden_slots, "hidden")):
            for visit in [b for b in slots if b[0] >= i and b[2] == k]:
                self._rings[ring].release(slots.pop(visit))

    def _visit(self, i: int, row: Row, k: int) -> Iterator[Op]:
        """A row's computations of one GPU batch, and the transfers around them."""
        for n, piece in enumerate(row):
            projects, finishes = self._projects(i, piece), self._finishes(i, piece)
            loads = finishes or n == 0
            yield from self._load_weights(self._instance(i, piece), k)
            if not finishes:
                attention = self._attention(piece) if projects or not self._is_cut(i) else None
                yield from self._load_caches((i, piece.first if attention is None else attention, k))
            if loads:
                yield from self._load_hiddens((i, piece.first, k))
            if projects:
                yield from self._project_and_attend(i, piece, k)
            else:
                stores = n + 1 == len(row) or self._projects(i, row[n + 1])
                yield from self._compute_and_store(i, piece, k, loads_hidden=loads, stores_hidden=stores)

    # Weights: parts of a bundle, spread over the GPU batches of the bundles before it.

    def _load_weights(self, instance: int, k: int) -> Iterator[Op]:
        """Parts of this bundle not yet issued, then a share of the bundles ahead: as far as the ring has room."""
        filling = instance == 0 and k == self._live[0]  # nothing runs yet
        issued = 0
        while self._weight_next[0] < self._num_bundles * max(self.program.batch_steps):
            n, part = self._weight_next
            traffic = self.program.weights[n % self._num_bundles]
            if n > instance:
                quota = -(-len(traffic.disk_parts) // len(self._live))
                if self.program.serial or (issued == quota and not filling):
                    return
                issued += 1
            if n not in self._weight_slots and not self._open_weights(n, traffic, force=n <= instance):
                return
            yield from self._weight_part(n, part, traffic)
            last = part + 1 == len(traffic.disk_parts)
            self._weight_next = (n + 1, 0) if last else (n, part + 1)

    def _open_weights(self, n: int, traffic: WeightTraffic, *, force: bool) -> bool:
        ring = self._rings["weight"]
        if not force and not ring.fits(traffic.slot):
            return False
        self._weight_slots[n], self._weight_old = ring.take(traffic.slot)
        return True

    def _weight_part(self, n: int, part: int, traffic: WeightTraffic) -> Iterator[Op]:
        i, bundle = divmod(n, self._num_bundles)
        visit = (i, self._starts[bundle], self._live[0])
        old = self._weight_old if part == 0 else ()
        disk, host = traffic.disk_parts[part], traffic.host_parts[part]
        yield from self._bring("weight", visit, part, self._weight_slots[n], old, disk=disk, host=host)

    def _release_weights(self, instance: int) -> None:
        self._rings["weight"].release(self._weight_slots.pop(instance))

    # Cache: what an earlier token step stored for the same layer and GPU batch.

    def _next_visit(self, visit: Visit, stages: Sequence[int]) -> Visit:
        """The visit after this one, of GPU batches that go on, where only `stages` are visited."""
        i, j, k = visit
        later = [b for b in self._live if b > k]
        if later:
            return i, j, later[0]
        n = bisect_right(stages, j)
        return (i, stages[n], self._live[0]) if n < len(stages) else (i + 1, stages[0], self._live[0])

    def _load_caches(self, visit: Visit) -> Iterator[Op]:
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
            self._cache_next = self._next_visit(ahead, self._attentions)

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
            homes=self._cache_homes(visit),
        )

    def _cache_homes(self, visit: Visit) -> Homes:
        home = visit[1] * self._num_batches + visit[2]
        return Slot("cache_disk", home), Slot("cache_host", home)

    # Hidden states: what the layer before stored for the same GPU batch.

    def _load_hiddens(self, visit: Visit) -> Iterator[Op]:
        ahead, horizon = visit, 1 if self.program.serial else len(self._live)
        for _ in range(horizon):
            i, j, k = ahead
            traffic = self.program.hidden(i, j - 1, k) if j else HiddenTraffic()
            nbytes = traffic.host + traffic.disk
            if nbytes and ahead not in self._hidden_slots and ahead >= self._hidden_next:
                if ahead != visit and not self._rings["hidden"].fits(nbytes):
                    return
                yield from self._hidden_load(ahead, traffic)
                self._hidden_next = self._next_visit(ahead, self._starts[:-1])
            ahead = self._next_visit(ahead, self._starts[:-1])
            if ahead[0] > visit[0] or (self._is_cut(visit[0]) and ahead[1] > visit[1]):
                return

    def _hidden_load(self, visit: Visit, traffic: HiddenTraffic) -> Iterator[Op]:
        slot, old = self._rings["hidden"].take(traffic.host + traffic.disk)
        self._hidden_slots[visit] = slot
        homes = self._hidden_homes(visit)
        yield from self._bring("hidden", visit, 0, slot, old, disk=traffic.disk, host=traffic.host, homes=homes)

    def _hidden_homes(self, visit: Visit) -> Homes:
        return Slot("hidden_disk", visit[2]), Slot("hidden_host", visit[2])

    # Transfers: the ways in and out, by host memory where that is apart from the device's.

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

    def _carry(
        self,
        kind: str,
        visit: Visit,
        out: Slot | None,
        homes: Homes,
        *,
        moved: int,
        disk: int,
        stage: int,
        also: tuple[Slot, ...] = (),
    ) -> Iterator[Op]:
        """Take a result home, and to homes that it has `also`.

        What goes to disk leaves from staging or, without any, from its home on the host.
        """
        store, write = OUT[kind]
        on_disk, on_host = homes
        source = out if stage else on_host
        if self.program.host_is_apart and out and moved:
            staged: tuple[Slot, ...] = ()
            gone: tuple[Slot, ...] = ()
            if stage:
                source, gone = self._rings["stage_out"].take(stage)
                staged = (source,)
                self._rings["stage_out"].release(source)
            yield Op(store, *visit, 0, (out,), (on_host, *staged, *also), gone, moved)
        if disk:
            assert source is not None, f"{kind} of {visit}: nothing to write"
            yield Op(write, *visit, 0, (source,), (on_disk,), bytes=disk)
        if out:
            self._rings[f"{kind}_out"].release(out)

    # Compute, and the stores that carry its results home.

    def _weights_in_use(self, i: int, piece: Piece) -> list[Slot]:
        slot = self._weight_slots[self._instance(i, piece)]
        return [slot] if slot.nbytes else []

    def _use(self, slots: dict[Visit, Slot], ring: str, visit: Visit) -> list[Slot]:
        """The slot that was brought for a visit, if any; the ring may have it back when the next op has read it."""
        if visit not in slots:
            return []
        self._rings[ring].release(slots[visit])
        return [slots.pop(visit)]

    def _op(
        self,
        visit: Visit,
        reads: Sequence[Slot],
        writes: Sequence[Slot],
        old: Sequence[Slot],
        *,
        stages: int = 1,
        kind: Kind = COMPUTE,
        loads_hidden: bool = False,
        stores_hidden: bool = False,
    ) -> Op:
        """A computation of `stages` from the visit's on."""
        work = self.program.work(*visit, stages, kind)
        return Op(
            kind,
            *visit,
            reads=tuple(reads),
            writes=tuple(writes),
            overwrites=tuple(old),
            bytes=work.weight_bytes + work.cache_bytes,
            work=work,
            stages=stages,
            loads_hidden=loads_hidden,
            stores_hidden=stores_hidden,
        )

    def _compute_and_store(
        self, i: int, piece: Piece, k: int, *, loads_hidden: bool, stores_hidden: bool
    ) -> Iterator[Op]:
        """A piece's computation with all that it needs and makes."""
        program, visit = self.program, (i, piece.first, k)
        finishes = self._finishes(i, piece)
        attention = None if self._is_cut(i) else self._attention(piece)
        attends = (i, attention, k) if attention is not None else None
        cache = program.cache(i, k) if attends else CacheTraffic()
        hidden = program.hidden(i, piece.stop - 1, k) if stores_hidden else HiddenTraffic()
        reads = self._weights_in_use(i, piece)
        writes: list[Slot] = []
        old: list[Slot] = []
        if finishes:
            attended = (i, piece.first - 1, k)
            yield from self._load_attended(attended)
            reads += self._use(self._results, "result", attended)
        reads += self._use(self._cache_slots, "cache", attends) if attends else []
        reads += self._use(self._hidden_slots, "hidden", visit)
        outs: dict[str, Slot] = {}
        for ring, nbytes in (("cache_out", cache.out), ("hidden_out", hidden.host + hidden.disk)):
            if nbytes:
                outs[ring], gone = self._rings[ring].take(nbytes)
                writes.append(outs[ring])
                old.extend(gone)
        if attends:
            reads += [self._cache_homes(attends)[1]] if cache.gathered else []
            if not program.host_is_apart:
                writes.append(self._cache_homes(attends)[1])  # host rows and open pages are appended to in place
            if program.keeps_open:
                writes.append(self._open_home(attends))
        stages = piece.stop - piece.first
        yield self._op(visit, reads, writes, old, stages=stages, loads_hidden=loads_hidden, stores_hidden=stores_hidden)
        if attends:
            yield from self._carry_cache(attends, outs.get("cache_out"), cache)
        moved, out, last = hidden.host + hidden.disk, outs.get("hidden_out"), (i, piece.stop - 1, k)
        homes = self._hidden_homes(last)
        yield from self._carry("hidden", last, out, homes, moved=moved, disk=hidden.disk, stage=hidden.disk)

    def _carry_cache(self, visit: Visit, out: Slot | None, cache: CacheTraffic) -> Iterator[Op]:
        """New K and V home; in decode, the pages that have become whole of those that the device keeps."""
        if self.program.keeps_open and visit[0]:
            out = self._open_home(visit)
        prompts_attended = self.program.host_attends and visit[0] == 0
        yield from self._carry(
            "cache",
            visit,
            out,
            self._cache_homes(visit),
            moved=cache.host_store,
            disk=cache.disk_write,
            stage=cache.write_slot,
            also=(self._attended_home(visit),) if prompts_attended else (),
        )

    # Attention on two lanes: the device's sequences on one, on the other those that the host attends to at their home.

    def _project_and_attend(self, i: int, piece: Piece, k: int) -> Iterator[Op]:
        """Q, K and V of all sequences; the host's part to its lane; the device's attention meanwhile."""
        visit, attends = (i, piece.first, k), (i, piece.stop, k)
        handed, cache = self.program.handoff(piece.stop - 1, k), self.program.cache(i, k)
        projected, old = self._rings["projected"].take(handed.device)
        writes, out = [projected], None
        if cache.out:
            out, gone = self._rings["cache_out"].take(cache.out)
            writes, old = [projected, out], (*old, *gone)
        if self.program.keeps_open:
            writes.append(self._open_home(attends))
        weights = self._weights_in_use(i, piece)
        yield self._op(visit, weights, writes, old, stages=piece.stop - piece.first)
        if handed.host:
            yield from self._ask_host(attends, projected, handed.host)
        if self.program.device_attends(k):
            self._results[attends], gone = self._take_result(attends)
            reads = [projected, *self._use(self._cache_slots, "cache", attends)]
            reads += [out] if out else []
            reads += [self._cache_homes(attends)[1]] if cache.gathered else []
            yield self._op(attends, reads, [self._results[attends]], gone)
        yield from self._carry_cache(attends, out, cache)
        self._rings["projected"].release(projected)

    def _take_result(self, visit: Visit) -> tuple[Slot, tuple[Slot, ...]]:
        return self._rings["result"].take(self.program.handoff(visit[1], visit[2]).device)

    def _ask_host(self, visit: Visit, projected: Slot, nbytes: int) -> Iterator[Op]:
        query, old = self._rings["query"].take(nbytes)
        yield Op(STORE_QUERY, *visit, 0, (projected,), (query,), old, nbytes)
        self._answers[visit], old = self._rings["answer"].take(self.program.handoff(visit[1], visit[2]).host)
        yield self._op(visit, [query], [self._answers[visit], self._attended_home(visit)], old, kind=ATTEND_HOST)
        self._rings["query"].release(query)

    def _load_attended(self, visit: Visit) -> Iterator[Op]:
        """The host's results beside the device's. Issued late: the lane would wait for the host, and all behind it."""
        old: tuple[Slot, ...] = ()
        if visit not in self._results:
            self._results[visit], old = self._take_result(visit)
        if nbytes := self.program.handoff(visit[1], visit[2]).host:
            reads = self._use(self._answers, "answer", visit)
            yield Op(LOAD_ATTENDED, *visit, 0, tuple(reads), (self._results[visit],), old, nbytes)

    def _open_home(self, visit: Visit) -> Slot:
        return Slot("cache_open", visit[1] * self._num_batches + visit[2])

    def _attended_home(self, visit: Visit) -> Slot:
        return Slot("cache_attended", visit[1] * self._num_batches + visit[2])
