"""The place of every byte of a round, and the bytes that each visit of its schedule moves.

Decided from the model, the workload, the policy and the weights' places on disk. Knows neither how much memory that
takes nor what is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import pairwise

from .layout import (
    CacheLayout,
    Group,
    Groups,
    SlotPages,
    cache_groups,
    hidden_groups,
    pad,
    page_tokens_for,
    split_counts,
)
from .placement import LayerPlacement, Run, Share, Tier
from .placements import Extents as Extents
from .placements import Placements, packed_placements
from .policy import Policy
from .schedule import CacheTraffic, Handoff, HiddenTraffic, WeightTraffic
from .spec import ATTEND, HEAD, Batch, Bundle, ModelSpec, Stage, Workload

PART_BYTES = 64 << 20  # a streamed layer is cut at least this fine, so that disk and link overlap within it


@dataclass(frozen=True, slots=True)
class Part:
    """One transfer of a layer's streamed share: runs of files, and a range of the host's share."""

    disk: tuple[Run, ...]
    host_at: int
    host_bytes: int

    @property
    def disk_bytes(self) -> int:
        return sum(r.nbytes for r in self.disk)


@dataclass(frozen=True, slots=True)
class BatchGroups:
    """One GPU batch's sequences divided twice: by the tier of their cache, and by that of their hidden state."""

    cache: Groups
    hidden: tuple[Group, ...]  # on the GPU, the host and the disk


class Traffic:
    """Placements of weights, cache and hidden states, and the bytes that each visit moves; immutable once made."""

    def __init__(
        self,
        *,
        model: ModelSpec,
        policy: Policy,
        workload: Workload,
        extents: Extents | None,
        align: int,
        host_is_apart: bool,
    ) -> None:
        self.model, self.policy, self.workload = model, policy, workload
        self.host_is_apart, self.align = host_is_apart, align
        weights = model, policy.sep_layer, (policy.w_gpu_percent, policy.w_cpu_percent), align
        self._placements = packed_placements(*weights) if extents is None else Placements(*weights, extents)
        self.bundles: tuple[Bundle, ...] = self._placements.bundles
        self.first_alike: tuple[int, ...] = self._placements.first_alike  # of each bundle, the first that is like it
        self.tables: LayerPlacement = self._placements.tables
        self.stages = tuple(
            Stage(stage, module, n)
            for n, bundle in enumerate(self.bundles)
            for module in bundle.modules
            for stage in module.stages
        )
        self.parts = cache(self._cut_parts)
        self._weight_traffic = cache(self._traffic_of_weights)
        batches = workload.batches
        # what the device is sent of the host's cache: K and V, or K alone, sparse attention fetching the V it needs
        self.host_halves = 1 if host_is_apart and policy.attn_sparsity < 1 else 2
        fields = policy.cache_format.fields(model.dtype, model.head_dim)
        self.cache_layout = CacheLayout(model.num_kv_heads, fields, page_tokens_for(_mean_len(batches)))
        sizes = [b.size for b in batches]
        attended = policy.attended_percent if host_is_apart else 0.0
        sent = policy.cache_cpu_percent - attended
        cache_counts = split_counts(sizes, (policy.cache_gpu_percent, attended, sent))
        hidden_counts = split_counts(sizes, (policy.act_gpu_percent, policy.act_cpu_percent))
        self.groups: tuple[BatchGroups, ...] = tuple(
            BatchGroups(cache_groups(b, c), hidden_groups(b, h))
            for b, c, h in zip(batches, cache_counts, hidden_counts, strict=True)
        )
        self.host_attends = any(g.cache.attended_by_host for g in self.groups)  # on a lane of its own
        # the device keeps the open pages of what is sent to it
        self.keeps_open = host_is_apart and policy.keep_open_pages and any(g.cache.sent for g in self.groups)

        # asked several times per op, by neighbours in the schedule
        self.cache_traffic = lru_cache(maxsize=64)(self._cache_traffic)
        self.slot_pages = lru_cache(maxsize=64)(self._slot_pages)
        self.hidden_traffic = lru_cache(maxsize=1024)(self._hidden_traffic)

    # Weights

    @property
    def placements(self) -> tuple[LayerPlacement, ...]:
        """Every bundle's own placement, with its tensors' names and its places in files."""
        return tuple(map(self._placements.place, range(len(self.bundles))))

    @property
    def distinct_bundles(self) -> tuple[Bundle, ...]:
        """One of each kind of bundle, the first."""
        return tuple(self.bundles[n] for n in dict.fromkeys(self.first_alike))

    def weight_shares(self, tier: Tier) -> Iterator[Share]:
        """Yield a tier's share of each bundle, of one that is like it, and of the tables: for their sizes."""
        for n in self.first_alike:
            yield self._placements.place(n).share(tier)
        yield self.tables.share(tier)

    def _cut_parts(self, bundle: int) -> tuple[Part, ...]:
        """Cut a bundle's streamed share in parts."""
        placement = self._placements.place(bundle)
        host = placement.host.nbytes if self.host_is_apart else 0
        streamed = placement.disk.nbytes + host
        count = max(len(self.workload.batches), -(-streamed // PART_BYTES))
        bounds = [min(pad(host * p // count), host) for p in range(count + 1)]
        return tuple(
            Part(disk, low, high - low)
            for disk, (low, high) in zip(placement.disk.parts(count, self.align), pairwise(bounds), strict=True)
        )

    def weight_traffic(self, bundle: int) -> WeightTraffic:
        return self._weight_traffic(self.first_alike[bundle])

    def _traffic_of_weights(self, bundle: int) -> WeightTraffic:
        parts, placement = self.parts(bundle), self._placements.place(bundle)
        host = placement.host.nbytes if self.host_is_apart else 0
        return WeightTraffic(
            tuple(p.disk_bytes for p in parts), tuple(p.host_bytes for p in parts), placement.disk.nbytes + host
        )

    # Cache

    def _cache_traffic(self, i: int, k: int) -> CacheTraffic:
        """Bytes that attention of GPU batch k moves in token step i, in any one layer."""
        last = i == self.workload.batches[k].new_tokens - 1
        if i == 0:
            return self._prefill_cache_traffic(k, last=last)
        layout, groups, pages = self.cache_layout, self.groups[k].cache, self.slot_pages(i, k)
        read = self._moved(p for p in pages if p.pass_disk)
        written = 0 if last else layout.dense(len(layout.filled(groups.on_disk.cached(i))), 1)
        out = groups.sent.size * layout.token_bytes if self.hands_over_tokens else 0
        filled = layout.dense(len(layout.filled(groups.sent_by_host.cached(i))), 1)
        return CacheTraffic(
            disk_read=read,
            read_slot=sum(p.room for p in pages if p.pass_disk),
            host_load=self._moved(pages) - read,
            slot=sum(p.room for p in pages),
            gathered=self._gathered(groups.sent_by_host, i),
            out=out,
            host_store=0 if last else written + filled if self.keeps_open else out,
            disk_write=written,
        )

    def _prefill_cache_traffic(self, k: int, *, last: bool) -> CacheTraffic:
        if last:  # one token asked: its K and V are never read again
            return CacheTraffic()
        pages = self.slot_pages(0, k)
        return CacheTraffic(
            out=sum(p.room for p in pages),
            host_store=self._moved(pages) if self.host_is_apart else 0,
            disk_write=self._moved(p for p in pages if p.pass_disk),
            write_slot=sum(p.room for p in pages if p.pass_disk),
        )

    def _moved(self, pages: Iterable[SlotPages]) -> int:
        return sum(self.cache_layout.dense(sum(p.counts), 1, p.halves) for p in pages)

    def _slot_pages(self, i: int, k: int) -> tuple[SlotPages, ...]:
        """Lay out the slot that K and V enter the device in before token step i, or in step 0 leave it in."""
        slot, end = [], 0
        for group, counts, halves, are_open in self._moving_pages(i, self.groups[k].cache):
            room = self.cache_layout.dense(max(counts), group.size, halves)
            if room:
                slot.append(SlotPages(group, tuple(counts), halves, are_open, slice(end, end + room)))
                end += room
        return tuple(slot)

    def _moving_pages(self, i: int, groups: Groups) -> Iterator[tuple[Group, Sequence[int], int, bool]]:
        """Yield groups with their pages that move, in the order of a slot: the disk's full ones, open ones, others."""
        layout = self.cache_layout
        for g in groups.on_disk:
            yield g, [layout.full(n) for n in g.held(i)], 2, False
        if not self.host_is_apart:
            return
        for g in () if self.keeps_open else groups.on_disk:  # at home on the host
            yield g, [1] * g.size, 2, True
        for g in groups.sent_by_host:
            yield g, self.host_pages(g.held(i)), self.host_halves if i else 2, False
        for g in () if i else groups.attended_by_host:
            yield g, [layout.pages(n) for n in g.held(i)], 2, False

    @property
    def hands_over_tokens(self) -> bool:
        """True if new tokens of the sequences that are sent go home one by one."""
        return self.host_is_apart and not self.keeps_open

    def host_pages(self, cached: Sequence[int]) -> list[int]:
        """Count the pages that the host holds of sequences with these numbers of cached tokens: all or full ones."""
        return [self.cache_layout.full(n) if self.keeps_open else self.cache_layout.pages(n) for n in cached]

    def _gathered(self, host: Groups, i: int) -> int:
        """Bytes of V that sparse attention fetches from the host's home: for every query head the rows it keeps."""
        if self.host_halves == 2:
            return 0
        row = self.cache_layout.token_bytes // (2 * self.model.num_kv_heads)
        return sum(self.kept(n) for n in host.cached(i)) * self.model.num_heads * row

    def kept(self, cached: int) -> int:
        """Number of earlier tokens whose V sparse attention reads, per head, of this many cached ones."""
        return int(self.policy.attn_sparsity * cached)

    @cached_property
    def cached_stages(self) -> tuple[int, ...]:
        """The stages that keep K and V."""
        return tuple(j for j, stage in enumerate(self.stages) if stage.spec.state)

    @cached_property
    def _attentions(self) -> dict[int, int]:
        stages = {id(self.stages[n].module): n for n in self.cached_stages}
        return {j: stages[id(s.module)] for j, s in enumerate(self.stages) if id(s.module) in stages}

    def attention_of(self, j: int) -> int:
        """The stage of attention in the module of stage j."""
        return self._attentions[j]

    def handoff(self, j: int, k: int) -> Handoff:
        """Bytes that projection or attention hands on for GPU batch k in decode, where they are computed apart."""
        model = self.model
        keys = 0 if self.stages[j].spec.kind == ATTEND else 2 * model.num_kv_heads
        row = (model.num_heads + keys) * model.head_dim * model.itemsize
        return Handoff(self.workload.batches[k].size * row, self.groups[k].cache.attended_by_host.size * row)

    def device_attends(self, k: int) -> bool:
        """True where the device attends to sequences of GPU batch k itself."""
        return self.groups[k].cache.attended_by_host.size < self.workload.batches[k].size

    def cache_home_pages(self, k: int) -> int:
        return self.cache_layout.pages(self.workload.batches[k].max_len)

    def home_bytes(self, k: int, group: Group) -> int:
        """Bytes that a layer keeps of a group's K and V on its tier; on disk full pages alone."""
        longest = self.workload.batches[k].max_len
        pages = self.cache_layout.full(longest) if group.tier is Tier.DISK else self.cache_home_pages(k)
        return self.cache_layout.dense(pages, group.size)

    def open_home_bytes(self, group: Group) -> int:
        """Bytes that a layer keeps of a group's open pages on the host: the disk's, wherever they are filled."""
        return self.cache_layout.dense(1, group.size) if group.tier is Tier.DISK else 0

    def device_open_bytes(self, k: int) -> int:
        """Bytes that a layer keeps of open pages on the device."""
        return self.cache_layout.dense(1, self.groups[k].cache.sent.size) if self.keeps_open else 0

    # Hidden states

    def _hidden_traffic(self, i: int, j: int, k: int) -> HiddenTraffic:
        """Bytes that stage j's result of GPU batch k moves to reach stage j + 1; the head's parts keep theirs."""
        if self.stages[j].spec.kind == HEAD:
            return HiddenTraffic()
        row = self.model.hidden * self.model.itemsize
        nbytes = {g.tier: g.tokens(i) * row for g in self.groups[k].hidden}
        return HiddenTraffic(nbytes[Tier.HOST] if self.host_is_apart else 0, pad(nbytes[Tier.DISK]))

    @cached_property
    def bundles_in_use(self) -> int:
        """Bundles whose weights a row of the schedule uses: one, or those from one attention to the next."""
        attentions = [self.stages[j].bundle for j in self.cached_stages]
        return 1 + max((b - a for a, b in pairwise(attentions)), default=1) if self.host_attends else 1

    @cached_property
    def placement(self) -> dict[str, dict[str, int]]:
        """Useful bytes by kind (weights, cache, activations) and tier (gpu, cpu, disk)."""
        weights, cache, hidden = dict.fromkeys(Tier, 0), dict.fromkeys(Tier, 0), dict.fromkeys(Tier, 0)
        for tier in Tier:
            weights[tier] = sum(share.useful for share in self.weight_shares(tier))
        attention_layers = len(self.cached_stages)
        for groups in self.groups:
            for g in groups.cache:
                tokens = sum(p + n - 1 for p, n in zip(g.prompt_lens, g.asked, strict=True))
                cache[g.tier] += attention_layers * tokens * self.cache_layout.token_bytes
            for g in groups.hidden:
                hidden[g.tier] += g.tokens(0) * self.model.hidden * self.model.itemsize
        return {
            kind: {tier.value: by_tier[tier] for tier in Tier}
            for kind, by_tier in (("weights", weights), ("cache", cache), ("activations", hidden))
        }


def _mean_len(batches: Sequence[Batch]) -> float:
    """Cached tokens of a sequence, in the mean over sequences and token steps."""
    tokens = sum(p + n / 2 for b in batches for p, n in zip(b.prompt_lens, b.new_tokens_each, strict=True))
    return tokens / sum(b.size for b in batches)
