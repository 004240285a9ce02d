"""Check that a plan fits the memory there is, and name one that would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from .footprint import WEIGHTS
from .hardware import GIB
from .placement import Tier
from .plan import Plan, make_plan
from .policy import Policy, PolicyError
from .spec import Workload

MIB = 1 << 20
SHARES = tuple(f"{kind}_{at}_percent" for kind in ("w", "cache", "act") for at in ("gpu", "cpu"))


def need(plan: Plan) -> dict[Tier, int]:
    """Peak bytes of each tier; of the disk without the weights' store. In place, all memory counts as the host's."""
    f = plan.footprint
    memory = {Tier.GPU: f.total(Tier.GPU), Tier.HOST: f.total(Tier.HOST)}
    if not plan.host_is_apart:
        memory = {Tier.HOST: sum(memory.values())}
    return memory | {Tier.DISK: f.scratch_bytes}


def fits(plan: Plan, available: Mapping[Tier, float]) -> bool:
    """Return True if the plan needs no more of any tier than is available; a tier that is not named is not limited."""
    return all(nbytes <= available.get(tier, nbytes) for tier, nbytes in need(plan).items())


def check(plan: Plan, available: Mapping[Tier, float]) -> None:
    """Raise PolicyError, with what each tier needs and a policy that fits, when the plan exceeds `available` bytes."""
    if fits(plan, available):
        return
    tier = next(t for t, nbytes in need(plan).items() if nbytes > available.get(t, nbytes))
    raise PolicyError(f"{_shortage(plan, tier, available[tier])}; {_way_out(plan, available)}")


def _shortage(plan: Plan, tier: Tier, have: float) -> str:
    f = plan.footprint
    if tier is Tier.DISK:
        return f"the disk needs {amount(f.scratch_bytes)} for cache and activations, has {amount(have)}"
    tiers = (tier,) if plan.host_is_apart else (Tier.GPU, Tier.HOST)
    weights, homes = sum(f.of(WEIGHTS, t) for t in tiers), sum(f.homes[t] for t in tiers)
    total = need(plan)[tier]
    name = "GPU" if tier is Tier.GPU else "the host"
    return (
        f"{name} needs {amount(total)}, has {amount(have)}: weights {amount(weights)}, "
        f"cache and activations {amount(homes)}, rings and workspace {amount(total - weights - homes)}"
    )


def amount(nbytes: float) -> str:
    """Bytes for people to read."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 100 else f"{nbytes / MIB:.2f} MiB"


def _way_out(plan: Plan, available: Mapping[Tier, float]) -> str:
    """The nearest policy that fits: smaller GPU batches, or shares elsewhere, or both."""
    size = plan.policy.gpu_batch_size
    low, high = 0, size - 1
    while low < high:  # the largest GPU batch that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(_smaller(plan, middle), available) else (low, middle - 1)
    if low:
        return f"--gpu-batch-size {low} fits"
    p = plan.policy
    elsewhere = {
        "cache and activations on the host": (p.w_gpu_percent, p.w_cpu_percent, 0, 100, 0, 100),
        "weights on disk, the rest on the host": (0, 0, 0, 100, 0, 100),
        "all on disk": (0, 0, 0, 0, 0, 0),
    }
    for count, (words, percent) in product(sorted({size, 1}, reverse=True), elsewhere.items()):
        shares = dict(zip(SHARES, percent, strict=True))
        if fits(_smaller(plan, count, replace(p, **shares)), available):  # type: ignore[arg-type]
            return f"--gpu-batch-size {count} --percent {' '.join(f'{x:g}' for x in percent)} ({words}) fits"
    return "no batch size or placement of this model fits; free memory or take a smaller model"


def _smaller(plan: Plan, gpu_batch_size: int, policy: Policy | None = None) -> Plan:
    policy = replace(policy or plan.policy, gpu_batch_size=gpu_batch_size)
    batches = tuple(b.first(gpu_batch_size) for b in plan.workload.batches)
    return make_plan(plan.model, policy, Workload(batches), align=plan.align, host_is_apart=plan.host_is_apart)
