"""Finds the policy: every round size and format by linear program, the best of them by simulation.

For each (GPU batch size, number of GPU batches, format) the relaxation (relax.py) gives shares and a throughput that no
policy of that kind exceeds. In the order of these bounds the shares are rounded to a real plan, which must fit, and
simulated, until what is found is as good as what the next bound promises. What more memory or a faster link would bring
is `worth`'s, and what needs least memory `smallest`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from .fit import fits
from .formats import FOUR_BIT
from .hardware import Hardware, HardwareError
from .placement import Tier
from .plan import Plan
from .policy import Policy, PolicyError
from .predict import Prediction, predict
from .problem import Problem, available
from .relax import ATTENDED, Optimum, Relaxation, Shares, shortened, with_shares
from .smallest import finest_plans, infeasible, smallest_plans
from .spec import stored_as

MODEST = 0.98  # of the best throughput, where that spares sequences in flight
CLOSE = 0.995  # a policy this near to the next bound ends the search
ESTIMATED = 12  # candidates at most whose schedule is simulated for a few decoder layers ...
FEW_STEPS = 4  # token steps of a simulation
SHORT_LAYERS = (4, 6)  # ... so many, and extended to all
KEPT = 3  # the best of them are simulated whole, the second and third ...
KEPT_OPS = 80_000  # ... as far as these reach
SHRINK = (0.0, 0.01, 0.03, 0.08, 0.2, 0.4, 0.7)  # of memory, until the rounded policy fits


@dataclass(frozen=True)
class Found:
    """A policy that fits, and what it is predicted to do."""

    policy: Policy
    plan: Plan
    prediction: Prediction
    tokens_per_s: float  # over all prompts of the problem
    bound_tokens_per_s: float  # of the relaxation, for its round size and format

    @property
    def latency_s(self) -> float:
        """Seconds from a round's start to its last token."""
        return self.prediction.total_s


@dataclass(frozen=True)
class Candidate:
    """A round size and format, with the relaxation's answer."""

    relaxation: Relaxation
    policy: Policy  # with its batch sizes and format
    optimum: Optimum
    tokens_per_s: float


@dataclass(frozen=True)
class Searched:
    """The policies found, best first; all candidates with their bounds; and the most that any could be predicted."""

    problem: Problem
    hardware: Hardware
    found: tuple[Found, ...]
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Found:
        return self.found[0]

    @property
    def bound_tokens_per_s(self) -> float:
        return max([self.best.tokens_per_s, *(c.tokens_per_s for c in self.candidates)])

    @property
    def gap(self) -> float:
        """The share of the bound that the best policy leaves open."""
        return 1 - self.best.tokens_per_s / self.bound_tokens_per_s


def search(problem: Problem, hardware: Hardware) -> Searched:
    """The best policies for a problem, by predicted throughput.

    Raises PolicyError, in one sentence, when no policy fits or none keeps the latency limit; HardwareError where the
    profile has no figures for the model's dtype or for a format that is allowed.
    """
    check_formats(problem, hardware)
    free = available(hardware, problem)
    candidates = sorted(_candidates(problem, hardware, free), key=lambda c: -c.tokens_per_s)
    found = _simulate(problem, hardware, free, candidates)
    if not found and problem.max_latency is not None:
        raise PolicyError(_too_slow(problem, hardware))
    if not found:
        found = _smallest(problem, hardware, free)
    best, *others = sorted(found, key=lambda f: -f.tokens_per_s)
    best = _with_open_pages_kept(problem, hardware, free, best)
    return Searched(problem, hardware, (best, *others), tuple(candidates))


def _with_open_pages_kept(problem: Problem, hardware: Hardware, free: Mapping[Tier, float], found: Found) -> Found:
    """The same policy storing only whole pages of the cache, where there is room for that and it is no slower."""
    policy = replace(found.policy, keep_open_pages=True)
    plan = problem.plan(policy, host_is_apart=hardware.host_is_apart)
    if not plan.keeps_open or not fits(plan, free):
        return found
    other = _found(problem, plan, hardware, found.bound_tokens_per_s)
    return other if other.tokens_per_s >= found.tokens_per_s else found


def check_formats(problem: Problem, hardware: Hardware) -> None:
    """Raise HardwareError where a profile has no figures for the model's dtype or for a format that is allowed."""
    attention = (("4bit-cache", hardware.decode_attention), ("4bit-cache", hardware.host_attention))
    for what, rates in (("4bit", hardware.matmul), *attention):
        for kind in (problem.model.dtype, *([FOUR_BIT] if what in problem.allow else [])):
            if kind not in rates:
                flag = f"--allow {what}" if kind == FOUR_BIT else f"--dtype {kind}"
                raise HardwareError(
                    f"the profile of {hardware.name} has no figures for {flag}; it has {', '.join(sorted(rates))}"
                )


def _too_slow(problem: Problem, hardware: Hardware) -> str:
    """One sentence: how long a round takes at least. Raises PolicyError where none fits at any speed."""
    quickest = search(replace(problem, max_latency=None, num_prompts=1), hardware).best
    return (
        f"no policy found takes {problem.max_latency:g} s or less for a round; a single sequence is predicted to take "
        f"{quickest.latency_s:.3g} s"
    )


def modest(searched: Searched, share: float = MODEST) -> Found:
    """The policy with the smallest round that is predicted to reach `share` of the best one's throughput."""
    problem, hardware = searched.problem, searched.hardware
    enough = share * searched.best.tokens_per_s
    smaller = [
        c
        for c in searched.candidates
        if c.tokens_per_s >= enough and c.policy.round_size < searched.best.policy.round_size
    ]
    for candidate in sorted(smaller, key=lambda c: c.policy.round_size)[:ESTIMATED]:
        plan = _realise(problem, available(hardware, problem), candidate)
        if plan and _estimate(problem, plan, hardware, candidate.tokens_per_s).tokens_per_s >= enough:
            return _found(problem, plan, hardware, candidate.tokens_per_s)
    return searched.best


def _sizes(problem: Problem) -> Iterator[tuple[int, list[int]]]:
    """GPU batch sizes, and with each the numbers of GPU batches to try."""
    prompts, counts = problem.num_prompts, problem.gpu_batches
    if prompts is None:
        yield from ((size, list(counts)) for size in problem.gpu_batch_sizes)
        return
    exact = {-(-prompts // count) for count in counts}  # sizes that divide the prompts evenly
    for size in sorted(exact.union(s for s in problem.gpu_batch_sizes if s <= prompts)):
        yield size, sorted({min(count, -(-prompts // size)) for count in counts})


def _candidates(problem: Problem, hardware: Hardware, free: Mapping[Tier, float]) -> Iterator[Candidate]:
    """Every round size and format for which the relaxation has an answer; larger GPU batches than fit are not tried."""
    for form in problem.formats():
        model = stored_as(problem.model, form)
        for size, counts in _sizes(problem):
            policy = replace(form, gpu_batch_size=size)
            relaxation = Relaxation(model, policy, problem.prompt_len, problem.gen_len, hardware)
            fitting = 0
            for count in counts:
                optimum = relaxation.solve(count, free, max_seconds=problem.max_latency)
                if optimum is None:
                    break
                fitting += 1
                whole = replace(policy, num_gpu_batches=count)
                yield Candidate(relaxation, whole, optimum, problem.throughput(whole, optimum.seconds))
            if not fitting:
                break


def _simulate(
    problem: Problem, hardware: Hardware, free: Mapping[Tier, float], candidates: Sequence[Candidate]
) -> list[Found]:
    """Estimate candidates in the order of their bounds until none left promises more; simulate the best whole."""
    estimates = _estimates(problem, hardware, free, candidates)
    if not estimates:  # none of the fastest keeps the latency limit: try the quickest
        estimates = _estimates(problem, hardware, free, sorted(candidates, key=lambda c: c.optimum.seconds))
    best = max((e.tokens_per_s for e in estimates), default=0.0)
    # of those as good as the best the one with the smallest schedule: fewer sequences in flight
    ranked = sorted(estimates, key=lambda e: (e.tokens_per_s < CLOSE * best, e.ops, -e.tokens_per_s))
    ranked = ranked[:1] + sorted(ranked[1:], key=lambda e: -e.tokens_per_s)
    found: list[Found] = []
    for estimate in ranked[:KEPT]:
        if not found or sum(f.prediction.ops for f in found) + estimate.ops <= KEPT_OPS:
            found.append(_found(problem, estimate.plan, hardware, estimate.bound_tokens_per_s))
    return found


def _estimates(
    problem: Problem, hardware: Hardware, free: Mapping[Tier, float], candidates: Sequence[Candidate]
) -> list[Estimate]:
    """Estimate candidates until none of those left can win; drop the ones over the latency limit."""
    limit = problem.max_latency or math.inf
    estimates: dict[Policy, Estimate] = {}
    best = 0.0
    for candidate in candidates:
        if best >= CLOSE * candidate.tokens_per_s or len(estimates) >= ESTIMATED:
            break
        plan = _realise(problem, free, candidate)
        if plan is not None and plan.policy not in estimates:
            estimates[plan.policy] = estimate = _estimate(problem, plan, hardware, candidate.tokens_per_s)
            if estimate.seconds <= limit:
                best = max(best, estimate.tokens_per_s)
    return [e for e in estimates.values() if e.seconds <= limit]


class Estimate(NamedTuple):
    """An estimate of a plan from the schedules of two shortened models."""

    plan: Plan
    seconds: float  # of a round
    tokens_per_s: float
    bound_tokens_per_s: float
    ops: int  # of the whole schedule's sample


def _found(problem: Problem, plan: Plan, hardware: Hardware, bound: float | None = None) -> Found:
    prediction = predict(plan, hardware, exact=FEW_STEPS)
    throughput = problem.throughput(plan.policy, prediction.total_s)
    return Found(plan.policy, plan, prediction, throughput, throughput if bound is None else bound)


def _estimate(problem: Problem, plan: Plan, hardware: Hardware, bound: float) -> Estimate:
    """Simulate the plan for two models with fewer decoder layers, and extend: a few per cent of the ops."""
    few, more = (
        predict(
            replace(problem, model=shortened(problem.model, n)).plan(plan.policy, host_is_apart=plan.host_is_apart),
            hardware,
            exact=FEW_STEPS,
        )
        for n in (min(n, plan.model.num_decoder_layers) for n in SHORT_LAYERS)
    )
    further = max(plan.model.num_decoder_layers - SHORT_LAYERS[0], 0) / (SHORT_LAYERS[1] - SHORT_LAYERS[0])
    seconds = few.total_s + further * (more.total_s - few.total_s)
    ops = few.ops + round(further * (more.ops - few.ops))
    return Estimate(plan, seconds, problem.throughput(plan.policy, seconds), bound, ops)


def _realise(problem: Problem, free: Mapping[Tier, float], candidate: Candidate) -> Plan | None:
    """The candidate's shares as a real plan that fits: rounded; where that overflows, found anew with less memory."""
    relaxation, count = candidate.relaxation, candidate.policy.num_gpu_batches
    for less in SHRINK:
        optimum: Optimum | None = candidate.optimum
        if less:
            smaller = {tier: nbytes * (1 - less) for tier, nbytes in free.items()}
            optimum = relaxation.solve(count, smaller)
        if optimum is None:
            return None
        plan = problem.plan(_rounded(candidate.policy, optimum.shares), host_is_apart=relaxation.hardware.host_is_apart)
        if fits(plan, free):
            return plan
    return None


def _rounded(policy: Policy, shares: Shares) -> Policy:
    """Whole percentages, with GPU shares rounded down: the rest goes one tier further, not over the edge."""
    kept: Shares = {}
    for (kind, tier), share in shares.items():
        if tier is Tier.GPU:
            whole = int(100 * share + 1e-6) / 100
            kept[kind, Tier.GPU] = whole
            kept[kind, Tier.HOST] = min(shares.get((kind, Tier.HOST), 0.0) + share - whole, 1 - whole)
        elif tier == ATTENDED:
            kept[kind, ATTENDED] = share
    if not any(tier is Tier.HOST for _, tier in shares):
        kept = {key: share for key, share in kept.items() if key[1] is not Tier.HOST}
    return with_shares(policy, kept)


def _smallest(problem: Problem, hardware: Hardware, free: Mapping[Tier, float]) -> list[Found]:
    """Search where no relaxation fits: single sequences, everything on whole tiers, one of which needs least of any."""
    plans: list[Plan] = []
    for smallest in (smallest_plans, finest_plans):
        plans += smallest(problem, hardware)
        fitting = [p for p in plans if fits(p, free)]
        if fitting:
            estimates = sorted((_estimate(problem, p, hardware, 0.0) for p in fitting), key=lambda e: -e.tokens_per_s)
            return [_found(problem, e.plan, hardware) for e in estimates[:KEPT]]
    raise PolicyError(infeasible(problem, plans, free, hardware))


def frontier(searched: Searched) -> list[tuple[float, float, Policy]]:
    """(latency in seconds, tokens per second, policy) of candidates that no other beats in both, by their bounds."""
    points = sorted((c.optimum.seconds, -c.tokens_per_s, c) for c in _distinct(searched.candidates))
    best: list[tuple[float, float, Policy]] = []
    for latency, negative, candidate in points:
        if not best or -negative > best[-1][1]:
            best.append((latency, -negative, _rounded(candidate.policy, candidate.optimum.shares)))
    return best


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    return list({(c.optimum.seconds, c.tokens_per_s): c for c in candidates}.values())
