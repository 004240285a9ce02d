"""Groups of the cache are the plan's alone: however sequences are divided into them, tokens stay the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from test_compression import check

from flexgen_triton.models.family import model_spec
from flexgen_triton.models.opt import opt_config
from flexgen_triton.plan import traffic
from flexgen_triton.plan.layout import Group, Groups, cache_groups
from flexgen_triton.plan.placement import Tier
from flexgen_triton.plan.plan import Plan, make_plan
from flexgen_triton.plan.policy import Policy
from flexgen_triton.plan.spec import Batch, Workload

SPREAD = Policy(7, 1, 100, 0, 28, 43, 100, 0)  # of seven sequences two on the GPU, three on the host, two on disk
HOST = Policy(7, 1, 100, 0, 0, 72, 100, 0)  # five on the host
CASES = {
    "in place": (SPREAD, False),
    "copied": (SPREAD, True),
    "open pages kept": (replace(SPREAD, keep_open_pages=True), True),
    "half attended by the host": (replace(HOST, cpu_cache_compute=True, cpu_attention_percent=50), True),
    "sparse": (replace(SPREAD, attn_sparsity=0.2), True),
    "4-bit and sparse": (replace(SPREAD, compress_weight=True, compress_cache=True, attn_sparsity=0.1), True),
}


def halved(batch: Batch, counts: Sequence[int]) -> Groups:
    """Every group as two neighbours."""
    return Groups(half for group in cache_groups(batch, counts) for half in halves(group))


def halves(group: Group) -> Iterator[Group]:
    middle = (group.size + 1) // 2
    for low, high in ((0, middle), (middle, group.size)):
        if low < high:
            lens, asked = group.prompt_lens[low:high], group.asked[low:high]
            yield replace(group, first=group.first + low, prompt_lens=lens, asked=asked)


def test_a_batchs_groups_are_chosen_by_their_homes():
    groups = cache_groups(Batch((9, 8, 7, 6, 5), 3), (1, 2, 0, 2))
    assert [(g.tier, g.first, g.prompt_lens) for g in groups] == [
        (Tier.GPU, 0, (9,)),
        (Tier.HOST, 1, (8, 7)),
        (Tier.DISK, 3, (6, 5)),
    ], "none is empty"
    assert groups.attended_by_host.rows == slice(1, 3)
    assert groups.sent == groups.on_disk and not groups.sent_by_host
    assert groups.sent.cached(1) == (6, 5)


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_the_references_with_twice_as_many_groups(tiny, tmp_path, monkeypatch, case):
    found: list[Groups] = []

    def watched(batch: Batch, counts: Sequence[int]) -> Groups:
        found.append(halved(batch, counts))
        return found[-1]

    monkeypatch.setattr(traffic, "cache_groups", watched)
    policy, copies = CASES[case]
    check(tiny, policy, tmp_path, copies=copies)
    homes = [(g.tier, g.attended_by_host) for g in found[-1]]
    assert len(homes) == 6 and all(homes.count(home) == 2 for home in homes)


def plan_of(policy: Policy) -> Plan:
    config = opt_config(hidden=128, layers=2, heads=2, ffn=128, vocab=99)
    batch = Batch((140, 130, 64, 63, 31, 30, 7), 5)
    return make_plan(model_spec(config, "tiny", "float16"), policy, Workload((batch,)), host_is_apart=True)


def test_more_groups_need_no_more_memory_and_move_the_same_bytes(monkeypatch):
    whole = plan_of(SPREAD)
    monkeypatch.setattr(traffic, "cache_groups", halved)
    parts = plan_of(SPREAD)
    assert len(parts.groups[0].cache) == 6 > len(whole.groups[0].cache) == 3
    assert parts.footprint.homes == whole.footprint.homes
    assert all(n <= whole.footprint.rings[name] for name, n in parts.footprint.rings.items())
    for i in range(5):
        few, many = whole.cache_traffic(i, 0), parts.cache_traffic(i, 0)
        for name in ("disk_read", "host_load", "out" if i else "host_store", "disk_write"):
            assert getattr(few, name) == getattr(many, name), (i, name)
