"""Generation with everything offloaded: makespan beside its bound, the busiest lane of the same run."""

from __future__ import annotations

import pytest

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.commands.bench import random_prompts

GEN_LEN = 4
CASES = {
    "weights on disk": Policy(32, 2, 0, 0, 0, 100, 100, 0),
    "all on disk": Policy(32, 2, 0, 0, 0, 0, 0, 0),
    "a bit of each": Policy(32, 2, 30, 30, 30, 30, 30, 30),
}


@pytest.mark.parametrize("copies", [False, True], ids=["in place", "copied"])
@pytest.mark.parametrize("case", CASES)
def test_makespan_over_bound(benchmark, judge, tmp_path_factory, case, copies):
    """OPT-125M, random weights, 64 prompts of 32 tokens: the share is bound / makespan."""
    offload = tmp_path_factory.getbasetemp() / "store"
    with LLM("opt-125m", path="_DUMMY_", policy=CASES[case], offload_dir=offload, copies=copies) as llm:
        prompts = random_prompts(64, 32, llm.spec.vocab, 0)
        params = SamplingParams(max_tokens=GEN_LEN, ignore_eos=True, temperature=0)
        benchmark.pedantic(lambda: llm.generate(prompts, params), rounds=3, warmup_rounds=1)
        assert llm.last_report is not None
        timeline = llm.last_report.timeline
        tokens = len(prompts) * GEN_LEN
        judge(tokens / timeline.makespan_s, "tok/s", tokens / timeline.bound_s)
