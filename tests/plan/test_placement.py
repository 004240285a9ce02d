"""Placement is exact: what is asked of a percentage is what is given, in every layer."""

from __future__ import annotations

import itertools
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexgen_triton.models.family import SIZES, model_spec
from flexgen_triton.plan.layout import split_counts
from flexgen_triton.plan.placement import Extent, Tier, packed_layout, place_layer, whole_tensor
from flexgen_triton.plan.plan import make_plan
from flexgen_triton.plan.policy import Policy
from flexgen_triton.plan.spec import Workload, stored_as

FIVES = range(0, 101, 5)


@pytest.mark.parametrize(
    ("name", "sep_layer"), [("opt-6.7b", True), ("opt-6.7b", False), ("opt-30b", True), ("opt-175b", False)]
)
def test_asked_and_given_differ_by_at_most_one_percent(name, sep_layer):
    """Two decoder layers stand for all: the next test looks at each of a whole model."""
    spec = model_spec(replace(SIZES[name], layers=2), name, "float16")
    for gpu, cpu in itertools.product(FIVES, FIVES):
        if gpu + cpu > 100:
            continue
        plan = make_plan(spec, Policy(1, 1, gpu, cpu, sep_layer=sep_layer), Workload.uniform(8, 4, 1, 1))
        given_bytes = plan.placement["weights"]
        assert sum(given_bytes.values()) == spec.weight_bytes
        for tier, asked in (("gpu", gpu), ("host", cpu), ("disk", 100 - gpu - cpu)):
            assert abs(given_bytes[tier] / spec.weight_bytes * 100 - asked) <= 0.1, (gpu, cpu, tier)


@pytest.mark.parametrize("gpu", FIVES)
def test_every_layer_is_within_one_row_of_its_share(gpu):
    spec = model_spec(SIZES["opt-30b"], "opt-30b", "float16")
    plan = make_plan(spec, Policy(1, 1, gpu, (100 - gpu) // 2), Workload.uniform(8, 4, 1, 1))
    for bundle, placement in zip(plan.bundles, plan.placements, strict=True):
        extents = [e for tier in Tier for e in placement.share(tier).extents]
        total, row = sum(e.nbytes for e in extents), max((e.row_bytes for e in extents), default=0)
        assert abs(placement.gpu.useful - total * gpu / 100) <= row, bundle.name


@settings(max_examples=100, deadline=None)
@given(
    tensors=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 300)), min_size=1, max_size=8),
    gpu=st.integers(0, 100),
    cpu=st.integers(0, 100),
    gap=st.sampled_from([0, 16, 5000]),
    parts=st.integers(1, 5),
)
def test_every_row_is_placed_once_and_read_whole(tensors, gpu, cpu, gap, parts):
    cpu = min(cpu, 100 - gpu)
    extents, offset = [], 100
    for n, (rows, row_bytes) in enumerate(tensors):
        extents.append(Extent(f"t{n}", 0, rows, row_bytes, 0, offset))
        offset = extents[-1].end + gap
    placement = place_layer(extents, gpu, cpu)
    seen = []
    for tier in Tier:
        share = placement.share(tier)
        for extent, segment in zip(share.extents, share.segments, strict=True):
            seen += [(extent.tensor, row) for row in range(extent.row, extent.row + extent.rows)]
            inside = [r for r in share.runs if r.at <= segment.at and segment.at + extent.nbytes <= r.at + r.nbytes]
            assert len(inside) == 1 and inside[0].offset + segment.at - inside[0].at == extent.offset
        for run in share.runs:
            assert run.offset % 4096 == run.nbytes % 4096 == run.at % 4096 == 0
        cut = [r for part in share.parts(parts, 4096) for r in part]
        assert sum(r.nbytes for r in cut) == sum(r.nbytes for r in share.runs)
        assert all(r.offset % 4096 == 0 for r in cut)
    assert sorted(seen) == sorted((f"t{n}", row) for n, (rows, _) in enumerate(tensors) for row in range(rows))


SMALL = replace(SIZES["opt-125m"], layers=5, hidden=64, ffn=128, vocab=300)


@pytest.mark.parametrize("sep_layer", [True, False])
@pytest.mark.parametrize("compressed", [False, True])
def test_of_bundles_that_are_alike_one_is_placed_and_costed(sep_layer, compressed):
    policy = Policy(1, 1, 20, 30, sep_layer=sep_layer, compress_weight=compressed)
    spec = stored_as(model_spec(SIZES["opt-175b"], "opt-175b", "float16"), policy)
    plan = make_plan(spec, policy, Workload.uniform(8, 4, 1, 1))
    heads = {bundle.tensors for bundle in plan.bundles if bundle.is_head}
    assert len(plan.distinct_bundles) <= 1 + (2 if sep_layer else 1) + len(heads)
    assert len(plan.bundles) == len(plan.placements) > 96


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    gpu=st.integers(0, 100),
    cpu=st.integers(0, 100),
    sep_layer=st.booleans(),
    policy=st.sampled_from([Policy(2, 3), Policy(1, 1, compress_weight=True)]),
    is_packed=st.booleans(),
)
def test_what_is_planned_of_a_bundle_is_its_own(data, gpu, cpu, sep_layer, policy, is_packed):
    """Wherever a checkpoint has a bundle's tensors, sizes and transfers are those of that bundle placed by itself."""
    policy = replace(policy, w_gpu_percent=gpu, w_cpu_percent=min(cpu, 100 - gpu), sep_layer=sep_layer)
    spec = stored_as(model_spec(SMALL, "small", "float16"), policy)
    if is_packed:
        stored = dict(zip((m.name for m in spec.modules), packed_layout(spec.modules), strict=True))
    else:
        offset, stored = 0, {}
        gaps = st.sampled_from([0, 2, 4096, 8192])
        for m in spec.modules:
            file, offset, stored[m.name] = data.draw(st.integers(0, 2)), offset + data.draw(gaps), []
            for t in m.tensors:
                stored[m.name].append(whole_tensor(t, file, offset))
                offset = stored[m.name][-1].end + (data.draw(gaps) if m.index % 2 else 0)
    workload = Workload.uniform(8, 4, policy.gpu_batch_size, policy.num_gpu_batches)
    plan = make_plan(spec, policy, workload, extents=None if is_packed else stored)
    gathered = {t.name for m in spec.modules for t in m.tensors if t.gathered}
    for n, bundle in enumerate(plan.bundles):
        extents = [e for m in bundle.modules for e in stored[m.name] if e.tensor not in gathered]
        own, traffic = place_layer(extents, gpu, policy.w_cpu_percent), plan.weight_traffic(n)
        assert plan.placements[n] == own
        for tier in Tier:
            planned = list(plan.weight_shares(tier))[n]
            assert (planned.useful, planned.nbytes) == (own.share(tier).useful, own.share(tier).nbytes)
        assert traffic.disk_parts == tuple(p.disk_bytes for p in plan.parts(n))
        assert traffic.host_parts == tuple(p.host_bytes for p in plan.parts(n))
        assert sum(traffic.disk_parts) == own.disk.nbytes and sum(traffic.host_parts) == own.host.nbytes
        read = [r for p in plan.parts(n) for r in p.disk]
        assert {r.file for r in read} <= {e.file for e in extents}


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    cuts=st.lists(st.floats(0, 100) | st.integers(0, 100), min_size=1, max_size=3),
)
@example(sizes=[1, 1, 15, 9], cuts=[2, 3])
def test_sequences_are_divided_to_one(sizes, cuts):
    """At the end of every GPU batch, and so of the last, each share of all sequences so far is exact to one."""
    percents = [high - low for low, high in pairwise([0, *sorted(cuts)])]
    counts = split_counts(sizes, percents)
    assert [sum(c) for c in counts] == sizes and all(n >= 0 for c in counts for n in c)
    for end in range(1, len(sizes) + 1):
        total = sum(sizes[:end])
        for column, percent in enumerate((*percents, 100 - sum(percents))):
            given = sum(c[column] for c in counts[:end])
            assert abs(given - total * percent / 100) < 1, (end, column)
            assert given == 0 or percent > 0
