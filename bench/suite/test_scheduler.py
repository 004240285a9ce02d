"""Rates at which ops are generated, linked and handed to lanes; the roof is a bare queue between two threads."""

from __future__ import annotations

import queue
import threading
import time

import torch

from flexgen_triton.models.family import SIZES, model_spec
from flexgen_triton.plan.generator import Generator
from flexgen_triton.plan.link import Linker
from flexgen_triton.plan.plan import make_plan
from flexgen_triton.plan.policy import Policy
from flexgen_triton.plan.spec import Workload
from flexgen_triton.run.executor import execute, open_lanes


def handovers_per_second(count: int = 20_000) -> float:
    """Items that one thread gets from another through a queue, a second."""
    handed: queue.SimpleQueue[int] = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: [handed.get() for _ in range(count)])
    thread.start()
    began = time.perf_counter()
    for n in range(count):
        handed.put(n)
    thread.join()
    return count / (time.perf_counter() - began)


def headline_plan(steps: int):
    spec = model_spec(SIZES["opt-30b"], "opt-30b", "float16")
    return make_plan(spec, Policy(48, 3, 20, 80, 0, 100, 0, 100), Workload.uniform(512, steps, 48, 3))


def test_generate_and_link(benchmark, judge):
    """OPT-30B under FlexGen's headline policy: ops a second, without running them."""
    program = headline_plan(3).program

    def run() -> int:
        linker = Linker()
        return sum(1 for op in Generator(program) if linker.link(op) is not None)

    count = benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    judge(count / benchmark.stats.stats.median, "ops/s", handovers_per_second())


def test_run_empty_ops(benchmark, judge):
    """The same ops run on lanes, each doing nothing."""
    program = headline_plan(2).program
    actions = dict.fromkeys(("load_weight", "load_cache", "load_hidden", "store_cache", "store_hidden", "compute"))
    nothing = {name: lambda op: None for name in actions}

    def run() -> int:
        with open_lanes(torch.device("cpu"), host_is_apart=program.host_is_apart) as lanes:
            return sum(1 for _ in execute(program, nothing, lanes))

    count = benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    judge(count / benchmark.stats.stats.median, "ops/s", handovers_per_second())
