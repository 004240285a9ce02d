"""The plan: every placement, buffer size and transfer of one round, decided before allocating anything.

Made from the model, the workload, the policy and where the weights lie on disk. Needs neither a GPU nor torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import pairwise

from .generator import Generator
from .layout import (
    CacheGroups,
    CacheLayout,
    Group,
    cache_fields,
    cache_groups,
    make_groups,
    pad,
    page_tokens_for,
    split_counts,
)
from .placement import Extent, LayerPlacement, Run, Tier, packed_layout, place_layer
from .policy import Policy, PolicyError
from .schedule import (
    ATTEND,
    ATTEND_HOST,
    COMPUTE,
    FINISH,
    PROJECT,
    CacheTraffic,
    HiddenTraffic,
    Program,
    SplitTraffic,
    WeightTraffic,
    Work,
)
from .spec import Batch, LayerSpec, ModelSpec, ModuleSpec, Workload
from .workspace import temporaries, workspace_bytes

PART_BYTES = 64 << 20  # a streamed layer is cut at least this fine, so that disk and link overlap within it
Extents = Mapping[str, Sequence[Extent]]  # by module

LIBRARY_BYTES = 48 << 20  # threads, matrix libraries' buffers and what a search leaves: 8 to 25 MiB on two cores
HOST_RINGS = ("stage_in", "stage_out", "query", "answer")  # the others are the device's
_NO_WORK = Work(rows=0, products=(), weight_bytes=0, hidden_bytes=0, first_of_load=False)


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


def _place(
    extents: Extents, model: ModelSpec, sep_layer: bool, cuts: tuple[float, float], align: int
) -> tuple[tuple[LayerPlacement, ...], LayerPlacement]:
    """Divide every layer, and the embedding tables together, over the tiers."""
    layers = model.layers(sep_layer)
    gathered = {t.name for layer in layers for t in layer.tensors if t.gathered}
    placements = tuple(
        place_layer([e for m in layer.modules for e in extents[m.name] if e.tensor not in gathered], *cuts, align)
        for layer in layers
    )
    return placements, place_layer([e for es in extents.values() for e in es if e.tensor in gathered], *cuts, align)


@lru_cache(maxsize=64)
def _place_packed(
    model: ModelSpec, sep_layer: bool, cuts: tuple[float, float], align: int
) -> tuple[tuple[LayerPlacement, ...], LayerPlacement]:
    """The same in a store of our own; a search asks for the same few again and again."""
    layout = packed_layout(model.modules)
    return _place({m.name: layout[n] for n, m in enumerate(model.modules)}, model, sep_layer, cuts, align)


class Plan:
    """Placements, sizes and traffic; immutable once made. See `make_plan`."""

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
        self.layers: tuple[LayerSpec, ...] = model.layers(policy.sep_layer)
        cuts = (policy.w_gpu_percent, policy.w_cpu_percent)
        place = _place_packed if extents is None else partial(_place, extents)
        self.placements: tuple[LayerPlacement, ...]
        self.tables: LayerPlacement
        self.placements, self.tables = place(model, policy.sep_layer, cuts, align)
        self.parts: tuple[tuple[Part, ...], ...] = tuple(self._cut_parts(p) for p in self.placements)
        batches = workload.batches
        # what the device is sent of the host's cache: K and V, or K alone, sparse attention fetching the V it needs
        self.host_halves = 1 if host_is_apart and policy.attn_sparsity < 1 else 2
        fields = cache_fields(model, is_4bit=policy.is_cache_4bit)
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

        self._layer_work = tuple(self._work_of(layer.modules) for layer in self.layers)
        cut = {j: layer.cut_at_attention() for j, layer in enumerate(self.layers) if layer.has_cache}
        self._part_work = {
            (j, name): self._work_of(c) for j, cs in cut.items() for name, c in zip((PROJECT, FINISH), cs, strict=True)
        }
        self._rows_on_disk = self.tables.disk.useful / max(sum(self.tables.share(t).useful for t in Tier), 1)
        # asked several times per op, by neighbours in the schedule
        self.cache_traffic = lru_cache(maxsize=64)(self._cache_traffic)
        self.hidden_traffic = lru_cache(maxsize=1024)(self._hidden_traffic)

    # Weights

    def _cut_parts(self, placement: LayerPlacement) -> tuple[Part, ...]:
        host = placement.host.nbytes if self.host_is_apart else 0
        streamed = placement.disk.nbytes + host
        count = max(len(self.workload.batches), -(-streamed // PART_BYTES))
        bounds = [min(pad(host * p // count), host) for p in range(count + 1)]
        return tuple(
            Part(disk, low, high - low)
            for disk, (low, high) in zip(placement.disk.parts(count, self.align), pairwise(bounds), strict=True)
        )

    def weight_traffic(self, j: int) -> WeightTraffic:
        parts, placement = self.parts[j], self.placements[j]
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

    # Arithmetic

    def _work_of(self, modules: Sequence[ModuleSpec]) -> tuple[tuple[tuple[str, float], ...], int, int]:
        """FLOPs per row by format, bytes of weights, and bytes of activations per row, of modules' products."""
        flops: dict[str, float] = {}
        tensors = [t for m in modules for t in m.tensors if not t.gathered]
        for t in tensors:
            if t.packing or len(t.shape) > 1:
                kind = "4-bit" if t.packing else t.dtype
                flops[kind] = flops.get(kind, 0.0) + 2.0 * t.num_parameters
        hidden = sum(self._passed_over(m) for m in modules)
        return tuple(flops.items()), sum(t.nbytes for t in tensors), hidden

    def _passed_over(self, module: ModuleSpec) -> int:
        """Bytes per row that a module reads and writes apart from its products: norm, biases, activation, residual."""
        width, itemsize = self.model.hidden, self.model.itemsize
        if module.kind == "head":  # fp32 logits are written once and read twice, to be sampled
            return 12 * sum(t.shape[0] for t in module.tensors if t.exact)
        factors = {"embed": 6, "attention": 12, "project": 8, "output": 4, "mlp": 6 + 4 * self.model.ffn / width}
        return round(factors[module.kind] * width) * itemsize

    def work(self, i: int, j: int, k: int, name: str = COMPUTE) -> Work:
        """The work of one computation of a visit: a whole layer, or one of the parts that attention cuts it into."""
        if name in (ATTEND, ATTEND_HOST):
            return self._attention_work(_NO_WORK, i, k, on_host=name == ATTEND_HOST)
        batch, layer, model = self.workload.batches[k], self.layers[j], self.model
        rows = batch.size + (0 if i else batch.scored) if layer.is_head else batch.tokens(i)
        products, weight_bytes, hidden = self._part_work.get((j, name)) or self._layer_work[j]
        streamed = sum(p.disk_bytes for p in self.parts[j]) // len(self.workload.batches) if name != FINISH else 0
        if layer.has_cache and name != FINISH:
            streamed += self.cache_traffic(i, k).disk_read
        work = Work(
            rows,
            tuple((kind, flops * rows) for kind, flops in products),
            weight_bytes,
            hidden * rows,
            first_of_load=k == 0,
            streamed_bytes=streamed,
        )
        if j == 0:
            return replace(work, lookups=round(self._rows_on_disk * self._distinct_rows(i, batch)))
        if not layer.has_cache or name in (PROJECT, FINISH):
            return work
        if i == 0:
            squares = sum(p * p for p in batch.prompt_lens)
            flops = 2.0 * model.num_heads * model.head_dim * squares
            return replace(work, prompt_flops=flops, prompt_len=round(squares / batch.prompt_tokens))
        return self._attention_work(work, i, k)

    def _attention_work(self, work: Work, i: int, k: int, *, on_host: bool = False) -> Work:
        """Decode attention of one GPU batch added: of the sequences that the host attends to, or of all others."""
        groups, model = self.groups[k].cache, self.model
        chosen = [g for g in groups if (g is groups.attended) == on_host]
        context = sum(sum(g.cached(i)) + g.size for g in chosen)
        return replace(
            work,
            cache_bytes=round(context * self.cache_layout.token_bytes * (1 + self.policy.attn_sparsity) / 2),
            cache_flops=4.0 * model.num_heads * model.head_dim * context,
            cache_format="4-bit" if self.policy.is_cache_4bit else model.dtype,
            gathered_bytes=0 if on_host else self.cache_traffic(i, k).gathered,
        )

    def _distinct_rows(self, i: int, batch: Batch) -> float:
        """Rows of the embedding tables that a step looks up: positions, and so many of random tokens that differ."""
        vocab, tokens = self.model.vocab, batch.tokens(i)
        positions = batch.prompt_lens[0] if i == 0 else len(set(batch.prompt_lens))
        return positions + vocab * (1 - (1 - 1 / vocab) ** tokens)

    # The program, and the memory it needs

    @cached_property
    def program(self) -> Program:
        return Program(
            weights=tuple(self.weight_traffic(j) for j in range(len(self.layers))),
            has_cache=tuple(layer.has_cache for layer in self.layers),
            batch_steps=tuple(b.new_tokens for b in self.workload.batches),
            cache=self.cache_traffic,
            hidden=self.hidden_traffic,
            work=self.work,
            split=self.split_traffic if self.host_attends else None,
            rings=self.rings,
            host_is_apart=self.host_is_apart,
            keeps_open=self.keeps_open,
            serial=not self.policy.overlap,
            pinned=self.policy.pin_weight,
        )

    @cached_property
    def rings(self) -> dict[str, int]:
        """Capacity of every ring, in bytes: one slot in sequence, two or more when loads run ahead."""
        ahead = 2 if self.policy.overlap else 1
        traffic = [
            self.cache_traffic(i, k) for k, b in enumerate(self.workload.batches) for i in self._extreme_steps(b)
        ]
        hidden = [self.hidden_traffic(0, 0, k) for k in range(len(self.workload.batches))]
        hidden_slot = max(h.host + h.disk for h in hidden)
        hidden_disk = max(h.disk for h in hidden)
        disk_part = max(p.disk_bytes for parts in self.parts for p in parts)
        staged_in = max(disk_part, *(c.read_slot for c in traffic), hidden_disk) if self.host_is_apart else 0
        staged_out = max(*(c.write_slot for c in traffic), hidden_disk) if self.host_is_apart else 0
        split = [self.split_traffic(1, k) for k in range(len(self.workload.batches) if self.host_attends else 0)]
        row = len(split) + 1  # what is handed from one row of the schedule to the next, and one more
        return {
            "weight": self._weight_ring(),
            "cache": ahead * pad(max(c.slot for c in traffic)),
            "hidden": ahead * pad(hidden_slot),
            "cache_out": ahead * pad(max(c.out for c in traffic)),
            "hidden_out": ahead * pad(hidden_slot),
            "projected": ahead * _most(s.projected for s in split),
            "result": row * _most(s.result for s in split),
            "stage_in": ahead * pad(staged_in),
            "stage_out": ahead * pad(staged_out),
            "query": row * _most(s.query for s in split),
            "answer": row * _most(s.answer for s in split),
        }

    @staticmethod
    def _extreme_steps(batch: Batch) -> set[int]:
        """Token steps among which the largest of every kind of cache traffic is found: before sequences end."""
        ends = {batch.new_tokens, *batch.asked}
        return {0, min(1, batch.new_tokens - 1), *(max(n - back, 0) for n in ends for back in (1, 2))}

    @property
    def layers_in_use(self) -> int:
        """Layers whose weights a row of the schedule uses: one, or those from one attention to the next."""
        attentions = [j for j, layer in enumerate(self.layers) if layer.has_cache]
        return 1 + max((b - a for a, b in pairwise(attentions)), default=1) if self.host_attends else 1

    def _weight_ring(self) -> int:
        """Room for the layers in use at once and, with overlap, for one more, wherever the first of them lies."""
        slots = [pad(self.weight_traffic(j).slot) for j in range(len(self.layers))]
        if not self.host_attends and not self.policy.overlap:
            return max(slots)
        if not self.host_attends:
            return max(a + 2 * b for a, b in zip(slots, slots[1:] + slots[:1], strict=True))
        count = self.layers_in_use + self.policy.overlap
        turns = slots + slots[: count - 1]
        windows = [turns[j : j + count] for j in range(len(slots))]
        return max(sum(w) + max(w) for w in windows)  # an end of the ring too short for the largest stays empty

    @cached_property
    def placement(self) -> dict[str, dict[str, int]]:
        """Useful bytes by kind (weights, cache, activations) and tier (gpu, cpu, disk)."""
        weights, cache, hidden = dict.fromkeys(Tier, 0), dict.fromkeys(Tier, 0), dict.fromkeys(Tier, 0)
        for tier in Tier:
            weights[tier] = sum(p.share(tier).useful for p in (*self.placements, self.tables))
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

    @cached_property
    def homes(self) -> dict[Tier, int]:
        """Bytes of the cache's and the hidden states' homes on each tier (without rings)."""
        layout, total = self.cache_layout, dict.fromkeys(Tier, 0)
        layers = sum(layer.has_cache for layer in self.layers)
        for k, groups in enumerate(self.groups):
            pages = self.cache_home_pages(k)
            gpu, attended, host, disk = groups.cache
            kept = layout.dense(1, host.size + disk.size) if self.keeps_open else 0
            total[Tier.GPU] += layers * (layout.dense(pages, gpu.size) + kept)
            on_host = layout.dense(pages, attended.size) + layout.dense(pages, host.size)
            total[Tier.HOST] += layers * (on_host + layout.dense(1, disk.size))
            total[Tier.DISK] += layers * layout.dense(layout.full(self.workload.batches[k].max_len), disk.size)
            for g in groups.hidden:
                total[g.tier] += pad(g.tokens(0) * self.model.hidden * self.model.itemsize)
        return total

    @cached_property
    def temporaries(self) -> dict[str, int]:
        """Bytes allocated before the run for the computations of token steps, by purpose."""
        return temporaries(self)

    @cached_property
    def workspace_bytes(self) -> int:
        """Temporaries of decoding and, beside them, of the largest computation of prompts, with the logits."""
        return workspace_bytes(self)

    @cached_property
    def device_bytes(self) -> int:
        """Peak bytes of the GPU tier: resident weights, homes, the rings that compute reads, workspace."""
        weights = sum(p.gpu.nbytes for p in (*self.placements, self.tables))
        rings = sum(nbytes for name, nbytes in self.rings.items() if name not in HOST_RINGS)
        return weights + self.homes[Tier.GPU] + rings + self.workspace_bytes

    @cached_property
    def host_bytes(self) -> int:
        """Peak bytes of the host tier: its weights, homes and staging rings, and what libraries take in a first run."""
        weights = sum(p.host.nbytes for p in (*self.placements, self.tables))
        rings = sum(self.rings[name] for name in HOST_RINGS)
        computing = sum(self.temporaries[name] for name in ("uploads", "hosted", "token_staging"))
        return weights + self.homes[Tier.HOST] + rings + computing + LIBRARY_BYTES

    @cached_property
    def scratch_bytes(self) -> int:
        """Disk space for cache and hidden states."""
        return self.homes[Tier.DISK]

    @property
    def generator(self) -> Generator:
        return Generator(self.program)


def _most(sizes: Iterable[int]) -> int:
    return pad(max(sizes, default=0))


def _mean_len(batches: Sequence[Batch]) -> float:
    """Cached tokens of a sequence, in the mean over sequences and token steps."""
    tokens = sum(p + n / 2 for b in batches for p, n in zip(b.prompt_lens, b.new_tokens_each, strict=True))
    return tokens / sum(b.size for b in batches)


def make_plan(
    model: ModelSpec,
    policy: Policy,
    workload: Workload,
    *,
    extents: Extents | None = None,
    align: int = 4096,
    host_is_apart: bool = True,
) -> Plan:
    """Plan one round; without `extents` the weights are planned as a store of our own would hold them.

    `host_is_apart` says that host memory must be copied to the device, as on a GPU. Raises PolicyError when a prompt
    and its new tokens exceed the model's positions.
    """
    for batch in workload.batches:
        longest, asked = max(zip(batch.prompt_lens, batch.new_tokens_each, strict=True), key=sum)
        if longest + asked > model.max_positions:
            raise PolicyError(
                f"a prompt of {longest} tokens and {asked} new ones need {longest + asked} positions, "
                f"{model.name} has {model.max_positions}; "
                f"at most {max(model.max_positions - longest, 0)} new tokens fit"
            )
    return Plan(
        model=model, policy=policy, workload=workload, extents=extents, align=align, host_is_apart=host_is_apart
    )
