"""Memory limits are obeyed and used: what runs is not refused, and nothing that a process held is counted twice."""

from __future__ import annotations

import gc
import json
import mmap
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from machines import TWO_CORES, profile_file

from flexgen_triton import LLM, Policy, SamplingParams
from flexgen_triton.machine.auto import MEASURING_BYTES
from flexgen_triton.memory.arena import rss
from flexgen_triton.plan.fit import need
from flexgen_triton.plan.footprint import LIBRARY_BYTES
from flexgen_triton.plan.hardware import GIB
from flexgen_triton.plan.placement import Tier
from flexgen_triton.plan.policy import PolicyError

MIB = 1 << 20
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)
BLOATED = replace(TWO_CORES, process_bytes=4 * GIB)  # measured by a process that held much else

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_search_counts_with_the_process_it_runs_in(tiny, tmp_path):
    with LLM(str(tiny.path), policy=Policy(2), dtype="float32", offload_dir=tmp_path) as by_hand:
        by_hand.generate(tiny.prompts, GREEDY)  # loads what generating needs
        plan = by_hand.last_report.plans[0]
    limit = rss() + need(plan)[Tier.HOST] + 4 * MIB
    with LLM(str(tiny.path), dtype="float32", offload_dir=tmp_path, hardware=BLOATED, cpu_memory=limit) as llm:
        outputs = llm.generate(tiny.prompts, GREEDY)
        assert [o.outputs[0].token_ids for o in outputs] == [t[:4] for t in tiny.tokens]


def ballast(nbytes: int) -> mmap.mmap:
    """Memory that is in the process, whatever the heap has free."""
    pages = mmap.mmap(-1, nbytes)
    for at in range(0, nbytes, mmap.PAGESIZE):
        pages[at] = 1
    return pages


def test_what_libraries_took_in_a_first_run_is_no_reason_to_refuse_the_second(tiny, tmp_path):
    """Every plan sets bytes aside for them; here they take nearly all of those, which then are in the process."""
    with LLM(str(tiny.path), policy=Policy(2), dtype="float32", offload_dir=tmp_path) as llm:
        llm.generate(tiny.prompts, GREEDY)
        plan = llm.last_report.plans[0]
    with LLM(
        str(tiny.path),
        policy=Policy(2),
        dtype="float32",
        offload_dir=tmp_path,
        cpu_memory=rss() + need(plan)[Tier.HOST] + 4 * MIB,
    ) as llm:
        first = llm.generate(tiny.prompts, GREEDY)
        libraries = ballast(LIBRARY_BYTES - 8 * MIB)
        again = llm.generate(tiny.prompts, GREEDY)
        assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in first]
        more = ballast(96 * MIB)
        with pytest.raises(PolicyError, match="the host needs"):
            llm.generate(tiny.prompts, GREEDY)
        libraries.close()
        more.close()


def test_measuring_is_refused_where_the_limit_leaves_it_no_room(tiny, tmp_path):
    limit = rss() + MEASURING_BYTES // 2
    with (
        LLM(str(tiny.path), dtype="float32", offload_dir=tmp_path, cpu_memory=limit) as llm,
        pytest.raises(PolicyError, match=r"not measured yet, which takes .* the limit is .* --hardware"),
    ):
        llm.generate(tiny.prompts, GREEDY)


AUTOMATIC = """
import json, sys
from flexgen_triton import LLM, SamplingParams
from flexgen_triton.memory.arena import peak_rss
model, profile, folder, limit = sys.argv[1:]
with LLM(model, hardware=profile, offload_dir=folder, cpu_memory=int(limit)) as llm:
    outputs = llm.generate(["Return the"] * 8, SamplingParams(max_tokens=8, ignore_eos=True, temperature=0))
    print(json.dumps([len(o.outputs[0].token_ids) for o in outputs] + [peak_rss()]))
"""


def test_an_automatic_policy_stays_below_a_limit_that_a_bloated_profile_would_refuse(tmp_path):
    """The demo model in a process of its own, at a limit that policies by hand keep."""
    limit = 520 * MIB
    arguments = ["demo", str(profile_file(tmp_path, replace(TWO_CORES, process_bytes=760 * MIB))), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", AUTOMATIC, *arguments, str(limit)],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    *counts, peak = json.loads(done.stdout)
    assert counts == [8] * 8
    assert peak <= limit


def test_streams_of_all_shapes_leave_nothing_behind(tiny, tmp_path):
    """Plans, buffers, tensors and threads of a stream go with it, whatever its shape, and half way too."""
    policies = (Policy(2, 2), Policy(3, 1, 0, 0, 0, 0, 0, 0), Policy(2, 1, 50, 0, 50, 0, compress_cache=True))
    kinds = (
        "Plan",
        "Buffers",
        "Round",
        "TokenSequence",
        "Tensor",
        "Thread",
        "Lanes",
        "lru_cache",
        "_lru_cache_wrapper",
    )

    def held() -> dict[str, int]:
        gc.collect()
        found = Counter(type(o).__name__ for o in gc.get_objects())
        return {kind: found[kind] for kind in kinds}

    with LLM(str(tiny.path), policy=policies[0], dtype="float32", offload_dir=tmp_path) as llm:

        def round_of_streams(n: int) -> None:
            for policy in policies:
                llm.use(policy)
                for count in (1, n % 5 + 2):
                    params = SamplingParams(max_tokens=n % 7 + 1, temperature=0.7, seed=n, logprobs=n % 3, n=n % 2 + 1)
                    stream = llm.stream(([5 + n] * (n + k + 1), params) for k in range(count))
                    next(stream)
                    if n % 2:
                        stream.close()
                    else:
                        list(stream)

        round_of_streams(0)
        round_of_streams(1)
        before = held()
        for n in range(2, 8):
            round_of_streams(n)
        after = held()
    more = {kind: after[kind] - before[kind] for kind in kinds if after[kind] > before[kind]}
    assert sum(more.values()) < 12, f"after 36 more streams: {more}"


@pytest.mark.parametrize("dtype", ["float32", "float16"], ids=["read in place", "converted"])
def test_a_search_plans_the_weights_as_they_will_lie(tiny, tmp_path, dtype):
    """A store of our own is read in larger pieces than a checkpoint: what is cut takes more of the memory."""
    policies = [Policy(2, 1, percent, 0) for percent in (0, 8, 50, 100)]
    with LLM(str(tiny.path), dtype=dtype, offload_dir=tmp_path) as llm:
        problem = llm.problem([8], 4, 2)
        for policy in (*policies, Policy(2, 1, 50, 0, compress_weight=True)):
            llm.use(policy)
            planned = problem.plan(policy, host_is_apart=False)
            real = llm.engine.plan(planned.workload)
            assert need(real)[Tier.HOST] <= need(planned)[Tier.HOST] + problem.alignment
