"""The arithmetic of every computation of a schedule, in units that a machine has rates for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from .formats import WeightFormat
from .placement import Tier
from .schedule import ATTEND, ATTEND_HOST, COMPUTE, FINISH, PROJECT, Work
from .spec import Batch, ModuleSpec
from .traffic import Traffic

_NO_WORK = Work(rows=0, products=(), weight_bytes=0, hidden_bytes=0, first_of_load=False)


class Arithmetic:
    """Counts what the computations of a round do."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic, self.model, self.policy, self.workload = traffic, traffic.model, traffic.policy, traffic.workload
        distinct = {j: traffic.layers[j] for j in traffic.first_alike}
        self._layer_work = {j: self._work_of(layer.modules) for j, layer in distinct.items()}
        cut = {j: layer.cut_at_attention() for j, layer in distinct.items() if layer.has_cache}
        self._part_work = {
            (j, name): self._work_of(c) for j, cs in cut.items() for name, c in zip((PROJECT, FINISH), cs, strict=True)
        }
        tables = traffic.tables
        self._rows_on_disk = tables.disk.useful / max(sum(tables.share(t).useful for t in Tier), 1)

    def _work_of(self, modules: Sequence[ModuleSpec]) -> tuple[tuple[tuple[WeightFormat, float], ...], int, int]:
        """FLOPs per row by format, bytes of weights, and bytes of activations per row, of modules' products."""
        flops: dict[WeightFormat, float] = {}
        tensors = [t for m in modules for t in m.tensors if not t.gathered]
        for t in tensors:
            if t.is_matrix:
                flops[t.format] = flops.get(t.format, 0.0) + 2.0 * t.num_parameters
        hidden = sum(m.passes for m in modules)
        return tuple(flops.items()), sum(t.nbytes for t in tensors), hidden

    def work(self, i: int, j: int, k: int, name: str = COMPUTE) -> Work:
        """The work of one computation of a visit: a whole layer, or one of the parts that attention cuts it into."""
        if name in (ATTEND, ATTEND_HOST):
            return self._attention_work(_NO_WORK, i, k, on_host=name == ATTEND_HOST)
        batch, layer, model = self.workload.batches[k], self._traffic.layers[j], self.model
        rows = batch.size + (0 if i else batch.scored) if layer.is_head else batch.tokens(i)
        alike = self._traffic.first_alike[j]
        products, weight_bytes, hidden = self._part_work.get((alike, name)) or self._layer_work[alike]
        streamed = 0
        if name != FINISH:
            streamed = sum(self._traffic.weight_traffic(j).disk_parts) // len(self.workload.batches)
            streamed += self._traffic.cache_traffic(i, k).disk_read if layer.has_cache else 0
        work = Work(
            rows,
            tuple((kind, flops * rows) for kind, flops in products),
            weight_bytes,
            hidden * rows,
            first_of_load=k == 0,
            streamed_bytes=streamed,
        )
        tables = {name for m in layer.modules for name in m.lookups}
        if tables:
            return replace(work, lookups=round(self._rows_on_disk * self._distinct_rows(i, batch, tables)))
        if not layer.has_cache or name in (PROJECT, FINISH):
            return work
        if i == 0:
            squares = sum(p * p for p in batch.prompt_lens)
            flops = 2.0 * model.num_heads * model.head_dim * squares
            return replace(work, prompt_flops=flops, prompt_len=round(squares / batch.prompt_tokens))
        return self._attention_work(work, i, k)

    def _attention_work(self, work: Work, i: int, k: int, *, on_host: bool = False) -> Work:
        """Decode attention of one GPU batch added: of the sequences that the host attends to, or of all others."""
        groups, model = self._traffic.groups[k].cache, self.model
        chosen = [g for g in groups if (g is groups.attended) == on_host]
        context = sum(sum(g.cached(i)) + g.size for g in chosen)
        return replace(
            work,
            cache_bytes=round(context * self._traffic.cache_layout.token_bytes * (1 + self.policy.attn_sparsity) / 2),
            cache_flops=4.0 * model.num_heads * model.head_dim * context,
            cache_format=self.policy.cache_format.rates(model.dtype),
            gathered_bytes=0 if on_host else self._traffic.cache_traffic(i, k).gathered,
        )

    def _distinct_rows(self, i: int, batch: Batch, tables: Collection[str]) -> float:
        """Rows of the tables that a step looks up: positions, and so many of random tokens that differ."""
        vocab, tokens = self.model.vocab, batch.tokens(i)
        positions = batch.prompt_lens[0] if i == 0 else len(set(batch.prompt_lens))
        rows = {"positions": positions, "tokens": vocab * (1 - (1 - 1 / vocab) ** tokens)}
        return sum(rows[name] for name in sorted(tables))
