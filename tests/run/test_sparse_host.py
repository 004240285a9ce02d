"""Sparse attention over a host's cache that is copied: K travels, V is read where it is at home."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_compression import check, make_policy

from flexgen_triton.memory.buffers import Buffers, Sizes
from flexgen_triton.memory.cache import Cache
from flexgen_triton.memory.cache_homes import CacheHomes
from flexgen_triton.memory.cache_places import CachePlaces
from flexgen_triton.memory.disk import DiskQueue
from flexgen_triton.memory.stripes import Folders
from flexgen_triton.models.family import model_spec
from flexgen_triton.models.opt import opt_config
from flexgen_triton.plan.placement import Tier
from flexgen_triton.plan.plan import Plan, make_plan
from flexgen_triton.plan.policy import Policy
from flexgen_triton.plan.schedule import Op
from flexgen_triton.plan.spec import Batch, Workload

CONFIG = opt_config(hidden=128, layers=2, heads=2, ffn=128, vocab=99)
LENS = (140, 130, 64, 63, 7)
STEP = 2
K, V, OPEN, FULL = 1, 2, 3, 4  # what a test fills the cache's homes with
FORMATS = pytest.mark.parametrize("is_4bit", [False, True], ids=["16-bit", "4-bit"])
HOMES = pytest.mark.parametrize("percent", [(0, 100), (20, 40), (0, 0)], ids=["host", "each", "disk"])


def plan_of(percent: tuple[int, int], sparsity: float, *, is_4bit: bool) -> Plan:
    policy = Policy(5, 1, 100, 0, *percent, 100, 0, attn_sparsity=sparsity, compress_cache=is_4bit)
    return make_plan(model_spec(CONFIG, "tiny", "float16"), policy, Workload((Batch(LENS, 4),)), host_is_apart=True)


def none_ended(plan: Plan) -> Callable[[int], list[bool]]:
    return lambda k: [False] * plan.workload.batches[k].size


@contextmanager
def filled(plan: Plan, folder: Path) -> Iterator[tuple[Cache, CachePlaces, Buffers]]:
    """A cache whose homes on the host hold nothing but K, V and OPEN."""
    disk = DiskQueue(threads=1)
    buffers = Buffers(Sizes.of(plan), device=torch.device("cpu"), folders=Folders.of(folder))
    homes = CacheHomes(plan, buffers)
    cache = Cache(plan, homes, buffers, disk, none_ended(plan))
    for home in homes._homes.values():
        if home.group.tier is Tier.HOST:
            halves = home.memory.view(plan.cache_home_pages(0), 2, home.group.size * plan.cache_layout.half)
            halves[:, 0], halves[:, 1] = K, V
        elif home.group.tier is Tier.DISK:
            home.memory.fill_(OPEN)
    try:
        yield cache, CachePlaces(plan, homes, buffers.uploads, none_ended(plan)), buffers
    finally:
        buffers.close()
        disk.close()


def op_named(plan: Plan, name: str) -> Op:
    attention = plan.cached_stages[0]
    return next(op for op in plan.generator if op.name == name and op.i == STEP and op.j <= attention <= op.last)


def load(plan: Plan, cache: Cache, buffers: Buffers) -> torch.Tensor:
    """The ring's slot after load_cache, zero where nothing was copied."""
    op = op_named(plan, "load_cache")
    slot = buffers.slot(op.writes[0]).zero_()
    staged = op.slot("stage_in")
    cache.load(op, buffers.slot(staged).fill_(FULL) if staged else None, slot)
    return slot


@FORMATS
@HOMES
@pytest.mark.parametrize("sparsity", [0.1, 1.0], ids=["sparse", "dense"])
def test_as_many_bytes_are_copied_as_planned(tmp_path, percent, is_4bit, sparsity):
    plan = plan_of(percent, sparsity, is_4bit=is_4bit)
    traffic, layout = plan.cache_traffic(STEP, 0), plan.cache_layout
    with filled(plan, tmp_path) as (cache, _, buffers):
        counts = torch.bincount(load(plan, cache, buffers), minlength=5).tolist()
    host, disk = plan.groups[0].cache.sent_by_host, plan.groups[0].cache.on_disk
    blocks = sum(layout.pages(n) for n in host.cached(STEP))
    assert counts[K] == blocks * layout.half
    assert counts[V] == (0 if sparsity < 1 else blocks * layout.half)
    assert counts[OPEN] == disk.size * 2 * layout.half
    assert counts[FULL] == traffic.disk_read
    assert counts[K] + counts[V] + counts[OPEN] == traffic.host_load


@FORMATS
@HOMES
def test_attention_is_handed_k_from_the_ring_and_v_at_home(tmp_path, percent, is_4bit):
    """The host's sequences are; the disk's come from the ring, the newest token of each from the slot `cache_out`."""
    plan = plan_of(percent, 0.1, is_4bit=is_4bit)
    op = op_named(plan, "compute")
    with filled(plan, tmp_path) as (cache, places, buffers):
        slot = load(plan, cache, buffers)
        out = buffers.slot(next(s for s in op.writes if s.ring == "cache_out"))
        for group, segments in places.segments(op, slot, out):
            if group.tier is Tier.GPU:
                continue
            home = cache._homes[op, group].memory
            *earlier, newest = segments
            assert all(within(f, out) for f in (*newest.k, *newest.v))
            for s in earlier:
                assert all(within(f, slot) for f in s.k)
                assert all(within(f, home if group.tier is Tier.HOST else slot) for f in s.v)
                assert [f.shape for f in s.k] == [f.shape for f in s.v]
            if group.tier is Tier.HOST:
                assert len(earlier) == 1
                assert earlier[0].lens.tolist() == list(group.cached(STEP))
                assert content(earlier[0].k[0], earlier[0].lens) == {K}
                assert content(earlier[0].v[0], earlier[0].lens) == {V}


def within(field: torch.Tensor, buffer: torch.Tensor) -> bool:
    return 0 <= field.data_ptr() - buffer.data_ptr() < buffer.numel()


def content(field: torch.Tensor, lens: torch.Tensor) -> set[int]:
    """Values of the bytes of the valid tokens of a field [blocks, n, Hkv, tokens, width]."""
    found: set[int] = set()
    for s, n in enumerate(lens.tolist()):
        rows = field[:, s].transpose(1, 2).flatten(0, 1)[:n]
        found |= set(rows.contiguous().view(torch.uint8).unique().tolist())
    return found


@pytest.mark.grid
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "serial"])
@pytest.mark.parametrize("fmt", ["sparse", "all"])
@pytest.mark.parametrize("percent", [(0, 100), (30, 40), (0, 60)], ids=["host", "each", "host and disk"])
def test_tokens_are_the_references(tiny, tmp_path, percent, fmt, overlap):
    """Several GPU batches of unequal prompts, weights and hidden states off the device too."""
    policy = make_policy((2, 4, 20, 40, *percent, 0, 100), fmt, overlap=overlap)
    check(tiny, policy, tmp_path, copies=True)


def test_the_home_is_what_sparse_attention_reads(tiny, tmp_path, monkeypatch):
    """With V at home wiped before each load, tokens are no longer the reference's: nothing else holds that V."""
    whole = Cache.load

    def wipe(self: Cache, op: Op, staged: torch.Tensor | None, into: torch.Tensor) -> None:
        whole(self, op, staged, into)
        (group,) = self._plan.groups[op.k].cache.sent_by_host
        self._homes[op, group].memory.view(-1, 2, group.size * self._layout.half)[:, 1] = 0

    monkeypatch.setattr(Cache, "load", wipe)
    with pytest.raises(AssertionError):
        check(tiny, make_policy((2, 2, 100, 0, 0, 100, 100, 0), "sparse"), tmp_path, copies=True)
