"""The policies that need least memory, and what is said of a problem that not even these solve.

Knows plans and memory; nothing of speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from .fit import fits, need
from .hardware import GIB, Hardware
from .placement import Tier
from .plan import Plan
from .policy import Policy
from .problem import GPU_BATCHES, Problem
from .relax import whole_tiers


def smallest_plans(problem: Problem, hardware: Hardware) -> Iterator[Plan]:
    """Yield the plans of single sequences with everything on whole tiers, one of which needs least of the GPU."""
    for form, overlap, separate in product(problem.formats(), (True, False), (True, False)):
        yield from _whole_plans(
            problem, hardware, replace(form, num_gpu_batches=1, overlap=overlap, sep_layer=separate)
        )


def finest_plans(problem: Problem, hardware: Hardware) -> Iterator[Plan]:
    """Yield plans that need less of the host: layers are staged in as many parts as there are GPU batches."""
    counts = [n for n in GPU_BATCHES[1:] if problem.num_prompts is None or n <= problem.num_prompts]
    for form, count in product(problem.formats(), counts):
        yield from _whole_plans(problem, hardware, replace(form, num_gpu_batches=count, overlap=False))


def _whole_plans(problem: Problem, hardware: Hardware, policy: Policy) -> Iterator[Plan]:
    tiers = tuple(Tier) if hardware.host_is_apart else (Tier.GPU, Tier.DISK)
    for placed in whole_tiers(replace(policy, gpu_batch_size=1), tiers):
        yield problem.plan(placed, host_is_apart=hardware.host_is_apart)


def infeasible(problem: Problem, plans: Sequence[Plan], free: Mapping[Tier, float], hardware: Hardware) -> str:
    """One sentence: which tier lacks how much, and the smallest change that makes the problem fit."""

    def lacking(plan: Plan) -> dict[Tier, float]:
        return {t: n - free[t] for t, n in need(plan).items() if t in free and n > free[t]}

    closest = min(plans, key=lambda p: sum(lacking(p).values()))
    names = {Tier.GPU: "the GPU", Tier.HOST: "the host", Tier.DISK: "the disk"}
    flags = {Tier.GPU: "--gpu-mem", Tier.HOST: "--cpu-mem", Tier.DISK: "--disk-mem"}
    totals = {Tier.GPU: hardware.gpu_bytes, Tier.HOST: hardware.host_bytes, Tier.DISK: hardware.disk_bytes}
    short = lacking(closest)
    lacks = " and ".join(f"{names[t]} lacks {_mib(n)}" for t, n in short.items())
    flag = " ".join(f"{flags[t]} {_mib(totals[t] + n)}" for t, n in short.items())
    size = f"{problem.model.name} with one sequence of {problem.prompt_len} + {problem.gen_len} tokens"
    return f"{size} does not fit: {lacks} in its smallest policy; {flag} would do{_other_ways(problem, hardware, free)}"


def _other_ways(problem: Problem, hardware: Hardware, free: Mapping[Tier, float]) -> str:
    """Other changes that would make the problem fit: formats that are not allowed, shorter prompts."""

    def possible(changed: Problem) -> bool:
        return any(fits(p, free) for p in smallest_plans(changed, hardware))

    ways = []
    for lossy in ("4bit", "4bit-cache"):
        if lossy not in problem.allow and possible(replace(problem, allow=problem.allow | {lossy})):
            ways.append(f"--allow {lossy}")
    low, high = 0, problem.prompt_len - 1
    while low < high:  # the longest prompt that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if possible(replace(problem, prompt_len=middle)) else (low, middle - 1)
    if low:
        ways.append(f"prompts of at most {low} tokens")
    return "".join(f", or {way}" for way in ways)


def _mib(nbytes: float) -> str:
    """Bytes rounded up, in a unit that the memory flags take."""
    return f"{-(-int(nbytes) // (GIB // 1024))}MiB" if nbytes < GIB else f"{nbytes / GIB + 0.0005:.3f}GiB"
