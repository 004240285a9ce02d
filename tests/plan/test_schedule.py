"""The schedule: every visit once, in order, and right under every legal interleaving of its lanes."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_triton.models.family import model_spec
from flexgen_triton.models.opt import opt_config
from flexgen_triton.plan.generator import Generator
from flexgen_triton.plan.link import Linker, simulate
from flexgen_triton.plan.plan import Plan, make_plan
from flexgen_triton.plan.policy import Policy
from flexgen_triton.plan.ring import Ring
from flexgen_triton.plan.schedule import Lane, Op, Slot
from flexgen_triton.plan.spec import Batch, Workload

CONFIG = opt_config(hidden=128, layers=3, heads=2, ffn=512, vocab=1000)
PERCENTS = {
    "all-gpu": (100, 0, 100, 0, 100, 0),
    "all-host": (0, 100, 0, 100, 0, 100),
    "all-disk": (0, 0, 0, 0, 0, 0),
    "mixed": (20, 30, 25, 25, 50, 25),
}
WAYS = {  # how sequences of the host and the disk are attended to
    "host attention": {"cpu_cache_compute": True},
    "hybrid": {"cpu_cache_compute": True, "cpu_attention_percent": 50},
    "open blocks": {"keep_open_pages": True},
    "hybrid, open blocks": {"cpu_cache_compute": True, "cpu_attention_percent": 50, "keep_open_pages": True},
}


def plan_of(percent: str, *, copies: bool, overlap: bool, sep_layer: bool, batches: int, way: str = "") -> Plan:
    policy = Policy(4, batches, *PERCENTS[percent], overlap=overlap, sep_layer=sep_layer, **WAYS.get(way, {}))
    lens = tuple(Batch((40 - k, 33, 20, 7), 12) for k in range(batches))
    return make_plan(model_spec(CONFIG, "tiny", "float32"), policy, Workload(lens), host_is_apart=copies)


def case_of(percent, copies, overlap, sep_layer, batches, way=""):
    case = {"percent": percent, "copies": copies, "overlap": overlap, "sep_layer": sep_layer, "batches": batches}
    words = (percent, way or ("copies" if copies else "in place"), "overlap" if overlap else "serial")
    words = (*words, "sep" if sep_layer else "fused", str(batches))
    return pytest.param({**case, "way": way}, id="-".join(words))


WHOLE = [case_of(*c) for c in itertools.product(PERCENTS, (True, False), (True, False), (True, False), (1, 3))]
OTHERS = {
    way: [
        case_of(percent, True, *flags, way)
        for *flags, percent in itertools.product((True, False), (True, False), (1, 3), ("all-host", "mixed"))
    ]
    for way in WAYS
}
SPLIT = OTHERS["host attention"] + OTHERS["hybrid"]
GRID = WHOLE + [case for cases in OTHERS.values() for case in cases]
SHARES = st.sampled_from([(0, 0), (100, 0), (0, 100), (30, 30), (50, 0), (0, 50)])
TRANSFERS = [
    *(("all-disk", True, ""), ("mixed", True, ""), ("all-host", True, ""), ("all-disk", False, "")),
    *(("mixed", False, ""), ("all-host", True, "host attention"), ("mixed", True, "hybrid, open blocks")),
]


@dataclass
class Memory:
    """Rings as bytes with owners, homes as versions: what each op finds must be what the model means by it."""

    plan: Plan
    rings: dict[str, list[tuple[Slot, object]]] = field(default_factory=lambda: defaultdict(list))
    homes: dict[Slot, int] = field(default_factory=dict)
    passed: tuple[int, int, int] | None = None
    kept: dict[int, tuple[int, int]] = field(default_factory=dict)

    def put(self, slot: Slot, content: object) -> None:
        kept = [(s, c) for s, c in self.rings[slot.ring] if s.at + s.nbytes <= slot.at or slot.at + slot.nbytes <= s.at]
        self.rings[slot.ring] = [*kept, (slot, content)]

    def get(self, slot: Slot) -> object:
        found = [c for s, c in self.rings[slot.ring] if s == slot]
        assert found, f"{slot} was overwritten"
        return found[0]

    def slot_of(self, op: Op, ring: str) -> object:
        slot = op.slot(ring)
        return self.get(slot) if slot is not None else None

    def run(self, op: Op) -> None:
        getattr(self, op.name)(op)

    def _bundle(self, op: Op) -> int:
        return self.plan.stages[op.j].bundle

    def _before(self, op: Op) -> int:
        """The stage whose result enters: projection and attention leave the hidden state as it is."""
        j = op.j
        while self.plan.stages[j - 1].spec.kind in ("project", "attend"):
            j -= 1
        return j - 1

    def _attention(self, op: Op) -> int:
        return self.plan.attention_of(op.j)

    # Weights: a slot's content is (instance, parts present)

    def _add_part(self, slot: Slot, op: Op) -> None:
        old = [c for s, c in self.rings["weight"] if s == slot]
        parts = old[0][1] if old else frozenset()  # type: ignore[index]
        self.put(slot, ((op.i, self._bundle(op)), parts | {op.part}))

    def read_weight(self, op: Op) -> None:
        slot = op.writes[0]
        if slot.ring == "weight":
            self._add_part(slot, op)
        else:
            self.put(slot, ("part", op.i, op.j, op.part))

    def load_weight(self, op: Op) -> None:
        for slot in op.reads:
            assert self.get(slot) == ("part", op.i, op.j, op.part), op
        self._add_part(op.writes[0], op)

    def _check_weights(self, op: Op) -> None:
        slot = op.slot("weight")
        traffic = self.plan.weight_traffic(self._bundle(op))
        if slot is None:
            assert not traffic.slot
            return
        sizes = zip(traffic.disk_parts, traffic.host_parts, strict=True)
        wanted = {n for n, (disk, host) in enumerate(sizes) if disk or host}
        instance, parts = self.get(slot)  # type: ignore[misc]
        assert instance == (op.i, self._bundle(op)) and wanted <= parts, (
            f"{op} found {instance}, parts {parts} of {wanted}"
        )

    # Cache: homes hold the token step of their last append

    def _written(self, op: Op) -> int:
        """The last earlier step whose K and V went to disk for this batch."""
        return max((i for i in range(op.i) if self.plan.cache_traffic(i, op.k).disk_write), default=-1)

    def _home(self, kind: str, op: Op) -> Slot:
        return Slot(kind, self._attention(op) * len(self.plan.groups) + op.k)

    def read_cache(self, op: Op) -> None:
        assert self.homes.get(self._home("cache_disk", op), -1) == self._written(op), op
        self.put(op.writes[0], ("disk cache", op.i, op.j, op.k))

    def load_cache(self, op: Op) -> None:
        stored = [i for i in range(op.i) if self.plan.cache_traffic(i, op.k).host_store]
        assert self.homes.get(self._home("cache_host", op), -1) == max(stored, default=-1), op
        if (staged := self.slot_of(op, "stage_in")) is not None:
            assert staged == ("disk cache", op.i, op.j, op.k), op
        self.put(op.writes[0], ("cache", op.i, op.j, op.k))

    def store_cache(self, op: Op) -> None:
        if self.plan.keeps_open and op.i:
            assert self.homes[self._home("cache_open", op)] == op.i, op
        else:
            assert self.slot_of(op, "cache_out") == ("new", op.i, op.j, op.k), op
        self.homes[self._home("cache_host", op)] = op.i
        if op.i == 0:
            self.homes[self._home("cache_attended", op)] = op.i
        if (staged := op.slot("stage_out")) is not None:
            self.put(staged, ("new", op.i, op.j, op.k))

    def write_cache(self, op: Op) -> None:
        source = op.reads[0]
        if source.nbytes:
            assert self.get(source) == ("new", op.i, op.j, op.k), op
        else:
            assert self.homes[source] == op.i, op
        self.homes[self._home("cache_disk", op)] = op.i

    def _check_cache(self, op: Op) -> None:
        traffic = self.plan.cache_traffic(op.i, op.k)
        content = self.slot_of(op, "cache")
        name = "cache" if self.plan.host_is_apart else "disk cache"
        assert content == ((name, op.i, self._attention(op), op.k) if traffic.slot else None), op
        if not self.plan.host_is_apart and op.i:
            assert self.homes[self._home("cache_host", op)] == op.i - 1, op

    # Attention on two lanes

    def _project(self, op: Op) -> None:
        assert not op.loads_hidden and self.passed == (op.i, op.j - 1, op.k), op
        self._check_weights(op)
        for ring, content in (("projected", "qkv"), ("cache_out", "new")):
            if (slot := op.slot(ring)) is not None:
                self.put(slot, (content, op.i, self._attention(op), op.k))
        self.homes[self._home("cache_open", op)] = op.i

    def store_query(self, op: Op) -> None:
        assert self.slot_of(op, "projected") == ("qkv", op.i, op.j, op.k), op
        self.put(op.slot("query"), ("query", op.i, op.j, op.k))

    def attend_host(self, op: Op) -> None:
        assert self.slot_of(op, "query") == ("query", op.i, op.j, op.k), op
        home = self._home("cache_attended", op)
        assert self.homes[home] == op.i - 1, op
        self.homes[home] = op.i
        self.put(op.slot("answer"), ("answer", op.i, op.j, op.k))

    def _attend(self, op: Op) -> None:
        assert self.slot_of(op, "projected") == ("qkv", op.i, op.j, op.k), op
        self._check_cache(op)
        if (out := self.slot_of(op, "cache_out")) is not None:
            assert out == ("new", op.i, op.j, op.k), op
        self.put(op.slot("result"), frozenset([("device", op.i, op.j, op.k)]))

    def load_attended(self, op: Op) -> None:
        assert self.slot_of(op, "answer") == ("answer", op.i, op.j, op.k), op
        slot = op.slot("result")
        old = [c for s, c in self.rings["result"] if s == slot]
        self.put(slot, (old[0] if old else frozenset()) | {("host", op.i, op.j, op.k)})

    def _finish(self, op: Op) -> None:
        assert op.loads_hidden
        groups = self.plan.groups[op.k].cache
        parts = {"host"} if groups.attended_by_host.size else set()
        parts |= {"device"} if groups.attended_by_host.size < self.plan.workload.batches[op.k].size else set()
        assert self.slot_of(op, "result") == {(part, op.i, op.j - 1, op.k) for part in parts}, op
        self._check_weights(op)
        self._check_hidden(op)

    # Hidden states

    def read_hidden(self, op: Op) -> None:
        assert self.homes[Slot("hidden_disk", op.k)] == (op.i, self._before(op)), op  # type: ignore[comparison-overlap]
        self.put(op.writes[0], ("hidden", op.i, op.j, op.k))

    def load_hidden(self, op: Op) -> None:
        if (staged := self.slot_of(op, "stage_in")) is not None:
            assert staged == ("hidden", op.i, op.j, op.k), op
        if self.plan.hidden_traffic(op.i, op.j - 1, op.k).host:
            assert self.homes[Slot("hidden_host", op.k)] == (op.i, self._before(op)), op  # type: ignore[comparison-overlap]
        self.put(op.writes[0], ("hidden", op.i, op.j, op.k))

    def store_hidden(self, op: Op) -> None:
        assert self.slot_of(op, "hidden_out") == ("hidden out", op.i, op.j, op.k), op
        self.homes[Slot("hidden_host", op.k)] = (op.i, op.j)  # type: ignore[assignment]
        if (staged := op.slot("stage_out")) is not None:
            self.put(staged, ("hidden out", op.i, op.j, op.k))

    def write_hidden(self, op: Op) -> None:
        assert self.get(op.reads[0]) == ("hidden out", op.i, op.j, op.k), op
        self.homes[Slot("hidden_disk", op.k)] = (op.i, op.j)  # type: ignore[assignment]

    def compute(self, op: Op) -> None:
        """Stages together, or those that attention is computed apart from."""
        kinds = stage_kinds(self.plan, op)
        if kinds == ["attend"]:
            self._attend(op)
        elif kinds[-1] == "project":
            self._project(op)
        elif kinds[0] == "finish":
            self._finish(op)
        else:
            self._compute(op, attends="attend" in kinds)

    def _compute(self, op: Op, *, attends: bool) -> None:
        self._check_weights(op)
        if attends:
            self._check_cache(op)
            self.homes[self._home("cache_open", op)] = op.i
            if not self.plan.host_is_apart:
                self.homes[self._home("cache_host", op)] = op.i
            if (slot := op.slot("cache_out")) is not None:
                self.put(slot, ("new", op.i, self._attention(op), op.k))
        self._check_hidden(op)

    def _check_hidden(self, op: Op) -> None:
        """Check that hidden states are loaded and stored, or handed from one computation to the next."""
        if not op.loads_hidden:
            assert self.passed == (op.i, op.j - 1, op.k), op
        away = self.plan.hidden_traffic(op.i, op.j - 1, op.k) if op.j and op.loads_hidden else None
        if away and away.host + away.disk:
            assert self.slot_of(op, "hidden") == ("hidden", op.i, op.j, op.k), op
        elif op.j and op.loads_hidden:
            assert self.kept[op.k] == (op.i, self._before(op)), op
        if (slot := op.slot("hidden_out")) is not None:
            self.put(slot, ("hidden out", op.i, op.last, op.k))
        if op.stores_hidden:
            self.kept[op.k] = op.i, op.last
        self.passed = op.i, op.last, op.k


def stage_kinds(plan: Plan, op: Op) -> list[str]:
    """The kinds of the stages that an op computes."""
    return [stage.spec.kind for stage in plan.stages[op.j : op.last + 1]]


Linked = list[tuple[Op, tuple[tuple[Lane, int], ...]]]


def linked(plan: Plan) -> Linked:
    linker = Linker(serial=plan.program.serial)
    return [(op, linker.link(op)) for op in plan.generator]


def interleave(plan: Plan, ops: Linked, rng: random.Random, frozen: tuple[Lane, int] | None = None,
               until: tuple[Lane, int] | None = None) -> bool:  # fmt: skip
    """Run ops in a random legal order. `frozen` may not run before `until` has; True if `until` ran first."""
    memory = Memory(plan)
    queues: dict[Lane, list[tuple[Op, tuple[tuple[Lane, int], ...]]]] = {lane: [] for lane in Lane}
    for op, waits in ops:
        queues[op.lane].append((op, waits))
    done = dict.fromkeys(Lane, 0)
    beaten = False
    while any(done[lane] < len(queue) for lane, queue in queues.items()):
        ready = [
            lane
            for lane, queue in queues.items()
            if done[lane] < len(queue) and all(done[other] > n for other, n in queue[done[lane]][1])
        ]
        assert ready, "deadlock"
        chosen = [lane for lane in ready if (lane, done[lane]) != frozen] or ready
        lane = rng.choice(chosen)
        if frozen and (lane, done[lane]) in (until, frozen):
            beaten, frozen = (lane, done[lane]) == until, None
        memory.run(queues[lane][done[lane]][0])
        done[lane] += 1
    return beaten


@pytest.mark.parametrize("case", GRID)
def test_every_visit_computes_once_in_order(case):
    plan = plan_of(**case)
    got = [(op.i, j, op.k) for op in plan.generator if op.name == "compute" for j in range(op.j, op.last + 1)]
    visits = list(itertools.product(range(12), range(len(plan.stages)), range(case["batches"])))
    if plan.host_attends:  # attention that the host takes part in is another test's matter
        visits, got = ([v for v in found if v[1] not in plan.cached_stages] for found in (visits, got))
    assert sorted(got) == visits
    for k in range(case["batches"]):
        assert [b for b in got if b[2] == k] == [b for b in visits if b[2] == k]


@pytest.mark.parametrize("case", SPLIT)
def test_a_layer_is_cut_at_the_attention_that_the_host_takes_part_in(case):
    plan = plan_of(**case)
    found = defaultdict(list)
    for op in plan.generator:
        if op.i and op.work and plan.stages[op.j].module.kind == "attention":
            name = op.name if op.name == "attend_host" else stage_kinds(plan, op)[0]
            found[op.i, plan.attention_of(op.j), op.k].append(name)
    assert plan.host_attends and len(found) == 11 * 3 * case["batches"]
    for (_, _, k), names in found.items():
        groups = plan.groups[k].cache
        middle = ["attend_host"] * bool(groups.attended_by_host.size) + ["attend"] * (groups.attended_by_host.size < 4)
        assert names == ["project", *middle, "finish"]


def test_the_host_attends_to_one_batch_while_the_others_compute():
    """Longer than a batch's computation, it keeps its lane busy from the first layer of a token step to the last."""
    plan = plan_of("all-host", copies=True, overlap=True, sep_layer=True, batches=3, way="host attention")

    def seconds(op: Op) -> float:
        return {"attend_host": 4.0, "compute": 1.0 * (stage_kinds(plan, op) != ["attend"])}.get(op.name, 0.0)

    spans = list(simulate((op for op in plan.generator if op.i), seconds))
    lane = sorted((s.start, s.end) for s in spans if s.op.lane is Lane.HOST_ATTENTION)
    idle = sum(b - a for (_, a), (b, _) in itertools.pairwise(lane))
    busy = sum(b - a for a, b in lane)
    between_steps = 1 + 3 + 3 + 2  # the last batch's finish, all MLPs and heads, the first's embedding and projection
    assert busy == 11 * 3 * 3 * 4.0
    assert idle == 10 * between_steps


@pytest.mark.parametrize("case", GRID)
def test_any_legal_interleaving_is_right(case):
    plan = plan_of(**case)
    ops = linked(plan)
    for seed in range(3):
        interleave(plan, ops, random.Random(seed))


@settings(max_examples=60, deadline=None)
@given(
    percents=st.lists(
        st.sampled_from([(0, 0), (100, 0), (0, 100), (30, 30), (50, 0), (0, 50)]), min_size=3, max_size=3
    ),
    lens=st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=4), min_size=1, max_size=3),
    steps=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    copies=st.booleans(),
    overlap=st.booleans(),
    attended=st.sampled_from([0, 40, 100]),
    keep_open=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_policy_and_lengths_are_right(percents, lens, steps, copies, overlap, attended, keep_open, seed):
    batches = tuple(Batch(tuple(sorted(p, reverse=True)), n) for p, n in zip(lens, steps, strict=False))
    way = {"cpu_cache_compute": attended > 0, "cpu_attention_percent": attended, "keep_open_pages": keep_open}
    policy = Policy(4, len(batches), *itertools.chain(*percents), overlap=overlap, **way)
    plan = make_plan(model_spec(CONFIG, "tiny", "float32"), policy, Workload(batches), host_is_apart=copies)
    interleave(plan, linked(plan), random.Random(seed))


@pytest.mark.parametrize(("percent", "copies", "way"), TRANSFERS)
def test_a_removed_dependency_is_noticed(percent, copies, way):
    """Take single waits away and hold the awaited op back: whenever the order then changes, memory must be wrong."""
    plan = plan_of(percent, copies=copies, overlap=True, sep_layer=True, batches=3, way=way)
    ops = linked(plan)
    positions = dict.fromkeys(Lane, 0)
    places = []
    for n, (op, waits) in enumerate(ops):
        places += [(n, (op.lane, positions[op.lane]), wait) for wait in waits]
        positions[op.lane] += 1
    rng = random.Random(0)
    noticed = unnoticed = 0
    for n, until, frozen in rng.sample(places, min(60, len(places))):
        op, waits = ops[n]
        broken = [*ops[:n], (op, tuple(w for w in waits if w != frozen)), *ops[n + 1 :]]
        try:
            unnoticed += interleave(plan, broken, rng, frozen, until)
        except (AssertionError, KeyError):
            noticed += 1
    print(f"{percent}: {noticed} noticed, {unnoticed} not, {min(60, len(places))} tried")
    assert noticed >= 20 and not unnoticed


def test_a_finished_batch_is_skipped_and_nothing_else_is():
    plan = plan_of("all-disk", copies=True, overlap=True, sep_layer=True, batches=3)
    ops = list(Generator(plan.program, lambda i, k: not (k == 1 and i >= 4)))
    computed = {(op.i, op.k) for op in ops if op.lane is Lane.COMPUTE}
    assert computed == {(i, k) for i in range(12) for k in range(3) if k != 1 or i < 4}
    linker = Linker()
    interleave(plan, [(op, linker.link(op)) for op in ops], random.Random(0))


def test_when_every_batch_has_finished_the_schedule_ends():
    plan = plan_of("mixed", copies=True, overlap=True, sep_layer=True, batches=3)
    steps = {op.i for op in Generator(plan.program, lambda i, k: i < 3) if op.lane is Lane.COMPUTE}
    assert steps == {0, 1, 2}


@pytest.mark.parametrize("copies", [True, False])
def test_overlap_approaches_the_busiest_lane_and_sequence_is_the_sum(copies):
    """Loads take as long as compute: overlapped, they must nearly vanish."""

    def seconds(op: Op) -> float:
        return 1e-3 if op.lane is Lane.COMPUTE else 3e-3 * op.bytes / plan.weight_traffic(plan.stages[op.j].bundle).slot

    for overlap in (True, False):
        policy = Policy(4, 3, 0, 0, 100, 0, 100, 0, overlap=overlap)
        spec, workload = model_spec(CONFIG, "tiny", "float32"), Workload.uniform(32, 16, 4, 3)
        plan = make_plan(spec, policy, workload, host_is_apart=copies)
        spans = list(simulate(plan.generator, seconds, serial=not overlap))
        busy = defaultdict(float)
        for s in spans:
            busy[s.op.lane] += s.end - s.start
        makespan = max(s.end for s in spans)
        if overlap:
            assert makespan <= 1.08 * max(busy.values())
        else:
            assert makespan == pytest.approx(sum(busy.values()))


def test_the_linker_remembers_slots_not_history():
    spec = model_spec(CONFIG, "tiny", "float32")
    sizes = []
    for steps in (20, 200):
        plan = make_plan(spec, Policy(4, 3, 0, 0, 0, 50, 0, 50), Workload.uniform(8, steps, 4, 3))
        linker = Linker()
        most = 0
        for op in plan.generator:
            linker.link(op)
            most = max(most, linker.slots)
        sizes.append(most)
    assert sizes[1] <= 2 * sizes[0] + 200


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=60), hold=st.integers(0, 3))
def test_a_ring_never_gives_live_memory_twice(sizes, hold):
    ring = Ring("r", 12 * 4096)
    live: list[Slot] = []
    for size in sizes:
        while len(live) > hold or not ring.fits(size * 4096):
            ring.release(live.pop(0))
        slot, old = ring.take(size * 4096)
        assert slot.at + slot.nbytes <= ring.capacity
        for other in (s for s in live if s.nbytes and slot.nbytes):  # an empty slot lies nowhere
            assert other.at + other.nbytes <= slot.at or slot.at + slot.nbytes <= other.at
            assert other not in old
        live.append(slot)
