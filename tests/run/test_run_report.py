"""A run's own figures: lanes, bound, bytes moved."""

from __future__ import annotations

import pytest

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.commands.figures import step_seconds
from flexgen_triton.models.family import SIZES, model_spec
from flexgen_triton.plan.cost import seconds
from flexgen_triton.plan.hardware import load_profile
from flexgen_triton.plan.link import Span, simulate
from flexgen_triton.plan.plan import make_plan
from flexgen_triton.plan.schedule import Kind, Lane, Op
from flexgen_triton.plan.spec import Workload
from flexgen_triton.run.trace import Timeline


def span(lane: Lane, start: float, end: float, i: int = 0) -> Span:
    return Span(Op(Kind("op", lane), i, 0, 0, bytes=10), start, end)


def test_bound_and_exposed_time_by_hand():
    spans = [
        span(Lane.DISK_IN, 0, 4),
        span(Lane.COMPUTE, 4, 6),
        span(Lane.DISK_IN, 4, 7, i=1),
        span(Lane.COMPUTE, 7, 12, i=1),
    ]
    timeline = Timeline.of(spans)
    assert timeline.makespan_s == 12
    assert timeline.bound_s == 4 + 5
    assert timeline.lanes["prefill"]["disk_in"].exposed_s == 4
    assert timeline.lanes["decode"]["disk_in"].exposed_s == pytest.approx(1)
    assert timeline.lanes["decode"]["disk_in"].bytes == 10


@pytest.mark.parametrize("sep_layer", [True, False])
def test_the_headline_policy_on_a_t4_is_within_five_percent_of_its_bound(sep_layer):
    """OPT-30B, 48 x 3, 512/32, 20 80 0 100 0 100, in simulation at the published machine's rates."""
    spec = model_spec(SIZES["opt-30b"], "opt-30b", "float16")
    t4 = load_profile("t4")
    plan = make_plan(spec, Policy(48, 3, 20, 80, 0, 100, 0, 100, sep_layer=sep_layer), Workload.uniform(512, 32, 48, 3))
    timeline = Timeline.of(simulate(plan.generator, lambda op: seconds(op, t4)))
    assert timeline.makespan_s <= 1.05 * timeline.bound_s
    lanes = timeline.lanes["decode"]
    assert lanes["h2d"].busy_s == max(use.busy_s for use in lanes.values())


def run(tiny, tmp_path, policy: Policy, copies: bool = False):
    with LLM(str(tiny.path), policy=policy, dtype="float32", offload_dir=tmp_path, copies=copies) as llm:
        llm.generate(tiny.prompts, SamplingParams(max_tokens=5, ignore_eos=True, temperature=0))
        return llm.last_report, llm.engine.weights.bytes_loaded


def test_resident_weights_are_loaded_once_and_never_moved_again(tiny, tmp_path):
    report, loaded = run(tiny, tmp_path, Policy(7, 1, 60, 40))
    plan = report.plans[0]
    resident = sum(s.nbytes for p in (*plan.placements, plan.tables) for s in (p.gpu, p.host))
    assert loaded == resident
    assert all(lanes.keys() == {"compute"} for lanes in report.timeline.lanes.values())


@pytest.mark.parametrize("copies", [False, True])
def test_each_token_step_streams_the_offloaded_share_once(tiny, tmp_path, copies):
    report, _ = run(tiny, tmp_path, Policy(4, 2, 20, 30), copies=copies)
    plan = report.plans[0]
    disk, host = (sum(getattr(p, tier).nbytes for p in plan.placements) for tier in ("disk", "host"))
    moved = {lane: sum(phase[lane].bytes for phase in report.timeline.lanes.values()) for lane in ("disk_in",)}
    assert moved["disk_in"] == 5 * disk
    if copies:
        assert sum(phase["h2d"].bytes for phase in report.timeline.lanes.values()) == 5 * (disk + host)


def test_steps_add_up_to_the_makespan(tiny, tmp_path):
    report, _ = run(tiny, tmp_path, Policy(2, 2, 0, 100))
    assert len(step_seconds(report)) == 5
    assert sum(step_seconds(report)) == pytest.approx(report.timeline.makespan_s, rel=0.02)
    assert report.prefill_s + report.decode_s == pytest.approx(sum(step_seconds(report)))
