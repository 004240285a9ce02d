"""Makes the ops of a program, in the order they are issued.

One generator walks the visits row by row and issues every load (`loads`) ahead of its use, as far as the rings have
room; the paper's strategies (FlexGen, section 4.2) are settings of it. Owns the computations and the stores of what
they make. Knows bytes and rings; not seconds, nor what an op does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .loads import Loads, use
from .ring import Ring
from .schedule import (
    ATTEND_HOST,
    COMPUTE,
    LOAD_ATTENDED,
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
)
from .visits import Homes, Piece, Row, Visit, Visits

OUT = {"cache": (STORE_CACHE, WRITE_CACHE), "hidden": (STORE_HIDDEN, WRITE_HIDDEN)}


class Generator:
    """Yields the ops of a program in issue order.

    `alive(i, k)` is asked once, when token step i of GPU batch k is about to be issued; False drops the batch.
    """

    def __init__(self, program: Program, alive: Callable[[int, int], bool] | None = None) -> None:
        self.program = program
        self._alive_fn = alive or (lambda i, k: True)
        self._visits = Visits(program)
        self._live = list(range(self._visits.num_batches))
        self._rings = {name: Ring(name, size) for name, size in program.rings.items()}
        self._loads = Loads(program, self._visits, self._rings, self._live)
        self._answers: dict[Visit, Slot] = {}
        self._results: dict[Visit, Slot] = {}

    def __iter__(self) -> Iterator[Op]:
        for i in range(max(self.program.batch_steps)):
            for row in self._visits.rows(i):
                for k in tuple(self._live):
                    if row[0].first == 0 and not self._still_alive(i, k):
                        self._drop(i, k)
                        continue
                    yield from self._visit(i, row, k)
                if not self._live:
                    return
                for piece in row:
                    if not self._visits.projects(i, piece):
                        self._loads.release_weights(self._visits.instance(i, piece))

    def _still_alive(self, i: int, k: int) -> bool:
        return i < self.program.batch_steps[k] and self._alive_fn(i, k)

    def _drop(self, i: int, k: int) -> None:
        self._live.remove(k)
        self._loads.drop(i, k)

    def _visit(self, i: int, row: Row, k: int) -> Iterator[Op]:
        """A row's computations of one GPU batch, and the transfers around them."""
        for n, piece in enumerate(row):
            projects, finishes = self._visits.projects(i, piece), self._visits.finishes(i, piece)
            loads = finishes or n == 0
            yield from self._loads.load_weights(self._visits.instance(i, piece), k)
            if not finishes:
                attention = self._visits.attention(piece) if projects or not self._visits.is_cut(i) else None
                yield from self._loads.load_caches((i, piece.first if attention is None else attention, k))
            if loads:
                yield from self._loads.load_hiddens((i, piece.first, k))
            if projects:
                yield from self._project_and_attend(i, piece, k)
            else:
                stores = n + 1 == len(row) or self._visits.projects(i, row[n + 1])
                yield from self._compute_and_store(i, piece, k, loads_hidden=loads, stores_hidden=stores)

    # Results home, by host memory where that is apart from the device's.

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
        finishes = self._visits.finishes(i, piece)
        attention = None if self._visits.is_cut(i) else self._visits.attention(piece)
        attends = (i, attention, k) if attention is not None else None
        cache = program.cache(i, k) if attends else CacheTraffic()
        hidden = program.hidden(i, piece.stop - 1, k) if stores_hidden else HiddenTraffic()
        reads = self._loads.weights_in_use(i, piece)
        writes: list[Slot] = []
        old: list[Slot] = []
        if finishes:
            attended = (i, piece.first - 1, k)
            yield from self._load_attended(attended)
            reads += use(self._rings["result"], self._results, attended)
        reads += self._loads.use_cache(attends) if attends else []
        reads += self._loads.use_hidden(visit)
        outs: dict[str, Slot] = {}
        for ring, nbytes in (("cache_out", cache.out), ("hidden_out", hidden.host + hidden.disk)):
            if nbytes:
                outs[ring], gone = self._rings[ring].take(nbytes)
                writes.append(outs[ring])
                old.extend(gone)
        if attends:
            reads += [self._visits.cache_homes(attends)[1]] if cache.gathered else []
            if not program.host_is_apart:
                writes.append(self._visits.cache_homes(attends)[1])  # host rows and open pages are appended to in place
            if program.keeps_open:
                writes.append(self._visits.open_home(attends))
        stages = piece.stop - piece.first
        yield self._op(visit, reads, writes, old, stages=stages, loads_hidden=loads_hidden, stores_hidden=stores_hidden)
        if attends:
            yield from self._carry_cache(attends, outs.get("cache_out"), cache)
        moved, out, last = hidden.host + hidden.disk, outs.get("hidden_out"), (i, piece.stop - 1, k)
        homes = self._visits.hidden_homes(last)
        yield from self._carry("hidden", last, out, homes, moved=moved, disk=hidden.disk, stage=hidden.disk)

    def _carry_cache(self, visit: Visit, out: Slot | None, cache: CacheTraffic) -> Iterator[Op]:
        """New K and V home; in decode, the pages that have become whole of those that the device keeps."""
        if self.program.keeps_open and visit[0]:
            out = self._visits.open_home(visit)
        prompts_attended = self.program.host_attends and visit[0] == 0
        yield from self._carry(
            "cache",
            visit,
            out,
            self._visits.cache_homes(visit),
            moved=cache.host_store,
            disk=cache.disk_write,
            stage=cache.write_slot,
            also=(self._visits.attended_home(visit),) if prompts_attended else (),
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
            writes.append(self._visits.open_home(attends))
        weights = self._loads.weights_in_use(i, piece)
        yield self._op(visit, weights, writes, old, stages=piece.stop - piece.first)
        if handed.host:
            yield from self._ask_host(attends, projected, handed.host)
        if self.program.device_attends(k):
            self._results[attends], gone = self._take_result(attends)
            reads = [projected, *self._loads.use_cache(attends)]
            reads += [out] if out else []
            reads += [self._visits.cache_homes(attends)[1]] if cache.gathered else []
            yield self._op(attends, reads, [self._results[attends]], gone)
        yield from self._carry_cache(attends, out, cache)
        self._rings["projected"].release(projected)

    def _take_result(self, visit: Visit) -> tuple[Slot, tuple[Slot, ...]]:
        return self._rings["result"].take(self.program.handoff(visit[1], visit[2]).device)

    def _ask_host(self, visit: Visit, projected: Slot, nbytes: int) -> Iterator[Op]:
        query, old = self._rings["query"].take(nbytes)
        yield Op(STORE_QUERY, *visit, 0, (projected,), (query,), old, nbytes)
        self._answers[visit], old = self._rings["answer"].take(self.program.handoff(visit[1], visit[2]).host)
        yield self._op(visit, [query], [self._answers[visit], self._visits.attended_home(visit)], old, kind=ATTEND_HOST)
        self._rings["query"].release(query)

    def _load_attended(self, visit: Visit) -> Iterator[Op]:
        """The host's results beside the device's. Issued late: the lane would wait for the host, and all behind it."""
        old: tuple[Slot, ...] = ()
        if visit not in self._results:
            self._results[visit], old = self._take_result(visit)
        if nbytes := self.program.handoff(visit[1], visit[2]).host:
            reads = use(self._rings["answer"], self._answers, visit)
            yield Op(LOAD_ATTENDED, *visit, 0, tuple(reads), (self._results[visit],), old, nbytes)
