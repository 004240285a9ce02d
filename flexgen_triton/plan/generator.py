"""Makes the ops of a program, in the order they are issued.

One generator walks the visits row by row and issues every load ahead of its use, as far as the rings have room; the
paper's strategies (FlexGen, section 4.2) are settings of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from .schedule import (
    ATTEND,
    ATTEND_HOST,
    COMPUTE,
    FINISH,
    PROJECT,
    CacheTraffic,
    HiddenTraffic,
    Lane,
    Op,
    Program,
    Slot,
    SplitTraffic,
    WeightTraffic,
)

SLOT_ALIGN = 4096


class Ring:
    """Plans a first-in first-out buffer of variable-size slots: where each lies and which old ones it overwrites.

    An old slot is reported once, to the first new one that touches it: a ring is written by one lane, in order.
    """

    def __init__(self, name: str, capacity: int) -> None:
        self.name, self.capacity = name, capacity
        self._live: deque[Slot] = deque()  # oldest first, up to the newest; some may be released already
        self._released: set[Slot] = set()
        self._stale: deque[Slot] = deque()  # released, memory not taken over yet; oldest first
        self._head = 0
        self._count = 0

    def _place(self, nbytes: int) -> int | None:
        """Offset of the next slot: the head, or the start when the end is too near; None while that is in use."""
        at = self._head if self._head + nbytes <= self.capacity else 0
        if at + nbytes > self.capacity or any(_overlap(s, at, nbytes) for s in self._live):
            return None
        return at

    def fits(self, nbytes: int) -> bool:
        return self._place(_round_up(nbytes)) is not None

    def take(self, nbytes: int) -> tuple[Slot, tuple[Slot, ...]]:
        """A new slot and the released ones whose memory it takes over."""
        nbytes = _round_up(nbytes)
        at = self._place(nbytes)
        assert at is not None, f"ring {self.name}: no room for {nbytes} of {self.capacity} bytes"
        slot = Slot(self.name, self._count, at, nbytes)
        self._count += 1
        if not nbytes:
            return slot, ()
        old = []
        wrapped = at < self._head
        while self._stale and (_overlap(self._stale[0], at, nbytes) or (wrapped and self._stale[0].at >= self._head)):
            old.append(self._stale.popleft())
        self._live.append(slot)
        self._head = at + nbytes
        return slot, tuple(old)

    def release(self, slot: Slot) -> None:
        if not slot.nbytes:
            return
        self._released.add(slot)
        while self._live and self._live[0] in self._released:
            self._released.remove(self._live[0])
            self._stale.append(self._live.popleft())


def _overlap(slot: Slot, at: int, nbytes: int) -> bool:
    return slot.at < at + nbytes and at < slot.at + slot.nbytes


def _round_up(nbytes: int) -> int:
    return -(-nbytes // SLOT_ALIGN) * SLOT_ALIGN


Visit = tuple[int, int, int]
Homes = tuple[Slot, Slot]  # on disk and on the host
Row = list[tuple[int, str]]  # layers and which of their computations


class Generator:
    """Yields the ops of a program in issue order.

    `alive(i, k)` is asked once, when token step i of GPU batch k is about to be issued; False drops the batch.
    """

    def __init__(self, program: Program, alive: Callable[[int, int], bool] | None = None) -> None:
        self.program = program
        self._alive_fn = alive or (lambda i, k: True)
        self._num_layers = len(program.weights)
        self._num_batches = len(program.batch_steps)
        self._live = list(range(self._num_batches))
        self._rings = {name: Ring(name, size) for name, size in program.rings.items()}
        self._weight_slots: dict[int, Slot] = {}  # instance i*L + j -> its slot
        self._weight_next = (0, 0)  # instance and part to load next
        self._cache_slots: dict[Visit, Slot] = {}
        self._cache_next: Visit = (1, 0, 0)
        self._hidden_slots: dict[Visit, Slot] = {}
        self._hidden_next: Visit = (0, 1, 0)
        self._answers: dict[Visit, Slot] = {}
        self._results: dict[Visit, Slot] = {}

    def __iter__(self) -> Iterator[Op]:
        for i in range(max(self.program.batch_steps)):
            for row in self._rows(i):
                for k in tuple(self._live):
                    if row[0] == (0, COMPUTE) and not self._still_alive(i, k):
                        self._drop(i, k)
                        continue
                    yield from self._visit(i, row, k)
                if not self._live:
                    return
                for j, name in row:
                    if name != PROJECT:
                        self._release_weights(i * self._num_layers + j)

    def _rows(self, i: int) -> list[Row]:
        """Cut the layers into rows, each computed by all GPU batches in turn: single layers, or attention to attention.

        So host attention of one batch has the time of all others, and its lane need not wait for a row's last batch
        before it gets the next row's first.
        """
        if not i or not self.program.split:
            return [[(j, COMPUTE)] for j in range(self._num_layers)]
        rows: list[Row] = [[]]
        for j, has_cache in enumerate(self.program.has_cache):
            rows[-1].append((j, PROJECT if has_cache else COMPUTE))
            if has_cache:
                rows.append([(j, FINISH)])
        return rows[:-1] + [[layer] for layer in rows[-1]]  # behind the last one nothing is gained by holding weights

    def _still_alive(self, i: int, k: int) -> bool:
        return i < self.program.batch_steps[k] and self._alive_fn(i, k)

    def _drop(self, i: int, k: int) -> None:
        self._live.remove(k)
        for slots, ring in ((self._cache_slots, "cache"), (self._hidden_slots, "hidden")):
            for visit in [b for b in slots if b[0] >= i and b[2] == k]:
                self._rings[ring].release(slots.pop(visit))

    def _visit(self, i: int, row: Row, k: int) -> Iterator[Op]:
        """A row's computations of one GPU batch, and the transfers around them."""
        following = [name for _, name in row[1:]]
        for (j, name), then in zip(row, [*following, None], strict=True):
            visit = (i, j, k)
            loads_hidden, stores_hidden = name == FINISH or (j, name) == row[0], then in (PROJECT, None)
            yield from self._load_weights(i * self._num_layers + j, k)
            if name != FINISH:
                yield from self._load_caches(visit)
            if loads_hidden:
                yield from self._load_hiddens(visit)
            if name == PROJECT:
                yield from self._project_and_attend(visit)
            else:
                yield from self._compute_and_store(visit, name, loads_hidden=loads_hidden, stores_hidden=stores_hidden)

    # Weights: parts of a layer, spread over the GPU batches of the layers before it.

    def _load_weights(self, instance: int, k: int) -> Iterator[Op]:
        """Parts of this layer not yet issued, then a share of the layers ahead: as far as the ring has room."""
        filling = instance == 0 and k == self._live[0]  # nothing runs yet
        issued = 0
        while self._weight_next[0] < self._num_layers * max(self.program.batch_steps):
            n, part = self._weight_next
            traffic = self.program.weights[n % self._num_layers]
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
        i, j = divmod(n, self._num_layers)
        old = self._weight_old if part == 0 else ()
        disk, host = traffic.disk_parts[part], traffic.host_parts[part]
        yield from self._bring("weight", (i, j, self._live[0]), part, self._weight_slots[n], old, disk=disk, host=host)

    def _release_weights(self, instance: int) -> None:
        self._rings["weight"].release(self._weight_slots.pop(instance))

    # Cache: what an earlier token step stored for the same layer and GPU batch.

    def _next_visit(self, visit: Visit) -> Visit:
        i, j, k = visit
        later = [b for b in self._live if b > k]
        if later:
            return i, j, later[0]
        return (i, j + 1, self._live[0]) if j + 1 < self._num_layers else (i + 1, 0, self._live[0])

    def _load_caches(self, visit: Visit) -> Iterator[Op]:
        i, j, k = visit
        limit = visit if self.program.serial else (i + 1, j, k)  # never ahead of the store it reads
        steps = self.program.batch_steps
        while self._cache_next < limit or self._cache_next == visit:
            ahead = self._cache_next
            traffic = self.program.cache(ahead[0], ahead[2])
            wanted = ahead >= visit and ahead[0] < steps[ahead[2]] and ahead[2] in self._live
            if wanted and self.program.has_cache[ahead[1]] and traffic.slot:
                if ahead != visit and not self._rings["cache"].fits(traffic.slot):
                    return
                yield from self._cache_load(ahead, traffic)
            self._cache_next = self._next_visit(ahead)

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
                self._hidden_next = self._next_visit(ahead)
            ahead = self._next_visit(ahead)
            if ahead[0] > visit[0] or (self._is_split(visit[0]) and ahead[1] > visit[1]):
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
        on_disk, on_host = (homes[:1], homes[1:]) if homes else ((), ())
        if not self.program.host_is_apart:
            if disk or old:
                yield Op(Lane.DISK_IN, f"read_{kind}", *visit, part, on_disk, (slot,), old, disk)
            return
        pageable = kind == "weight" and host > 0 and not self.program.pinned
        staged: tuple[Slot, ...] = ()
        if disk:
            staging, gone = self._rings["stage_in"].take(stage or disk)
            yield Op(Lane.DISK_IN, f"read_{kind}", *visit, part, on_disk, (staging,), gone, disk)
            staged = (staging,)
            self._rings["stage_in"].release(staging)
        if disk or host or old:
            reads = (*staged, *on_host)
            yield Op(Lane.H2D, f"load_{kind}", *visit, part, reads, (slot,), old, disk + host, pageable=pageable)

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
        on_disk, on_host = homes
        source = out if stage else on_host
        if self.program.host_is_apart and out and moved:
            staged: tuple[Slot, ...] = ()
            gone: tuple[Slot, ...] = ()
            if stage:
                source, gone = self._rings["stage_out"].take(stage)
                staged = (source,)
                self._rings["stage_out"].release(source)
            yield Op(Lane.D2H, f"store_{kind}", *visit, 0, (out,), (on_host, *staged, *also), gone, moved)
        if disk:
            assert source is not None, f"{kind} of {visit}: nothing to write"
            yield Op(Lane.DISK_OUT, f"write_{kind}", *visit, 0, (source,), (on_disk,), bytes=disk)
        if out:
            self._rings[f"{kind}_out"].release(out)

    # Compute, and the stores that carry its results home.

    def _is_split(self, i: int) -> bool:
        return i > 0 and self.program.split is not None

    def _weights_in_use(self, visit: Visit) -> list[Slot]:
        slot = self._weight_slots[visit[0] * self._num_layers + visit[1]]
        return [slot] if slot.nbytes else []

    def _use(self, slots: dict[Visit, Slot], ring: str, visit: Visit) -> list[Slot]:
        """Take the slot loaded for a visit, if there is one; the ring may have it back when the next op has read it."""
        if visit not in slots:
            return []
        self._rings[ring].release(slots[visit])
        return [slots.pop(visit)]

    def _compute_op(
        self, name: str, visit: Visit, reads: list[Slot], writes: list[Slot], old: list[Slot], **hidden: bool
    ) -> Op:
        i, j, k = visit
        work = self.program.work(i, j, k, name)
        nbytes = work.weight_bytes + work.cache_bytes
        lane = Lane.HOST_ATTENTION if name == ATTEND_HOST else Lane.COMPUTE
        return Op(lane, name, i, j, k, 0, tuple(reads), tuple(writes), tuple(old), nbytes, work, **hidden)

    def _compute_and_store(self, visit: Visit, name: str, *, loads_hidden: bool, stores_hidden: bool) -> Iterator[Op]:
        """A whole layer's computation, or what follows its attention."""
        i, j, k = visit
        program = self.program
        has_cache = program.has_cache[j] and name == COMPUTE
        cache = program.cache(i, k) if has_cache else CacheTraffic()
        hidden = program.hidden(i, j, k) if stores_hidden else HiddenTraffic()
        reads = self._weights_in_use(visit)
        writes: list[Slot] = []
        old: list[Slot] = []
        if name == FINISH:
            yield from self._load_attended(visit)
            reads += self._use(self._results, "result", visit)
        reads += self._use(self._cache_slots, "cache", visit) if has_cache else []
        reads += self._use(self._hidden_slots, "hidden", visit)
        outs: dict[str, Slot] = {}
        for ring, nbytes in (("cache_out", cache.out), ("hidden_out", hidden.host + hidden.disk)):
            if nbytes:
                outs[ring], gone = self._rings[ring].take(nbytes)
                writes.append(outs[ring])
                old.extend(gone)
        on_host = self._cache_homes(visit)[1]
        if cache.gathered:
            reads.append(on_host)
        if has_cache and not program.host_is_apart:
            writes.append(on_host)  # host rows and open visits are appended to in place
        if has_cache and program.keeps_open:
            writes.append(self._open_home(visit))
        yield self._compute_op(name, visit, reads, writes, old, loads_hidden=loads_hidden, stores_hidden=stores_hidden)
        yield from self._carry_cache(visit, outs.get("cache_out"), cache)
        moved = hidden.host + hidden.disk
        out, homes = outs.get("hidden_out"), self._hidden_homes(visit)
        yield from self._carry("hidden", visit, out, homes, moved=moved, disk=hidden.disk, stage=hidden.disk)

    def _carry_cache(self, visit: Visit, out: Slot | None, cache: CacheTraffic) -> Iterator[Op]:
        """New K and V home; in decode, what has become whole of the pages that the device keeps."""
        if self.program.keeps_open and visit[0]:
            out = self._open_home(visit)
        prompts_attended = self.program.split is not None and visit[0] == 0
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

    def _project_and_attend(self, visit: Visit) -> Iterator[Op]:
        """Q, K and V of all sequences; the host's part to its lane; the device's attention meanwhile."""
        assert self.program.split is not None
        i, _, k = visit
        split, cache = self.program.split(i, k), self.program.cache(i, k)
        projected, old = self._rings["projected"].take(split.projected)
        writes, out = [projected], None
        if cache.out:
            out, gone = self._rings["cache_out"].take(cache.out)
            writes, old = [projected, out], (*old, *gone)
        if self.program.keeps_open:
            writes.append(self._open_home(visit))
        yield self._compute_op(PROJECT, visit, self._weights_in_use(visit), writes, list(old), loads_hidden=False)
        if split.query:
            yield from self._ask_host(visit, split, projected)
        if split.attends:
            self._results[visit], gone = self._rings["result"].take(split.result)
            reads = [projected, *self._use(self._cache_slots, "cache", visit)]
            reads += [out] if out else []
            reads += [self._cache_homes(visit)[1]] if cache.gathered else []
            yield self._compute_op(ATTEND, visit, reads, [self._results[visit]], list(gone))
        yield from self._carry_cache(visit, out, cache)
        self._rings["projected"].release(projected)

    def _ask_host(self, visit: Visit, split: SplitTraffic, projected: Slot) -> Iterator[Op]:
        query, old = self._rings["query"].take(split.query)
        yield Op(Lane.D2H, "store_query", *visit, 0, (projected,), (query,), old, split.query)
        self._answers[visit], old = self._rings["answer"].take(split.answer)
        home = self._attended_home(visit)
        yield self._compute_op(ATTEND_HOST, visit, [query], [self._answers[visit], home], list(old))
        self._rings["query"].release(query)

    def _load_attended(self, visit: Visit) -> Iterator[Op]:
        """The host's results beside the device's. Issued late: the lane would wait for the host, and all behind it."""
        assert self.program.split is not None
        split = self.program.split(visit[0], visit[2])
        old: tuple[Slot, ...] = ()
        if visit not in self._results:
            self._results[visit], old = self._rings["result"].take(split.result)
        if split.query:
            reads = self._use(self._answers, "answer", visit)
            yield Op(Lane.H2D, "load_attended", *visit, 0, tuple(reads), (self._results[visit],), old, split.answer)

    def _open_home(self, visit: Visit) -> Slot:
        return Slot("cache_open", visit[1] * self._num_batches + visit[2])

    def _attended_home(self, visit: Visit) -> Slot:
        return Slot("cache_attended", visit[1] * self._num_batches + visit[2])
