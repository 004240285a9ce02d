"""The place of every byte of a round, and the bytes that each visit of its schedule moves.

Decided from the model, the workload, the policy and the weights' places on disk. Knows neither how much memory that
takes nor what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import pairwise

from .layout import (
    CacheGroups,
    CacheLayout,
    Group,
    cache_groups,
    make_groups,
    pad,
    page_tokens_for,
    split_counts,
)
from .placement import LayerPlacement, Run, Share, Tier
from .placements import Extents as Extents
from .placements import Placements, packed_placements
from .policy import Policy
from .schedule import CacheTraffic, HiddenTraffic, SplitTraffic, WeightTraffic
from .spec import Batch, LayerSpec, ModelSpec, Workload

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

    cache: CacheGroups
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
        self.layers: tuple[LayerSpec, ...] = self._placements.layers
        self.first_alike: tuple[int, ...] = self._placements.first_alike  # of each layer, the first that is like it
        self.tables: LayerPlacement = self._placements.tables
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
            BatchGroups(cache_groups(b, c), tuple(make_groups(b, h)))
            for b, c, h in zip(batches, cache_counts, hidden_counts, strict=True)
        )
        self.host_attends = any(g.cache.attended.size for g in self.groups)  # on a lane of its own
        away = any(g.cache.host.size or g.cache.disk.size for g in self.groups)
        self.keeps_open = host_is_apart and policy.keep_open_pages and away  # the device keeps the pages being filled

        # asked several times per op, by neighbours in the schedule
        self.cache_traffic = lru_cache(maxsize=64)(self._cache_traffic)
        self.hidden_traffic = lru_cache(maxsize=1024)(self._hidden_traffic)

    # Weights

    @property
    def placements(self) -> tuple[LayerPlacement, ...]:
        """Every layer's own placement, with its tensors' names and its places in files."""
        return tuple(map(self._placements.layer, range(len(self.layers))))

    @property
    def distinct_layers(self) -> tuple[LayerSpec, ...]:
        """One of each kind of layer, the first."""
        return tuple(self.layers[j] for j in dict.fromkeys(self.first_alike))

    def weight_shares(self, tier: Tier) -> Iterator[Share]:
        """Yield a tier's share of each layer, of one that is like it, and of the tables: for their sizes."""
        for j in self.first_alike:
            yield self._placements.layer(j).share(tier)
        yield self.tables.share(tier)

    def _cut_parts(self, j: int) -> tuple[Part, ...]:
        """Layer j's streamed share in parts."""
        placement = self._placements.layer(j)
        host = placement.host.nbytes if self.host_is_apart else 0
        streamed = placement.disk.nbytes + host
        count = max(len(self.workload.batches), -(-streamed // PART_BYTES))
        bounds = [min(pad(host * p // count), host) for p in range(count + 1)]
        return tuple(
            Part(disk, low, high - low)
            for disk, (low, high) in zip(placement.disk.parts(count, self.align), pairwise(bounds), strict=True)
        )

    def weight_traffic(self, j: int) -> WeightTraffic:
        return self._weight_traffic(self.first_alike[j])

    def _traffic_of_weights(self, j: int) -> WeightTraffic:
        parts, placement = self.parts(j), self._placements.layer(j)
        host = placement.host.nbytes if self.host_is_apart else 0
        return WeightTraffic(
            tuple(p.disk_bytes for p in parts), tuple(p.host_bytes for p in parts), placement.disk.nbytes + host
        )

    # Cache

    def _cache_traffic(self, i: int, k: int) -> CacheTraffic:
        """Bytes that attention of GPU batch k moves in token step i, in any one layer."""
        layout = self.cache_layout
        _, attended, host, disk = self.groups[k].cache
        batch = self.workload.batches[k]
        last = i == batch.new_tokens - 1
        if i == 0:
            return self._prefill_cache_traffic(attended, host, disk, last=last)
        full = [layout.full(n) for n in disk.cached(i)]
        used = self.host_pages(host.cached(i))
        read, read_slot = layout.dense(sum(full), 1), layout.dense(max(full, default=0), disk.size)
        filled = len(layout.filled(disk.cached(i)))
        written = 0 if last else layout.dense(filled, 1)
        if not self.host_is_apart:
            return CacheTraffic(disk_read=read, read_slot=read_slot, slot=read_slot, disk_write=written)
        opened = self.open_bytes(disk)
        out = 0 if self.keeps_open else (host.size + disk.size) * layout.token_bytes  # attention reads it there
        stored = written + layout.dense(len(layout.filled(host.cached(i))), 1) if self.keeps_open else out
        return CacheTraffic(
            disk_read=read,
            read_slot=read_slot,
            host_load=layout.dense(sum(used), 1, self.host_halves) + opened,
            slot=read_slot + opened + layout.dense(max(used, default=0), host.size, self.host_halves),
            gathered=self._gathered(host, i),
            out=out,
            host_store=0 if last else stored,
            disk_write=written,
        )

    def host_pages(self, cached: Sequence[int]) -> list[int]:
        """Count the pages that the host holds of sequences with these numbers of cached tokens: all or full ones."""
        return [self.cache_layout.full(n) if self.keeps_open else self.cache_layout.pages(n) for n in cached]

    def open_bytes(self, disk: Group) -> int:
        """Bytes that the open pages of the disk's sequences, which lie on the host, add to a transfer of full ones."""
        return 0 if self.keeps_open else self.cache_layout.dense(1, disk.size)

    def _gathered(self, host: Group, i: int) -> int:
        """Bytes of V that sparse attention fetches from the host's home: for every query head the rows it keeps."""
        if self.host_halves == 2:
            return 0
        row = self.cache_layout.token_bytes // (2 * self.model.num_kv_heads)
        return sum(self.kept(n) for n in host.cached(i)) * self.model.num_heads * row

    def kept(self, cached: int) -> int:
        """Number of earlier tokens whose V sparse attention reads, per head, of this many cached ones."""
        return int(self.policy.attn_sparsity * cached)

    def _prefill_cache_traffic(self, attended: Group, host: Group, disk: Group, *, last: bool) -> CacheTraffic:
        if last:  # one token asked: its K and V are never read again
            return CacheTraffic()
        layout = self.cache_layout
        full = [layout.full(n) for n in disk.prompt_lens]
        written, write_slot = layout.dense(sum(full), 1), layout.dense(max(full, default=0), disk.size)
        if not self.host_is_apart:
            return CacheTraffic(out=write_slot, disk_write=written, write_slot=write_slot)
        at_home = self.host_pages(host.prompt_lens), [layout.pages(n) for n in attended.prompt_lens]
        opened = self.open_bytes(disk)
        return CacheTraffic(
            out=write_slot + opened + sum(layout.dense(max(used, default=0), len(used)) for used in at_home),
            host_store=written + opened + sum(layout.dense(sum(used), 1) for used in at_home),
            disk_write=written,
            write_slot=write_slot,
        )

    def split_traffic(self, i: int, k: int) -> SplitTraffic:
        """Bytes that move for attention of GPU batch k in a token step after the first, in any one layer."""
        model, groups = self.model, self.groups[k].cache
        size = self.workload.batches[k].size
        result = model.num_heads * model.head_dim * model.itemsize  # of one sequence
        projected = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim * model.itemsize
        asked = groups.attended.size
        return SplitTraffic(size * projected, asked * projected, asked * result, size * result, attends=asked < size)

    def cache_home_pages(self, k: int) -> int:
        return self.cache_layout.pages(self.workload.batches[k].max_len)

    # Hidden states

    def _hidden_traffic(self, i: int, j: int, k: int) -> HiddenTraffic:
        """Bytes that take layer j's result of GPU batch k to layer j+1; the head's parts hand theirs on in place."""
        if self.layers[j].is_head:
            return HiddenTraffic()
        row = self.model.hidden * self.model.itemsize
        _, host, disk = self.groups[k].hidden
        on_host = host.tokens(i) * row if self.host_is_apart else 0
        return HiddenTraffic(on_host, pad(disk.tokens(i) * row))

    @cached_property
    def layers_in_use(self) -> int:
        """Layers whose weights a row of the schedule uses: one, or those from one attention to the next."""
        attentions = [j for j, layer in enumerate(self.layers) if layer.has_cache]
        return 1 + max((b - a for a, b in pairwise(attentions)), default=1) if self.host_attends else 1

    @cached_property
    def placement(self) -> dict[str, dict[str, int]]:
        """Useful bytes by kind (weights, cache, activations) and tier (gpu, cpu, disk)."""
        weights, cache, hidden = dict.fromkeys(Tier, 0), dict.fromkeys(Tier, 0), dict.fromkeys(Tier, 0)
        for tier in Tier:
            weights[tier] = sum(share.useful for share in self.weight_shares(tier))
        attention_layers = sum(layer.has_cache for layer in self.layers)
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
