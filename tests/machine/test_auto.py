"""The automatic policy of the library: it is found, obeyed, changed when it must be, and invisible in the output."""

from __future__ import annotations

import pytest
from machines import SMALL_GPU, TWO_CORES

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.machine import auto
from flexgen_triton.plan.fit import need
from flexgen_triton.plan.hardware import HardwareError
from flexgen_triton.plan.placement import Tier
from flexgen_triton.plan.policy import PolicyError

GREEDY = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0)
KIB, MIB = 1 << 10, 1 << 20


def automatic(tiny, tmp_path, **more) -> LLM:
    return LLM(str(tiny.path), **{"dtype": "float32", "offload_dir": tmp_path, "hardware": TWO_CORES, **more})


def test_the_default_policy_is_found_for_the_prompts(tiny, tmp_path):
    with automatic(tiny, tmp_path) as llm:
        with pytest.raises(PolicyError, match="no prompts were seen yet"):
            _ = llm.policy
        outputs = llm.generate(tiny.prompts, GREEDY)
        assert [o.outputs[0].token_ids for o in outputs] == [t[:5] for t in tiny.tokens]
        assert llm.policy.w_gpu_percent == 100  # all of it fits
        engine = llm.engine
        llm.generate(tiny.prompts, GREEDY)
        assert llm.engine is engine  # nothing was loaded again


@pytest.mark.parametrize(
    ("more", "in_place"),
    [({}, True), ({"verify": True}, True), ({"dtype": "bfloat16"}, False), ({"allow": ["4bit"]}, False)],
    ids=str,
)
def test_a_search_leaves_room_for_how_the_store_is_aligned(tiny, tmp_path, more, in_place):
    """Converted weights and those with checksums are read in chunks of 256 KiB, which take more than their bytes."""
    with automatic(tiny, tmp_path, **more) as llm:
        problem = llm.problem([8], 4, 2)
        assert problem.stored == in_place
        for gpu, cpu in ((100, 0), (40, 30), (0, 0)):
            policy = Policy(2, 1, gpu, cpu)
            llm.use(policy)
            planned, taken = problem.plan(policy, host_is_apart=False), llm.engine.plan(problem.workload(2, 1))
            assert need(taken)[Tier.HOST] <= need(planned)[Tier.HOST] + problem.alignment


def test_a_small_device_is_filled_and_the_rest_offloaded(tiny, tmp_path):
    """As on a GPU: device memory apart, less of it than the weights take."""
    with LLM(
        str(tiny.path),
        dtype="float32",
        offload_dir=tmp_path,
        hardware=SMALL_GPU,
        copies=True,
        gpu_memory=SMALL_GPU.context_bytes + 1700 * KIB,
    ) as llm:
        outputs = llm.generate(tiny.prompts, GREEDY)
        assert [o.outputs[0].token_ids for o in outputs] == [t[:5] for t in tiny.tokens]
        assert llm.policy.w_gpu_percent < 100
        plan = llm.last_report.plans[0]
        assert plan.footprint.total(Tier.GPU) <= 1700 * KIB


def test_other_prompts_get_another_policy_where_the_present_one_does_not_fit(tiny, tmp_path):
    memory = SMALL_GPU.context_bytes + 2300 * KIB
    with LLM(
        str(tiny.path), dtype="float32", offload_dir=tmp_path, hardware=SMALL_GPU, copies=True, gpu_memory=memory
    ) as llm:
        llm.generate([tiny.prompts[0][:2]], SamplingParams(max_tokens=2, ignore_eos=True, temperature=0))
        first = llm.policy
        outputs = llm.generate(tiny.prompts * 3, GREEDY)
        assert [o.outputs[0].token_ids for o in outputs] == [t[:5] for t in tiny.tokens] * 3
        assert llm.policy != first


def test_a_policy_by_hand_is_refused_where_it_exceeds_a_limit(tiny, tmp_path):
    with pytest.raises(PolicyError, match=r"GPU needs .* has .*fits"):
        LLM(str(tiny.path), policy=Policy(), offload_dir=tmp_path, copies=True, gpu_memory="0.5MiB")
    with pytest.raises(PolicyError, match="policy is 'fast'; give a Policy, or 'auto'"):
        LLM(str(tiny.path), policy="fast", offload_dir=tmp_path)
    with pytest.raises(ValueError, match="'lots' is no amount of memory"):
        LLM(str(tiny.path), offload_dir=tmp_path, cpu_memory="lots")


def test_profiles_and_limits_that_make_no_sense(tiny, tmp_path):
    with automatic(tiny, tmp_path, gpu_memory="1GiB") as llm, pytest.raises(PolicyError, match="there is no GPU here"):
        llm.generate(tiny.prompts, GREEDY)
    for dtype, hardware, words in (
        ("float32", "cray-1", "cray-1 is no file and no known machine; known are a100"),
        ("bfloat16", "t4", "has no figures for --dtype bfloat16"),
    ):
        llm = LLM(str(tiny.path), dtype=dtype, offload_dir=tmp_path, hardware=hardware)
        with llm, pytest.raises(HardwareError, match=words):
            llm.generate(tiny.prompts, GREEDY)


def test_a_policy_in_use_is_kept_while_it_is_nearly_the_best(tiny, tmp_path):
    with automatic(tiny, tmp_path) as llm:
        problem = llm.problem([20], 8, 64)
        best = auto.choose(problem, llm.hardware).policy
        half = Policy(best.gpu_batch_size, best.num_gpu_batches, 99, 1, 100, 0, 100, 0)
        assert auto.choose(problem, llm.hardware, half).policy == half
        slow = Policy(1, 1, 0, 0, 0, 0, 0, 0)
        assert auto.choose(problem, llm.hardware, slow).policy == best


def test_one_length_stands_for_the_longer_half():
    assert auto.typical_length([10]) == 10
    assert auto.typical_length([1, 2, 100, 98]) == 99


def test_a_stream_has_a_policy_before_all_of_it_is_read(tiny, tmp_path, monkeypatch):
    """It is found for the first few prompts, as if they went on for ever, and one block is no larger than it pays."""
    monkeypatch.setattr("flexgen_triton.llm.MIN_WAITING", 5)
    read = 0

    def prompts():
        nonlocal read
        for prompt in tiny.prompts * 4:
            read += 1
            yield prompt, GREEDY

    with automatic(tiny, tmp_path, cpu_memory="2GiB") as llm:
        stream = llm.stream(prompts())
        found = {}
        for output in stream:
            found[output.request_id] = output.outputs[0].token_ids
        choice = llm.totals.choice
        assert choice is not None and choice.policy == llm.policy and choice.tokens_per_s > 0
        assert choice.busiest == "compute", "all of it fits"
    assert [found[n] for n in range(read)] == [t[:5] for t in tiny.tokens] * 4


def test_what_it_does_not_choose_is_as_told(tiny, tmp_path):
    base = Policy(overlap=False, compress_cache=True)
    with automatic(tiny, tmp_path, base=base) as llm:
        llm.generate(tiny.prompts, GREEDY)
        assert not llm.policy.overlap and llm.policy.compress_cache and not llm.policy.compress_weight


def test_a_stream_whose_short_prompts_ask_for_most_has_a_policy(tiny, tmp_path, monkeypatch):
    """The typical length and the typical number of tokens asked for need not fit the model's positions together."""
    monkeypatch.setattr("flexgen_triton.llm.MIN_WAITING", 5)
    pairs = [([5] * length, SamplingParams(max_tokens=120 - length, temperature=0)) for length in (1, 100) * 6]
    with automatic(tiny, tmp_path) as llm:
        found = list(llm.stream(pairs))
    assert len(found) == len(pairs) and not any(o.error for o in found)
