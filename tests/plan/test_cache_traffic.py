"""Attention's transfers: K alone of the host's sequences where sparse attention fetches V itself; all else whole."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import test_schedule
from hypothesis import given
from hypothesis import strategies as st
from test_schedule import CONFIG, Memory, interleave, linked, stage_kinds

from flexgen_triton.models.family import model_spec
from flexgen_triton.plan.layout import CacheLayout, Field
from flexgen_triton.plan.plan import Plan, make_plan
from flexgen_triton.plan.policy import Policy
from flexgen_triton.plan.schedule import Lane, Op, Slot
from flexgen_triton.plan.spec import Batch, Workload

LENS = (140, 130, 64, 63, 7)
STEPS = 5
HOST, SPREAD, DISK = (0, 100), (20, 40), (0, 0)
FORMATS = pytest.mark.parametrize("is_4bit", [False, True], ids=["16-bit", "4-bit"])


def plan_of(cache: tuple[int, int], sparsity: float, *, is_4bit: bool = False, copies: bool = True, batches: int = 1,
            overlap: bool = True) -> Plan:  # fmt: skip
    policy = Policy(5, batches, 100, 0, *cache, 100, 0, attn_sparsity=sparsity, compress_cache=is_4bit, overlap=overlap)
    spec = model_spec(CONFIG, "tiny", "float16")
    return make_plan(spec, policy, Workload((Batch(LENS, STEPS),) * batches), host_is_apart=copies)


def loaded(plan: Plan) -> dict[int, int]:
    """Bytes that the first layer's attention of batch 0 is sent, by token step."""
    first = (plan.cached_stages[0], 0)
    return {op.i: op.bytes for op in plan.generator if op.name == "load_cache" and (op.j, op.k) == first}


@FORMATS
def test_of_the_hosts_sequences_only_k_travels(is_4bit):
    """Blocks of 16 tokens, 2 heads of 64 numbers: 4 KiB of K in 16 bits, in 4 bits 32 + 4 bytes a number's head."""
    sparse, dense = (plan_of(HOST, s, is_4bit=is_4bit) for s in (0.1, 1.0))
    half = 16 * 2 * (36 if is_4bit else 128)
    assert sparse.cache_layout.half == (half + 4095) // 4096 * 4096
    for step in range(1, STEPS):
        blocks = sum(-(-(n + step - 1) // 16) for n in LENS)
        assert loaded(sparse)[step] == blocks * sparse.cache_layout.half
        assert loaded(dense)[step] == 2 * loaded(sparse)[step]


@FORMATS
def test_the_ring_holds_only_what_travels(is_4bit):
    sparse, dense = (plan_of(HOST, s, is_4bit=is_4bit) for s in (0.1, 1.0))
    assert dense.footprint.rings["cache"] == 2 * sparse.footprint.rings["cache"] > 0
    others = [name for name in dense.footprint.rings if name != "cache"]
    assert [dense.footprint.rings[name] for name in others] == [sparse.footprint.rings[name] for name in others]


@FORMATS
def test_disk_and_open_blocks_travel_whole(is_4bit):
    sparse, dense = (plan_of(SPREAD, s, is_4bit=is_4bit) for s in (0.1, 1.0))
    host = dense.groups[0].cache.sent_by_host
    assert host.size == 2
    for step in range(1, STEPS):
        a, b = sparse.cache_traffic(step, 0), dense.cache_traffic(step, 0)
        v = sum(dense.cache_layout.pages(n) for n in host.cached(step)) * dense.cache_layout.half
        assert b.host_load - a.host_load == v
        for name in ("disk_read", "read_slot", "out", "host_store", "disk_write", "write_slot"):
            assert getattr(a, name) == getattr(b, name), name
    assert sparse.cache_traffic(0, 0) == dense.cache_traffic(0, 0)
    sparse, dense = plan_of(DISK, 0.1), plan_of(DISK, 1.0)
    assert loaded(sparse) == loaded(dense)


def test_in_place_nothing_changes():
    sparse, dense = (plan_of(SPREAD, s, copies=False) for s in (0.1, 1.0))
    assert [sparse.cache_traffic(i, 0) for i in range(STEPS)] == [dense.cache_traffic(i, 0) for i in range(STEPS)]


def test_what_attention_fetches_is_the_kept_rows_of_every_head():
    traffic = plan_of(HOST, 0.1).cache_traffic(2, 0)
    assert traffic.gathered == (14 + 13 + 6 + 6 + 0) * 2 * 128  # of 141, 131, 65, 64 and 8; 2 heads, 128 bytes a row
    assert plan_of(HOST, 0.1, is_4bit=True).cache_traffic(2, 0).gathered == 39 * 2 * 36
    assert plan_of(DISK, 0.1).cache_traffic(2, 0).gathered == plan_of(HOST, 1.0).cache_traffic(2, 0).gathered == 0


class GatheringMemory(Memory):
    """A model of memory in which attention finds K in the ring and V at home, of the step before."""

    def compute(self, op: Op) -> None:
        super().compute(op)
        if "attend" in stage_kinds(self.plan, op) and self.plan.cache_traffic(op.i, op.k).gathered:
            home = op.slot("cache_host")
            assert home == Slot("cache_host", self.plan.attention_of(op.j) * len(self.plan.groups) + op.k), op
            assert self.homes[home] == op.i - 1, op


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "serial"])
@pytest.mark.parametrize(("cache", "batches"), [(HOST, 1), (HOST, 3), (SPREAD, 3)])
def test_v_at_home_is_the_last_steps_under_any_legal_interleaving(monkeypatch, cache, batches, overlap):
    monkeypatch.setattr(test_schedule, "Memory", GatheringMemory)
    plan = plan_of(cache, 0.1, batches=batches, overlap=overlap)
    for seed in range(3):
        interleave(plan, linked(plan), random.Random(seed))


def test_attention_waits_for_the_store_before_it_and_the_store_for_attention():
    """They wait for each other directly, not only by way of the load of K."""
    plan = plan_of(HOST, 0.1, batches=3)
    stored: dict[tuple[int, int, int], int] = {}
    computed: dict[tuple[int, int, int], int] = {}
    counts = dict.fromkeys(Lane, 0)
    checked = 0
    for op, waits in linked(plan):
        if op.name == "store_cache":
            visit = (op.i, op.j, op.k)
            stored[visit] = counts[op.lane]
            assert dict(waits)[Lane.COMPUTE] >= computed[visit], op
        if op.name == "compute" and "attend" in stage_kinds(plan, op):
            attention = plan.attention_of(op.j)
            computed[op.i, attention, op.k] = counts[op.lane]
            if op.i:
                assert dict(waits)[Lane.D2H] >= stored[op.i - 1, attention, op.k], op
                checked += 1
        counts[op.lane] += 1
    assert checked == (STEPS - 1) * 3 * len(plan.cached_stages)


def test_attention_that_does_not_wait_for_the_store_is_noticed(monkeypatch):
    """Neither it nor the load of K waits for the home any more: held back, the store comes too late for V."""

    class KeysFromAnywhere(GatheringMemory):
        def load_cache(self, op: Op) -> None:
            self.put(op.writes[0], ("cache", op.i, op.j, op.k))

    monkeypatch.setattr(test_schedule, "Memory", KeysFromAnywhere)
    plan = plan_of(HOST, 0.1, batches=3)
    ops = linked(plan)
    loose = [
        (op, tuple(w for w in waits if w[0] is not Lane.D2H or op.name not in ("compute", "load_cache")))
        for op, waits in ops
    ]
    positions = [n for n, op in enumerate(op for op, _ in ops if op.lane is Lane.D2H) if op.i == 1]
    computes = [op for op, _ in ops if op.lane is Lane.COMPUTE]
    noticed = 0
    for n in positions:
        op = [op for op, _ in ops if op.lane is Lane.D2H][n]
        until = next(m for m, c in enumerate(computes) if c.j <= op.j <= c.last and (c.i, c.k) == (2, op.k))
        try:
            interleave(plan, loose, random.Random(n), (Lane.D2H, n), (Lane.COMPUTE, until))
        except AssertionError:
            noticed += 1
    assert noticed == len(positions) > 0


@given(
    counts=st.lists(st.integers(0, 5), max_size=5),
    heads=st.integers(1, 3),
)
def test_ranges_are_the_bytes_that_sequences_have_joined(counts, heads):
    layout = CacheLayout(heads, (Field("float16", 64),), 64)
    half, n = layout.half, len(counts)
    want = sorted(
        at * half
        for s, blocks in enumerate(counts)
        for at in (2 * n * block + h * n + s for block in range(blocks) for h in (0, 1))
    )
    ranges = list(layout.ranges(counts))
    assert [at for low, high in ranges for at in range(low, high, half)] == want
    assert all(a[1] < b[0] for a, b in pairwise(ranges))
    if len(set(counts)) == 1 and counts[0]:
        assert ranges == [(0, layout.dense(counts[0], n))]
