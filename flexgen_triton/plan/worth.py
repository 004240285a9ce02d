"""The throughput that one more of each resource would bring, by the linear programs of a search.

Knows a finished search and its candidates; simulates nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from .hardware import GIB
from .placement import Tier
from .problem import available
from .search import Searched


def worth(searched: Searched, neighbours: int = 24) -> dict[str, float]:
    """Tokens per second that one more GiB of each tier, or GB/s of each link, would bring: re-solved, not simulated.

    By tier ("gpu", "host", "disk") and lane ("h2d", ...), against the relaxation's best as it is.
    """
    problem, hardware = searched.problem, searched.hardware
    free = available(hardware, problem)
    near = searched.candidates[:neighbours]
    now = max((c.tokens_per_s for c in near), default=0.0)

    def best(memory: Mapping[Tier, float], faster: Mapping[str, float]) -> float:
        answers = (
            (c, c.relaxation.solve(c.policy.num_gpu_batches, memory, max_seconds=problem.max_latency, faster=faster))
            for c in near
        )
        return max((problem.throughput(c.policy, a.seconds) for c, a in answers if a), default=0.0)

    gains = {tier.value: best({**free, tier: free[tier] + GIB}, {}) - now for tier in free}
    form = searched.best.policy.cache_format.rates(problem.model.dtype)
    links = {
        "host_attention": hardware.host_attention[form],
        "h2d": hardware.h2d,
        "d2h": hardware.d2h,
        "disk_in": hardware.disk_read,
        "disk_out": hardware.disk_write,
    }
    for lane, curve in links.items():
        if hardware.host_is_apart or lane.startswith("disk"):
            rate = curve.points[-1][1]
            gains[lane] = best(free, {lane: (rate + 1e9) / rate}) - now
    return gains
