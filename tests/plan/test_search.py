"""The search for a policy: what it returns fits, more of anything never hurts, and what is possible is found."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from machines import SMALL_GPU, TWO_CORES

from flexgen_triton.models.family import SIZES, model_spec
from flexgen_triton.models.opt import opt_config
from flexgen_triton.plan.fit import fits, need
from flexgen_triton.plan.hardware import GIB, Curve, Hardware, load_profile
from flexgen_triton.plan.placement import Tier
from flexgen_triton.plan.plan import make_plan
from flexgen_triton.plan.policy import Policy, PolicyError
from flexgen_triton.plan.predict import EXACT_STEPS, predict, sample_steps
from flexgen_triton.plan.problem import Problem, available
from flexgen_triton.plan.relax import ATTENDED, KINDS, Relaxation, with_shares
from flexgen_triton.plan.search import FEW_STEPS, frontier, modest, search
from flexgen_triton.plan.spec import Workload
from flexgen_triton.plan.worth import worth

MIB = 1 << 20
TINY = model_spec(opt_config(256, 6, 4, 1024, vocab=2000, positions=512), "tiny", "float16")
SLOW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])

FEW_SIZES = {"gpu_batch_sizes": (1, 4, 32, 256), "gpu_batches": (1, 3, 12)}
TRIED = pytest.mark.parametrize(
    "tried", [FEW_SIZES, pytest.param({}, marks=pytest.mark.slow)], ids=["a few sizes", "every size"]
)

rates = st.floats(1e8, 1e11)
sizes = st.integers(8 * MIB, 512 * MIB)


@st.composite
def machines(draw: st.DrawFn) -> Hardware:
    """A GPU beside a host, with any links; TINY's weights are 11 MB."""
    links = {name: Curve.flat(draw(rates)) for name in ("h2d", "d2h", "disk_read", "disk_write")}
    speed = draw(st.floats(1e10, 1e13))
    matmul = {kind: Curve(((1, speed / 50), (256, speed))) for kind in ("float16", "4-bit")}
    free = 128 * MIB + TWO_CORES.process_bytes  # what libraries take of the host
    sizes_of = {"gpu_bytes": draw(sizes) + SMALL_GPU.context_bytes, "host_bytes": draw(sizes) + free}
    return replace(SMALL_GPU, **links, matmul=matmul, **sizes_of, disk_bytes=draw(sizes))


def attending_host(rate: float) -> Hardware:
    """A fast GPU with room for the weights and little else beside a slow link; the host attends at so many bytes/s."""
    rates = {kind: Curve.flat(rate) for kind in ("float16", "4-bit")}
    fast = {"matmul": {kind: Curve.flat(2e13) for kind in ("float16", "4-bit")}, "prefill_attention": Curve.flat(2e13)}
    links = {"h2d": Curve.flat(1e9), "d2h": Curve.flat(1e9)}
    gpu = SMALL_GPU.context_bytes + 220 * MIB
    return replace(SMALL_GPU, **links, **fast, host_attention=rates, gpu_bytes=gpu, host_bytes=8 * GIB)


@pytest.mark.parametrize(("rate", "low", "high"), [(2e10, 0.8, 1), (1e9, 0.35, 0.65), (2e7, 0, 0.1)])
def test_the_host_attends_to_what_it_can_read_while_the_link_brings_the_rest(rate, low, high):
    """At twenty times the link's rate, at the same and at a fiftieth, for 256 sequences, whose cache is there."""
    hardware, problem = attending_host(rate), Problem(TINY, 400, 64)
    relaxation = Relaxation(TINY, Policy(32), 400, 64, hardware)
    shares = relaxation.solve(8, available(hardware, problem)).shares
    on_host = shares["cache", ATTENDED] + shares["cache", Tier.HOST]
    assert on_host > 0.5
    assert low <= shares["cache", ATTENDED] / on_host <= high


def test_sharing_attention_beats_leaving_it_to_either():
    policy = Policy(64, 4, 100, 0, 0, 100, 100, 0)
    took = [
        predict(Problem(TINY, 400, 64).plan(p, host_is_apart=True), attending_host(1e9)).total_s
        for p in (policy, *(replace(policy, cpu_cache_compute=True, cpu_attention_percent=n) for n in (100, 50)))
    ]
    assert took[2] < 0.7 * min(took[:2])


def test_open_blocks_stay_on_a_gpu_that_has_room_for_them():
    """The prompts' cache exceeds it by far."""
    problem, hardware = Problem(TINY, 400, 64, num_prompts=256), attending_host(2e7)
    found = search(problem, hardware).best
    for keeps in (True, False):
        plan = problem.plan(replace(found.policy, keep_open_pages=keeps), host_is_apart=True)
        quicker = predict(plan, hardware, exact=FEW_STEPS).total_s < found.prediction.total_s
        assert not (quicker and fits(plan, available(hardware, problem)))


problems = st.builds(Problem, st.just(TINY), st.integers(1, 100), st.integers(1, 40), st.none() | st.integers(1, 300))


def possible(problem: Problem, hardware: Hardware):
    """The search's answer; what does not fit is another test's matter."""
    try:
        return search(problem, hardware)
    except PolicyError:
        assume(False)


@TRIED
@SLOW
@given(problems, machines())
def test_every_plan_that_is_returned_fits(tried, problem, hardware):
    problem = replace(problem, **tried)
    for found in possible(problem, hardware).found:
        assert fits(found.plan, available(hardware, problem))
        assert found.plan.policy == found.policy
        assert found.prediction.total_s > 0


@TRIED
@SLOW
@given(
    problems, machines(), st.sampled_from(["gpu", "host", "disk", "h2d", "d2h", "disk_read", "disk_write", "matmul"])
)
def test_more_memory_or_bandwidth_never_lowers_the_predicted_throughput(tried, problem, hardware, what):
    """Exactly so for the bound of all policies and for any one policy, every token step of which is simulated (of a
    sample some steps count more than others); for the best one that is found within `gap`, the share of the bound that
    the search says it leaves open."""
    problem = replace(problem, **tried)
    less = possible(problem, hardware)
    better = search(problem, improved(hardware, what))
    assert better.bound_tokens_per_s >= less.bound_tokens_per_s * (1 - 1e-6)
    short = replace(problem, gen_len=min(problem.gen_len, EXACT_STEPS))
    plan = short.plan(less.best.policy, host_is_apart=hardware.host_is_apart)
    slow, fast = (predict(plan, machine).total_s for machine in (hardware, better.hardware))
    assert fast <= slow * (1 + 1e-9)
    assert better.best.tokens_per_s >= less.best.tokens_per_s * (1 - better.gap - 1e-6)


def improved(hardware: Hardware, what: str) -> Hardware:
    if what in ("gpu", "host", "disk"):
        return hardware.limited(**{what: int(1.5 * getattr(hardware, f"{what}_bytes"))})
    if what == "matmul":
        return replace(hardware, matmul={kind: curve.scaled(2) for kind, curve in hardware.matmul.items()})
    return replace(hardware, **{what: getattr(hardware, what).scaled(2)})


shares = st.tuples(st.integers(0, 100), st.integers(0, 100)).map(lambda p: (p[0], min(p[1], 100 - p[0])))


@TRIED
@settings(SLOW, max_examples=20)
@given(
    st.integers(1, 40), st.integers(1, 4), shares, shares, shares, st.booleans(), st.integers(1, 90), st.integers(1, 20)
)
def test_what_is_feasible_is_never_called_infeasible(tried, size, count, w, cache, act, copies, prompt_len, gen_len):
    """Any policy, on a machine with not one byte more than it needs."""
    policy = Policy(size, count, *w, *cache, *act)
    plan = make_plan(TINY, policy, Workload.uniform(prompt_len, gen_len, size, count), host_is_apart=copies)
    needs = need(plan)
    hardware = (SMALL_GPU if copies else TWO_CORES).limited(
        needs.get(Tier.GPU, 0) + (SMALL_GPU.context_bytes if copies else 0),
        needs[Tier.HOST] + TWO_CORES.process_bytes,
        needs[Tier.DISK],
    )
    found = search(Problem(TINY, prompt_len, gen_len, **tried), hardware)
    assert fits(found.best.plan, {t: float(n) for t, n in needs.items()})


@pytest.mark.parametrize("count", [2, 3, 8])
def test_more_gpu_batches_are_tried_where_staging_lacks_room(count):
    """A layer is staged in as many parts as there are GPU batches, so one sequence alone needs more of the host."""
    plan = make_plan(TINY, Policy(1, count, 0, 0, 0, 0, 0, 0), Workload.uniform(1, 1, 1, count), host_is_apart=True)
    needs = need(plan)
    hardware = SMALL_GPU.limited(
        needs[Tier.GPU] + SMALL_GPU.context_bytes, needs[Tier.HOST] + TWO_CORES.process_bytes, needs[Tier.DISK]
    )
    assert fits(search(Problem(TINY, 1, 1), hardware).best.plan, {t: float(n) for t, n in needs.items()})


@pytest.mark.parametrize("hardware", [SMALL_GPU, TWO_CORES], ids=lambda h: h.name)
def test_infeasible_problems_say_what_lacks_and_what_would_do(hardware):
    model = model_spec(SIZES["opt-1.3b"], "opt-1.3b", "float16")
    tight = hardware.limited(gpu=hardware.context_bytes + 64 * MIB, host=TWO_CORES.process_bytes + 160 * MIB)
    with pytest.raises(PolicyError) as refused:
        search(Problem(model, 512, 32), tight)
    sentence = str(refused.value)
    assert re.search(r"(the GPU|the host) lacks \d+", sentence)
    flags = dict(re.findall(r"--(gpu|cpu)-mem ([\d.]+(?:MiB|GiB))", sentence))
    assert flags
    units = {"MiB": MIB, "GiB": GIB}
    sizes = {{"gpu": "gpu", "cpu": "host"}[k]: int(float(v[:-3]) * units[v[-3:]]) for k, v in flags.items()}
    assert search(Problem(model, 512, 32), tight.limited(**sizes)).found


def test_a_shorter_prompt_or_four_bits_are_named_where_they_would_do():
    model = model_spec(SIZES["opt-1.3b"], "opt-1.3b", "float16")
    host = TWO_CORES.process_bytes + 290 * MIB
    with pytest.raises(PolicyError, match=r"prompts of at most \d+ tokens") as refused:
        search(Problem(model, 2000, 32), TWO_CORES.limited(host=host))
    longest = int(re.search(r"at most (\d+) tokens", str(refused.value))[1])
    assert search(Problem(model, longest, 32), TWO_CORES.limited(host=host)).found
    with pytest.raises(PolicyError):
        search(Problem(model, longest + 1, 32), TWO_CORES.limited(host=host))


@pytest.mark.parametrize("hardware", [SMALL_GPU, TWO_CORES], ids=lambda h: h.name)
@pytest.mark.parametrize("percents", [(100, 0, 100, 0, 100, 0), (20, 50, 0, 70, 0, 100), (0, 0, 0, 0, 0, 0)])
def test_the_relaxation_agrees_with_the_plan_it_stands_for(hardware, percents):
    """Needs within 2 %, and the busiest lane's seconds: never above, since large transfers run no slower than small."""
    if not hardware.host_is_apart:
        percents = tuple(p for pair in zip(percents[::2], percents[1::2], strict=True) for p in (sum(pair), 0))
    model = model_spec(SIZES["opt-1.3b"], "opt-1.3b", "float16")
    policy, count = Policy(20, 1), 3
    relaxation = Relaxation(model, policy, 200, 24, hardware)
    wanted = dict(zip([(k, t) for k in KINDS for t in (Tier.GPU, Tier.HOST)], (p / 100 for p in percents), strict=True))
    base, changes = relaxation.linear(count)

    def total(key: tuple[str, str]) -> float:
        return base.get(key, 0.0) + sum(
            share * changes.get(v, {}).get(key, 0.0)
            for v, share in {
                **wanted,
                **{(k, Tier.DISK): 1 - wanted[k, Tier.GPU] - wanted[k, Tier.HOST] for k in KINDS},
            }.items()
        )

    plan = make_plan(
        model,
        with_shares(replace(policy, num_gpu_batches=count), wanted),
        Workload.uniform(200, 24, 20, count),
        host_is_apart=hardware.host_is_apart,
    )
    for tier, nbytes in need(plan).items():
        staging = plan.footprint.rings["stage_in"] + plan.footprint.rings["stage_out"] if tier is Tier.HOST else 0
        assert total(("need", tier.value)) == pytest.approx(nbytes - staging, rel=0.02, abs=8 * MIB)
    prediction = predict(plan, hardware)
    for phase, busy in prediction.lanes.items():
        lane = prediction.busiest(phase)
        assert 0.85 * busy[lane] <= total((phase, lane)) <= 1.02 * busy[lane]


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 7, 32, 511])
def test_sampled_steps_stand_for_all(steps):
    weights = sample_steps(steps)
    assert sum(weights.values()) == steps
    assert set(weights) <= set(range(steps)) and {0, steps - 1} <= set(weights)
    mean = sum(i * w for i, w in weights.items()) / steps
    assert mean == pytest.approx((steps - 1) / 2, abs=0.5)


def test_a_sample_of_steps_predicts_what_all_of_them_do():
    model = model_spec(SIZES["opt-1.3b"], "opt-1.3b", "float16")
    plan = make_plan(model, Policy(16, 2, 0, 50, 0, 60, 0, 100), Workload.uniform(100, 60, 16, 2))
    assert predict(plan, SMALL_GPU).total_s == pytest.approx(predict(plan, SMALL_GPU, exact=60).total_s, rel=0.01)


def test_where_everything_fits_nothing_is_offloaded():
    policy = search(Problem(TINY, 32, 8, num_prompts=16), SMALL_GPU).best.policy
    assert policy.w_gpu_percent == policy.cache_gpu_percent == policy.act_gpu_percent == 100


@TRIED
def test_lossy_formats_are_used_only_where_allowed(tried):
    model = model_spec(SIZES["opt-6.7b"], "opt-6.7b", "float16")
    t4 = load_profile("t4")
    exact = search(Problem(model, 512, 32, **tried), t4).best
    assert not exact.policy.compress_weight and not exact.policy.compress_cache and exact.policy.attn_sparsity == 1
    lossy = search(Problem(model, 512, 32, allow=frozenset({"4bit"}), **tried), t4).best
    assert lossy.policy.compress_weight and not lossy.policy.compress_cache
    assert lossy.tokens_per_s > exact.tokens_per_s
    with pytest.raises(PolicyError, match="8bit cannot be allowed; what can is 4bit, 4bit-cache, sparse"):
        Problem(model, 512, 32, allow=frozenset({"8bit"}))


@TRIED
def test_a_latency_limit_is_kept_or_refused(tried):
    problem = Problem(TINY, 64, 16, **tried)
    best = search(problem, SMALL_GPU).best
    limited = search(replace(problem, max_latency=best.latency_s / 4), SMALL_GPU).best
    assert limited.latency_s <= best.latency_s / 4
    assert limited.tokens_per_s <= best.tokens_per_s
    with pytest.raises(PolicyError, match="a single sequence is predicted to take"):
        search(replace(problem, max_latency=1e-9), SMALL_GPU)


def test_as_many_prompts_as_there_are():
    found = search(Problem(TINY, 32, 8, num_prompts=5), SMALL_GPU)
    assert found.best.policy.round_size >= 5 and found.best.policy.gpu_batch_size <= 5
    assert found.best.tokens_per_s == pytest.approx(5 * 8 / found.best.prediction.total_s)


def test_unequal_prompts_are_planned_by_the_longest():
    lens = (100, 7, 7, 7, 90, 3)
    plan = search(Problem(TINY, 50, 8, num_prompts=6, prompt_lens=lens), SMALL_GPU).best.plan
    assert plan.workload.batches[0].prompt_lens[0] == 100


def test_a_modest_block_is_smaller_and_nearly_as_fast():
    searched = search(Problem(TINY, 32, 8), TWO_CORES)
    found = modest(searched)
    assert found.policy.round_size < searched.best.policy.round_size
    assert found.tokens_per_s >= 0.97 * searched.best.tokens_per_s


def test_worth_names_the_scarce_resource():
    """OPT-30B on a T4: what is short is the link, memory and attention that spare it; the disk is not used."""
    searched = search(Problem(model_spec(SIZES["opt-30b"], "opt-30b", "float16"), 512, 32), load_profile("t4"))
    gains = worth(searched)
    assert gains["h2d"] > gains["gpu"] > 0 and gains["host_attention"] > gains["gpu"]
    assert gains["disk_in"] == pytest.approx(0, abs=1e-6) and gains["disk"] == pytest.approx(0, abs=1e-6)
    points = frontier(searched)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(points))
