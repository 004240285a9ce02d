"""The memory that a plan needs of each tier, by what it is for: the one table that all who ask read.

What is allocated, refused, printed and searched for adds up from the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .layout import pad
from .placement import Tier
from .schedule import CacheTraffic, Handoff
from .spec import Batch
from .temporaries import head_bytes, logits_bytes, prompt_bytes, temporaries
from .traffic import Traffic

KINDS = WEIGHTS, CACHE, ACTIVATIONS, RINGS, WORKSPACE, LIBRARIES = (
    "weights",
    "cache",
    "activations",
    "rings",
    "workspace",
    "libraries",
)
STAGING = ("stage_in", "stage_out")  # rings that weights, cache and activations pass through alike
RING_TIERS = {
    "weight": Tier.GPU,
    "cache": Tier.GPU,
    "hidden": Tier.GPU,
    "cache_out": Tier.GPU,
    "hidden_out": Tier.GPU,
    "projected": Tier.GPU,
    "result": Tier.GPU,
    **dict.fromkeys((*STAGING, "query", "answer"), Tier.HOST),
}
LIBRARY_BYTES = 48 << 20  # threads, matrix libraries' buffers and what a search leaves: 8 to 25 MiB on two cores


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of one tier: `kind` is the row of the table that they count to, `name` what they are in it."""

    kind: str
    name: str
    tier: Tier
    nbytes: int


@dataclass(frozen=True)
class Footprint:
    """Every room of a plan. `temporaries` are all that a device may need, of which the rooms have the plan's own."""

    rooms: tuple[Room, ...]
    temporaries: Mapping[str, int]

    def of(self, kind: str, tier: Tier) -> int:
        """Bytes of one kind on a tier."""
        return sum(r.nbytes for r in self.rooms if r.kind == kind and r.tier is tier)

    def total(self, tier: Tier) -> int:
        """Peak bytes of a tier; on disk with its share of the weights, which lie in a store that is there before."""
        return sum(r.nbytes for r in self.rooms if r.tier is tier)

    @property
    def scratch_bytes(self) -> int:
        """Disk space for cache and activations."""
        return self.homes[Tier.DISK]

    @cached_property
    def rings(self) -> dict[str, int]:
        """Capacity of every ring."""
        return {r.name: r.nbytes for r in self.rooms if r.kind == RINGS}

    @cached_property
    def homes(self) -> dict[Tier, int]:
        """Bytes where cache and activations are kept, by tier."""
        return {tier: self.of(CACHE, tier) + self.of(ACTIVATIONS, tier) for tier in Tier}


def footprint(traffic: Traffic) -> Footprint:
    """Return the memory of a round: resident weights, homes, rings, and what computations take beside them."""
    needed = temporaries(traffic)
    return Footprint(tuple(_rooms(traffic, needed)), needed)


def _rooms(traffic: Traffic, needed: Mapping[str, int]) -> Iterator[Room]:
    for tier in Tier:
        shares = traffic.weight_shares(tier)
        yield Room(WEIGHTS, "layers", tier, sum(s.useful if tier is Tier.DISK else s.nbytes for s in shares))
    for kind, by_tier in ((CACHE, _cache_homes(traffic)), (ACTIVATIONS, _hidden_homes(traffic))):
        for tier, nbytes in by_tier.items():
            yield Room(kind, "homes", tier, nbytes)
    for name, nbytes in _rings(traffic).items():
        yield Room(RINGS, name, RING_TIERS[name], nbytes)
    for name in ("decode", "dense", "uploads") if traffic.host_is_apart else ("decode", "widened", "panel"):
        yield Room(WORKSPACE, name, Tier.GPU, needed[name])
    for name in ("uploads", "hosted", "token_staging"):
        yield Room(WORKSPACE, name, Tier.HOST, needed[name])
    yield Room(WORKSPACE, "prompts", Tier.GPU, prompt_bytes(traffic))
    yield Room(WORKSPACE, "head", Tier.GPU, head_bytes(traffic))
    yield Room(WORKSPACE, "logits", Tier.GPU, logits_bytes(traffic))
    yield Room(LIBRARIES, "first run", Tier.HOST, LIBRARY_BYTES)


def _cache_homes(traffic: Traffic) -> dict[Tier, int]:
    total = dict.fromkeys(Tier, 0)
    layers = len(traffic.cached_stages)
    for k, groups in enumerate(traffic.groups):
        for group in groups.cache:
            total[group.tier] += layers * traffic.home_bytes(k, group)
            total[Tier.HOST] += layers * traffic.open_home_bytes(group)
        total[Tier.GPU] += layers * traffic.device_open_bytes(k)
    return total


def _hidden_homes(traffic: Traffic) -> dict[Tier, int]:
    total = dict.fromkeys(Tier, 0)
    for group in (g for groups in traffic.groups for g in groups.hidden):
        total[group.tier] += pad(group.tokens(0) * traffic.model.hidden * traffic.model.itemsize)
    return total


def _rings(traffic: Traffic) -> dict[str, int]:
    """Capacity of every ring, in bytes: one slot in sequence, two or more when loads run ahead."""
    ahead = 2 if traffic.policy.overlap else 1
    caches = list(_largest_caches(traffic))
    hidden = [traffic.hidden_traffic(0, 0, k) for k in range(len(traffic.workload.batches))]
    hidden_slot = max(h.host + h.disk for h in hidden)
    hidden_disk = max(h.disk for h in hidden)
    disk_part = max(max(traffic.weight_traffic(n).disk_parts) for n in set(traffic.first_alike))
    apart = traffic.host_is_apart
    staged_in = max(disk_part, *(c.read_slot for c in caches), hidden_disk) if apart else 0
    staged_out = max(*(c.write_slot for c in caches), hidden_disk) if apart else 0
    batches = range(len(traffic.workload.batches) if traffic.host_attends else 0)
    projected, attended = _handoffs(traffic, batches)
    row = len(batches) + 1  # what is handed from one row of the schedule to the next, and one more
    return {
        "weight": _weight_ring(traffic),
        "cache": ahead * pad(max(c.slot for c in caches)),
        "hidden": ahead * pad(hidden_slot),
        "cache_out": ahead * pad(max(c.out for c in caches)),
        "hidden_out": ahead * pad(hidden_slot),
        "projected": ahead * pad(projected.device),
        "result": row * pad(attended.device),
        "stage_in": ahead * pad(staged_in),
        "stage_out": ahead * pad(staged_out),
        "query": row * pad(projected.host),
        "answer": row * pad(attended.host),
    }


def _handoffs(traffic: Traffic, batches: Sequence[int]) -> tuple[Handoff, Handoff]:
    """The largest that projection and attention hand on, of these GPU batches."""
    attend = traffic.cached_stages[0]
    stages = ([traffic.handoff(j, k) for k in batches] for j in (attend - 1, attend))
    projected, attended = (Handoff(*(max(sizes) for sizes in zip((0, 0), *found, strict=True))) for found in stages)
    return projected, attended


def _largest_caches(traffic: Traffic) -> Iterator[CacheTraffic]:
    """Yield traffic of the cache that has the largest of every kind."""
    for k, batch in enumerate(traffic.workload.batches):
        for i in _extreme_steps(batch):
            yield traffic.cache_traffic(i, k)


def _extreme_steps(batch: Batch) -> set[int]:
    """Token steps among which the largest of every kind of cache traffic is found: before sequences end."""
    ends = {batch.new_tokens, *batch.asked}
    return {0, min(1, batch.new_tokens - 1), *(max(n - back, 0) for n in ends for back in (1, 2))}


def _weight_ring(traffic: Traffic) -> int:
    """Room for the bundles in use at once and, with overlap, for one more, wherever the first of them lies."""
    slots = [pad(traffic.weight_traffic(n).slot) for n in range(len(traffic.bundles))]
    if not traffic.host_attends and not traffic.policy.overlap:
        return max(slots)
    if not traffic.host_attends:
        return max(a + 2 * b for a, b in zip(slots, slots[1:] + slots[:1], strict=True))
    count = traffic.bundles_in_use + traffic.policy.overlap
    turns = slots + slots[: count - 1]
    windows = [turns[j : j + count] for j in range(len(slots))]
    return max(sum(w) + max(w) for w in windows)  # an end of the ring too short for the largest stays empty
